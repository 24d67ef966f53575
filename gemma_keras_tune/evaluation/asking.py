"""Questions to base and tuned model: asked in few compiled programs, answers kept as they come."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import keras_hub
import numpy as np

from gemma_keras_tune._support.equality import ArrayEquality
from gemma_keras_tune.adapters.active import held_adapter
from gemma_keras_tune.adapters.lora import lora_disabled
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.resuming import AnswerLog
from gemma_keras_tune.gemma.state import model_lock
from gemma_keras_tune.generation.answers import (
    MAX_BUFFERS,
    SHORTEN,
    Answer,
    ProgramShapes,
    beyond_context,
    choose_programs,
    generate_ids,
)

Side = Literal["base", "tuned"]
Group = list["Question"]


@dataclasses.dataclass(frozen=True, eq=False)
class Question(ArrayEquality):
    """One prompt to put to one side, once.

    Attributes:
        side: `"base"` or `"tuned"`.
        what: What it is part of: `"cases"`, `"few_shot"` or `"retention"`.
        place: Its case's place in the plan, or its item's.
        ids: `[tokens]` int32, the prompt.
        stops: Token ids at which an answer ends.
        max_new_tokens: Longest answer, in tokens.
        seed: The sample's seed; `None` for a greedy answer.
    """

    side: Side
    what: Literal["cases", "few_shot", "retention"]
    place: int
    ids: np.ndarray
    stops: frozenset[int]
    max_new_tokens: int
    seed: int | None = None

    @property
    def key(self) -> str:
        """What the answer depends on, beside the models and the sampler."""
        about = f"{self.side} {sorted(self.stops)} {self.max_new_tokens} {self.seed} ".encode()
        return hashlib.sha256(about + self.ids.astype(np.int32).tobytes()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Sides:
    """The two that are compared: two models, or one with its adapter off and on.

    Attributes:
        tuned: The tuned model.
        base: The base: the same model, another one, or none.
    """

    tuned: keras.Model
    base: keras.Model | None = None

    def __post_init__(self) -> None:
        """Note which adapter is on, as other threads may switch between two questions."""
        object.__setattr__(self, "_adapter_on", held_adapter(self.tuned))

    def model(self, side: Side) -> keras.Model:
        """The model of a side."""
        return self.tuned if side == "tuned" else self.base

    @contextlib.contextmanager
    def on(self, side: Side) -> Iterator[keras.Model]:
        """The model of a side, ready to be asked. Other threads wait for it."""
        model = self.model(side)
        with model_lock(model):
            if side == "tuned":
                chosen: Any = self._adapter_on()  # type: ignore[attr-defined]
            else:
                chosen = lora_disabled(model) if model is self.tuned else contextlib.nullcontext()
            with chosen:
                yield model


def ask(
    sides: Sides,
    questions: Sequence[Question],
    *,
    sampler: str | keras_hub.samplers.Sampler = "auto",
    batch_size: int = 16,
    log: AnswerLog,
    progress: Callable[[int], None],
) -> dict[str, Answer]:
    """Put questions to base and tuned model.

    A model is asked in at most three compiled programs, whatever the questions are.

    Args:
        sides: Whom to ask.
        questions: What to ask. Equal ones are asked once.
        sampler: A KerasHub sampler or its name, for questions with a seed.
        batch_size: Rows that run at once.
        log: Where answers are kept; what is there already is not asked again.
        progress: Called with the number of questions each time some are answered.

    Returns:
        The answers, by the questions' keys.

    Raises:
        EvaluationError: Prompts that do not fit into a model's context; all of them are named.
    """
    _check_context(sides, questions)
    answers = log.known(questions, progress)
    left = {q.key: q for q in questions if q.key not in answers}
    progress(sum(q.key in left for q in questions) - len(left))
    groups: dict[Any, Group] = {}
    for question in left.values():
        drawn = question.seed is not None
        groups.setdefault((question.what, question.side, drawn), []).append(question)
    samplers = {False: keras_hub.samplers.get("greedy"), True: resolve_sampler(sampler)}
    shapes = _shapes(sides, groups, samplers, batch_size)
    for about, group in groups.items():
        _, side, drawn = about
        with sides.on(side) as model:
            answers |= _ask(model, group, samplers[drawn], shapes[about], log, progress)
    return answers


_NAMES = {"cases": "case", "few_shot": "few-shot case", "retention": "retention item"}


def _check_context(sides: Sides, questions: Sequence[Question]) -> None:
    problems = [
        f"{_NAMES[q.what]} {q.place + 1}, {q.side} model: {problem}"
        for q in {q.key: q for q in questions}.values()
        if (problem := beyond_context(sides.model(q.side), len(q.ids), q.max_new_tokens))
    ]
    if problems:
        raise EvaluationError("Some prompts are too long.", problems, SHORTEN)


def _ask(
    model: keras.Model,
    group: Group,
    sampler: keras_hub.samplers.Sampler,
    shapes: ProgramShapes,
    log: AnswerLog,
    progress: Callable[[int], None],
) -> dict[str, Answer]:
    tokenizer = model.preprocessor.tokenizer
    found: dict[str, Answer] = {}

    def keep(written: list[tuple[int, np.ndarray, bool]]) -> None:
        new = {
            group[place].key: Answer(str(tokenizer.detokenize(ids)), ids, stopped)
            for place, ids, stopped in written
        }
        log.add(new)
        found.update(new)

    seeds = [q.seed for q in group if q.seed is not None]
    generate_ids(
        model,
        [q.ids for q in group],
        stop_token_ids=group[0].stops,
        max_new_tokens=group[0].max_new_tokens,
        sampler=sampler,
        seed=seeds or None,
        batch_size=shapes.size,
        shapes=shapes,
        progress=progress,
        on_batch=keep,
    )
    return found


def _shapes(
    sides: Sides,
    groups: Mapping[Any, Group],
    samplers: Mapping[bool, keras_hub.samplers.Sampler],
    batch_size: int,
) -> dict[Any, ProgramShapes]:
    """The programs that each group runs in: at most three new ones for each model.

    Drawn answers take one program. Short answers to many general items take one of their own where
    that would run more rows at once than the cases do. The cases have the rest.
    """
    found: dict[Any, ProgramShapes] = {}
    for model in {id(m): m for m in (sides.base, sides.tuned) if m is not None}.values():
        own = {about: group for about, group in groups.items() if sides.model(about[1]) is model}
        drawn = [about for about in own if about[2]]
        items = [about for about in own if about[0] == "retention"]
        cases = [about for about in own if about not in drawn and about not in items]
        if cases and _most_rows(own, items) <= _most_rows(own, cases):
            cases, items = cases + items, []
        spare = MAX_BUFFERS - bool(drawn) - bool(items)
        for part, most in ((drawn, 1), (items, 1), (cases, spare)):
            if part:
                calls = [([len(q.ids) for q in own[a]], own[a][0].max_new_tokens) for a in part]
                sampler = samplers[part[0][2]]
                chosen = choose_programs(model, calls, sampler, batch_size, most=most)
                found |= dict.fromkeys(part, chosen)
    return found


def _most_rows(groups: Mapping[Any, Group], part: Sequence[Any]) -> int:
    return max((len(groups[about]) for about in part), default=0)


def resolve_sampler(sampler: str | keras_hub.samplers.Sampler) -> keras_hub.samplers.Sampler:
    """A sampler by its name; `"auto"` is what Google advises for Gemma.

    Args:
        sampler: A KerasHub sampler or its name.

    Returns:
        The sampler.
    """
    if sampler == "auto":
        return keras_hub.samplers.TopPSampler(p=0.95, k=64)
    return keras_hub.samplers.get(sampler)


def sampler_config(sampler: str | keras_hub.samplers.Sampler) -> Any:
    """A sampler as JSON data, equal for samplers that draw alike.

    Args:
        sampler: A KerasHub sampler or its name.

    Returns:
        Its name, or its class and settings. A seed is left out: samples bring their own.
    """
    if isinstance(sampler, str):
        return sampler
    config = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    plain = json.loads(json.dumps(config, sort_keys=True, default=str))
    return {"class_name": type(sampler).__name__, "config": plain}


@contextlib.contextmanager
def progress_bar(total: int, what: str, unit: str, verbose: int) -> Iterator[Callable[[int], None]]:
    """A bar that is moved on by calling what comes with it.

    Args:
        total: How many there are.
        what: What is being done.
        unit: What is counted.
        verbose: 0 shows nothing.

    Yields:
        A function of how many more are done.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=unit, disable=not (verbose and total)) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def is_whole(value: Any, least: int | None = None, *others: str) -> bool:
    """Whether an argument is a whole number, at least so large; or one of other words."""
    if isinstance(value, str):
        return value in others
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (least is None or value >= least)


def is_share(value: Any) -> bool:
    """Whether an argument is a number between 0 and 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 1
