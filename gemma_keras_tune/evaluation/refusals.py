"""Refusals in several languages, found by the regular expressions of `refusals.toml`."""

import functools
import importlib.resources
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence

_QUOTES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'", "“": '"', "”": '"'})
_PART = re.compile(r"<(\w+)>")


def plain(text: str) -> str:
    """Simplify a text: case, kinds of quotes and white space do not count in a refusal."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return " ".join(text.casefold().split())


def _read() -> tuple[dict[str, str], dict[str, str]]:
    """Read the patterns of refusals, and of idioms that are none, by language."""
    file = importlib.resources.files(__package__) / "refusals.toml"
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    patterns: dict[str, dict[str, str]] = {"refusals": {}, "idioms": {}}
    for language, found in data.items():
        for name in patterns.keys() & found.keys():
            patterns[name][language] = plain(_joined(found[name], found.get("parts", {})))
    return patterns["refusals"], patterns["idioms"]


def _joined(entry: str | Sequence[str], parts: Mapping[str, str | Sequence[str]]) -> str:
    """Join alternatives, with named parts in the place of their names."""
    text = entry if isinstance(entry, str) else f"(?:{'|'.join(entry)})"
    return _PART.sub(lambda match: _joined(parts[match[1]], parts), text)


REFUSALS, IDIOMS = _read()
LANGUAGES = tuple(REFUSALS)


@functools.cache
def _compiled(language: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    idiom = IDIOMS.get(language)
    return re.compile(REFUSALS[language]), re.compile(idiom) if idiom else None


def find_refusal(text: str, languages: Sequence[str], forms: Sequence[str] = ()) -> str | None:
    """Find words that refuse, as `plain` gives them; `None` if there are none.

    `forms` are more phrases, each found anywhere in the text as whole words.
    """
    said = plain(text)
    for form in map(plain, forms):
        if _has(said, form):
            return form
    for language in languages:
        refusal, idiom = _compiled(language)
        found = refusal.search(idiom.sub(" … ", said) if idiom else said)
        if found:
            return found[0].strip(" .,!?:;。")
    return None


def _has(text: str, form: str) -> bool:
    start = r"(?<!\w)" if form[0].isascii() and form[0].isalnum() else ""
    end = r"(?!\w)" if form[-1].isascii() and form[-1].isalnum() else ""
    return re.search(start + re.escape(form) + end, text) is not None
