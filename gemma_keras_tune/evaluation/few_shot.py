"""Test if tuning is needed: the base with a few training pairs in its prompt.

Few-shot prompting (Brown et al., 2020, arXiv:2005.14165) costs no training. If it does as well as
the tuned model, the prompt is the cheaper solution.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_keras_tune.evaluation.results import CaseResult, FewShot
from gemma_keras_tune.evaluation.statistics import mcnemar, wilson_interval
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import Template
from gemma_keras_tune.generation.answers import Answer
from gemma_keras_tune.pairs import Message, Pair

MAX_EXAMPLES = 5
MAX_TOKENS = 512
# Pairs to choose from; of a longer source, the first ones.
MAX_CANDIDATES = 10_000


def choose_examples(
    pairs: Iterable[Pair],
    encoder: RowTokenizer,
    template: Template,
    *,
    count: int = MAX_EXAMPLES,
    tokens: int = MAX_TOKENS,
    leave_out: Iterable[int] = (),
    seed: int = 0,
) -> tuple[Pair, ...]:
    """Draw training pairs to put in a prompt, with different responses if possible.

    A pair that ends with a call of a tool is none: without the result, no turn can follow it.

    Args:
        pairs: The training pairs.
        encoder: Counts their tokens.
        template: Their format.
        count: Most pairs to draw.
        tokens: Most tokens of all pairs together. A pair that does not fit is passed over.
        leave_out: Rows that may not be chosen, as those with a case's own prompt.
        seed: Seed of the draw.
    """
    forbidden = set(leave_out)
    drawn = [p for p in itertools.islice(pairs, MAX_CANDIDATES) if p.row not in forbidden]
    drawn = [p for p in drawn if not p.messages[-1].tool_calls]
    random.Random(seed).shuffle(drawn)
    first = list({pair.response: pair for pair in reversed(drawn)}.values())
    shown = {pair.row for pair in first}
    rest = (pair for pair in drawn if pair.row not in shown)
    chosen: list[Pair] = []
    left = tokens
    for pair in itertools.chain(first, rest):
        if len(chosen) == count:
            break
        size = len(encoder.encode(template.segments(_turns(pair.messages)))[0])
        if size <= left:
            chosen.append(pair)
            left -= size
    return tuple(chosen)


def with_examples(examples: Sequence[Pair], messages: Sequence[Message]) -> tuple[Message, ...]:
    """Put examples in front of a conversation, as turns that have been taken.

    The conversation's system message comes first; if it has none, the first of the examples'.
    """
    systems = [m for m in messages if m.role == "system"]
    systems += [m for pair in examples for m in pair.messages if m.role == "system"]
    shown = [m for pair in examples for m in _turns(pair.messages)]
    return (*systems[:1], *shown, *_turns(messages))


def line_break_ids(tokenizer: Any, examples: Sequence[Pair]) -> set[int]:
    """Find the ids of tokens that are line breaks alone, at which a response can end.

    There are none if an example's response has a line break.
    """
    if _any_line_break(examples):
        return set()
    breaks = ["\n" * count for count in range(1, 32)]
    ids = {text: tokenizer.token_to_id(text) for text in breaks}
    return {int(i) for text, i in ids.items() if tokenizer.id_to_token(int(i)) == text}


def first_response(response: Answer, examples: Sequence[Pair]) -> Answer:
    """Cut a response at its end, as a user who writes such prompts would.

    A model that was not tuned to stop goes on with one more example. If no example's response has a
    line break, the response ends at the first one.
    """
    text = response.text.lstrip()
    if _any_line_break(examples) or "\n" not in text:
        return response
    return dataclasses.replace(response, text=text.partition("\n")[0], stopped=True)


def judge_few_shot(
    cases: Sequence[CaseResult], examples: Sequence[Pair], confidence: float
) -> FewShot:
    """Compare the base with examples in its prompt with the bare base and the tuned model."""
    fair = [case for case in cases if not case.leak]
    few, base, tuned = (
        [case.passed(name) for case in fair] for name in ("few_shot", "base", "tuned")
    )
    low, high = wilson_interval(sum(few), len(fair), confidence)
    p_value = mcnemar(few, tuned)
    facts = (
        f"With {len(examples)} training pairs in its prompt the base passed {sum(few)} of "
        f"{len(fair)} cases, without them {sum(base)}; the tuned model passed {sum(tuned)}"
    )
    return FewShot(
        rows=tuple(pair.row for pair in examples),
        cases=len(fair),
        passed=sum(few),
        base_passed=sum(base),
        tuned_passed=sum(tuned),
        low=low,
        high=high,
        p_value=p_value,
        words=f"{facts} (p = {p_value:.2g}). {_advice(sum(few), sum(tuned), p_value, confidence)}",
    )


def _advice(few: int, tuned: int, p_value: float, confidence: float) -> str:
    if p_value > 1 - confidence:
        if tuned > few:
            return "More cases are needed to show that tuning does better than prompting."
        return "Prompting may do as well: these cases do not show that tuning was needed."
    if tuned > few:
        return "Tuning does better than prompting."
    return "Prompting does better than this tuning."


def _any_line_break(examples: Iterable[Pair]) -> bool:
    return any("\n" in pair.response.strip() for pair in examples)


def _turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(message for message in messages if message.role != "system")
