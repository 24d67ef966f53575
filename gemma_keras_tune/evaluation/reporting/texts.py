"""Untrusted text, made fit to be shown: what is hidden in it becomes visible, what is long is cut.

Prompts and answers may hold anything. Markup in them is escaped by the writers; here are the
characters that deceive or break a page without any markup.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Literal

# Control characters but tab and line feed; overrides of the reading direction; lone surrogates,
# which no file can hold; what is no character at all.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)
# Runs of white space, words, and single signs. Scripts that put no spaces between words are
# compared sign by sign.
_WORDS = re.compile(
    r"\s+|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+|."
)
# Comparing takes time that grows with the square of the length.
MAX_WORDS = 1500
# With less in common, marks would be on everything.
MIN_ALIKE = 0.3


def visible(text: str) -> str:
    """Text with its hidden characters written out, as `␀` or `⟨U+202E⟩`.

    Args:
        text: Any text.

    Returns:
        Text that a browser, a terminal and an XML file can hold, and that reads as it is.
    """
    return _HIDDEN.sub(_name, text)


def _name(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def shorten(text: str, limit: int) -> tuple[str, int]:
    """The beginning of a text.

    Args:
        text: Any text.
        limit: The most characters to keep.

    Returns:
        The text, and how many characters were left out.
    """
    return text[:limit], max(len(text) - limit, 0)


def one_line(text: str, limit: int) -> str:
    """A text on one line, cut with an ellipsis.

    Args:
        text: Any text.
        limit: The most characters to keep.

    Returns:
        The line.
    """
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def fitting_limit(lengths: Iterable[int], total: int) -> int:
    """How long texts may be so that all of them together are no longer than `total`.

    Only the longest are cut: the limit is as high as can be.

    Args:
        lengths: The length of each text.
        total: What they may come to.

    Returns:
        The limit; the longest length where nothing need be cut.
    """
    ordered = sorted(lengths)
    left = total
    for place, length in enumerate(ordered):
        share = left // (len(ordered) - place)
        if length > share:
            return share
        left -= length
    return max(ordered, default=0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A piece of a text that was compared with another.

    Attributes:
        kind: `"same"` in both, `"gone"` in the first alone, `"new"` in the second alone.
        text: The piece.
    """

    kind: Literal["same", "gone", "new"]
    text: str


def word_diff(first: str, second: str) -> tuple[Run, ...]:
    """What words two texts share, and what words they do not.

    Args:
        first: A text.
        second: Another.

    Returns:
        The runs of both, in order. None where the texts are equal, too long to compare, or have so
        little in common that marks would help nobody.
    """
    if first == second or not first or not second:
        return ()
    # A word is at least one character, so this spares splitting what is too long anyway.
    if max(len(first), len(second)) > 12 * MAX_WORDS:
        return ()
    a, b = _words(first), _words(second)
    if max(len(a), len(b)) > MAX_WORDS:
        return ()
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    same = sum(len(_join(a[i : i + size])) for i, _, size in matcher.get_matching_blocks())
    if 2 * same < MIN_ALIKE * (len(first) + len(second)):
        return ()
    runs = []
    for what, i, i_end, j, j_end in matcher.get_opcodes():
        if what == "equal":
            runs.append(Run("same", _join(a[i:i_end])))
            continue
        runs += [Run("gone", _join(a[i:i_end]))] if i < i_end else []
        runs += [Run("new", _join(b[j:j_end]))] if j < j_end else []
    return tuple(runs)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text)


def _join(words: Sequence[str]) -> str:
    return "".join(words)
