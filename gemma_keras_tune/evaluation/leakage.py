"""Cases whose prompt was trained on, word for word or nearly.

Prompts are compared without case, punctuation and white space, and then by their character
5-grams: two prompts are nearly the same if their Jaccard index is at least `threshold`. All pairs
are compared, not a sample of hashes: the 5-grams of the cases make a sparse matrix, which is
multiplied with that of the pairs in blocks, so 100,000 pairs take seconds and little memory.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.plans import Case
from gemma_keras_tune.evaluation.results import Leak
from gemma_keras_tune.pairs import Message, Pair

GRAM = 5
BLOCK = 2048
MAX_ROWS = 10


def find_leaks(
    cases: Iterable[Case], pairs: Iterable[Pair], *, threshold: float = 0.7
) -> dict[str, Leak]:
    """Find the cases whose prompt is in the training pairs, each with a `Leak` by the case's id.

    System messages are left out: many rows share one. A conversation of several turns is compared
    at each of its turns, as each is trained. `threshold` is the similarity from which a prompt
    counts as nearly the same; at 1 it must be equal.

    Raises:
        EvaluationError: The threshold is not over 0 and up to 1.
    """
    if not 0 < threshold <= 1:
        raise EvaluationError(f"`threshold` must be over 0 and up to 1. Received: {threshold!r}")
    cases = list(cases)
    texts = [_normalised(_joined(case.messages)) for case in cases]
    found: list[list[tuple[float, bool, int]]] = [[] for _ in cases]
    for block in _blocks(_pair_texts(pairs), BLOCK):
        for case, place, likeness in _alike(texts, [text for _, text in block], threshold):
            row, text = block[place]
            found[case].append((likeness, text == texts[case], row))
    return {case.id: _leak(hits) for case, hits in zip(cases, found, strict=True) if hits}


def _leak(hits: list[tuple[float, bool, int]]) -> Leak:
    hits = sorted(hits, key=lambda hit: (-hit[1], -hit[0], hit[2]))
    rows = tuple(dict.fromkeys(row for _, _, row in hits))
    return Leak(rows[:MAX_ROWS], hits[0][0], hits[0][1])


def _pair_texts(pairs: Iterable[Pair]) -> Iterator[tuple[int, str]]:
    """Yield row and normalised prompt of every turn that is trained."""
    for pair in pairs:
        for index, message in enumerate(pair.messages):
            if message.role == "user":
                yield pair.row, _normalised(_joined(pair.messages[: index + 1]))


def _joined(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role != "system")


# Not signs of arithmetic or of a language's name, nor marks, which are the vowels of many scripts.
_SEPARATORS = regex.compile(r"(?:(?![\p{Sm}\p{M}])(?![-*/%^]\s*\d)(?!(?<=\w)#)[\W_])+")


def _normalised(text: str) -> str:
    """Keep letters and digits, in small, with one space between words, if there are any."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _SEPARATORS.sub(" ", plain).strip() or " ".join(plain.split())


def _blocks(items: Iterable[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _alike(
    texts: list[str], others: list[str], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Yield the indices of similar texts in both lists, and their similarity."""
    columns: dict[str, int] = {}
    first, second = ([_grams(text, columns) for text in side] for side in (texts, others))
    shared = (_matrix(first, len(columns)) @ _matrix(second, len(columns)).T).tocoo()
    for place, other, count in zip(*shared.coords, shared.data, strict=True):
        likeness = count / (len(first[place]) + len(second[other]) - count)
        if likeness >= threshold:
            yield int(place), int(other), float(likeness)


def _grams(text: str, columns: dict[str, int]) -> set[int]:
    """Find the column of each run of `GRAM` characters; a shorter text is one run."""
    runs = {text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1))}
    return {columns.setdefault(run, len(columns)) for run in runs}


def _matrix(rows: list[set[int]], width: int) -> Any:
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *map(len, rows)])
    places = np.fromiter((column for row in rows for column in row), np.int64, starts[-1])
    return csr_array((np.ones(len(places)), places, starts), shape=(len(rows), width))
