"""Is tuning needed? The base with a few training pairs in its prompt, before the question itself.

Few-shot prompting (Brown et al., 2020, arXiv:2005.14165) costs no training. Where it does as well
as the tuned model, the prompt is the cheaper answer.
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
from gemma_keras_tune.pairs.reader import Message, Pair

EXAMPLES = 5
TOKENS = 512
# Pairs to choose from; of a longer source, the first ones.
CANDIDATES = 10_000


def choose_examples(
    pairs: Iterable[Pair],
    encoder: RowTokenizer,
    template: Template,
    *,
    count: int = EXAMPLES,
    tokens: int = TOKENS,
    leave_out: Iterable[int] = (),
    seed: int = 0,
) -> tuple[Pair, ...]:
    """Training pairs to put in a prompt: drawn at random, with different answers where there are.

    Args:
        pairs: The training pairs.
        encoder: Counts their tokens.
        template: Their format.
        count: How many at most.
        tokens: Tokens they may take together. A pair that does not fit is passed over.
        leave_out: Rows that may not be chosen, as those that hold a case's own prompt.
        seed: Seed of the draw.

    Returns:
        The pairs, in the order they are shown.
    """
    forbidden = set(leave_out)
    drawn = [p for p in itertools.islice(pairs, CANDIDATES) if p.row not in forbidden]
    random.Random(seed).shuffle(drawn)
    first = list({pair.response: pair for pair in reversed(drawn)}.values())
    shown = {pair.row for pair in first}
    rest = (pair for pair in drawn if pair.row not in shown)
    chosen: list[Pair] = []
    room = tokens
    for pair in itertools.chain(first, rest):
        if len(chosen) == count:
            break
        size = len(encoder.encode(template.segments(_turns(pair.messages)))[0])
        if size <= room:
            chosen.append(pair)
            room -= size
    return tuple(chosen)


def with_examples(examples: Sequence[Pair], messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation in which the examples come first, as turns that have been taken.

    Args:
        examples: Training pairs.
        messages: The case's own conversation. Its system message stays in front; without one, the
            first example's is taken.

    Returns:
        The conversation.
    """
    systems = [m for m in messages if m.role == "system"]
    systems += [m for pair in examples for m in pair.messages if m.role == "system"]
    shown = [m for pair in examples for m in _turns(pair.messages)]
    return (*systems[:1], *shown, *_turns(messages))


def line_break_ids(tokenizer: Any, examples: Sequence[Pair]) -> set[int]:
    """Tokens at which an answer after examples can end, where no example's answer has a line break.

    Args:
        tokenizer: The model's tokenizer.
        examples: The pairs in the prompt.

    Returns:
        The ids of its tokens that are nothing but line breaks; none where an example has one.
    """
    if any("\n" in pair.response.strip() for pair in examples):
        return set()
    breaks = ["\n" * count for count in range(1, 32)]
    ids = {text: tokenizer.token_to_id(text) for text in breaks}
    return {int(i) for text, i in ids.items() if tokenizer.id_to_token(int(i)) == text}


def first_answer(answer: Answer, examples: Sequence[Pair]) -> Answer:
    """The answer to the question alone, as a user who prompts would cut it.

    A model that was not tuned to stop goes on with an example of its own. Where no example's answer
    has a line break, the answer ends at the first one.

    Args:
        answer: What the base wrote after the examples.
        examples: The pairs in the prompt.

    Returns:
        The answer, cut.
    """
    text = answer.text.lstrip()
    if any("\n" in pair.response.strip() for pair in examples) or "\n" not in text:
        return answer
    return dataclasses.replace(answer, text=text.partition("\n")[0], stopped=True)


def judge_few_shot(
    cases: Sequence[CaseResult], examples: Sequence[Pair], confidence: float
) -> FewShot:
    """What the base can do with examples in its prompt, against the base without, and the tuned.

    Args:
        cases: The cases that were asked; leaked ones are passed over.
        examples: The pairs in the prompt.
        confidence: Confidence level.

    Returns:
        A `FewShot`.
    """
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


def _turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(message for message in messages if message.role != "system")
