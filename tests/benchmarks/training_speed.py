"""Training speed on short pairs, side by side in one run.

    python tests/benchmarks/training_speed.py [--json FILE] [--pairs 64]

Gemma 3 270M in float32, LoRA rank 4 on query and value. Each contender trains one epoch to compile,
and is timed over the next ones; its best epoch counts. KerasHub runs its documented recipe
(`sequence_length=256`, batch 1), and again with the length our own pipeline chose and our batch.
"""

import time
from collections.abc import Callable

import _bench

BATCH = 8
EPOCHS = 3


def best_epoch(epoch: Callable[[], object], pairs: int) -> float:
    """Pairs a second of the best epoch after the first."""
    epoch()
    seconds = []
    for _ in range(EPOCHS - 1):
        begin = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - begin)
    return pairs / min(seconds)


def kerashub(pairs: list[tuple[str, str]], length: int, batch: int) -> float:
    """Pairs a second of KerasHub's recipe at a length and batch."""
    _bench.forget()
    model = _bench.kerashub_recipe(length)
    data = {"prompts": [p for p, _ in pairs], "responses": [r for _, r in pairs]}
    return best_epoch(lambda: model.fit(data, batch_size=batch, epochs=1, verbose=0), len(pairs))


def ours(pairs: list[tuple[str, str]]) -> tuple[float, int]:
    """Our pairs a second, and the longest length the pipeline chose."""
    model = _bench.gkt.load(_bench.MODEL)
    trainer = _bench.ours(model)
    data = _bench.gkt.make_dataset(pairs, model, batch_size=BATCH, template="{input}\n{output}")
    length = max(int(x["token_ids"].shape[1]) for x, _, _ in data)
    fit = lambda: trainer.fit(data, epochs=1, shuffle=False, verbose=0)  # noqa: E731
    return best_epoch(fit, len(pairs)), length


def main() -> None:
    options = _bench.arguments(__doc__)
    pairs = _bench.short_pairs(options.pairs)
    mine, length = ours(pairs)
    same = kerashub(pairs, length, BATCH)
    few = pairs[: max(8, len(pairs) // 8)]  # the recipe is slow; its rate does not depend on it
    recipe = kerashub(few, 256, 1)
    rows = {
        "gemma_keras_tune": mine,
        f"KerasHub, padded to {length}, batch {BATCH}": same,
        "KerasHub's recipe, 256 tokens, batch 1": recipe,
    }
    _bench.report(
        f"Training speed, {len(pairs)} short pairs",
        [f"  {n:42} {r:7.2f} pairs/s   {mine / r:5.2f} x" for n, r in rows.items()],
        {
            "vs_kerashub_recipe": mine / recipe,
            "vs_kerashub_same_length": mine / same,
            "vs_trl": None,
            "vs_gemma_jax": None,
            "pairs_per_second": mine,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
