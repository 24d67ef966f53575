"""What was forgotten? A short general set, asked before and after tuning.

Tuning on a narrow task can cost a model what it knew. `measure_retention` puts some forty general
items (facts, sayings, sums, formats, code, small talk; twelve languages) to the base and to the
tuned model. Each item is scored twice: by how many bits a token of its reference answer costs, and
by whether a short greedy answer holds it. The first moves long before the second does.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from gemma_keras_tune.adapters.lora import is_lora_on
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.asking import Question, Side, Sides, ask
from gemma_keras_tune.evaluation.resuming import AnswerLog
from gemma_keras_tune.evaluation.statistics import Verdict
from gemma_keras_tune.gemma.templates import Segment, Template, TemplateSpec, get_template
from gemma_keras_tune.generation.answers import Answer
from gemma_keras_tune.pairs.reader import Message
from gemma_keras_tune.training.scoring import Scorer

# A loss of half a bit makes a token 1.4 times less likely.
TOLERANCE = 0.5
MAX_NEW_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class RetentionItem:
    """One general item.

    Attributes:
        id: Its name.
        language: Language code, or `"code"`.
        skill: What it is about, such as `"facts"`.
        style: `"text"` is continued as it stands, `"chat"` is put through the model's template.
        prompt: What the model reads.
        answer: The reference answer.
        accept: Texts one of which a right answer contains; by default the reference answer.
    """

    id: str
    language: str
    skill: str
    style: Literal["text", "chat"]
    prompt: str
    answer: str
    accept: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Whether an answer holds an accepted text, upper or lower case, not inside a number."""
        return any(
            re.search(rf"(?<!\d){re.escape(accepted.strip().casefold())}(?!\d)", text.casefold())
            for accepted in self.accept or (self.answer,)
        )


@dataclasses.dataclass(frozen=True)
class RetentionScore:
    """What became of one item.

    Attributes:
        item: The item.
        base_bits: Bits a token of the reference answer before tuning.
        tuned_bits: The same after.
        base_answer: What the model wrote before tuning.
        tuned_answer: What it wrote after.
    """

    item: RetentionItem
    base_bits: float
    tuned_bits: float
    base_answer: str
    tuned_answer: str

    @property
    def base_right(self) -> bool:
        """Whether the answer before tuning was right."""
        return self.item.is_right(self.base_answer)

    @property
    def tuned_right(self) -> bool:
        """Whether the answer after tuning was right."""
        return self.item.is_right(self.tuned_answer)


@dataclasses.dataclass(frozen=True)
class Retention:
    """What was kept and what was forgotten.

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
        """Exact McNemar test of right answers before against after."""
        import scipy.stats

        lost, won = len(self.lost), len(self.won)
        return float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0

    @property
    def verdict(self) -> Verdict:
        """Pass: the loss is under half a bit a token, the interval included. Fail: it is over."""
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
        """All this in words."""
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
        """The scores as JSON data, with what follows from them."""
        low, high = self.interval
        return {
            "verdict": self.verdict,
            "words": self.words,
            "change": self.change,
            "low": low,
            "high": high,
            "confidence": self.confidence,
            "base_right": self.base_right,
            "tuned_right": self.tuned_right,
            "p_value": self.p_value,
            "items": [
                {
                    **dataclasses.asdict(score),
                    "base_right": score.base_right,
                    "tuned_right": score.tuned_right,
                }
                for score in self.scores
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Retention":
        """The inverse of `to_dict`."""
        scores = []
        for entry in data["items"]:
            item = {**entry["item"], "accept": tuple(entry["item"]["accept"])}
            fields = {f.name: entry[f.name] for f in dataclasses.fields(RetentionScore)}
            scores.append(RetentionScore(**{**fields, "item": RetentionItem(**item)}))
        return cls(tuple(scores), data["confidence"])

    @functools.cached_property
    def _changes(self) -> np.ndarray:
        return np.array([score.tuned_bits - score.base_bits for score in self.scores])


def retention_items() -> tuple[RetentionItem, ...]:
    """The general set that comes with this library.

    Returns:
        Some forty items.
    """
    file = importlib.resources.files(__package__) / "retention.jsonl"
    return read_items(map(json.loads, file.read_text(encoding="utf-8").splitlines()))


def read_items(items: Iterable[RetentionItem | Mapping[str, Any]]) -> tuple[RetentionItem, ...]:
    """Items, as they are or as dictionaries.

    Args:
        items: Each a `RetentionItem`, or its fields, of which `prompt` and `answer` suffice: such a
            prompt is put through the model's template.

    Returns:
        The items.

    Raises:
        EvaluationError: Some are no items, all of them named; or there are fewer than two.
    """
    found: list[RetentionItem] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        problem = _problem(item)
        if problem:
            problems.append(f"item {number}: {problem}")
        elif isinstance(item, RetentionItem):
            found.append(item)
        else:
            found.append(_item(item, number))
    if problems:
        raise EvaluationError(
            "Some retention items cannot be asked.",
            problems,
            'An item is `{"prompt": "2 + 2 =", "answer": "4"}`.',
        )
    if len(found) < 2:
        raise EvaluationError(f"Retention needs at least two items. Received: {len(found)}")
    return tuple(found)


_FIELDS = tuple(field.name for field in dataclasses.fields(RetentionItem))


def _item(data: Mapping[str, Any], number: int) -> RetentionItem:
    usual = {"id": str(number), "language": "", "skill": "", "style": "chat"}
    return RetentionItem(**{**usual, **data, "accept": tuple(data.get("accept", ()))})


def _problem(item: Any) -> str:
    """What is wrong with an item, in words."""
    data = dataclasses.asdict(item) if isinstance(item, RetentionItem) else item
    if not isinstance(data, Mapping):
        return f"it must be a dictionary or a RetentionItem, got {item!r:.80}"
    unknown = [str(name) for name in data if name not in _FIELDS]
    if unknown:
        return f"there is no field {', '.join(unknown)}; fields are {', '.join(_FIELDS)}"
    for name in ("prompt", "answer"):
        if not isinstance(data.get(name), str) or not data[name].strip():
            return f"`{name}` must be a text"
    if any(not isinstance(data.get(name, ""), str) for name in ("id", "language", "skill")):
        return "`id`, `language` and `skill` must be texts"
    if data.get("style", "chat") not in ("text", "chat"):
        return f"`style` must be text or chat, got {data['style']!r:.80}"
    accept = data.get("accept", ())
    if not isinstance(accept, (list, tuple)) or not all(isinstance(a, str) and a for a in accept):
        return "`accept` must be a list of texts"
    return ""


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
    """Ask general items before and after tuning.

    Args:
        model: A tuned KerasHub Gemma.
        items: What to ask, each a `RetentionItem` or a dictionary with `prompt` and `answer`; by
            default `retention_items()`.
        baseline: The model before tuning. `None` is the same one with its adapter off.
        template: The prompts' format. `"auto"` is the one the model was tuned with.
        batch_size: Items that run at once.
        confidence: Confidence level of the interval.
        progress: Called with the number of answers each time some are there; there are two an item.

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
    sides = Sides(model, model if baseline is None else baseline)
    test = RetentionTest(sides, items, get_template(model, template))
    log = AnswerLog(None, {})
    answers = ask(
        sides, test.questions, batch_size=batch_size, log=log, progress=progress or (lambda _: None)
    )
    return test.judge(answers, batch_size=batch_size, confidence=confidence, log=log)


class RetentionTest:
    """The general items, as questions to base and tuned model.

    Args:
        sides: The two.
        items: The items.
        template: The prompts' format.
    """

    def __init__(self, sides: Sides, items: Sequence[RetentionItem], template: Template) -> None:
        self.sides = sides
        self.items = tuple(items)
        self._scorers = {
            id(m): Scorer(m) for m in (sides.base, sides.tuned) if m is not None
        }  # the same one where base and tuned are one model
        self._texts = [_segments(item, template) for item in items]
        prompts = self._scorer("tuned").encode([_prompt(item, template) for item in items])
        self._asked: dict[Side, list[Question]] = {}
        for side in _SIDES:
            tokenizer = sides.model(side).preprocessor.tokenizer
            stops = frozenset(map(int, template.stop_token_ids(tokenizer)))
            self._asked[side] = [
                Question(side, "retention", i, prompts.row(i)[0], stops, MAX_NEW_TOKENS)
                for i in range(len(self.items))
            ]

    @property
    def questions(self) -> list[Question]:
        """What to ask."""
        return [question for side in _SIDES for question in self._asked[side]]

    def judge(
        self, answers: Mapping[str, Answer], *, batch_size: int, confidence: float, log: AnswerLog
    ) -> Retention:
        """Score the answers, and how likely each side finds the reference answers.

        Args:
            answers: The answers by the questions' keys.
            batch_size: Items that run at once.
            confidence: Confidence level of the interval.
            log: Where scores are kept.

        Returns:
            A `Retention`.
        """
        bits = {side: self._bits(side, batch_size, log) for side in _SIDES}
        texts = {side: [answers[q.key].text for q in self._asked[side]] for side in _SIDES}
        found = zip(
            self.items, bits["base"], bits["tuned"], texts["base"], texts["tuned"], strict=True
        )
        return Retention(tuple(RetentionScore(*score) for score in found), confidence)

    def _bits(self, side: Side, batch_size: int, log: AnswerLog) -> list[float]:
        """Bits a token of each reference answer."""
        scorer = self._scorer(side)
        tokens = scorer.encode(self._texts)
        keys = [_bits_key(side, *tokens.row(i)) for i in range(len(self.items))]
        if not all(key in log.scores for key in keys):
            with self.sides.on(side):
                losses = scorer.losses(tokens, batch_size=batch_size)
            found = [float(np.mean(loss)) / math.log(2) for loss in losses]
            log.add_scores({k: {"bits": b} for k, b in zip(keys, found, strict=True)})
        return [log.scores[key]["bits"] for key in keys]

    def _scorer(self, side: Side) -> Scorer:
        return self._scorers[id(self.sides.model(side))]


_SIDES: tuple[Side, Side] = ("base", "tuned")


def _bits_key(side: Side, ids: np.ndarray, trained: np.ndarray) -> str:
    """What the bits of a reference answer depend on, beside the models."""
    data = f"bits {side} ".encode() + ids.astype(np.int32).tobytes() + trained.tobytes()
    return hashlib.sha256(data).hexdigest()[:32]


def _prompt(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    if item.style == "text":
        return (Segment(item.prompt, False),)
    return template.segments((Message("user", item.prompt),), generation_prompt=True)


def _segments(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    """What the model reads, and the reference answer."""
    if item.style == "text":
        return Segment(item.prompt, False), Segment(item.answer, True)
    return template.segments((Message("user", item.prompt), Message("assistant", item.answer)))
