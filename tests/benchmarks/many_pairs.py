"""The memory `tune` takes for a few pairs and for a million, read from a file.

    python tests/benchmarks/many_pairs.py [--json FILE] [--pairs 1000000]

Each count is tuned on from its first row to its last, one epoch, in a process of its own, on a tiny
random model, so that what is measured is the pairs' and not the model's. The memory is the most
that the process held beyond what it had once the model was there. Pages of the temporary files with
the token ids are left out: the system keeps them as long as nobody else needs the memory.
"""

import json
import multiprocessing
import pathlib
import tempfile
from typing import Any

import _bench
from _peak_memory import PeakMemory

FEW = 10_000
MB = 2**20


def write(path: pathlib.Path, count: int) -> int:
    """Distinct pairs, a little over a hundred bytes each; returns the bytes of the file."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "prompt": f"Part number {number} of the brake caliper for the car of the year "
                f"{1900 + number % 120}?",
                "response": f"{number % 97:02d}-{number:07d}",
            }
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


def tuned(path: str, connection: Any) -> None:
    """Tune in a process of its own, and send seconds and bytes."""
    import jax

    import gemma_keras_tune as gkt
    from gemma_keras_tune import testing

    jax.config.update("jax_enable_compilation_cache", False)
    model = testing.tiny_model()
    with PeakMemory(own=True) as memory:
        result = gkt.tune(model, path, batch_size=256, epochs=1, verbose=0)
    connection.send(
        {
            "pairs": result.plan.pairs,
            "steps": result.plan.steps,
            "seconds": memory.seconds,
            "bytes": memory.grown,
        }
    )


def measure(count: int, folder: pathlib.Path) -> dict[str, Any]:
    """Figures of a file of so many pairs."""
    path = folder / f"{count}.jsonl"
    size = write(path, count)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=tuned, args=(str(path), sender))
    process.start()
    sender.close()
    figures = receiver.recv()
    process.join()
    return {**figures, "file_bytes": size}


def main() -> None:
    options = _bench.arguments(__doc__, pairs=1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(count, pathlib.Path(folder)) for count in (FEW, options.pairs)]
    few, many = runs
    extra = (many["bytes"] - few["bytes"]) / (many["pairs"] - few["pairs"])
    _bench.report(
        "Memory of tuning on a file, one epoch, tiny random model",
        [
            *(
                f"  {run['pairs']:9,} pairs, {run['file_bytes'] / MB:6,.0f} MB of text   "
                f"{run['steps']:6,} steps   {run['seconds']:6,.0f} s   "
                f"{run['bytes'] / MB:6,.0f} MB beyond the model"
                for run in runs
            ),
            f"  each pair more: {extra:.0f} bytes",
        ],
        {"runs": runs, "bytes_a_pair": extra},
        options.json,
    )


if __name__ == "__main__":
    main()
