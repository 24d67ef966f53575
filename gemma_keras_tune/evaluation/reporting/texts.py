"""Untrusted text, made fit to be shown: hidden characters become visible, long texts are cut.

Prompts and responses may contain anything. The templates escape markup in them; this module writes
out characters that deceive or break a page without any markup.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import jinja2

# Control characters except tab and line feed; overrides of the reading direction; lone surrogates,
# which no file can hold; code points that are no characters.
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


def resource(name: str) -> str:
    """Read a file of this package."""
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


@functools.cache
def template(name: str) -> jinja2.Template:
    """Open a template of this package, which escapes every text."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(resource),
    )
    environment.filters["visible"] = lambda text: visible(str(text))
    environment.filters["percent"] = percent
    environment.filters["slug"] = lambda text: text.replace(" ", "-").replace("_", "-")
    return environment.get_template(name)


def percent(share: float) -> str:
    """Write a share, 0 to 1, as in `"87 %"`, with a decimal if that matters near the ends."""
    value = 100 * share
    if 0.05 < value < 1 or 99 < value < 99.95:
        return f"{value:.1f} %"
    return f"{value:.0f} %"


def visible(text: str) -> str:
    """Write out hidden characters, as `␀` or `⟨U+202E⟩`, for a browser, terminal or XML file."""
    return _HIDDEN.sub(_name, text)


def _name(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def shorten(text: str, limit: int) -> tuple[str, int]:
    """Cut a text at `limit` characters; return it with the number of characters left out."""
    return text[:limit], max(len(text) - limit, 0)


def one_line(text: str, limit: int) -> str:
    """Write a text on one line of at most `limit` characters, cut with an ellipsis."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def fitting_limit(lengths: Iterable[int], total: int) -> int:
    """Find the highest limit with which texts of these lengths have `total` characters together.

    Returns:
        The limit; the longest length if no text need be cut.
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
    """A piece of two texts: `"same"` in both, `"gone"` in the first, `"new"` in the second."""

    kind: Literal["same", "gone", "new"]
    text: str


def word_diff(first: str, second: str) -> tuple[Run, ...]:
    """Compare two texts by words.

    Returns:
        The runs of both, in order. None if the texts are equal, too long to compare, or have so
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
