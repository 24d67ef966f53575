"""Handing a tuned model over, in one file for each format."""
