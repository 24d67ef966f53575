"""The time that `import gemma_keras_tune` takes beyond `import keras_hub`.

    python tests/benchmarks/import_time.py [--json FILE] [--rounds 9]

Each import runs in a fresh process; the two take turns, so that a busy machine slows both. The
aim is a difference of at most 0.3 s.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
MODULES = ("keras_hub", "gemma_keras_tune")
CODE = """
import sys, time
start = time.perf_counter()
__import__(sys.argv[1])
print(time.perf_counter() - start)
"""


def import_seconds(module: str) -> float:
    """Seconds that a fresh process takes to import a module."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, module],
        env=os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=9, help="imports of each module")
    options = parser.parse_args()
    for module in MODULES:  # compiles the files, and brings them into memory
        import_seconds(module)
    rounds = [[import_seconds(module) for module in MODULES] for _ in range(options.rounds)]
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    difference = statistics.median(ours - theirs for theirs, ours in rounds)
    for module, seconds in zip(MODULES, medians, strict=True):
        print(f"import {module}: {seconds:.2f} s, median of {options.rounds}")
    print(f"difference: {difference:.2f} s, median of the rounds")
    if options.json:
        figures = {
            "rounds": options.rounds,
            "median_seconds": dict(zip(MODULES, medians, strict=True)),
            "median_difference_seconds": difference,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
