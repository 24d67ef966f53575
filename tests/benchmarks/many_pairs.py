"""The memory `tune` takes for a few pairs and for a million, read from a file.

    python tests/benchmarks/many_pairs.py [--json FILE] [--pairs 1000000]

Each count is tuned on from its first row to its last, one epoch, in a process of its own, on a tiny
random model, so that what is measured is the pairs' and not the model's. The memory is the highest
the system saw the process hold, beyond what it held once the model was there; pages of the
temporary files that hold the token ids count too, though the system may take these back.
"""

import json
import multiprocessing
import pathlib
import resource
import tempfile
import time
from typing import Any

import _bench

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


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tuned(path: str, connection: Any) -> None:
    """Tune in a process of its own, and send seconds and bytes."""
    import gemma_keras_tune as gkt
    from gemma_keras_tune import testing

    model = testing.tiny_model()
    before = peak()
    begin = time.perf_counter()
    result = gkt.tune(model, path, batch_size=256, epochs=1, verbose=0, compilation_cache=False)
    connection.send(
        {
            "pairs": result.plan.pairs,
            "updates": result.plan.updates,
            "seconds": time.perf_counter() - begin,
            "bytes": peak() - before,
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
                f"{run['updates']:6,} updates   {run['seconds']:6,.0f} s   "
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
