"""Tokenizing text as a Gemma reads it."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune.gemma.templates import END_OF_TEXT, Segment


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
