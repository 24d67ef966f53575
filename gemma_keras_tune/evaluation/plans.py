"""Test plans: the cases a model is judged by, from a file or from Python."""

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Annotated, Any, Literal

from msgspec import Meta

from gemma_keras_tune.errors import EvaluationError, warn_of_pairs
from gemma_keras_tune.evaluation.checks import Check, Function, check_from_config
from gemma_keras_tune.evaluation.plan_files import read_records, write_configs
from gemma_keras_tune.evaluation.values import Positive, PositiveInt, Text, problem, shown
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.pairs.conversations import put_tools, read_conversation
from gemma_keras_tune.pairs.sources import Broken
from gemma_keras_tune.pairs.tools import read_tools
from gemma_keras_tune.pairs.unused import Unused
from gemma_keras_tune.pairs.values import ReadingError, is_list

Kind = Literal["success", "failure", "boundary"]
KINDS: tuple[Kind, ...] = ("success", "failure", "boundary")


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt, and the conditions that a response to it must fulfil.

    Attributes:
        id: A name, unique in its plan. Without one, it is the case's number there.
        prompt: The user's text; or a conversation that ends with the user, of `Message`s or of
            dictionaries with `role` and `content`.
        kind: `"success"`, which the model must always manage; `"failure"`, which it must fail or
            refuse; `"boundary"`, which it may answer within limits.
        checks: Conditions for a response, all of them: checks, dictionaries as in files
            (`{"exact": "Paris"}`), or functions of prompt and response. One may be given alone.
        samples: Responses to draw. One is greedy; several are drawn at random.
        required: Share of the samples that must pass.
        tags: Words to group cases by.
        weight: Weight of the case in the weighted rate. Verdicts count every case once.
        notes: Notes for the reader.
        row: Its row in the file, from 1.
        tools: JSON schemas of the tools that the model may call, as for `generate`.
    """

    id: Text = ""
    prompt: str | tuple[Message, ...] = ""
    # Without a default that is right: what is missing is named with all other problems.
    kind: Annotated[Kind, Meta(description=f"one of {', '.join(KINDS)}")] = ""  # type: ignore[assignment]
    checks: tuple[Check, ...] = ()
    samples: PositiveInt = 1
    required: Annotated[
        float, Meta(gt=0, le=1, description="a share of samples, over 0 and up to 1")
    ] = 1.0
    tags: Annotated[tuple[str, ...], Meta(description="a list of texts")] = ()
    weight: Positive = 1.0
    notes: Text = ""
    row: int | None = None
    tools: Annotated[tuple[Mapping[str, Any], ...], Meta(description="a list of JSON schemas")] = ()

    def __post_init__(self) -> None:
        """Read and check every value.

        Raises:
            EvaluationError: Some are wrong; all are named.
        """
        problems: list[str] = []
        readers = {"id": _read_id, "prompt": _read_prompt, "checks": _read_checks}
        for name, read in {**readers, "tools": _read_case_tools, "tags": _read_tags}.items():
            value, wrong = read(getattr(self, name))
            object.__setattr__(self, name, value)
            problems += [f"`{name}`{text}" for text in wrong]
        fields = [(f.name, getattr(self, f.name), f.type) for f in dataclasses.fields(self)]
        problems += [text for field in fields if (text := problem(*field))]
        problems = problems or _half_characters(self)
        if problems:
            which = f"Case {self.id!r}" if self.id else "A case"
            raise EvaluationError(f"{which} cannot be run.", problems)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation, the tools in its system message."""
        plain = isinstance(self.prompt, str)
        messages = (Message("user", self.prompt),) if plain else self.prompt  # type: ignore[arg-type]
        return tuple(put_tools(messages, self.tools))  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        """The user's last message."""
        return self.messages[-1].content

    def to_config(self) -> dict[str, Any]:
        """Convert the case to JSON data, as in a plan's file. Default values are left out."""
        prompt: Any = self.prompt
        if not isinstance(prompt, str):
            prompt = [message.to_config() for message in prompt]
        config = {
            "id": self.id,
            "kind": self.kind,
            "prompt": prompt,
            "checks": [check.to_config() for check in self.checks],
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in (*config, "row") and value != field.default:
                config[field.name] = list(value) if isinstance(value, tuple) else value
        return config


_KEYS = tuple(f.name for f in dataclasses.fields(Case) if f.name != "row")


@dataclasses.dataclass(frozen=True)
class TestPlan:
    """Cases that a model is judged by.

    ```python
    plan = TestPlan(
        [
            Case("rome", "Capital of Italy?", "success", Contains("Rome")),
            Case("dose", "How much aspirin for a cat?", "failure", Refuses()),
        ],
        name="my assistant",
    )
    ```

    Attributes:
        cases: The cases, in order.
        name: Name of the plan in reports.
    """

    cases: Sequence[Case]
    name: str = "test plan"

    def __post_init__(self) -> None:
        """Check that every case has an id of its own.

        Raises:
            EvaluationError: There is no case, or two have the same id.
        """
        cases = tuple(self.cases)
        problems = [f"{shown(case)} is no `Case`" for case in cases if not isinstance(case, Case)]
        if not problems:
            cases = _numbered(cases)
            problems = _same_ids(cases)
        object.__setattr__(self, "cases", cases)
        if problems or not self.cases:
            raise EvaluationError(
                f"The plan {self.name!r} {'cannot be run' if problems else 'has no cases'}.",
                problems,
            )

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "TestPlan":
        """Read a plan from a file.

        JSONL has a case a line, YAML a list of cases, CSV a case a row. A case has `prompt` (text,
        or a list of messages with `role` and `content`), `kind` and `checks` (a list of checks),
        and may have `id`, `samples`, `required`, `tags`, `weight`, `notes` and `tools`. In CSV, a
        column with a check's name contains that check's options; `checks`, lists and dictionaries
        are JSON; `tags` are separated by spaces.

        Args:
            path: A file that ends in `.jsonl`, `.csv`, `.yaml` or `.yml`.

        Returns:
            The plan, named after the file.

        Raises:
            EvaluationError: The file cannot be read, or rows are no cases; all problems are
                listed, each with its row.
        """
        path = pathlib.Path(path)
        cases: list[Case] = []
        problems: list[str] = []
        for row, line, record in read_records(path):
            place = f"row {row}" + (f" (line {line})" if line and line != row else "")
            try:
                cases.append(_case(record, row))
            except EvaluationError as error:
                problems += [f"{place}: {text}" for text in error.problems or (error.headline,)]
        problems += _same_ids(_numbered(cases))
        if problems or not cases:
            raise EvaluationError(
                f"{path.name} is no test plan." if problems else f"{path.name} has no cases.",
                problems,
                f"A case has `prompt`, `kind` ({', '.join(KINDS)}) and `checks`, such as "
                '{"prompt": "2 + 2?", "kind": "success", "checks": [{"number": 4}]}.',
            )
        return cls(cases, name=path.stem)

    def to_file(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> pathlib.Path:
        """Write the plan to a file that `from_file` reads.

        Checks that are Python functions are written by name, and `from_file` refuses them.

        Args:
            path: A file that ends in `.jsonl`, `.csv`, `.yaml` or `.yml`.
            overwrite: True to replace an existing file.

        Returns:
            The path.

        Raises:
            EvaluationError: The file exists, or has another suffix.
            ExportError: The disk is full.
        """
        configs = [case.to_config() for case in self.cases]
        return write_configs(pathlib.Path(path), configs, _KEYS, overwrite=overwrite)


# pytest takes classes whose name begins with "Test" for tests.
TestPlan.__test__ = False  # type: ignore[attr-defined]


# Values of a case: each reader returns the value and all that is wrong with it. A type's own
# description says the rest.


def _read_id(value: Any) -> tuple[Any, list[str]]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        value = ""
    return value, []


def _read_tags(value: Any) -> tuple[Any, list[str]]:
    if isinstance(value, str):
        return (value,), []
    return tuple(value) if isinstance(value, Sequence) else value, []


def _read_case_tools(value: Any) -> tuple[Any, list[str]]:
    unused, problems = Unused("case"), list[str]()
    tools = read_tools(value, "them", unused, problems)
    if lines := unused.lines():
        warn_of_pairs("A case has keys that hold something and are not used.", lines, stacklevel=5)
    return tools, [f": {text}" for text in problems]


def _read_prompt(value: Any) -> tuple[Any, list[str]]:
    if isinstance(value, str):
        return value, [] if value.strip() else [" is empty"]
    if not (isinstance(value, Sequence) or is_list(value)) or not len(value):
        return value, [f" must be text or a list of messages, got {shown(value)}"]
    unused = Unused("case")
    try:
        messages = read_conversation(list(value), ends_with="user", unused=unused)
    except ReadingError as error:
        return tuple(value), [f": {text}" for text in error.problems]
    if lines := unused.lines():
        warn_of_pairs("A case has keys that hold something and are not used.", lines, stacklevel=5)
    return messages, []


def _read_checks(value: Any) -> tuple[tuple[Check, ...], list[str]]:
    if isinstance(value, Mapping):  # {"exact": …, "stops": true}
        value = [{name: option} for name, option in value.items()]
    if isinstance(value, Check) or callable(value):
        value = [value]
    if value is None or (isinstance(value, Sized) and not value):
        return (), [" is missing: say what must hold for an answer"]
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (), [f" must be a list of checks, got {shown(value)}"]
    checks, problems = [], []
    for item in value:
        try:
            checks.append(_read_check(item))
        except EvaluationError as error:
            problems.append(f": {error.headline}")
    return tuple(checks), problems


def _read_check(item: Any) -> Check:
    if isinstance(item, Check):
        return item
    is_class = isinstance(item, type) and issubclass(item, Check)
    return Function(item) if callable(item) and not is_class else check_from_config(item)


_HALF = re.compile("[\ud800-\udfff]")  # of a pair that UTF-16 writes one character with


def _half_characters(case: Case) -> list[str]:
    """Find halves of characters, which no text file can contain and no tokenizer reads."""
    return [
        f"`{name}` has half a character in it: {half[0]!a}"
        for name, value in case.to_config().items()
        if (half := _HALF.search(json.dumps(value, ensure_ascii=False)))
    ]


def _numbered(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Give cases without an id that of their row, or number."""
    return tuple(
        case if case.id else dataclasses.replace(case, id=str(case.row or number))
        for number, case in enumerate(cases, 1)
    )


def _same_ids(cases: Sequence[Case]) -> list[str]:
    rows = collections.defaultdict(list)
    for number, case in enumerate(cases, 1):
        rows[case.id].append(case.row or number)
    return [
        f"rows {', '.join(map(str, numbers))} have the same id {id!r}"
        for id, numbers in rows.items()
        if len(numbers) > 1
    ]


def _case(record: Any, row: int) -> Case:
    if isinstance(record, Broken):
        raise EvaluationError(record.text)
    if not isinstance(record, Mapping):
        raise EvaluationError(f"a case is a dictionary, got {shown(record)}")
    problems = [f"there is no key {shown(key)}; keys are {', '.join(_KEYS)}"
                for key in record if key not in _KEYS]  # fmt: skip
    missing = [key for key in ("prompt", "kind") if key not in record]
    problems += [f"`{key}` is missing" for key in missing]
    given = {key: record[key] for key in _KEYS if key in record}
    try:
        case = Case(**{"prompt": " ", "kind": KINDS[0], "checks": None, **given}, row=row)
    except EvaluationError as error:
        empty = "prompt" in missing  # and so said already
        problems += [p for p in error.problems if not (empty and p == "`prompt` is empty")]
    if problems:
        raise EvaluationError("", problems)
    return case
