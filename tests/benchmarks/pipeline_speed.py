"""The pipeline's speed on short pairs, and how many training programs 1,000 mixed pairs compile.

    python tests/benchmarks/pipeline_speed.py [--json FILE] [--pairs 20000]

Pairs a second from texts to batches on the machine's cores, the tokenizer's work included, against
KerasHub's own preprocessor, mapped over batches of 64 in `tf.data`: padded to the longest length
our pipeline chose, which is what counts, and to the 256 tokens of its documented recipe. All take
the same pairs and are read to their end; the better of two passes counts. Ours is timed from the
raw pairs to the last batch of the first epoch, checks and shapes included; later epochs, whose rows
are tokenized already, have a line of their own. KerasHub's graph is traced before its clock starts.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import _bench
import numpy as np
import tensorflow as tf
from _short_pairs import short_pairs

import gemma_keras_tune as gkt

BATCH = 64
TEMPLATE = "{prompt}\n{response}"
RECIPE_LENGTH = 256


def rate(batches: Callable[[], Iterable[Any]], pairs: int) -> float:
    """Pairs a second to the last batch, the better of two."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        for _batch in batches():
            pass
        seconds.append(time.perf_counter() - begin)
    return pairs / min(seconds)


def ours(pairs: list[tuple[str, str]], model: Any) -> tf.data.Dataset:
    """Our batches."""
    return gkt.make_dataset(model, pairs, batch_size=BATCH, template=TEMPLATE)


def kerashub(pairs: list[tuple[str, str]], model: Any, length: int) -> tf.data.Dataset:
    """Batches of KerasHub's preprocessor, in `tf.data`."""
    model.preprocessor.sequence_length = length
    texts = {"prompts": [p + "\n" for p, _ in pairs], "responses": [r for _, r in pairs]}
    data = tf.data.Dataset.from_tensor_slices(texts).batch(BATCH)
    return data.map(model.preprocessor, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)


def kerashub_rate(pairs: list[tuple[str, str]], model: Any, length: int) -> float:
    """Pairs a second of KerasHub's preprocessor at a length."""
    data = kerashub(pairs, model, length)
    return rate(lambda: data, len(pairs))


def mixed_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs whose lengths spread from a few tokens to several hundred."""
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(np.log(3), np.log(300), (count, 2))).astype(int)
    return [(f"{i} " + "word " * a, "answer " * b) for i, (a, b) in enumerate(sizes)]


def programs(model: Any) -> int:
    """Distinct shapes of a training batch, each of which is one compiled program."""
    data = gkt.make_dataset(model, mixed_pairs(1000), batch_size=8, template=TEMPLATE)
    return len({(x["token_ids"].shape, x["positions"].shape) for x, _, _ in data})


def main() -> None:
    options = _bench.arguments(__doc__, pairs=20_000)
    pairs = short_pairs(options.pairs)
    model = gkt.load(_bench.MODEL)
    mine = rate(lambda: ours(pairs, model), len(pairs))
    tokenized = ours(pairs, model)
    length = max(int(x["token_ids"].shape[1]) for x, _, _ in tokenized)
    later = rate(lambda: tokenized, len(pairs))
    rates = {
        size: _bench.attempt(
            f"KerasHub at {size}", lambda size=size: kerashub_rate(pairs, model, size)
        )
        for size in (length, RECIPE_LENGTH)
    }
    ratios = {size: mine / theirs if theirs else None for size, theirs in rates.items()}
    count = programs(model)
    _bench.report(
        f"Pipeline, {len(pairs)} short pairs, batches of {BATCH}",
        [
            f"  gemma_keras_tune, up to {length} tokens        {mine:9,.0f} pairs/s",
            f"    its later epochs                      {later:9,.0f} pairs/s",
            *(
                f"  KerasHub's preprocessor, {size:3} tokens     {_bench.shown(theirs, '9,.0f')} "
                f"pairs/s   {_bench.shown(ratios[size], '.2f')} x"
                for size, theirs in rates.items()
            ),
            f"  programs for 1,000 mixed pairs          {count:9d}",
        ],
        {
            "vs_kerashub_preprocessor": ratios[length],
            "vs_kerashub_preprocessor_256": ratios[RECIPE_LENGTH],
            "pairs_per_second": mine,
            "pairs_per_second_later": later,
            "programs_for_1000_mixed_pairs": count,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
