"""Forgetting, measured with a short general set of items before and after tuning.

Tuning on a narrow task can cost a model some of its knowledge. `measure_retention` gives some forty
general items (facts, sayings, sums, formats, code, small talk; twelve languages) to the base and to
the tuned model. Each item is scored twice: by the bits that a token of its reference answer costs,
and by a test if a short greedy answer contains it. The first moves long before the second does.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import keras
import msgspec
import numpy as np

from gemma_keras_tune.adapters.lora import is_lora_on
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.requests import SIDES, ModelPair, Request, Side, run_requests
from gemma_keras_tune.evaluation.response_log import ResponseLog
from gemma_keras_tune.evaluation.statistics import Conclusion, mcnemar
from gemma_keras_tune.evaluation.values import shown
from gemma_keras_tune.gemma.templates import Segment, Template, TemplateSpec, get_template
from gemma_keras_tune.generation.answers import Answer
from gemma_keras_tune.generation.scoring import Scorer
from gemma_keras_tune.pairs import Message

# A loss of half a bit makes a token 1.4 times less likely.
TOLERANCE = 0.5
MAX_NEW_TOKENS = 12

SomeText = Annotated[str, msgspec.Meta(pattern=r"\S")]


@dataclasses.dataclass(frozen=True)
class RetentionItem:
    """One general item.

    Attributes:
        id: Its name.
        language: Language code, or `"code"`.
        skill: Its subject, such as `"facts"`.
        style: `"text"` is continued as it is, `"chat"` is put through the model's template.
        prompt: Text for the model.
        answer: The reference answer.
        accept: Texts one of which a right answer contains; by default the reference answer.
    """

    id: str
    language: str
    skill: str
    style: Literal["text", "chat"]
    prompt: SomeText
    answer: SomeText
    accept: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()

    def is_right(self, text: str) -> bool:
        """Look for an accepted text in an answer, in any case of letters, not inside a number."""
        return any(
            re.search(rf"(?<!\d){re.escape(accepted.strip().casefold())}(?!\d)", text.casefold())
            for accepted in self.accept or (self.answer,)
        )


@dataclasses.dataclass(frozen=True)
class RetentionScore:
    """Scores of one item.

    Attributes:
        item: The item.
        base_bits: Bits a token of the reference answer before tuning.
        tuned_bits: The same after tuning.
        base_answer: The model's answer before tuning.
        tuned_answer: The model's answer after tuning.
    """

    item: RetentionItem
    base_bits: float
    tuned_bits: float
    base_answer: str
    tuned_answer: str

    @property
    def base_right(self) -> bool:
        """True if the answer before tuning was right."""
        return self.item.is_right(self.base_answer)

    @property
    def tuned_right(self) -> bool:
        """True if the answer after tuning was right."""
        return self.item.is_right(self.tuned_answer)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Scores of all items before and after tuning.

    Attributes:
        scores: One for each item.
        confidence: Confidence level of the interval.
    """

    scores: tuple[RetentionScore, ...]
    confidence: float = 0.95

    @functools.cached_property
    def change(self) -> float:
        """Mean change in bits a token; above 0 the reference answers have become less likely."""
        return float(np.mean(self._changes))

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Student's t interval of that mean, over the paired items."""
        import scipy.stats

        if np.ptp(self._changes) == 0:
            return self.change, self.change
        test = scipy.stats.ttest_1samp(self._changes, 0.0)
        low, high = test.confidence_interval(self.confidence)
        return float(low), float(high)

    @functools.cached_property
    def p_value(self) -> float:
        """Exact McNemar test of the right answers before tuning against those after."""
        right = [(score.base_right, score.tuned_right) for score in self.scores]
        return mcnemar(*zip(*right, strict=True))

    @property
    def verdict(self) -> Conclusion:
        """`"pass"` if the whole interval is under half a bit a token, `"fail"` if it is over."""
        low, high = self.interval
        return "pass" if high <= TOLERANCE else "fail" if low > TOLERANCE else "cannot tell"

    @property
    def base_right(self) -> int:
        """Items answered right before tuning."""
        return sum(score.base_right for score in self.scores)

    @property
    def tuned_right(self) -> int:
        """Items answered right after."""
        return sum(score.tuned_right for score in self.scores)

    @property
    def lost(self) -> tuple[RetentionScore, ...]:
        """Items right before, wrong after."""
        return tuple(s for s in self.scores if s.base_right and not s.tuned_right)

    @property
    def won(self) -> tuple[RetentionScore, ...]:
        """Items wrong before, right after."""
        return tuple(s for s in self.scores if s.tuned_right and not s.base_right)

    @property
    def words(self) -> str:
        """The result in words."""
        low, high = self.interval
        total = len(self.scores)
        what = {
            "pass": "No loss of half a bit or more",
            "fail": "The model has forgotten",
            "cannot tell": "This set cannot tell whether much was forgotten",
        }[self.verdict]
        return (
            f"{what}: the answers to {total} general items cost {self.change:+.2f} bits a token "
            f"({100 * self.confidence:g} % interval {low:+.2f} to {high:+.2f}). Answered right: "
            f"{self.base_right} before, {self.tuned_right} after ({len(self.lost)} lost, "
            f"{len(self.won)} won, p = {self.p_value:.2g})."
        )

    def __str__(self) -> str:
        return self.words

    def to_dict(self) -> dict[str, Any]:
        """Convert the scores to JSON data, with all that follows from them."""
        low, high = self.interval
        names = ("verdict", "words", "change", "confidence", "base_right", "tuned_right", "p_value")
        items = [
            {
                **dataclasses.asdict(score),
                "base_right": score.base_right,
                "tuned_right": score.tuned_right,
            }
            for score in self.scores
        ]
        return {
            **{name: getattr(self, name) for name in names},
            "low": low,
            "high": high,
            "items": items,
        }

    @functools.cached_property
    def _changes(self) -> np.ndarray:
        return np.array([score.tuned_bits - score.base_bits for score in self.scores])


def retention_items() -> tuple[RetentionItem, ...]:
    """Read the general set of some forty items that comes with this library."""
    file = importlib.resources.files(__package__) / "retention.jsonl"
    return read_items(map(json.loads, file.read_text(encoding="utf-8").splitlines()))


def read_items(items: Iterable[RetentionItem | Mapping[str, Any]]) -> tuple[RetentionItem, ...]:
    """Read items, as they are or as dictionaries, of which `prompt` and `answer` suffice.

    Raises:
        EvaluationError: Some are no items, all of them named; or there are fewer than two.
    """
    found: list[RetentionItem] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        try:
            found.append(_read_item(item, number))
        except msgspec.ValidationError as error:
            problems.append(f"item {number}: {error}, got {shown(item)}")
    if problems:
        raise EvaluationError(
            "Some retention items cannot be asked.",
            problems,
            'An item is `{"prompt": "2 + 2 =", "answer": "4"}`.',
        )
    if len(found) < 2:
        raise EvaluationError(f"Retention needs at least two items. Received: {len(found)}")
    return tuple(found)


def _read_item(item: Any, number: int) -> RetentionItem:
    data = msgspec.to_builtins(item) if isinstance(item, RetentionItem) else item
    if isinstance(data, Mapping):
        names = [field.name for field in dataclasses.fields(RetentionItem)]
        if unknown := [str(name) for name in data if name not in names]:
            raise msgspec.ValidationError(
                f"there is no field {', '.join(unknown)}; fields are {', '.join(names)}"
            )
        usual = {"id": str(number), "language": "", "skill": "", "style": "chat"}
        data = {**usual, **data}
    return msgspec.convert(data, RetentionItem)


def measure_retention(
    model: keras.Model,
    items: Sequence[RetentionItem | Mapping[str, Any]] | None = None,
    *,
    baseline: keras.Model | None = None,
    template: TemplateSpec = "auto",
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> Retention:
    """Measure what tuning cost a model of its general knowledge.

    Args:
        model: A tuned KerasHub Gemma.
        items: The items, each a `RetentionItem` or a dictionary with `prompt` and `answer`; by
            default `retention_items()`.
        baseline: The model before tuning. `None` is the same one with its adapter off.
        template: The prompts' format. `"auto"` is the one the model was tuned with.
        batch_size: Items that run at once.
        confidence: Confidence level of the interval.
        progress: Called with the number of new answers each time there are some; there are two an
            item.

    Returns:
        A `Retention`.

    Raises:
        EvaluationError: There is no base to compare with; or items are none, or fewer than two.
    """
    if baseline is None and not is_lora_on(model):
        raise EvaluationError(
            "What was forgotten is measured between base and tuned model, and no adapter is on.",
            next_step="Pass the model before its LoRA is merged, load its adapter on the base, or "
            "pass the model before tuning: `baseline=load(…)`.",
        )
    items = retention_items() if items is None else read_items(items)
    models = ModelPair(model, model if baseline is None else baseline)
    test = RetentionTest(models, items, get_template(model, template))
    log = ResponseLog(None, {})
    progress = progress or (lambda _: None)
    responses = run_requests(
        models, test.requests, batch_size=batch_size, log=log, progress=progress
    )
    return test.judge(responses, batch_size=batch_size, confidence=confidence, log=log)


class RetentionTest:
    """The general items, as requests to base and tuned model."""

    def __init__(
        self, models: ModelPair, items: Sequence[RetentionItem], template: Template
    ) -> None:
        self.models = models
        self.items = tuple(items)
        self._scorers = {
            id(m): Scorer(m) for m in (models.base, models.tuned) if m is not None
        }  # the same one where base and tuned are one model
        self._texts = [_segments(item, template) for item in items]
        prompts = self._scorer("tuned").encode([_prompt(item, template) for item in items])
        self._requests: dict[Side, list[Request]] = {}
        for side in SIDES:
            tokenizer = models.model(side).preprocessor.tokenizer
            stops = frozenset(map(int, template.stop_token_ids(tokenizer)))
            self._requests[side] = [
                Request(side, "retention", i, ids, stops, MAX_NEW_TOKENS)
                for i, (ids, _) in enumerate(prompts)
            ]

    @property
    def requests(self) -> list[Request]:
        """All requests, those to the base first."""
        return [request for side in SIDES for request in self._requests[side]]

    def judge(
        self,
        responses: Mapping[str, Answer],
        *,
        batch_size: int,
        confidence: float,
        log: ResponseLog,
    ) -> Retention:
        """Score the responses, and the probability of the reference answers."""
        bits = {side: self._bits(side, batch_size, log) for side in SIDES}
        texts = {side: [responses[r.key].text for r in self._requests[side]] for side in SIDES}
        found = zip(
            self.items, bits["base"], bits["tuned"], texts["base"], texts["tuned"], strict=True
        )
        return Retention(tuple(RetentionScore(*score) for score in found), confidence)

    def _bits(self, side: Side, batch_size: int, log: ResponseLog) -> list[float]:
        """Compute the bits a token of each reference answer."""
        scorer = self._scorer(side)
        rows = scorer.encode(self._texts)
        keys = [_bits_key(side, *row) for row in rows]
        if not all(key in log.scores for key in keys):
            with self.models.on(side):
                losses = scorer.losses(rows, batch_size=batch_size)
            found = [float(np.mean(loss)) / math.log(2) for loss in losses]
            log.add_scores({k: {"bits": b} for k, b in zip(keys, found, strict=True)})
        return [log.scores[key]["bits"] for key in keys]

    def _scorer(self, side: Side) -> Scorer:
        return self._scorers[id(self.models.model(side))]


def _bits_key(side: Side, ids: np.ndarray, scored: np.ndarray) -> str:
    """Hash of all that the bits of a reference answer depend on, beside the models."""
    data = f"bits {side} ".encode() + ids.astype(np.int32).tobytes() + scored.tobytes()
    return hashlib.sha256(data).hexdigest()[:32]


def _prompt(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    if item.style == "text":
        return (Segment(item.prompt, False),)
    return template.segments((Message("user", item.prompt),), generation_prompt=True)


def _segments(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    """Join the prompt and the reference answer."""
    if item.style == "text":
        return Segment(item.prompt, False), Segment(item.answer, True)
    return template.segments((Message("user", item.prompt), Message("assistant", item.answer)))
