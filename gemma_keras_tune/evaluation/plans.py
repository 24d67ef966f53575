"""Test plans: the cases a model is judged by, from a file or from Python."""

import collections
import csv
import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import yaml

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune.errors import EvaluationError, PairsError, warn_of_pairs
from gemma_keras_tune.evaluation.checks import (
    CHECKS,
    Check,
    Function,
    check_from_config,
    has_text,
    shown,
)
from gemma_keras_tune.pairs.conversations import Message, read_conversation
from gemma_keras_tune.pairs.sources import Broken, open_source
from gemma_keras_tune.pairs.unused import Unused
from gemma_keras_tune.pairs.values import ReadingError, is_list

Kind = Literal["success", "failure", "boundary"]
KINDS: tuple[Kind, ...] = ("success", "failure", "boundary")
SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt, and what an answer to it must be like.

    Attributes:
        id: A name, unique in its plan. Without one, it is the case's number there.
        prompt: What the user says; or a conversation that ends with the user, of `Message`s or of
            dictionaries with `role` and `content`.
        kind: `"success"`, which the model must always manage; `"failure"`, which it must fail or
            refuse; `"boundary"`, which it may answer within limits.
        checks: What must hold for an answer, all of them: checks, dictionaries as in files
            (`{"exact": "Paris"}`), or functions of prompt and answer. One may stand alone.
        samples: Answers to draw. One is greedy; several are drawn at random.
        required: Share of the samples that must pass.
        tags: Words to group cases by.
        weight: How much it counts in the weighted rate. Verdicts count every case once.
        notes: Anything for the reader.
        row: Its row in the file, from 1.
    """

    id: str = ""
    prompt: str | tuple[Message, ...] = ""
    kind: Kind = ""  # type: ignore[assignment]  # what is missing is named with all that is wrong
    checks: tuple[Check, ...] = ()
    samples: int = 1
    required: float = 1.0
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    notes: str = ""
    row: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            EvaluationError: Some are wrong; all are named.
        """
        problems: list[str] = []
        for name, read in (("id", _id), ("prompt", _prompt), ("checks", _checks), ("tags", _tags)):
            value, wrong = read(getattr(self, name))
            object.__setattr__(self, name, value)
            problems += [f"`{name}`{text}" for text in wrong]
        problems += _problems(self)
        problems = problems or _half_characters(self)
        if problems:
            which = f"Case {self.id!r}" if self.id else "A case"
            raise EvaluationError(f"{which} cannot be run.", problems)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation."""
        return (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1].content

    def to_config(self) -> dict[str, Any]:
        """The case as JSON data, as a plan's file has it. What is as usual is left out."""
        prompt: Any = self.prompt
        if not isinstance(prompt, str):
            prompt = [{"role": message.role, "content": message.content} for message in prompt]
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
        name: How reports call the plan.
    """

    cases: Sequence[Case]
    name: str = "test plan"

    def __post_init__(self) -> None:
        """Check that every case can be told from the others.

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
        """Read a plan.

        JSONL has a case a line, YAML a list of cases, CSV a case a row. A case has `prompt` (text,
        or a list of messages with `role` and `content`), `kind` and `checks` (a list of checks),
        and may have `id`, `samples`, `required`, `tags`, `weight` and `notes`. In CSV, a column
        with a check's name holds what that check needs; `checks`, lists and dictionaries are JSON;
        `tags` are separated by spaces.

        Args:
            path: A file that ends in `.jsonl`, `.csv`, `.yaml` or `.yml`.

        Returns:
            The plan, named after the file.

        Raises:
            EvaluationError: It cannot be read, or rows are no cases; all problems are listed, each
                with its row.
        """
        path = pathlib.Path(path)
        cases: list[Case] = []
        problems: list[str] = []
        for row, line, record in _records(path):
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
        """Write the plan, so that `from_file` reads it.

        Checks that are Python functions are written by name, and `from_file` refuses them.

        Args:
            path: A file that ends in `.jsonl`, `.csv`, `.yaml` or `.yml`.
            overwrite: Whether it may replace an existing file.

        Returns:
            The path.

        Raises:
            EvaluationError: The file exists, or its name ends otherwise.
            ExportError: The disk is full.
        """
        path = pathlib.Path(path)
        _check_suffix(path)
        if path.exists() and not overwrite:
            raise EvaluationError(
                f"{path} already exists.",
                next_step="Choose another name, or pass `overwrite=True`.",
            )
        configs = [case.to_config() for case in self.cases]
        text = {".jsonl": _to_json_lines, ".csv": _to_csv}.get(path.suffix, _to_yaml)(configs)
        return write_text(path, text)


# pytest takes classes whose name begins with "Test" for tests.
TestPlan.__test__ = False  # type: ignore[attr-defined]


# What a case is made of, each with what is wrong about it.


def _id(value: Any) -> tuple[Any, list[str]]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        value = ""
    return value, [] if isinstance(value, str) else [f" must be text, got {shown(value)}"]


def _prompt(value: Any) -> tuple[Any, list[str]]:
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


def _checks(value: Any) -> tuple[tuple[Check, ...], list[str]]:
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
            checks.append(_check(item))
        except EvaluationError as error:
            problems.append(f": {error.headline}")
    return tuple(checks), problems


def _check(item: Any) -> Check:
    if isinstance(item, Check):
        return item
    is_class = isinstance(item, type) and issubclass(item, Check)
    return Function(item) if callable(item) and not is_class else check_from_config(item)


def _tags(value: Any) -> tuple[Any, list[str]]:
    single = isinstance(value, str) or not isinstance(value, Sequence)
    tags = (value,) if single else tuple(value)
    good = all(isinstance(tag, str) for tag in tags)
    return tags, [] if good else [f" must be a list of texts, got {shown(value)}"]


def _problems(case: Case) -> list[str]:
    wanted = {
        "kind": (case.kind in KINDS, f"one of {', '.join(KINDS)}"),
        "samples": (_is_whole(case.samples) and case.samples >= 1, "a whole number from 1"),
        "required": (
            _is_real(case.required) and 0 < case.required <= 1,
            "a share of samples, over 0 and up to 1",
        ),
        "weight": (_is_real(case.weight) and 0 < case.weight < float("inf"), "a number over 0"),
        "notes": (isinstance(case.notes, str), "text"),
    }
    found = [
        f"`{name}` must be {what}, got {shown(getattr(case, name))}"
        for name, (good, what) in wanted.items()
        if not good
    ]
    return found


_HALF = re.compile("[\ud800-\udfff]")  # of a pair that UTF-16 writes one character with


def _half_characters(case: Case) -> list[str]:
    """What no text file can hold, and no tokenizer reads."""
    return [
        f"`{name}` has half a character in it: {half[0]!a}"
        for name, value in case.to_config().items()
        if (half := _HALF.search(json.dumps(value, ensure_ascii=False)))
    ]


def _numbered(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases, those without an id called by their row, or number."""
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Reading.


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in SUFFIXES:
        raise EvaluationError(
            f"A test plan's file ends in {', '.join(SUFFIXES)}. Received: {path.name!r}"
        )


def _records(path: pathlib.Path) -> Iterator[tuple[int, int | None, Any]]:
    """Row, line and raw case of everything in a file."""
    _check_suffix(path)
    if not path.is_file():
        raise EvaluationError(f"There is no file {path}.", next_step="Check the path.")
    if path.suffix in (".yaml", ".yml"):
        yield from _yaml_records(path)
        return
    try:
        rows = open_source(path)
        repeated = _repeated_keys(path) if path.suffix == ".jsonl" else {}
        _check_columns(path, rows.columns or ())
        for row, (_, line, record) in enumerate(rows.records(None), 1):
            if line in repeated and isinstance(record, Mapping):
                record = _twice(repeated[line])
            elif path.suffix == ".csv" and isinstance(record, dict):
                record = _from_csv(record)
            yield row, line, record
    except PairsError as error:
        raise EvaluationError(error.headline, error.problems) from error


def _twice(key: Any) -> Broken:
    return Broken(f"the key {shown(key)} is there twice, so one of the two would be lost")


def _check_columns(path: pathlib.Path, columns: Sequence[Any]) -> None:
    name = _first_twice(columns)
    if name is not None:
        raise EvaluationError(
            f"{path.name} is no test plan.",
            [f"its first line names the column {shown(name)} twice"],
            'Several checks of one name go into `checks`: [{"contains": "a"}, {"contains": "b"}].',
        )


def _first_twice(names: Iterable[str]) -> str | None:
    counts = collections.Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json`, which keeps the last of several values of one key and says nothing."""
    key = _first_twice(key for key, _ in pairs)
    if key is not None:
        raise _KeyTwice(key)
    return dict(pairs)


class _KeyTwice(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(_twice(key).text)
        self.key = key


def _repeated_keys(path: pathlib.Path) -> dict[int, str]:
    """The lines of records that have a key twice, and the key.

    The reader of pairs, which reads plans too, does not look for them.
    """
    text = path.read_text("utf-8-sig", errors="replace")
    decode = json.JSONDecoder(object_pairs_hook=_no_twice).raw_decode
    plain = json.JSONDecoder().raw_decode
    found: dict[int, str] = {}
    place = text.find("{")
    while place >= 0:
        try:
            _, place = decode(text, place)
        except _KeyTwice as error:
            found[text.count("\n", 0, place) + 1] = error.key
            place = _end_of(plain, text, place)
        except (ValueError, RecursionError):
            place = _next_line(text, place)
        place = text.find("{", place)
    return found


def _end_of(decode: Callable[[str, int], tuple[Any, int]], text: str, place: int) -> int:
    try:
        return decode(text, place)[1]
    except (ValueError, RecursionError):
        return _next_line(text, place)


def _next_line(text: str, place: int) -> int:
    return text.find("\n", place) + 1 or len(text)


def _yaml_records(path: pathlib.Path) -> Iterator[tuple[int, int | None, Any]]:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        cases = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        for case in cases:
            _keep_id(case)
        repeated = [_key_twice(case) for case in cases]
        data = loader.construct_document(node) if node else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(data, list):
        raise EvaluationError(f"{path.name} must be a list of cases. Received: {shown(data)}")
    for row, (case, record, key) in enumerate(zip(cases, data, repeated, strict=True), 1):
        yield row, case.start_mark.line + 1, record if key is None else _twice(key)


def _keep_id(case: yaml.Node) -> None:
    """Read an id as it is written: YAML takes 007 for 7, and `no` for false."""
    pairs = case.value if isinstance(case, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "id" and isinstance(value, yaml.ScalarNode) and value.value:
            value.tag = "tag:yaml.org,2002:str"


def _key_twice(node: yaml.Node) -> str | None:
    """A key that some dictionary within has twice. Each is looked at once, however often named."""
    seen: set[int] = set()
    left = [node]
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = (str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if key := _first_twice(keys):
                return key
            left += [part for pair in node.value for part in pair]
        else:
            left += node.value
    return None


def _from_csv(record: Mapping[str, str]) -> Any:
    """A CSV row as a JSON one has it. Empty cells are not there."""
    row: dict[str, Any] = {}
    checks: list[Any] = []
    for key, text in record.items():
        if not text.strip():
            continue
        try:
            if key in CHECKS:
                checks.append({key: _check_from_cell(key, text)})
            elif key in ("prompt", "id", "kind", "notes"):
                row[key] = text
            elif key == "tags":
                row[key] = text.split()
            elif key == "checks":
                checks += _as_list(_json(text))
            elif key == "messages":
                row["prompt"] = _json(text)
            else:
                row[key] = _from_cell(text)
        except ValueError as error:
            return Broken(f"`{key}` is no JSON: {error}")
    return {**row, "checks": checks}


def _check_from_cell(name: str, text: str) -> Any:
    """What a check needs: of one about texts a cell is a text, also where it looks like a number.

    It may be options, or, for a check that takes several texts, a list.
    """
    kind = CHECKS[name]
    if not has_text(kind):
        return _from_cell(text)
    try:
        value = _json(text)
    except _KeyTwice:
        raise
    except ValueError:
        return text
    options = isinstance(value, dict) and kind.main in value
    several = isinstance(value, list) and kind.main == "texts"
    return value if options or several else text


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_cell(text: str) -> Any:
    """JSON, where a cell is a number, a truth value, a list or a dictionary; else its text."""
    truth = {"true": True, "false": False}.get(text.strip().lower())  # spreadsheets write TRUE
    if truth is not None:
        return truth
    try:
        value = _json(text)
    except ValueError:
        if text.lstrip()[:1] in ("[", "{"):
            raise
        return text
    return text if value is None else value


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_twice)


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


# Writing.


def _to_json_lines(configs: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(config, ensure_ascii=False) + "\n" for config in configs)


def _to_yaml(configs: list[dict[str, Any]]) -> str:
    return str(yaml.safe_dump(configs, sort_keys=False, allow_unicode=True, width=100))


def _to_csv(configs: list[dict[str, Any]]) -> str:
    flat = []
    for config in configs:
        if not isinstance(config["prompt"], str):
            config["messages"] = config.pop("prompt")
        flat.append({key: _cell(key, value) for key, value in config.items()})
    columns = [c for c in (*_KEYS, "messages") if any(c in row for row in flat)]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key == "tags":
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False)
