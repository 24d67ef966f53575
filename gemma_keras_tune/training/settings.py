"""The settings of a run, each declared once.

The signatures and docstrings of `tune`, `make_plan` and `cross_validate`, the checks, the options
of the command line, the fields of `Plan` and the table in the documentation come from the two
classes `TrainingSettings` and `Settings`.
"""

import dataclasses
import difflib
import inspect
import numbers
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import keras
from keras.optimizers.schedules import LearningRateSchedule

from gemma_keras_tune._support.numbers import NOT_NEGATIVE, POSITIVE, Rule, integer, plain
from gemma_keras_tune.adapters.lora import TargetModules
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.gemma.templates import TEMPLATES, FunctionTemplate, Template, TextTemplate
from gemma_keras_tune.training.optimizer import (
    batches_per_step,
    inner_optimizer,
    optimizer_class,
    schedule_config,
    schedule_from_config,
)

Auto = Literal["auto"]
Method = Literal["lora", "full"]
Overlong = Literal["error", "drop", "truncate"]

_SHARE = Rule("a number of at least 0 and under 1", numbers.Real, lambda value: 0 <= value < 1)
_COUNT = integer(1)


def template_setting(template: Any) -> Any:
    """Describe a template by its name or its text, where it has one, so that a plan can be read.

    Args:
        template: Anything `get_template` takes.

    Returns:
        A string, or a `Template`; anything else as it is.
    """
    if callable(template):
        return FunctionTemplate(template)
    if isinstance(template, Template) and TEMPLATES.get(template.name) == template:
        return template.name
    if isinstance(template, TextTemplate) and template == TextTemplate(template.text):
        return template.text
    return template


def _learning_rate(value: Any) -> Any:
    if isinstance(value, LearningRateSchedule):
        return schedule_config(value)
    if isinstance(value, dict):
        schedule_from_config(value)
    return value


def _target_modules(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    if all(isinstance(name, str) for name in names):
        return names
    wanted = "'auto', 'all', 'attention' or names of layers"
    raise PlanError(f"`target_modules` must be {wanted}. Received: {value!r}")


def _optimizer(value: Any) -> Any:
    if isinstance(value, keras.optimizers.Optimizer):
        return type(value).__name__
    try:
        if value != "auto":
            optimizer_class(value)
        return value.lower()
    except (AttributeError, PlanError):
        wanted = "'auto', a Keras optimizer or the name of one"
        raise PlanError(f"`optimizer` must be {wanted}. Received: {value!r}") from None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Declaration of one setting of a run.

    Attributes:
        help: Its meaning.
        auto: The choice that `"auto"`, its default, makes; `None` where it cannot be `"auto"`.
        default: Its value where it is not given.
        rule: The numbers it can be.
        values: Other values it can be.
        convert: Gives the value as a plan holds it; raises `PlanError` where it is not valid.
        stays_auto: Whether a plan may hold `"auto"`.
        metavar: Placeholder of its value in the help of the command line.
    """

    help: str
    auto: str | None = None
    default: Any = "auto"
    rule: Rule | None = None
    values: tuple[Any, ...] = ()
    convert: Callable[[Any], Any] | None = None
    stays_auto: bool = False
    metavar: str | None = None

    @property
    def text(self) -> str:
        """Meaning and default, for a docstring."""
        auto = self.auto and f' `"auto"`: {self.auto}.'
        return self.help + (auto or "")

    def read(self, name: str, value: Any) -> Any:
        """Check a value.

        Args:
            name: The setting's name.
            value: Its value, as a user gives it.

        Returns:
            The value as a plan holds it.

        Raises:
            PlanError: The value is not valid.
        """
        value = plain(value)
        if self.convert:
            value = self.convert(value)
        others = ("auto", *self.values) if self.auto else self.values
        if self.rule and not (self.convert and isinstance(value, dict)):
            problem = self.rule.problem(name, value, *others)
            if problem:
                raise PlanError(problem)
        elif self.values and not any(type(value) is type(v) and value == v for v in others):
            choices = ", ".join(map(repr, others))
            raise PlanError(f"`{name}` must be one of {choices}. Received: {value!r}")
        return value


class TrainingSettings(TypedDict, total=False):
    """Settings of each training run, also of those that a cross-validation makes."""

    method: Annotated[
        Method,
        Setting(
            '`"lora"` trains low-rank factors, `"full"` every weight.',
            default="lora",
            values=("lora", "full"),
        ),
    ]
    rank: Annotated[
        int | Auto | None,
        Setting(
            "LoRA's rank: the inner size of its two matrices.",
            "8 under 1,000 pairs, else 16; less where a layer is smaller",
            rule=_COUNT,
            values=(None,),
        ),
    ]
    alpha: Annotated[
        float | Auto | None,
        Setting(
            "LoRA's alpha: the update is scaled by `alpha / rank`.",
            "equal to the rank, a scale of 1",
            rule=POSITIVE,
            values=(None,),
        ),
    ]
    target_modules: Annotated[
        TargetModules | Auto | None,
        Setting(
            'Layers that LoRA is on: `"all"` linear layers, `"attention"`, or names as '
            "`enable_lora` takes them.",
            'the same as `"all"`',
            convert=_target_modules,
            metavar="NAMES",
        ),
    ]
    use_rslora: Annotated[
        bool | Auto,
        Setting("Scale by `alpha / sqrt(rank)` instead.", "do not", values=(True, False)),
    ]
    epochs: Annotated[
        int | Auto,
        Setting(
            "Passes over the pairs.",
            "about 60 steps in all, between 1 (3 under 5,000 pairs) and 30 passes",
            rule=_COUNT,
        ),
    ]
    batch_size: Annotated[
        int | Auto,
        Setting(
            "Rows in a batch.",
            "4 under 64 pairs, 8 under 5,000, else 16; fewer, with gradient accumulation instead, "
            "where a step would not fit into memory",
            rule=_COUNT,
        ),
    ]
    gradient_accumulation_steps: Annotated[
        int | Auto,
        Setting(
            "Batches that make one step. Their mean is over all their trained tokens, so "
            "`1 x 8` gives what `8 x 1` gives.",
            "1, or as many as keep the size of a step when the batch is cut",
            rule=_COUNT,
        ),
    ]
    rematerialize: Annotated[
        bool | Auto,
        Setting(
            "Compute each decoder block again in the backward pass, and do not keep its "
            "activations: much less memory, and a step takes about a third longer.",
            "where a step of one row would not fit into memory otherwise",
            values=(True, False),
        ),
    ]
    learning_rate: Annotated[
        float | LearningRateSchedule | Auto,
        Setting(
            "Peak learning rate; or a Keras schedule over the steps, which is followed as it is, "
            "without warm-up.",
            "5e-4 for LoRA (2e-4 above 1.5 billion parameters), 5e-5 (1e-5) for full tuning",
            rule=POSITIVE,
            convert=_learning_rate,
        ),
    ]
    warmup_steps: Annotated[
        int | Auto,
        Setting("Steps over which the learning rate rises.", "5 % of the steps", rule=integer(0)),
    ]
    weight_decay: Annotated[
        float | Auto,
        Setting(
            "Decoupled weight decay; norms and biases are left alone.", "0.01", rule=NOT_NEGATIVE
        ),
    ]
    sequence_length: Annotated[
        int | Auto,
        Setting(
            "Limit in tokens, to which all rows are padded.",
            "no row is cut, and rows are padded to up to four lengths",
            rule=_COUNT,
            stays_auto=True,
        ),
    ]
    overlong: Annotated[
        Overlong,
        Setting(
            'Handling of rows over `sequence_length`: `"error"`, `"drop"` or `"truncate"`.',
            default="error",
            values=("error", "drop", "truncate"),
        ),
    ]
    template: Annotated[
        str | Template | Callable[..., Any],
        Setting(
            "A template's name, a string with `{prompt}` and `{response}`, or a function.",
            "the one that the model came with or was tuned with",
            convert=template_setting,
            stays_auto=True,
        ),
    ]
    optimizer: Annotated[
        keras.optimizers.Optimizer | str,
        Setting(
            'The name of a Keras optimizer, such as `"lion"`, which gets the learning rate and '
            "weight decay of the plan; or a Keras optimizer, which brings its own learning rate, "
            "weight decay and gradient accumulation.",
            "AdamW",
            convert=_optimizer,
            stays_auto=True,
            metavar="NAME",
        ),
    ]


class Settings(TrainingSettings, total=False):
    """Every setting of a run. `tune` and `make_plan` take each by keyword."""

    validation_split: Annotated[
        float,
        Setting(
            "Share of the pairs to hold out and watch the loss on, grouped so that no prompt is "
            "on both sides.",
            default=0.0,
            rule=_SHARE,
            metavar="SHARE",
        ),
    ]
    early_stopping: Annotated[
        int | None,
        Setting(
            "Stop after this many epochs without a better validation loss, and go back to the "
            "best weights.",
            default=None,
            rule=_COUNT,
            values=(None,),
            metavar="EPOCHS",
        ),
    ]
    seed: Annotated[
        int,
        Setting("Seed of shuffling and of LoRA's start.", default=0, rule=integer(0)),
    ]


def _declared(names: Any) -> dict[str, tuple[Any, Setting]]:
    hints = typing.get_type_hints(names, include_extras=True)
    return {name: typing.get_args(hint) for name, hint in hints.items()}


SETTINGS: Mapping[str, Setting] = {k: setting for k, (_, setting) in _declared(Settings).items()}
DEFAULTS: Mapping[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_settings(function: _Function) -> _Function:
    """Show each setting in the signature and docstring of a function that ends in `**settings`.

    Args:
        function: A function whose last parameter is `**settings: Unpack[…]`.

    Returns:
        The same function.
    """
    signature = inspect.signature(function)
    *others, last = signature.parameters.values()
    declared = _declared(typing.get_args(last.annotation)[0])
    keywords = [
        inspect.Parameter(name, last.KEYWORD_ONLY, default=setting.default, annotation=kind)
        for name, (kind, setting) in declared.items()
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*others, *keywords]
    )
    function.__doc__ = with_settings(function.__doc__, declared)
    return function


def with_settings(docstring: str | None, names: Iterable[str]) -> str:
    """Write the entries of settings into a docstring, in the place of `**settings`.

    Args:
        docstring: A docstring with an entry `**settings`.
        names: The settings.

    Returns:
        The docstring with an entry for each.
    """
    entries = (f"{name}: {SETTINGS[name].text}" for name in names)
    lines = "\n".join(
        textwrap.fill(entry, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for entry in entries
    )
    return re.sub(r"^ {8}\*\*settings:.*(\n {12}.*)*", lambda _: lines, docstring or "", flags=re.M)


def check_settings(given: Mapping[str, Any], problems: Iterable[str] = ()) -> dict[str, Any]:
    """Refuse settings that are not valid, all at once.

    Args:
        given: Settings by name, as `tune` takes them.
        problems: Problems of other arguments, to be told with the rest.

    Returns:
        The settings as a plan holds them: NumPy's numbers as Python's, target modules as a tuple, a
        template as `template_setting` has it, a schedule as JSON data, an optimizer by its name or
        class and with its own settings.

    Raises:
        PlanError: Unknown settings, settings out of range, or other than the optimizer's.
    """
    settings = {}
    found = []
    for name, value in given.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            found.append(f"`{name}` is not a setting" + (f": `{near[0]}` is" if near else ""))
            continue
        try:
            settings[name] = SETTINGS[name].read(name, value)
        except PlanError as error:
            found.append(error.headline)
    found += problems
    for bring in (_of_optimizer, _of_schedule):
        own, wrong = bring(given, settings)
        settings |= own
        found += wrong
    if found:
        raise PlanError("The plan cannot be carried out.", found)
    return settings


def _of_optimizer(
    given: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Settings that an optimizer of the user's brings, and those that contradict it."""
    optimizer = given.get("optimizer")
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return {}, []
    inner = inner_optimizer(optimizer)
    own = {
        "learning_rate": float(inner.learning_rate),
        "warmup_steps": 0,
        "weight_decay": float(inner.weight_decay or 0.0),
        "gradient_accumulation_steps": batches_per_step(optimizer),
    }
    name = type(optimizer).__name__
    return own, [
        f"`{key}` is the optimizer's own, and {name} has {value!r}. Received: {settings[key]!r}"
        for key, value in own.items()
        if settings.get(key, "auto") not in ("auto", value)
    ]


def _of_schedule(
    given: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(settings.get("learning_rate"), dict):
        return {}, []
    warmup = settings.get("warmup_steps", "auto")
    if warmup in ("auto", 0):
        return {"warmup_steps": 0}, []
    return {}, [
        "`warmup_steps` must be 'auto' or 0 where `learning_rate` is a schedule, which includes "
        f"its own warm-up. Received: {warmup!r}"
    ]
