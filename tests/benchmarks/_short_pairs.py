"""The short pairs that training and the pipeline are timed on."""

import random


def short_pairs(count: int) -> list[tuple[str, str]]:
    """Questions for part numbers: about 10 tokens of prompt and 13 of answer."""
    draw = random.Random(0)
    cars = ("A4", "Golf", "Polo", "Passat", "Octavia", "Leon")
    parts = ("brake caliper", "oil filter", "air filter", "clutch", "door handle", "wiper arm")
    return [
        (
            f"Part number for {draw.choice(cars)} {draw.choice(parts)} {i}",
            f"{draw.randrange(10)}E{draw.randrange(10)}-{draw.randrange(1000):03d}"
            f"-{draw.randrange(1000):03d}",
        )
        for i in range(count)
    ]
