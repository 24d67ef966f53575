"""Memory of one training step by XLA's own analysis, and of the weights in memory.

    python tests/benchmarks/training_memory.py [--json FILE]

1. 4 rows of 512 tokens, 128 of them response, Gemma 3 270M in float32, LoRA rank 4 on query and
   value, with and without recomputation, against KerasHub's recipe; and the time of a step.
2. 1 row of 2,048 and of 8,192 tokens at the sizes of Gemma 3 4B, which is compiled and not run.
3. The weights of the real 270M in float32, int8 and int4, the last two with a bfloat16 embedding.
"""

import time
from typing import Any

import _bench
import _shapes
import jax
import numpy as np

import gemma_keras_tune as gkt

ROWS, LENGTH, RESPONSE = 4, 512, 128
ROUNDS = 5


def batch(rows: int, length: int, response: int) -> Any:
    ids = np.ones((rows, length), np.int32)
    positions = np.arange(rows * response, dtype=np.int32)
    x = {"token_ids": ids, "padding_mask": ids, "positions": positions}
    return x, positions, np.ones(len(positions), np.float32) / len(positions)


def shapes_of(trainer: Any) -> Any:
    """The state of a step, by its shapes alone: a model's variables may have no values."""
    groups = _bench.variables_of(trainer)
    return tuple([jax.ShapeDtypeStruct(v.shape, v.dtype) for v in group] for group in groups)


def compiled(trainer: Any, data: Any) -> Any:
    step = jax.jit(trainer.train_step, donate_argnums=0)
    return step.lower(shapes_of(trainer), data).compile()


def temporary_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def kerashub() -> int:
    ids = np.ones((ROWS, LENGTH), np.int32)
    x = {"token_ids": ids, "padding_mask": ids}
    trainer = _bench.kerashub_recipe(LENGTH)
    return temporary_bytes(compiled(trainer, (x, ids, ids.astype("float32"))))


def ours() -> tuple[dict[bool, int], float]:
    """Temporary bytes without and with recomputation, and the ratio of the times of a step."""
    programs, states = {}, {}
    data = batch(ROWS, LENGTH, RESPONSE)
    for again in (False, True):
        trainer = _bench.ours(gkt.load(_bench.MODEL, dtype="float32"), rematerialize=again)
        programs[again] = compiled(trainer, data)
        states[again] = _bench.state_of(trainer)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS + 1):  # in turns, and the first is not counted
        for again, program in programs.items():
            begin = time.perf_counter()
            _, states[again] = jax.block_until_ready(program(states[again], data))
            seconds[again].append(time.perf_counter() - begin)
    medians = {again: float(np.median(times[1:])) for again, times in seconds.items()}
    sizes = {again: temporary_bytes(program) for again, program in programs.items()}
    return sizes, medians[True] / medians[False]


def of_4b(length: int) -> dict[bool, int]:
    sizes = {}
    for again in (False, True):
        trainer = _bench.ours(_shapes.gemma3("4B", "float32"), rematerialize=again)
        sizes[again] = temporary_bytes(compiled(trainer, batch(1, length, length // 4)))
    return sizes


def weights_mb() -> dict[str, float]:
    found = {}
    for name, options in {
        "float32": {"dtype": "float32"},
        "int8": {"dtype": "bfloat16", "quantize": "int8"},
        "int4": {"dtype": "bfloat16", "quantize": "int4"},
    }.items():
        model = gkt.load(_bench.MODEL, **options)
        found[name] = sum(v.value.nbytes for v in model.variables) / 1e6
        del model
        _bench.forget()
    return found


def main() -> None:
    options = _bench.arguments(__doc__, pairs=None)
    theirs = _bench.attempt("KerasHub's recipe", kerashub)
    _bench.forget()
    mine, ratio = ours()
    _bench.forget()
    large = {length: of_4b(length) for length in (2048, 8192)}
    weights = weights_mb()
    shares = {again: size / theirs if theirs else None for again, size in mine.items()}
    lines = [f"  KerasHub's recipe            {_bench.shown(theirs and theirs / 1e6, '8,.0f')} MB"]
    for again, name in ((False, "gemma_keras_tune"), (True, "with recomputation")):
        lines.append(
            f"  {name:<26} {mine[again] / 1e6:10,.0f} MB   "
            f"{_bench.shown(shares[again], '.3f')} of it"
        )
    lines.append(f"  A step with recomputation takes {ratio:.2f} times as long.")
    lines += [
        f"  Gemma 3 4B, 1 x {length:,}: {sizes[False] / 1e9:.2f} GB, with recomputation "
        f"{sizes[True] / 1e9:.2f} GB"
        for length, sizes in large.items()
    ]
    lines.append("  Weights: " + ", ".join(f"{k} {v:,.0f} MB" for k, v in weights.items()))
    _bench.report(
        f"Temporary memory of one step, {ROWS} x {LENGTH} tokens, {RESPONSE} response each",
        lines,
        {
            "vs_kerashub_recipe": shares[False],
            "vs_kerashub_recipe_rematerialized": shares[True],
            "gemma3_4b_2048_rematerialized": large[2048][True] / large[2048][False],
            "gemma3_4b_8192_rematerialized": large[8192][True] / large[8192][False],
            "rematerialized_step_time": ratio,
            "weights_mb": weights,
            "bytes": mine[False],
            "bytes_rematerialized": mine[True],
            "kerashub_bytes": theirs,
            "gemma3_4b_bytes": {str(n): sizes[False] for n, sizes in large.items()},
            "gemma3_4b_bytes_rematerialized": {str(n): sizes[True] for n, sizes in large.items()},
        },
        options.json,
    )


if __name__ == "__main__":
    main()
