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


def main() -> None:
    options = _bench.arguments(__doc__)
    ids = np.ones((ROWS, LENGTH), np.int32)
    recipe = _bench.kerashub_recipe(LENGTH)
    x = {"token_ids": ids, "padding_mask": ids}
    theirs = temporary_bytes(recipe, (x, ids, ids.astype("float32")))
    del recipe
    _bench.forget()
    trainer = _bench.ours(_bench.gkt.load(_bench.MODEL))
    count = ROWS * RESPONSE
    positions = np.arange(count, dtype=np.int32)
    x = {"token_ids": ids, "padding_mask": ids, "positions": positions}
    mine = temporary_bytes(trainer, (x, positions, np.ones(count, np.float32)))
    _bench.report(
        f"Temporary memory of one step, {ROWS} x {LENGTH} tokens, {RESPONSE} response each",
        [
            f"  KerasHub's recipe    {theirs / 1e6:8,.0f} MB",
            f"  gemma_keras_tune     {mine / 1e6:8,.0f} MB   {mine / theirs:.2f} of it",
        ],
        {"vs_kerashub_recipe": mine / theirs, "bytes": mine, "kerashub_bytes": theirs},
        options.json,
    )


if __name__ == "__main__":
    main()
