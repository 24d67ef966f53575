"""Requests to base and tuned model: run in few compiled programs, responses kept as they come."""

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
from gemma_keras_tune.evaluation.response_log import ResponseLog
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
from gemma_keras_tune.generation.samplers import advised_sampler, resolve_sampler

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
Purpose = Literal["cases", "few_shot", "retention"]
# Purpose, side, and whether responses are drawn at random: such requests share their programs.
GroupKey = tuple[Purpose, Side, bool]
Groups = Mapping[GroupKey, list["Request"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Request(ArrayEquality):
    """One prompt for one of the two models, once.

    Attributes:
        side: `"base"` or `"tuned"`.
        purpose: `"cases"`, `"few_shot"` or `"retention"`.
        index: Index of its case in the plan, or of its retention item.
        ids: `[tokens]` int32, the prompt.
        stops: Token ids at which a response ends.
        max_new_tokens: Longest response, in tokens.
        seed: The sample's seed; `None` for a greedy response.
    """

    side: Side
    purpose: Purpose
    index: int
    ids: np.ndarray
    stops: frozenset[int]
    max_new_tokens: int
    seed: int | None = None

    @property
    def key(self) -> str:
        """Hash of all that the response depends on, beside the models and the sampler."""
        about = f"{self.side} {sorted(self.stops)} {self.max_new_tokens} {self.seed} ".encode()
        return hashlib.sha256(about + self.ids.astype(np.int32).tobytes()).hexdigest()[:32]

    @property
    def group(self) -> GroupKey:
        """Key of the requests that run together."""
        return self.purpose, self.side, self.seed is not None


@dataclasses.dataclass(frozen=True)
class ModelPair:
    """The two models that are compared, or one model with its adapter off and on.

    Attributes:
        tuned: The tuned model.
        base: The base: the same model, another one, or `None`.
    """

    tuned: keras.Model
    base: keras.Model | None = None

    def __post_init__(self) -> None:
        """Note which adapter is on, as other threads may switch between two requests."""
        object.__setattr__(self, "_adapter_on", held_adapter(self.tuned))

    def model(self, side: Side) -> keras.Model:
        """Return the model of a side."""
        return self.tuned if side == "tuned" else self.base

    @contextlib.contextmanager
    def on(self, side: Side) -> Iterator[keras.Model]:
        """Switch to a side within the context, which gives its model. Other threads wait for it."""
        model = self.model(side)
        with model_lock(model):
            if side == "tuned":
                chosen: Any = self._adapter_on()  # type: ignore[attr-defined]
            else:
                chosen = lora_disabled(model) if model is self.tuned else contextlib.nullcontext()
            with chosen:
                yield model


def run_requests(
    models: ModelPair,
    requests: Sequence[Request],
    *,
    sampler: str | keras_hub.samplers.Sampler = "auto",
    batch_size: int = 16,
    log: ResponseLog,
    progress: Callable[[int], None],
) -> dict[str, Answer]:
    """Run requests on base and tuned model, and return the responses by the requests' keys.

    A model runs in at most three compiled programs, whatever the requests are.

    Args:
        models: The models.
        requests: The requests. Equal ones run once.
        sampler: A KerasHub sampler or its name, for requests with a seed.
        batch_size: Rows that run at once.
        log: File of responses; those in it do not run again.
        progress: Called with the number of new responses each time there are some.

    Raises:
        EvaluationError: Prompts that do not fit into a model's context; all of them are named.
    """
    _check_context(models, requests)
    responses = log.known(requests, progress)
    left = {r.key: r for r in requests if r.key not in responses}
    progress(sum(r.key in left for r in requests) - len(left))
    groups: dict[GroupKey, list[Request]] = {}
    for request in left.values():
        groups.setdefault(request.group, []).append(request)
    samplers = {False: resolve_sampler("greedy"), True: sampler_for(sampler)}
    shapes = _shapes(models, groups, samplers, batch_size)
    for key, group in groups.items():
        _, side, drawn = key
        with models.on(side) as model:
            responses |= _run_group(model, group, samplers[drawn], shapes[key], log, progress)
    return responses


_NAMES = {"cases": "case", "few_shot": "few-shot case", "retention": "retention item"}


def _check_context(models: ModelPair, requests: Sequence[Request]) -> None:
    problems = [
        f"{_NAMES[r.purpose]} {r.index + 1}, {r.side} model: {text}"
        for r in {r.key: r for r in requests}.values()
        if (text := beyond_context(models.model(r.side), len(r.ids), r.max_new_tokens))
    ]
    if problems:
        raise EvaluationError("Some prompts are too long.", problems, SHORTEN)


def _run_group(
    model: keras.Model,
    group: list[Request],
    sampler: keras_hub.samplers.Sampler,
    shapes: ProgramShapes,
    log: ResponseLog,
    progress: Callable[[int], None],
) -> dict[str, Answer]:
    tokenizer = model.preprocessor.tokenizer
    found: dict[str, Answer] = {}

    def keep(batch: list[tuple[int, np.ndarray, bool]]) -> None:
        new = {
            group[row].key: Answer(str(tokenizer.detokenize(ids)), ids, stopped)
            for row, ids, stopped in batch
        }
        log.add(new)
        found.update(new)

    seeds = [r.seed for r in group if r.seed is not None]
    generate_ids(
        model,
        [r.ids for r in group],
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
    models: ModelPair,
    groups: Groups,
    samplers: Mapping[bool, keras_hub.samplers.Sampler],
    batch_size: int,
) -> dict[GroupKey, ProgramShapes]:
    """Choose the programs that each group runs in: at most three new ones for each model.

    Drawn responses take one program. Short responses to many general items take one program if
    that runs more rows at once than the cases do. The cases have the rest.
    """
    found: dict[GroupKey, ProgramShapes] = {}
    for model in {id(m): m for m in (models.base, models.tuned) if m is not None}.values():
        own = {key: group for key, group in groups.items() if models.model(key[1]) is model}
        drawn = [key for key in own if key[2]]
        items = [key for key in own if key[0] == "retention"]
        cases = [key for key in own if key not in drawn and key not in items]
        if cases and _max_rows(own, items) <= _max_rows(own, cases):
            cases, items = cases + items, []
        spare = MAX_BUFFERS - bool(drawn) - bool(items)
        for part, most in ((drawn, 1), (items, 1), (cases, spare)):
            if part:
                calls = [([len(r.ids) for r in own[k]], own[k][0].max_new_tokens) for k in part]
                sampler = samplers[part[0][2]]
                chosen = choose_programs(model, calls, sampler, batch_size, most=most)
                found |= dict.fromkeys(part, chosen)
    return found


def _max_rows(groups: Groups, part: Sequence[GroupKey]) -> int:
    return max((len(groups[key]) for key in part), default=0)


def sampler_for(sampler: str | keras_hub.samplers.Sampler) -> keras_hub.samplers.Sampler:
    """Return a sampler by its name; `"auto"` is the one that Google advises for Gemma."""
    return advised_sampler() if sampler == "auto" else resolve_sampler(sampler)


def sampler_config(sampler: str | keras_hub.samplers.Sampler) -> Any:
    """Convert a sampler to JSON data, equal for samplers that draw alike.

    A seed is left out: every sample has its own.
    """
    if isinstance(sampler, str):
        return sampler
    config = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    plain = json.loads(json.dumps(config, sort_keys=True, default=str))
    return {"class_name": type(sampler).__name__, "config": plain}


@contextlib.contextmanager
def progress_bar(
    total: int, title: str, unit: str, verbose: int
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar within the context, unless `verbose` is 0.

    Yields:
        A function that takes the number of further units that are done.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit=unit, disable=not (verbose and total)) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
