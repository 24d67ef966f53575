"""Print the table of docs/hardware.md: weights and one training step, by model and length.

    python tests/benchmarks/memory_by_model.py

Gigabytes, computed by the functions that a plan is made with, for LoRA in bfloat16 on one row.
"""

import math

import _shapes

from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.quantization import BLOCK_SIZE
from gemma_keras_tune.training.memory import step_bytes

LENGTHS = (512, 2048, 8192)
# Bytes a weight; in int4 a block also has a bfloat16 scale and a zero point of one byte.
BYTES = {"bfloat16": 2, "int8": 1, "int4": 0.5 + 3 / BLOCK_SIZE}


def main() -> None:
    heads = [f"{n:,} tokens" for n in LENGTHS]
    print("| Gemma 3 |", " | ".join([*BYTES, *heads]), "|")
    print("|---|" + "---|" * (len(BYTES) + len(LENGTHS)))
    for name in _shapes.GEMMA3:
        model = _shapes.gemma3(name, "bfloat16")
        linears = family_of(model).linears(model)
        linear = sum(math.prod(n.layer.kernel.shape) for n in linears)
        others = 2 * (model.count_params() - linear)
        cells = [f"{(others + linear * size) / 1e9:.1f}" for size in BYTES.values()]
        for length in LENGTHS:
            steps = (step_bytes(model, 1, length, rematerialize=on) for on in (False, True))
            cells.append(" → ".join(f"{size / 1e9:.1f}" for size in steps))
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
