"""Orbax checkpoints of the Gemma library for JAX."""
