"""The eight official e-mails of the business e-mail assistant, by base and tuned model.

    python tests/benchmarks/business_email.py [--json FILE]

Gemma 3 270M is tuned on the demo's pairs by the demo's recipe, and asked with the adapter off and
on. The e-mails are read from `../shared/data/business_email` (Gemma Cookbook, Demos/
business-email-assistant, Apache-2.0), and no pair was taken from them. An answer counts as valid
JSON if it is one JSON object and nothing else; its `type` must be that of the record, and an item
is found if its name is in the answer, in capital or small letters. Other fields are not compared:
three of the records have values there that their e-mail does not give.
"""

import dataclasses
import json
from typing import Any

import _bench

import gemma_keras_tune as gkt
from gemma_keras_tune import demo

MAX_NEW_TOKENS = 80  # the longest record takes 73
COUNTS = ("valid_json", "type_right", "items_found")


def main() -> None:
    options = _bench.arguments(__doc__.splitlines()[0], pairs=None)
    records = read()
    prompts = [record["prompt"] for record in records]
    model = gkt.load(_bench.MODEL)
    gkt.tune(model, demo.training_pairs(), **demo.RECIPE)
    graded = {
        name: grade(model, records, **adapter)
        for name, adapter in (("base", {"adapter": None}), ("tuned", {}))
    }
    _bench.report(
        f"business e-mail assistant, {len(records)} official e-mails",
        demo.table(prompts, graded["base"], graded["tuned"], of="official e-mail").splitlines(),
        {
            "rows": len(records),
            "items": sum(len(record["response"]["items"]) for record in records),
            **{name: figures(answers) for name, answers in graded.items()},
        },
        options.json,
    )


def read() -> list[dict[str, Any]]:
    """The records, in the order of their file names."""
    files = sorted(_bench.shared_data("business_email").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def grade(model: Any, records: list[dict[str, Any]], **adapter: Any) -> list[demo.Graded]:
    """The model's answers, each compared with its record."""
    answers = gkt.generate(
        model,
        [record["prompt"] for record in records],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=len(records),
        **adapter,
    )
    return [demo.grade(a, r["response"]) for a, r in zip(answers, records, strict=True)]


def figures(graded: list[demo.Graded]) -> dict[str, Any]:
    """The counts over all answers, and the answers."""
    rows = [dataclasses.asdict(answer) for answer in graded]
    return {**{name: sum(row[name] for row in rows) for name in COUNTS}, "answers": rows}


if __name__ == "__main__":
    main()
