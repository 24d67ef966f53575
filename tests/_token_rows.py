"""Rows of token ids for tests of batches."""

import numpy as np

from gemma_keras_tune.training.tokenizing import TokenizedPairs


def rows(lengths, responses):
    """Rows of ids 10, 11, …, whose last tokens are trained."""
    ids, trained = [], []
    for length, response in zip(lengths, responses, strict=True):
        ids += list(range(10, 11 + length))
        trained += [False] * (length + 1 - response) + [True] * response
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 1)])
    return TokenizedPairs(
        np.asarray(ids, np.int32), np.asarray(trained), offsets, np.arange(1, 1 + len(lengths))
    )
