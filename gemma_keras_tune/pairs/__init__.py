"""Pairs of prompt and response: read from any source, checked, split."""

from gemma_keras_tune.pairs.reader import (
    Message,
    Pair,
    PairChecks,
    PairSource,
    Problem,
    read_pairs,
    split_pairs,
)

__all__ = ["Message", "Pair", "PairChecks", "PairSource", "Problem", "read_pairs", "split_pairs"]
