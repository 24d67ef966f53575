"""What is kept on disk as it comes, so that an interrupted evaluation goes on where it stopped."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.generation.answers import Answer

SCHEMA = "gemma_keras_tune.answers/2"


class Keyed(Protocol):
    """Anything with a key that says what its answer depends on."""

    @property
    def key(self) -> str:
        """The key."""
        ...


class AnswerLog:
    """A JSONL file: what the evaluation is in its first line, then an answer or scores a line.

    A last line that was cut off in the middle of its writing is asked again.

    Attributes:
        path: The file; `None` where nothing is kept.
        scores: Scores by what they are of, each by name.

    Args:
        path: The file; `None` keeps nothing.
        identity: What must be the same for answers to be the same.

    Raises:
        EvaluationError: The file belongs to another evaluation, or is none; what differs is named.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self.scores: dict[str, dict[str, float]] = {}
        self._answers: dict[str, Answer] = {}
        if self.path is None:
            return
        header = {"schema": SCHEMA, **identity}
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path, header)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def known(
        self, questions: Iterable[Keyed], progress: Callable[[int], None]
    ) -> dict[str, Answer]:
        """Answers that are there already.

        Args:
            questions: What will be asked.
            progress: Called with how many need not be.

        Returns:
            The answers by key.
        """
        keys = [question.key for question in questions if question.key in self._answers]
        progress(len(keys))
        return {key: self._answers[key] for key in keys}

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers.

        Args:
            answers: The answers by key.
        """
        self._write(
            {"key": key, "text": a.text, "ids": a.ids.tolist(), "stopped": a.stopped}
            for key, a in answers.items()
        )

    def add_scores(self, scores: Mapping[str, dict[str, float]]) -> None:
        """Keep scores.

        Args:
            scores: What to find them by, and the scores by name.
        """
        self.scores.update(scores)
        self._write({"key": key, "scores": found} for key, found in scores.items())

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        if self.path is None or not lines:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: pathlib.Path, header: Mapping[str, Any]) -> None:
        # Lines end in "\n" alone: answers may hold other line separators.
        *lines, torn = path.read_bytes().decode("utf-8", "replace").split("\n")
        found = _object(lines[0]) if lines else {}
        if found.get("schema") != SCHEMA:
            raise EvaluationError(
                f"{path} holds no answers of an evaluation.",
                next_step="Give another file name to `resume`.",
            )
        problems = [
            f"{name}: it has {found.get(name)!r}, this evaluation {value!r}"
            for name, value in header.items()
            if found.get(name) != value
        ]
        if problems:
            raise EvaluationError(
                f"{path} belongs to another evaluation.",
                problems,
                "Give another file name to `resume`, or delete the file.",
            )
        for number, line in enumerate(lines[1:], 2):
            data = _object(line)
            if _are_scores(data):
                self.scores[data["key"]] = data["scores"]
            elif _is_answer(data):
                ids = np.asarray(data["ids"], np.int32)
                self._answers[data["key"]] = Answer(data["text"], ids, data["stopped"])
            else:
                raise EvaluationError(
                    f"{path}, line {number}, is no answer: {line[:80]!r}",
                    next_step="Delete the line, or give another file name to `resume`.",
                )
        if torn:
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _object(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _is_answer(data: Mapping[str, Any]) -> bool:
    good = isinstance(data.get("key"), str) and isinstance(data.get("text"), str)
    good = good and isinstance(data.get("stopped"), bool) and isinstance(data.get("ids"), list)
    return good and all(type(i) is int and 0 <= i < 2**31 for i in data["ids"])


def _are_scores(data: Mapping[str, Any]) -> bool:
    scores = data.get("scores")
    good = isinstance(data.get("key"), str) and isinstance(scores, dict)
    return good and all(type(score) in (int, float) for score in data["scores"].values())
