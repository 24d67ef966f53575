"""The facts of each Gemma: families, weights, templates, tokenizers."""
