"""The call that repeats an evaluation, out of the settings that its report has."""

import inspect
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.evaluation.reporting import texts
from gemma_keras_tune.evaluation.results import Report

LONGEST_LINE = 88


def call(report: Report) -> str:
    """How `evaluate` was called.

    Args:
        report: The report. Of settings that it does not have nothing is said.

    Returns:
        Python code, in which `model`, `plan` and other objects are called by their arguments'
        names. What is `evaluate`'s default is left out.
    """
    arguments = ["model", "plan", *_arguments(report)]
    line = f"gkt.evaluate({', '.join(arguments)})"
    if len(line) > LONGEST_LINE:
        line = "gkt.evaluate(\n" + "".join(f"    {one},\n" for one in arguments) + ")"
    return texts.visible(line)


def _arguments(report: Report) -> list[str]:
    from gemma_keras_tune.evaluation.running import evaluate

    parameters = inspect.signature(evaluate).parameters
    found = ["pairs=pairs"] if report.settings.get("pairs") is not None else []
    found += ["result=result"] if report.tuning else []
    for name, value in {**report.settings, "seed": report.seed}.items():
        if name not in parameters or name in ("pairs", "result"):
            continue
        value = _common(value) if name == "target" else value
        # "auto" took the base where there was one, and then it says so.
        usual = ("base",) if name == "baseline" else (parameters[name].default,)
        if value not in usual:
            found.append(f"{name}={_written(name, value)}")
    return found


def _common(targets: Any) -> Any:
    """One number where every kind has the same target."""
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
