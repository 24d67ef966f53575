"""Pairs of prompt and response: read from any source, checked, split."""
