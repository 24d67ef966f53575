"""Responses and scores, kept on disk as they come, so that an interrupted evaluation continues."""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.generation.answers import Answer

SCHEMA = "gemma_keras_tune.answers/2"

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _ResponseLine(msgspec.Struct, tag="response", forbid_unknown_fields=True):
    key: str
    text: str
    ids: list[TokenId]
    stopped: bool


class _ScoresLine(msgspec.Struct, tag="scores", forbid_unknown_fields=True):
    key: str
    scores: dict[str, float]


class Keyed(Protocol):
    """Anything with a key that names all that its response depends on."""

    @property
    def key(self) -> str:
        """The key."""
        ...


class ResponseLog:
    """A JSONL file: the evaluation's identity in the first line, then a response or scores a line.

    A last line that was cut off in the middle of its writing is dropped, and asked for again.

    Attributes:
        path: The file; `None` keeps nothing on disk.
        scores: Scores by key, each by name.

    Args:
        path: The file; `None` keeps nothing on disk.
        identity: All that must be the same for responses to be the same.

    Raises:
        EvaluationError: The file belongs to another evaluation, or is no such file; all that
            differs is named.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self.scores: dict[str, dict[str, float]] = {}
        self._responses: dict[str, Answer] = {}
        if self.path is None:
            return
        header = {"schema": SCHEMA, **identity}
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path, header)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(msgspec.json.encode(header) + b"\n")

    def known(
        self, requests: Iterable[Keyed], progress: Callable[[int], None]
    ) -> dict[str, Answer]:
        """Look up the responses to requests that are there already, and tell their number."""
        keys = [request.key for request in requests if request.key in self._responses]
        progress(len(keys))
        return {key: self._responses[key] for key in keys}

    def add(self, responses: Mapping[str, Answer]) -> None:
        """Keep responses by key."""
        self._write(
            _ResponseLine(key, r.text, r.ids.tolist(), r.stopped) for key, r in responses.items()
        )

    def add_scores(self, scores: Mapping[str, dict[str, float]]) -> None:
        """Keep scores by key, each by name."""
        self.scores.update(scores)
        self._write(_ScoresLine(key, found) for key, found in scores.items())

    def _write(self, lines: Iterable[msgspec.Struct]) -> None:
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        if self.path is None or not data:
            return
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: pathlib.Path, header: Mapping[str, Any]) -> None:
        # Lines end in "\n" alone: responses may contain other line separators.
        first, *rest = path.read_bytes().split(b"\n")
        *lines, torn = rest or [b""]
        _check_header(path, first, header)
        for number, line in enumerate(lines, 2):
            try:
                found = msgspec.json.decode(line, type=_ResponseLine | _ScoresLine)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise EvaluationError(
                    f"{path}, line {number}, is no response: {error}",
                    next_step="Delete the line, or give another file name to `resume`.",
                ) from error
            if isinstance(found, _ScoresLine):
                self.scores[found.key] = found.scores
            else:
                ids = np.asarray(found.ids, np.int32)
                self._responses[found.key] = Answer(found.text, ids, found.stopped)
        if torn:
            path.write_bytes(b"".join(line + b"\n" for line in (first, *lines)))


def _check_header(path: pathlib.Path, line: bytes, header: Mapping[str, Any]) -> None:
    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = {}
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
