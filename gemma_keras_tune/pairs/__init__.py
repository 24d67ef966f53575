"""Pairs of prompt and response: read from any source, checked, split."""

from gemma_keras_tune.pairs.checks import PairChecks
from gemma_keras_tune.pairs.conversations import Message, ToolMessage
from gemma_keras_tune.pairs.problems import Problem
from gemma_keras_tune.pairs.reader import PairSource, read_pairs
from gemma_keras_tune.pairs.rows import Pair
from gemma_keras_tune.pairs.splitting import split_pairs
from gemma_keras_tune.pairs.tools import ToolCall

__all__ = [
    "Message",
    "Pair",
    "PairChecks",
    "PairSource",
    "Problem",
    "ToolCall",
    "ToolMessage",
    "read_pairs",
    "split_pairs",
]
