"""Phrases to emoji: a task that has many right answers, and a test plan that allows for them.

    python examples/emoji.py text_to_emoji.csv [--rows 400] [--model package://gemma3_270m]

`text_to_emoji.csv` is the data of Google's Gemma 3 270M emoji demo, with columns `text` and `emoji`
(https://github.com/google-gemini/gemma-cookbook, Demos/Emoji-Gemma-on-Web, Apache-2.0). The plan is
`emoji_plan.jsonl` beside this file. What it asks is never trained on.
"""

import argparse
import pathlib
import random

import gemma_keras_tune as gkt

PLAN = pathlib.Path(__file__).with_name("emoji_plan.jsonl")


def main() -> None:
    """Tune, test, and write the report."""
    options = _options()
    plan = gkt.TestPlan.from_file(PLAN)
    pairs = training_pairs(options.data, plan, options.rows, options.seed)
    model = gkt.load(options.model)
    result = gkt.tune(model, pairs, epochs=options.epochs, seed=options.seed)
    report = gkt.evaluate(
        model,
        plan,
        pairs=pairs,  # to look for leaks, and to try the base with some of them in its prompt
        result=result,
        max_new_tokens=24,
        retention=not options.quick,
        seed=options.seed,
    )
    print(report)
    if options.report:
        print(report.save(options.report))


def training_pairs(path: str, plan: gkt.TestPlan, rows: int, seed: int) -> list[tuple[str, str]]:
    """Rows of the file, drawn by the seed; what the plan asks is not among them."""
    asked = {case.text.casefold().strip() for case in plan}
    source = gkt.read_pairs(path, prompt_column="text", response_column="emoji")
    pairs = [(pair.prompt, pair.response) for pair in source]
    source.raise_for_problems()
    pairs = [pair for pair in pairs if pair[0].casefold().strip() not in asked]
    random.Random(seed).shuffle(pairs)
    return pairs[:rows]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="text_to_emoji.csv")
    parser.add_argument("--model", default="package://gemma3_270m", help="anything `load` takes")
    parser.add_argument("--rows", type=int, default=400, help="pairs to tune on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--report", help="where to write the report: .html, .json or .md")
    parser.add_argument("--quick", action="store_true", help="do not measure what was forgotten")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
