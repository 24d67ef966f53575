"""A travel assistant that calls six tools: base and tuned model on 40 requests held out.

    python examples/tool_calls.py [--model package://gemma3_270m] [--epochs 2] [--report out.html]

The tools are in `tool_calls_tools.json` beside this file, 72 pairs in `tool_calls.jsonl` and the
40 cases in `tool_calls_plan.jsonl`. The embedded Gemma 3 270M knows no format for tools; it learns
FunctionGemma's from the pairs.
"""

import argparse
import dataclasses
import json
import pathlib

import gemma_keras_tune as gkt

HERE = pathlib.Path(__file__).parent
TOOLS = json.loads((HERE / "tool_calls_tools.json").read_text("utf-8"))
SYSTEM = "You are a model that can do function calling with the following functions"


def main() -> None:
    """Tune, test, and write the report."""
    options = _options()
    model = gkt.load(options.model)
    result = gkt.tune(
        model,
        training_pairs(),
        template="functiongemma" if options.model.startswith("package://") else "auto",
        epochs=options.epochs,
        batch_size=4,
        learning_rate=2e-3,
        seed=options.seed,
    )
    report = gkt.evaluate(
        model, plan(), result=result, max_new_tokens=64, retention=False, few_shot=0
    )
    print(report)
    if options.report:
        print(report.save(options.report))


def training_pairs() -> list[dict[str, object]]:
    """The rows of the file, each with the tools and the system message."""
    rows = map(json.loads, (HERE / "tool_calls.jsonl").read_text("utf-8").splitlines())
    return [{"system": SYSTEM, "tools": TOOLS, **row} for row in rows]


def plan() -> gkt.TestPlan:
    """The cases of the file, each with the tools and the system message."""
    cases = gkt.TestPlan.from_file(HERE / "tool_calls_plan.jsonl")
    system = gkt.Message("system", SYSTEM)
    return gkt.TestPlan(
        [dataclasses.replace(case, prompt=(system, *case.messages), tools=TOOLS) for case in cases],
        name="train travel",
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package://gemma3_270m", help="anything `load` takes")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--report", help="where to write the report: .html, .json or .md")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
