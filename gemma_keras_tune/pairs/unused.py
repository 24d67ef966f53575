"""Keys that are not read: their meaning, and counts of those that hold something."""

import enum
import functools
import re
from typing import Any

from gemma_keras_tune.pairs.values import shorten

MAX_KEYS = 500
_WORD = re.compile(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+|[^\W\d_]+")


class Meaning(enum.Enum):
    """The ways in which a key changes what a row or a message means, with the reason to refuse."""

    TOOLS = (
        "holds tool calls or tools in a form that is not read: give `tools` beside `messages`, "
        "calls as `tool_calls` of the assistant and results as messages of the role `tool`"
    )
    MEDIA = "holds images, audio, video or files, and this library tunes text alone"
    REASONING = (
        "holds reasoning: pass `reasoning='keep'` to read_pairs to train it in front of the "
        "answer, or `reasoning='drop'` to leave it out"
    )
    VERDICT = (
        "is a verdict on the answer or the row: choose the rows to train on and remove the key, "
        "or name the columns with `prompt_column` and `response_column`"
    )
    PREFERENCE = (
        "belongs to a choice between answers: pass `preference='chosen'` to read_pairs to train "
        "the preferred ones"
    )
    WEIGHT = "must be true or false, 1 or 0; other weights and masks are not understood"
    CONTEXT = (
        "seems to belong to the prompt and is not read beside these keys: join it to the prompt, "
        "or name the columns with `prompt_column` and `response_column`"
    )


def _keys(text: str, meaning: Meaning) -> dict[str, Meaning]:
    return dict.fromkeys(text.split(), meaning)


# Keys in lower case, without underscores, hyphens and spaces.
_MEANINGS = {
    **_keys(
        "tools toolcalls toolcall toolcallid toolresults toolresult toolresponses tooluse "
        "functions function functioncall functioncalls functionresponse availabletools",
        Meaning.TOOLS,
    ),
    **_keys("inlinedata filedata attachments files pixelvalues inputfeatures", Meaning.MEDIA),
    **_keys(
        "reasoning reasoningcontent reasoningdetails thinking thinkingcontent thought thoughts "
        "think thinkingtrajectories thinkingblocks chainofthought cot scratchpad rationale",
        Meaning.REASONING,
    ),
    **_keys(
        "verdict preference feedback correct iscorrect accepted isaccepted kto ktotag quality "
        "rank ranking grade critique correction corrected reflection trainonlabels dislikes bad "
        "isbad good isgood upvotes downvotes thumbsup thumbsdown unanswerable",
        Meaning.VERDICT,
    ),
    **_keys(
        "weight weights sampleweight lossweight train trainable training traindetail istrained "
        "loss mask masked masks lossmask trainmask",
        Meaning.WEIGHT,
    ),
    **_keys(
        "context contexts input inputs article passage passages document documents choices "
        "options history",
        Meaning.CONTEXT,
    ),
}
# Words of a key that say it with others: `image_url`, `overall_score`, `chosenResponse`.
_WORDS = {
    **_keys("image images audio audios video videos picture pictures", Meaning.MEDIA),
    **_keys(
        "label labels score scores rating ratings reward rewards",
        Meaning.VERDICT,
    ),
    **_keys("chosen rejected preferred", Meaning.PREFERENCE),
}


@functools.lru_cache(maxsize=4096)
def meaning_of(key: Any) -> Meaning | None:
    """Look up how a key changes what its row or message means; `None` for any other key."""
    if not isinstance(key, str):
        return None
    words = [word.lower() for word in _WORD.findall(key)]
    found = _MEANINGS.get("".join(words))
    return found or next((_WORDS[word] for word in words if word in _WORDS), None)


class Unused:
    """Counts what holds something and is not used, in constant memory.

    Args:
        noun: The name of what is read one after the other.

    Attributes:
        row: Number of the row that is being read.
        counts: Number of places by key.
    """

    def __init__(self, noun: str = "row") -> None:
        self._noun = noun
        self.row = 0
        self.counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, name: str, value: Any) -> None:
        """Count a value that is not used under the name of its key."""
        count = self.counts.get(name)
        if count is None:
            if len(self.counts) >= MAX_KEYS:
                name = "other keys"
            self._examples.setdefault(name, f"{self._noun} {self.row}: {shorten(value)}")
            count = self.counts.get(name, 0)
        self.counts[name] = count + 1

    def add_column(self, name: str, count: int) -> None:
        """Add a column of a table that is not read and holds something in `count` rows."""
        if count:
            self.counts[name] = count

    def lines(self) -> list[str]:
        """Write one line for each key, with the number of its values and the first of them."""
        return [
            f"{name}: {count:,} time{'s' * (count > 1)}"
            + (f", first in {self._examples[name]}" if name in self._examples else "")
            for name, count in self.counts.items()
        ]
