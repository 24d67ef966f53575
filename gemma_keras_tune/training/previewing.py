"""A few rows exactly as they would be trained."""

import codecs
import dataclasses
import html
import itertools
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.equality import ArrayEquality
from gemma_keras_tune._support.numbers import integer
from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import Template, get_template
from gemma_keras_tune.pairs import read_pairs


@dataclasses.dataclass(frozen=True, eq=False)
class PreviewRow(ArrayEquality):
    """Row as it would be trained.

    Attributes:
        row: Its number in the source, from 1.
        ids: `[tokens]` int32 token ids, `<bos>` first.
        pieces: The text of each token. A character of several byte tokens stands at the last one.
        trained: `[tokens]` bool, tokens that carry loss.
    """

    row: int
    ids: np.ndarray
    pieces: tuple[str, ...]
    trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Preview:
    """Rows as they would be trained; printed with the trained part between guillemets.

    Attributes:
        template: Name of the template.
        rows: The rows.
    """

    template: str
    rows: tuple[PreviewRow, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(self._text, self.rows))

    __repr__ = __str__

    def _text(self, row: PreviewRow) -> str:
        ids = " ".join(f"«{i}»" if t else str(i) for i, t in zip(row.ids, row.trained, strict=True))
        return (
            f"row {row.row}: {len(row.ids)} tokens, {int(row.trained.sum())} trained (« »), "
            f"template {self.template}\n{_marked(row)}\n{ids}"
        )

    def _repr_html_(self) -> str:
        parts = []
        for row in self.rows:
            spans = "".join(
                f'<span title="{i}"{" style=background:#9c69" if t else ""}>'
                f"{html.escape(p).replace(chr(10), '↵<br>')}</span>"
                for i, p, t in zip(row.ids, row.pieces, row.trained, strict=True)
            )
            parts.append(
                f"<p><b>row {row.row}</b>: {len(row.ids)} tokens, {int(row.trained.sum())} "
                f"trained (shaded)</p><pre style='white-space:pre-wrap'>{spans}</pre>"
            )
        return "".join(parts)


def preview(
    model: keras.Model,
    pairs: Any,
    *,
    rows: int = 3,
    template: str | Template | Callable[..., Any] = "auto",
) -> Preview:
    """Show the first rows exactly as they would be trained.

    Args:
        model: A KerasHub Gemma with its preprocessor.
        pairs: Anything `read_pairs` takes that can be read again: the rows shown are read here,
            and a generator would give them no second time.
        rows: Number of rows.
        template: Anything `get_template` takes.

    Returns:
        A `Preview`: the text, the token ids, and which of them carry loss.

    Raises:
        PairsError: No row could be read, one of the first rows has a problem, the source gives its
            rows once, or `rows` is no positive integer.
    """
    if problem := integer(1).problem("rows", rows):
        raise PairsError(problem)
    source = read_pairs(pairs)
    if not source.repeatable:
        raise PairsError(
            f"{source.name} gives its rows once, and those shown here would be missing when it is "
            "trained on.",
            next_step="Pass a list, or a function that returns a fresh iterator each time.",
        )
    chosen = get_template(model, template)
    tokenizer = model.preprocessor.tokenizer
    shown = []
    for pair in itertools.islice(source, rows):
        ids, trained = RowTokenizer(tokenizer).encode(chosen.segments(pair.messages))
        shown.append(PreviewRow(pair.row, ids, _pieces(tokenizer, ids), trained))
    if len(shown) < rows:
        source.raise_for_problems()
    return Preview(chosen.name, tuple(shown))


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _pieces(tokenizer: keras.layers.Layer, ids: np.ndarray) -> tuple[str, ...]:
    """Decode each token; byte tokens give their characters once these are complete."""
    pieces = []
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    for token in (tokenizer.id_to_token(int(i)) for i in ids):
        if byte := _BYTE.fullmatch(token):
            pieces.append(decode(bytes.fromhex(byte[1])))
        else:
            pieces.append(decode(b"", final=True) + token.replace("▁", " "))
    return tuple(pieces)


def _marked(row: PreviewRow) -> str:
    text = ""
    for trained, group in itertools.groupby(
        zip(row.trained, row.pieces, strict=True), key=lambda pair: bool(pair[0])
    ):
        part = "".join(piece for _, piece in group)
        text += f"«{part}»" if trained else part
    return text
