"""What was forgotten? A short general set, asked before and after tuning.

Tuning on a narrow task can cost a model what it knew. `measure_retention` puts some forty general
items (facts, sayings, sums, formats, code, small talk; thirteen languages) to the base and to the
tuned model. Each item is scored twice: by how many bits a token of its reference answer costs, and
by whether a short greedy answer holds it. The first moves long before the second does.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.scoring import Scorer
from gemma_keras_tune.generation import generate_ids
from gemma_keras_tune.lora import lora_active, lora_disabled
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.templates import Segment, Template, get_template

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
    def verdict(self) -> Literal["pass", "fail", "cannot tell"]:
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
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return tuple(RetentionItem(**{**row, "accept": tuple(row.get("accept", ()))}) for row in rows)


def measure_retention(
    model: keras.Model,
    items: Sequence[RetentionItem] | None = None,
    *,
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> Retention:
    """Ask general items with the adapter off and on.

    Args:
        model: A KerasHub Gemma with LoRA on.
        items: What to ask; by default `retention_items()`.
        batch_size: Items that run at once.
        confidence: Confidence level of the interval.
        progress: Called with the number of answers each time some are there; there are two an item.

    Returns:
        A `Retention`.

    Raises:
        EvaluationError: LoRA is not on, so there is no base to compare with; or under two items.
    """
    items = retention_items() if items is None else tuple(items)
    if not lora_active(model):
        raise EvaluationError(
            "What was forgotten is measured between base and tuned model, and no adapter is on.",
            next_step="Pass the model before its LoRA is merged, or load its adapter on the base.",
        )
    if len(items) < 2:
        raise EvaluationError(f"Retention needs at least two items. Received: {len(items)}")
    scorer = Scorer(model)
    with lora_disabled(model):
        base = _ask(model, scorer, items, batch_size, progress)
    tuned = _ask(model, scorer, items, batch_size, progress)
    scores = [
        RetentionScore(item, bits_before, bits_after, before, after)
        for item, (bits_before, before), (bits_after, after) in zip(items, base, tuned, strict=True)
    ]
    return Retention(tuple(scores), confidence)


def _ask(
    model: keras.Model,
    scorer: Scorer,
    items: Sequence[RetentionItem],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> list[tuple[float, str]]:
    """Bits a token of the reference answer, and the answer, for each item."""
    template = get_template("auto", model)
    tokens = scorer.encode([_segments(item, template) for item in items])
    losses = scorer.losses(tokens, batch_size=batch_size)
    prompts = scorer.encode([_prompt(item, template) for item in items])
    tokenizer = model.preprocessor.tokenizer
    written = generate_ids(
        model,
        [prompts.row(i)[0] for i in range(len(items))],
        stop_token_ids=template.stop_token_ids(tokenizer),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        progress=progress,
    )
    return [
        (float(np.mean(loss)) / math.log(2), str(tokenizer.detokenize(ids)))
        for loss, (ids, _) in zip(losses, written, strict=True)
    ]


def _prompt(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    if item.style == "text":
        return (Segment(item.prompt, False),)
    return template.segments((Message("user", item.prompt),), generation_prompt=True)


def _segments(item: RetentionItem, template: Template) -> tuple[Segment, ...]:
    """What the model reads, and the reference answer."""
    if item.style == "text":
        return Segment(item.prompt, False), Segment(item.answer, True)
    return template.segments((Message("user", item.prompt), Message("assistant", item.answer)))
