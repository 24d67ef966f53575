"""Responses of a model: all at once, or piece by piece."""
