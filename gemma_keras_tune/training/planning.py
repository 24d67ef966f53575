"""From the pairs, their lengths and the machine to a plan that trains something.

The defaults start from how many pairs there are, because the usual ones do not: with 20 pairs and
settings made for thousands, most tools make a handful of steps, all of them inside the warm-up.
Here a small set is passed over until about `TARGET_STEPS` steps have been made, within limits.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import msgspec

from gemma_keras_tune._support.backend import device_name, replicas
from gemma_keras_tune._support.files import write_text
from gemma_keras_tune._support.memory import free_memory
from gemma_keras_tune.adapters.lora import largest_rank
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.gemma.families import context_length
from gemma_keras_tune.gemma.templates import Template
from gemma_keras_tune.training.callbacks import callback_problems
from gemma_keras_tune.training.memory import StepOptions, step_bytes, what_helps
from gemma_keras_tune.training.optimizer import default_learning_rate
from gemma_keras_tune.training.settings import (
    DEFAULTS,
    SETTINGS,
    Method,
    check_settings,
    with_settings,
)
from gemma_keras_tune.training.shapes import Shape, indivisible

TARGET_STEPS = 60
MAX_EPOCHS = 30
# Version of the files that `Plan.save` writes.
SCHEMA = 1

# The settings of a plan, as fields.
_Resolved: Any = dataclasses.make_dataclass(
    "_Resolved",
    [(name, Any, dataclasses.field(default=value)) for name, value in DEFAULTS.items()],
    frozen=True,
    kw_only=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(_Resolved):
    """Every setting of a run, resolved. Pass it to `tune` to run the same again.

    The settings are attributes, under the names that `tune` takes them by. `rank`, `alpha` and
    `target_modules` are `None` for full tuning; `learning_rate` is JSON data for a schedule. For an
    optimizer of the user's, `optimizer` is its class and `learning_rate` that of the first step.

    Attributes:
        **settings: The settings of the run.
        pairs: Rows trained on.
        tokens: Tokens fed in one epoch, padding left out.
        response_tokens: Trained tokens in one epoch.
        padding: Share of the fed positions that are padding.
        shapes: Static shapes, each one compiled program.
        batches: Batches in the whole run.
        steps: Steps (updates of the weights) in the whole run.
        dropped: Row numbers left out on request.
        truncated: Row numbers cut on request.
        validation_pairs: Rows the loss is watched on.
        validation_dropped: Row numbers of those left out on request.
        validation_truncated: Row numbers of those cut on request.
        memory_needed: Rough bytes of one step beyond the weights.
        memory_free: Bytes that were free for it on a device, or `None` where nothing says.
        device: Kind of the device, with the number of those that share each batch.
        dtype: Dtype that the model computes in.
        memory_help: The setting that would save most of them, in words.
    """

    pairs: int = 0
    tokens: int = 0
    response_tokens: int = 0
    padding: float = 0.0
    shapes: tuple[Shape, ...] = ()
    batches: int = 0
    steps: int = 0
    dropped: tuple[int, ...] = ()
    truncated: tuple[int, ...] = ()
    validation_pairs: int = 0
    validation_dropped: tuple[int, ...] = ()
    validation_truncated: tuple[int, ...] = ()
    memory_needed: int = dataclasses.field(default=0, compare=False)
    memory_free: int | None = dataclasses.field(default=None, compare=False)
    device: str = dataclasses.field(default="", compare=False)
    dtype: str = dataclasses.field(default="", compare=False)
    memory_help: str = dataclasses.field(default="", compare=False)

    def settings(self) -> dict[str, Any]:
        """Give the settings as `tune` takes them; an optimizer of the user's by its class."""
        return {name: getattr(self, name) for name in SETTINGS}

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the plan as JSON, so that the run can be repeated later.

        Args:
            path: The file; replaced where it exists.

        Returns:
            The file.

        Raises:
            PlanError: The template is a function.
            ExportError: The file cannot be written.
        """
        if isinstance(self.template, Template):
            raise PlanError(
                f"A template that is a Python function cannot be saved: {self.template.name}",
                next_step="Use a template that has a name or a text, or keep the plan in memory.",
            )
        data = {"schema": SCHEMA, "settings": self.settings(), "figures": self._figures()}
        text = msgspec.json.format(msgspec.json.encode(data), indent=2)
        return write_text(pathlib.Path(path).expanduser(), text.decode() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan that `save` wrote.

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            PlanError: The file cannot be read, is of another version, or has unknown, missing or
                wrong values; all of them are listed.
        """
        path = pathlib.Path(path).expanduser()
        try:
            data = msgspec.json.decode(path.read_bytes())
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}") from error
        return _plan_from(data, path)

    def _figures(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIGURES}

    def __str__(self) -> str:
        shapes = ", ".join(f"{s.batch_size} x {s.length}" for s in self.shapes)
        lines = [
            f"Plan: {self._what()}, {_count(self.epochs, 'epoch')} over {self.pairs:,} pairs "
            f"({self.tokens:,} tokens, {self.response_tokens:,} of them trained)",
            f"  {self._batch()}, {self.steps:,} steps, {self._rate()}",
            f"  {_count(len(self.shapes), 'shape')} to compile: {shapes}; "
            f"{100 * self.padding:.0f} % padding; template {self._template()}; seed {self.seed}",
        ]
        if self.validation_pairs:
            stop = self.early_stopping
            lines.append(
                f"  validated on {self.validation_pairs:,} other pairs after every epoch"
                + (f"; stops after {_count(stop, 'epoch')} without a better loss" if stop else "")
            )
        return "\n".join([*lines, *self._rows_left_out(), self._memory()])

    def _what(self) -> str:
        if not self.rank:
            return "all weights"
        named = isinstance(self.target_modules, str) or self.target_modules is None
        target_modules = self.target_modules if named else ", ".join(self.target_modules or ())
        stabilized = ", rank-stabilized" if self.use_rslora else ""
        return f"LoRA rank {self.rank}, alpha {self.alpha:g}{stabilized} on {target_modules}"

    def _batch(self) -> str:
        steps = self.gradient_accumulation_steps
        parts = f" ({steps} x {self.batch_size})" if steps > 1 else ""
        again = ", activations recomputed" if self.rematerialize else ""
        return f"batch {self.batch_size * steps} rows{parts}{again}"

    def _rate(self) -> str:
        if not self.optimizer.islower():
            return f"the {self.optimizer} passed in, first learning rate {self.learning_rate:g}"
        rate = self.learning_rate
        name = "" if self.optimizer == "auto" else f"{self.optimizer}, "
        schedule = f"by {rate['class_name']}" if isinstance(rate, dict) else f"{rate:g}"
        return (
            f"{name}learning rate {schedule}, {self.warmup_steps} of warm-up, "
            f"weight decay {self.weight_decay:g}"
        )

    def _template(self) -> str:
        if isinstance(self.template, Template):
            return self.template.name
        return repr(self.template) if "{" in self.template else self.template

    def _rows_left_out(self) -> list[str]:
        return [
            f"  {len(rows):,} {what} as asked: "
            + ", ".join(map(str, rows[:20]))
            + ("…" if len(rows) > 20 else "")
            for rows, what in (
                (self.dropped, "rows left out"),
                (self.truncated, "rows cut"),
                (self.validation_dropped, "validation rows left out"),
                (self.validation_truncated, "validation rows cut"),
            )
            if rows
        ]

    def _memory(self) -> str:
        needed = f"a step may need {self.memory_needed / 1e9:.1f} GB beyond the weights"
        line = f"  on {self.device} in {self.dtype}: {needed}"
        if self.memory_free is None:
            return line
        line += f", {self.memory_free / 1e9:.1f} GB are free"
        short = self.memory_needed > self.memory_free
        return f"{line}: {self.memory_help} helps most" if short else line


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


Plan.__doc__ = with_settings(Plan.__doc__, SETTINGS)
_FIGURES = {f.name: f.type for f in dataclasses.fields(Plan) if f.name not in SETTINGS}


def _plan_from(data: Any, path: pathlib.Path) -> Plan:
    """Make the plan of a file, and tell all that is wrong with it."""
    groups = {"schema": int, "settings": dict, "figures": dict}
    if not isinstance(data, dict) or not all(
        isinstance(data.get(name), kind) for name, kind in groups.items()
    ):
        raise PlanError(f"{path} is not a plan: it must have {', '.join(map(repr, groups))}.")
    if data["schema"] != SCHEMA:
        raise PlanError(
            f"{path} is a plan of version {data['schema']}, and version {SCHEMA} is known.",
            next_step="Make the plan again with `make_plan`.",
        )
    known = {"settings": SETTINGS, "figures": _FIGURES}
    problems = [f"`{name}` is unknown" for name in data.keys() - groups.keys()]
    for group, names in known.items():
        problems += [f"`{name}` is unknown" for name in data[group].keys() - names]
        problems += [f"`{name}` is missing" for name in names.keys() - data[group].keys()]
    values = {}
    for name in SETTINGS.keys() & data["settings"].keys():
        try:
            values[name] = _saved_setting(name, data["settings"][name])
        except PlanError as error:
            problems.append(error.headline)
    for name in _FIGURES.keys() & data["figures"].keys():
        try:
            values[name] = msgspec.convert(data["figures"][name], _FIGURES[name])
        except msgspec.ValidationError as error:
            problems.append(f"`{name}`: {error}")
    if problems:
        raise PlanError(f"{path} is not a plan that can be carried out.", sorted(problems))
    return Plan(**values)


def _saved_setting(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        _check_schedule(name, value)
    if name == "optimizer" and isinstance(value, str) and value[:1].isupper():
        return value  # the class of an optimizer to be passed again
    if name == "template" and not isinstance(value, str):
        raise PlanError(f"`template` must be a name or a text. Received: {value!r}")
    value = SETTINGS[name].read(name, value)
    if value == "auto" and not SETTINGS[name].stays_auto:
        raise PlanError(f"`{name}` must be resolved. Received: 'auto'")
    return value


def _check_schedule(name: str, config: dict[str, Any]) -> None:
    """Refuse all but Keras's own schedules, since others would import what a file names."""
    inner = config.get("config")
    plain = isinstance(inner, dict) and msgspec.json.encode(inner).count(b"{") == 1
    if config.get("module") != "keras.optimizers.schedules" or not plain:
        raise PlanError(f"`{name}` must be a number or a schedule of Keras. Received: {config!r}")


def as_plan(plan: Any) -> Plan | None:
    """Take a plan, or read its file.

    Args:
        plan: A `Plan`, the path of one, or `None`.

    Returns:
        The plan, or `None`.

    Raises:
        PlanError: It is something else, or the file cannot be read.
    """
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(plan)
    raise PlanError(
        f"`plan` must be a `Plan`, such as `result.plan`, or the path of one. Received: {plan!r}"
    )


def resolve_settings(
    given: Mapping[str, Any],
    plan: Any = None,
    *,
    callbacks: Any = (),
    validation_data: Any = None,
) -> dict[str, Any]:
    """Check the settings that are given, and fill in the others from a plan or the defaults.

    Args:
        given: Settings by name, those alone that the user has passed. `"auto"` leaves the choice
            to the plan.
        plan: The plan of an earlier run, its path, or `None`.
        callbacks: As `tune` takes them.
        validation_data: As `tune` takes it.

    Returns:
        Every setting, as `check_settings` gives it.

    Raises:
        PlanError: Settings out of range or against those of the plan, or callbacks that cannot
            work.
    """
    problems = []
    try:
        plan = as_plan(plan)
    except PlanError as error:
        if isinstance(plan, (str, os.PathLike)):
            raise
        problems.append(error.headline)
        plan = None
    method = plan.method if plan else given.get("method", DEFAULTS["method"])
    problems += callback_problems(callbacks, method, given.get("optimizer", "auto"))
    problems += indivisible(given.get("batch_size", plan.batch_size if plan else "auto"))
    checked = check_settings(given, problems)
    settings = _as_planned(checked, plan) if plan else {**DEFAULTS, **checked}
    split, stop = settings["validation_split"], settings["early_stopping"]
    if validation_data is not None and split:
        raise PlanError("Pass `validation_data` or `validation_split`, not both.")
    if stop is not None and validation_data is None and not split:
        raise PlanError(
            "`early_stopping` watches the validation loss, and there are no validation pairs.",
            next_step="Pass `validation_data` or `validation_split`.",
        )
    return settings


def _as_planned(given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Give the settings of the plan, where none that is given contradicts them."""
    planned = plan.settings()
    if not planned["optimizer"].islower():  # the user's, to be passed again
        given = {"optimizer": "auto", **given}
    wrong = [
        f"`{name}`: the plan has {planned[name]!r}. Received: {value!r}"
        for name, value in given.items()
        if value != planned[name] and (value != "auto" or name == "optimizer")
    ]
    if wrong:
        raise PlanError(
            "These arguments contradict the plan.",
            wrong,
            "Leave them out to run the plan again, with the optimizer it names if that is one of "
            "yours; or change the plan: `dataclasses.replace(plan, …)`.",
        )
    return planned


def plan_settings(
    model: keras.Model, pairs: int, longest: int, settings: Mapping[str, Any]
) -> Plan:
    """Resolve every `"auto"` from the number of pairs, their lengths and the machine.

    Args:
        model: A KerasHub Gemma.
        pairs: Number of rows.
        longest: Tokens of the longest row.
        settings: Every setting, as `resolve_settings` gives it.

    Returns:
        A `Plan`, its figures about the data not yet filled in.
    """
    length = settings["sequence_length"]
    if length != "auto":
        if length > context_length(model):
            raise PlanError(
                "`sequence_length` must be at most the model's context of "
                f"{context_length(model):,} tokens. Received: {length:,}"
            )
        longest = max(longest, length)  # all rows are padded to it
    method: Method = settings["method"]
    rows, batches, again = _batch(model, pairs, longest, settings)
    steps_an_epoch = math.ceil(pairs / (rows * batches))
    fewest = 3 if pairs < 5_000 else 1
    passes = min(MAX_EPOCHS, max(fewest, math.ceil(TARGET_STEPS / steps_an_epoch)))
    epochs = _or(settings["epochs"], passes)
    steps = steps_an_epoch * epochs
    resolved = {
        **_lora(model, pairs, settings),
        "epochs": epochs,
        "batch_size": rows,
        "gradient_accumulation_steps": batches,
        "rematerialize": again,
        "learning_rate": _or(settings["learning_rate"], default_learning_rate(model, method)),
        "warmup_steps": _or(settings["warmup_steps"], min(round(0.05 * steps), steps - 1)),
        "weight_decay": _or(settings["weight_decay"], 0.01),
    }
    share = rows // replicas()
    size: StepOptions = dict(method=method, accumulates=batches > 1, rematerialize=again)
    return Plan(
        **{**settings, **resolved},
        memory_needed=step_bytes(model, share, longest, **size),
        memory_free=free_memory(),
        memory_help=what_helps(model, share, longest, **size),
        device=device_name(),
        dtype=str(model.compute_dtype),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _lora(model: keras.Model, pairs: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    if settings["method"] == "full":
        return {"rank": None, "alpha": None, "target_modules": None, "use_rslora": False}
    rank = settings["rank"]
    if rank in ("auto", None):
        rank = min(8 if pairs < 1_000 else 16, largest_rank(model))
    alpha = settings["alpha"]
    return {
        "rank": rank,
        "alpha": float(rank if alpha in ("auto", None) else alpha),
        "target_modules": "all"
        if settings["target_modules"] in ("auto", None)
        else settings["target_modules"],
        "use_rslora": _or(settings["use_rslora"], False),
    }


def _batch(
    model: keras.Model, pairs: int, longest: int, settings: Mapping[str, Any]
) -> tuple[int, int, bool]:
    """Rows in a batch, batches in a step, and whether activations are recomputed.

    The batch is cut first: with fewer rows at a time, nothing is computed twice.
    """
    rows, steps, again = (
        settings[name] for name in ("batch_size", "gradient_accumulation_steps", "rematerialize")
    )
    parts = replicas()
    wanted = (4 if pairs < 64 else 8 if pairs < 5_000 else 16) if rows == "auto" else rows
    share = max(1, wanted // parts)  # rows of one replica
    wanted = share * parts
    shares = [share >> cut for cut in range(share.bit_length())] if rows == "auto" else [share]
    both = (False, True) if again == "auto" else (again,)
    choices = [(size, rematerialize) for rematerialize in both for size in shares]
    free = free_memory()

    def fits(size: int, rematerialize: bool) -> bool:
        needed = step_bytes(
            model, size, longest, method=settings["method"], rematerialize=rematerialize,
            accumulates=size < share if steps == "auto" else steps > 1,
        )  # fmt: skip
        return free is None or needed <= free

    fit, again = next((choice for choice in choices if fits(*choice)), choices[-1])
    return fit * parts, _or(steps, max(1, share // fit)), again
