"""LoRA on a model: on, off, merged, several on one base, read from disk."""
