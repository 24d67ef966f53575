"""Peak temporary memory of one training step by XLA's own analysis, against KerasHub's recipe.

    python tests/benchmarks/training_memory.py [--json FILE]

4 rows of 512 tokens, 128 of them response, Gemma 3 270M in float32, LoRA rank 4 on query and value.
"""

import _bench
import jax
import numpy as np

ROWS, LENGTH, RESPONSE = 4, 512, 128


def temporary_bytes(trainer, data) -> int:
    step = jax.jit(trainer.train_step, donate_argnums=0)
    compiled = step.lower(_bench.state_of(trainer), data).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def kerashub() -> int:
    ids = np.ones((ROWS, LENGTH), np.int32)
    x = {"token_ids": ids, "padding_mask": ids}
    return temporary_bytes(_bench.kerashub_recipe(LENGTH), (x, ids, ids.astype("float32")))


def ours() -> int:
    ids = np.ones((ROWS, LENGTH), np.int32)
    positions = np.arange(ROWS * RESPONSE, dtype=np.int32)
    x = {"token_ids": ids, "padding_mask": ids, "positions": positions}
    trainer = _bench.ours(_bench.gkt.load(_bench.MODEL))
    return temporary_bytes(trainer, (x, positions, np.ones(len(positions), np.float32)))


def main() -> None:
    options = _bench.arguments(__doc__, pairs=None)
    theirs = _bench.attempt("KerasHub's recipe", kerashub)
    _bench.forget()
    mine = ours()
    share = mine / theirs if theirs else None
    _bench.report(
        f"Temporary memory of one step, {ROWS} x {LENGTH} tokens, {RESPONSE} response each",
        [
            f"  KerasHub's recipe    {_bench.shown(theirs and theirs / 1e6, '8,.0f')} MB",
            f"  gemma_keras_tune     {mine / 1e6:8,.0f} MB   {_bench.shown(share, '.2f')} of it",
        ],
        {"vs_kerashub_recipe": share, "bytes": mine, "kerashub_bytes": theirs},
        options.json,
    )


if __name__ == "__main__":
    main()
