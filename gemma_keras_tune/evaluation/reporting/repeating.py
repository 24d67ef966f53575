"""The call that repeats an evaluation, out of the settings that its report has."""

from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.evaluation.reporting import texts
from gemma_keras_tune.evaluation.results import Results

MAX_LINE = 88
# Those of `evaluate`, which this module cannot import. "auto" took the base if there was one, and
# then the settings say so.
DEFAULTS: Mapping[str, Any] = {
    "baseline": "base", "few_shot": "auto", "retention": "auto", "target": 0.9,
    "confidence": 0.95, "policy": None, "template": "auto", "sampler": "auto",
    "max_new_tokens": 256, "batch_size": 16, "seed": 0,
}  # fmt: skip


def call(report: Results) -> str:
    """Write the call of `evaluate` as Python code.

    Objects such as the model are named as their arguments are. Default values, and settings that
    the report does not have, are left out.
    """
    arguments = ["model", "test_plan", *_arguments(report)]
    line = f"gkt.evaluate({', '.join(arguments)})"
    if len(line) > MAX_LINE:
        line = "gkt.evaluate(\n" + "".join(f"    {one},\n" for one in arguments) + ")"
    return texts.visible(line)


def _arguments(report: Results) -> list[str]:
    found = ["pairs=pairs"] if report.settings.get("pairs") is not None else []
    found += ["result=result"] if report.tuning else []
    given = {**report.settings, "seed": report.seed}
    for name, value in given.items():
        if name in DEFAULTS:
            value = _common(value) if name == "target" else value
            if value != DEFAULTS[name]:
                found.append(f"{name}={_written(name, value)}")
    return found


def _common(targets: Any) -> Any:
    """Return one number if every kind has the same target."""
    values = list(targets.values()) if isinstance(targets, Mapping) else [targets]
    return values[0] if values and all(value == values[0] for value in values) else targets


def _written(name: str, value: Any) -> str:
    if name == "policy" or (name == "template" and value == "custom"):
        return name
    if name == "retention" and not isinstance(value, (bool, str)):
        return "items"
    if name == "sampler" and isinstance(value, Mapping):
        options = value.get("config", {})
        given = ", ".join(f"{k}={v!r}" for k, v in options.items() if k != "name")
        return f"keras_hub.samplers.{value.get('class_name', 'Sampler')}({given})"
    return repr(value)
