"""Tokenizing text as a Gemma reads it."""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune.errors import warn_of_pairs
from gemma_keras_tune.gemma.templates import END_OF_TEXT, Messages, Segment, special_tokens
from gemma_keras_tune.pairs.problems import ranges


@functools.lru_cache(maxsize=1)
def _processor(proto: bytes) -> Any:
    """Read a SentencePiece model, or return the last one: reading takes a while."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def known_tokens(tokenizer: Any, rows: int) -> np.ndarray | None:
    """Tell which rows of an embedding are those of a token.

    Args:
        tokenizer: A KerasHub tokenizer of a Gemma.
        rows: Rows of the embedding. Some models have more than their tokenizer has tokens.

    Returns:
        `[rows]` bool; `None` if all are.
    """
    processor = _processor(tokenizer.proto)
    ids = range(min(rows, processor.get_piece_size()))
    known = np.zeros(rows, bool)
    known[: len(ids)] = np.logical_not(processor.is_unused(list(ids)))
    return None if known.all() else known


class PromptMarks:
    """Finds special tokens in the text of prompts: the template writes its own around it.

    Args:
        tokenizer: A KerasHub tokenizer of a Gemma.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)))
        self._prompts: dict[str, list[int]] = collections.defaultdict(list)

    def look_at(self, number: int, messages: Messages) -> None:
        """Look at the messages of one more prompt, of this number."""
        for message in messages:
            for token in dict.fromkeys(self._pattern.findall(message.content or "")):
                self._prompts[f"{token!r} stands in {message.role} text"].append(number)

    def warn(self, noun: str = "prompt") -> None:
        """Tell of all that was found in one `PairsWarning`, if anything was."""
        if self._prompts:
            warn_of_pairs(
                f"Some {noun}s hold special tokens in their text. The template writes its own, so "
                "the model would read them twice: leave them out.",
                [f"{noun} {ranges(of)}: {text}" for text, of in self._prompts.items()],
                stacklevel=5,
            )


class RowTokenizer:
    """Turns text segments into token ids, many at a time.

    Args:
        tokenizer: A KerasHub tokenizer of a Gemma.
    """

    def __init__(self, tokenizer: keras.layers.Layer) -> None:
        self._processor = _processor(tokenizer.proto)
        self.start_id = int(tokenizer.start_token_id)
        self.end_id = int(tokenizer.end_token_id)
        self.pad_id = int(tokenizer.pad_token_id)

    def encode(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize one row, `<bos>` first, and mark the tokens that are trained.

        Args:
            segments: Pieces of text in order; each is tokenized on its own.

        Returns:
            `ids` int32 and `trained` bool, both `[tokens]`.
        """
        ids, trained, _ = self.encode_rows([segments])
        return ids, trained

    def encode_rows(
        self, rows: Iterable[Sequence[Segment]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenize many rows into flat arrays.

        Args:
            rows: The segments of each row. From a generator, they are not all held at once.

        Returns:
            `ids` int32 and `trained` bool, both `[tokens]`, and `[rows]` int64 tokens in each row.
        """
        texts: list[str] = []
        flags: list[bool] = []
        answers: list[bool] = []
        counts: list[int] = []
        for row in rows:
            counts.append(len(row))
            for part in row:
                texts.append(part.text)
                flags.append(part.trained)
                answers.append(part.trained or part.masked)
        # SentencePiece never reads a control piece out of text: `<eos>` would be spelled out.
        ended = [i for i, text in enumerate(texts) if answers[i] and text.endswith(END_OF_TEXT)]
        for i in ended:
            texts[i] = texts[i][: -len(END_OF_TEXT)]
        pieces = self._processor.encode(texts)
        for i in ended:
            pieces[i].append(self.end_id)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        flat = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, lengths.sum())
        # Where each row begins among the parts, and then among the ids.
        bounds = np.cumsum([0, *counts])
        starts = np.concatenate([[0], np.cumsum(lengths)])[bounds]
        return (
            np.insert(flat, starts[:-1], self.start_id),
            np.insert(np.repeat(np.asarray(flags, bool), lengths), starts[:-1], False),
            np.diff(starts) + 1,
        )
