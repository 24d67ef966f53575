"""Few static shapes with little padding."""

import numpy as np
from _token_rows import rows

from gemma_keras_tune.training.pipeline import Batcher
from gemma_keras_tune.training.shapes import choose_shapes


def test_a_thousand_mixed_rows_make_at_most_four_programs_and_little_padding():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4, 0.6, 1000), 8, 400).astype(int)
    tokens = rows(lengths, np.maximum(1, lengths // 3))
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, 8)
    assert 2 <= len(shapes) <= 4
    batcher = Batcher(tokens, shapes, 0)
    fed = sum(s.batch_size * s.length for s, _ in batcher.epoch(0))
    assert tokens.lengths.sum() / fed > 0.65
    assert tokens.lengths.mean() / tokens.lengths.max() < 0.2  # what one shape would give
