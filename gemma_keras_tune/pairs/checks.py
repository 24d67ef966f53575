"""Checks of pairs that can be trained on and still look wrong."""

import array
import collections
import re
from collections.abc import Iterable, Iterator

import numpy as np

from gemma_keras_tune.errors import warn_of_pairs
from gemma_keras_tune.pairs.problems import ranges
from gemma_keras_tune.pairs.rows import Pair


class PairChecks:
    """Collects what looks wrong in pairs that can be trained on, one pair after the other.

    Only hashes are kept, 16 bytes for each answer.

    ```python
    checks = PairChecks(special_tokens=["<start_of_turn>", "<end_of_turn>"])
    for pair in source:
        checks.add(pair)
    checks.warn()
    ```

    Args:
        special_tokens: The model's special tokens as text. They are control signs to it, so in the
            text of a row they are most likely left over from another tool.
    """

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        tokens = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._gate = sorted({token[0] for token in tokens})
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._prompts = array.array("q")
        # The lowest bit says whether the answer is the row's last.
        self._answers = array.array("I")
        self._rows = array.array("I")
        self._special: dict[str, array.array[int]] = collections.defaultdict(
            lambda: array.array("I")
        )

    def add(self, pair: Pair) -> None:
        """Look at one more pair."""
        messages = pair.messages
        # Every answer that is trained is one case: the messages before it, and the answer.
        seen = 0
        last = len(messages) - 1
        for place, message in enumerate(messages):
            content = message.written
            if message.role == "assistant" and message.trained:
                self._prompts.append(seen)
                self._answers.append((hash(content) & 0xFFFFFFFE) | (place == last))
                self._rows.append(pair.row)
            seen = hash((seen, message.role, content))
            for character in self._gate:  # Far faster than the pattern, and mostly enough.
                if character in content:
                    self._find_special(content, message.role, pair.row)
                    break

    def _find_special(self, content: str, role: str, row: int) -> None:
        assert self._pattern is not None
        for token in dict.fromkeys(self._pattern.findall(content)):
            self._special[f"{token!r} stands in {role} text"].append(row)

    @property
    def duplicates(self) -> tuple[tuple[int, ...], ...]:
        """Row numbers in groups whose whole conversation is the same."""
        return tuple(self._groups(same_answer=True))

    @property
    def contradictions(self) -> tuple[tuple[int, ...], ...]:
        """Row numbers in groups that answer the same prompt differently, at any of their turns."""
        return tuple(self._groups(same_answer=False))

    @property
    def special_tokens(self) -> dict[str, tuple[int, ...]]:
        """Special tokens that were found in text, with their row numbers."""
        return {text: tuple(rows) for text, rows in self._special.items()}

    def _groups(self, *, same_answer: bool) -> Iterator[tuple[int, ...]]:
        prompts = np.frombuffer(self._prompts, np.int64)
        answers = np.frombuffer(self._answers, np.uint32)
        rows = np.frombuffer(self._rows, np.uint32)
        if same_answer:
            final = (answers & 1).astype(bool)
            prompts, answers, rows = prompts[final], answers[final], rows[final]
        # The answer without its mark: a turn within one row may be the last of another.
        said = answers >> 1
        order = np.lexsort((rows, said, prompts))
        new_prompt = np.diff(prompts[order]) != 0
        new_answer = new_prompt | (np.diff(said[order]) != 0)
        bounds = np.flatnonzero(new_answer if same_answer else new_prompt) + 1
        edges = np.concatenate([[0], bounds, [len(order)]])
        sizes = np.diff(edges)
        groups = []
        for index in np.flatnonzero(sizes > 1):
            group = order[edges[index] : edges[index + 1]]
            if same_answer or said[group[0]] != said[group[-1]]:
                groups.append(tuple(sorted({int(row) for row in rows[group]})))
        yield from sorted(groups)

    def findings(self) -> tuple[str, ...]:
        """List everything that was found, one line each, with row numbers."""
        lines = [f"rows {ranges(rows)} are exact duplicates" for rows in self.duplicates]
        lines += [
            f"rows {ranges(rows)} answer the same prompt differently"
            for rows in self.contradictions
        ]
        for text, rows in self.special_tokens.items():
            lines.append(f"row{'s' * (len(rows) > 1)} {ranges(rows)}: {text}")
        return tuple(lines)

    def warn(self, part: str = "") -> None:
        """Tell of everything found in one `PairsWarning`, if there is anything.

        Args:
            part: Which pairs they are, such as `"validation"`, where there are several kinds.
        """
        if lines := self.findings():
            which = f"{part} pairs".lstrip()
            warn_of_pairs(f"Some {which} look wrong.", lines, "PairChecks.findings()")
