"""Token ids to batches: masks, shapes, order."""

import itertools

import numpy as np
import pytest
from _token_rows import rows
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training.pipeline import Batcher, make_batcher
from gemma_keras_tune.training.shapes import MAX_SHAPES, choose_shapes
from gemma_keras_tune.training.tokenizing import tokenize_pairs

PLAIN = "{prompt}\n{response}"
lengths_and_answers = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    min_size=1,
    max_size=80,
)


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def test_a_row_in_aligned_columns():
    tokens = rows([4, 2], [2, 1])
    batcher = Batcher(tokens, choose_shapes(tokens.lengths, tokens.response_lengths, 2), 0)
    batcher.shuffle = False
    x, labels, weights = next(batcher.arrays(0))
    by_length = np.argsort(-x["padding_mask"].sum(axis=1))
    # inputs  10 11 12 13      10 11
    # labels  .  .  13 14      .  12
    assert x["token_ids"][by_length].tolist() == [
        [10, 11, 12, 13, 0, 0, 0, 0],
        [10, 11, 0, 0, 0, 0, 0, 0],
    ]
    assert x["padding_mask"][by_length].sum(axis=1).tolist() == [4, 2]
    live = weights > 0
    seen = x["token_ids"].reshape(-1)[x["positions"][live]]
    pairs = sorted(zip(seen.tolist(), labels[live].tolist(), strict=True))
    assert pairs == [(11, 12), (12, 13), (13, 14)]
    np.testing.assert_allclose(weights[live], 1 / 3)


@settings(max_examples=60, deadline=None)
@given(lengths_and_answers, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_every_row_comes_once_an_epoch_and_every_batch_fits(sizes, batch_size, steps, shuffle):
    lengths, responses = zip(*sizes, strict=True)
    tokens = rows(lengths, responses)
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, batch_size)
    assert 1 <= len(shapes) <= MAX_SHAPES
    batcher = Batcher(tokens, shapes, 0, shuffle=shuffle, gradient_accumulation_steps=steps)
    for epoch in range(2):
        batches = batcher.epoch(epoch)
        assert len(batches) == batcher.batches_per_epoch and len(batches) % steps == 0
        seen = np.concatenate([b for _, b in batches])
        assert sorted(seen.tolist()) == list(range(len(tokens)))
        for shape, batch in batches:
            assert len(batch) <= shape.batch_size
            assert (tokens.lengths[batch] <= shape.length).all()
            assert tokens.response_lengths[batch].sum() <= shape.positions
        weights = [w for _, _, w in batcher.arrays(epoch)]
        for start in range(0, len(weights), steps):
            total = sum(w.sum() for w in weights[start : start + steps]) / steps
            assert total == pytest.approx(1.0, rel=1e-5)


def test_order_is_seeded_and_changes_with_the_epoch():
    tokens = rows([8] * 64, [3] * 64)
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, 8)

    def order(seed, epoch):
        return np.concatenate([b for _, b in Batcher(tokens, shapes, 0, seed=seed).epoch(epoch)])

    assert order(0, 0).tolist() == order(0, 0).tolist()
    assert order(0, 0).tolist() != order(0, 1).tolist()
    assert order(0, 0).tolist() != order(1, 0).tolist()


def test_the_dataset_gives_the_next_epoch_each_time(model):
    dataset = gkt.make_dataset(model, testing.tiny_pairs(40), template=PLAIN, batch_size=4)
    first, second = ([y.numpy().tolist() for _, y, _ in dataset] for _ in range(2))
    assert len(first) == len(second) == int(dataset.cardinality())
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))


def test_iterators_side_by_side_read_an_epoch_each(model):
    tokens = tokenize_pairs(model, testing.tiny_pairs(40), template=PLAIN)
    batcher = make_batcher(model, tokens, batch_size=3, gradient_accumulation_steps=4)
    dataset = batcher.to_dataset(first_epoch=5)
    iterators = [iter(dataset) for _ in range(3)]
    found = list(zip(*iterators, strict=True))
    assert len(found) == batcher.batches_per_epoch
    for epoch, batches in enumerate(zip(*found, strict=True), 5):
        for (x, y, weights), expected in zip(batches, batcher.arrays(epoch), strict=True):
            for name, array in expected[0].items():
                np.testing.assert_array_equal(x[name], array)
            np.testing.assert_array_equal(y, expected[1])
            np.testing.assert_array_equal(weights, expected[2])


def test_make_dataset_attaches_its_template():
    model = testing.tiny_model()
    gkt.make_dataset(model, testing.tiny_pairs(2), template="Q: {prompt}\nA: {response}")
    assert gkt.template_of(model) == gkt.get_template(model, "Q: {prompt}\nA: {response}")
    assert gkt.get_template(model) == gkt.template_of(model)


def test_sizes_that_are_no_sizes_are_refused(model):
    tokens = tokenize_pairs(model, testing.tiny_pairs(2), template=PLAIN)
    with pytest.raises(gkt.errors.PlanError) as caught:
        make_batcher(model, tokens, batch_size=0, sequence_length=2.5)
    assert len(caught.value.problems) == 2
