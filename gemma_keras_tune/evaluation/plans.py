"""Test plans: the cases a model is judged by, from a file or from Python."""

import collections
import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from gemma_keras_tune._pair_sources import Broken, open_source
from gemma_keras_tune.errors import EvaluationError, PairsError
from gemma_keras_tune.evaluation.checks import (
    CHECKS,
    Check,
    check_from_config,
    has_text,
    shown,
)
from gemma_keras_tune.pairs import Message

Kind = Literal["success", "failure", "boundary"]
KINDS: tuple[Kind, ...] = ("success", "failure", "boundary")
SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")
_ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt, and what an answer to it must be like.

    Attributes:
        id: A name, unique in its plan.
        prompt: What the user says; or a conversation that ends with the user.
        kind: `"success"`, which the model must always manage; `"failure"`, which it must fail or
            refuse; `"boundary"`, which it may answer within limits.
        checks: What must hold for an answer, all of them.
        samples: Answers to draw. One is greedy; several are drawn at random.
        required: Share of the samples that must pass.
        tags: Words to group cases by.
        weight: How much it counts in the weighted rate. Verdicts count every case once.
        notes: Anything for the reader.
        row: Its row in the file, from 1.
    """

    id: str
    prompt: str | tuple[Message, ...]
    kind: Kind
    checks: tuple[Check, ...]
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
        for name in ("checks", "tags"):
            value = getattr(self, name)
            single = isinstance(value, (str, Check)) or not isinstance(value, Sequence)
            object.__setattr__(self, name, (value,) if single else tuple(value))
        if not isinstance(self.prompt, str) and isinstance(self.prompt, Sequence):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        problems = _problems(self)
        if problems:
            raise EvaluationError(f"Case {self.id!r} cannot be run.", problems)

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
            prompt = [dataclasses.asdict(message) for message in prompt]
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
        object.__setattr__(self, "cases", tuple(self.cases))
        wrong = [f"{shown(case)} is no `Case`" for case in self.cases if not isinstance(case, Case)]
        problems = wrong or _same_ids(self.cases)
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
        problems += _same_ids(cases)
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
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
        return path


# pytest takes classes whose name begins with "Test" for tests.
TestPlan.__test__ = False  # type: ignore[attr-defined]


def _problems(case: Case) -> list[str]:
    wanted = {
        "id": (isinstance(case.id, str) and bool(case.id), "text that is not empty"),
        "kind": (case.kind in KINDS, f"one of {', '.join(KINDS)}"),
        "checks": (
            bool(case.checks) and all(isinstance(c, Check) for c in case.checks),
            "at least one check: say what must hold for an answer",
        ),
        "samples": (_is_whole(case.samples) and case.samples >= 1, "a whole number from 1"),
        "required": (
            _is_real(case.required) and 0 < case.required <= 1,
            "a share of samples, over 0 and up to 1",
        ),
        "tags": (all(isinstance(tag, str) for tag in case.tags), "a list of texts"),
        "weight": (_is_real(case.weight) and 0 < case.weight < float("inf"), "a number over 0"),
        "notes": (isinstance(case.notes, str), "text"),
    }
    found = [
        f"`{name}` must be {what}, got {shown(getattr(case, name))}"
        for name, (good, what) in wanted.items()
        if not good
    ]
    return found + _prompt_problems(case.prompt)


def _prompt_problems(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [] if prompt.strip() else ["`prompt` is empty"]
    if not isinstance(prompt, tuple) or not prompt:
        return [f"`prompt` must be text or a list of messages, got {shown(prompt)}"]
    if not all(isinstance(message, Message) for message in prompt):
        return ["`prompt` must be a list of `Message`, each with `role` and `content`"]
    roles = [message.role for message in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected or len(turns) % 2 == 0:
        return [f"`prompt` must take turns and end with the user, got {', '.join(roles)}"]
    return []


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
        yield from ((row, None, record) for row, record in enumerate(_read_yaml(path), 1))
        return
    try:
        for row, (_, line, record) in enumerate(open_source(path).records(None), 1):
            flat = path.suffix == ".csv" and isinstance(record, dict)
            yield row, line, _from_csv(record) if flat else record
    except PairsError as error:
        raise EvaluationError(error.headline, error.problems) from error


def _read_yaml(path: pathlib.Path) -> list[Any]:
    yaml = _yaml()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(data, list):
        raise EvaluationError(f"{path.name} must be a list of cases. Received: {shown(data)}")
    return data


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise EvaluationError(
            "Plans in YAML need PyYAML.", next_step="`pip install 'gemma-keras-tune[evaluation]'`."
        ) from error
    return yaml


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
                checks += _as_list(json.loads(text))
            elif key == "messages":
                row["prompt"] = json.loads(text)
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
        value = json.loads(text)
    except ValueError:
        return text
    options = isinstance(value, dict) and kind.main in value
    several = isinstance(value, list) and kind.main == "texts"
    return value if options or several else text


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_cell(text: str) -> Any:
    """JSON, where a cell is a number, a truth value, a list or a dictionary; else its text."""
    try:
        value = json.loads(text)
    except ValueError:
        if text.lstrip()[:1] in ("[", "{"):
            raise
        return text
    return text if value is None else value


def _case(record: Any, row: int) -> Case:
    if isinstance(record, Broken):
        raise EvaluationError(record.text)
    if not isinstance(record, Mapping):
        raise EvaluationError(f"a case is a dictionary, got {shown(record)}")
    problems = [f"there is no key {key!r}; keys are {', '.join(_KEYS)}"
                for key in record if key not in _KEYS]  # fmt: skip
    problems += [f"`{key}` is missing" for key in ("prompt", "kind") if key not in record]
    checks, wrong = _checks(record.get("checks"))
    problems += wrong
    prompt = record.get("prompt", " ")
    if isinstance(prompt, list):
        prompt, wrong = _messages(prompt)
        problems += wrong
    given = {key: record[key] for key in _KEYS if key in record}
    if "tags" in given and not isinstance(given["tags"], (str, list)):
        problems.append(f"`tags` must be a list of texts, got {shown(given.pop('tags'))}")
    values = {"id": str(row), "kind": KINDS[0], **given, "prompt": prompt, "checks": checks}
    try:
        case = Case(**values, row=row)
    except EvaluationError as error:
        # What is missing or broken has been said above.
        said = [key for key in ("prompt", "checks") if any(f"`{key}`" in p for p in problems)]
        said += ["checks"] * (len(problems) > 0 and not checks)
        problems += [p for p in error.problems if not any(f"`{key}`" in p for key in said)]
    if problems:
        raise EvaluationError("", problems)
    return case


def _checks(configs: Any) -> tuple[tuple[Check, ...], list[str]]:
    if not configs:
        return (), ["`checks` is missing: say what must hold for an answer"]
    if isinstance(configs, Mapping):  # {"exact": …, "stops": true}
        configs = [{name: value} for name, value in configs.items()]
    if not isinstance(configs, list):
        return (), [f"`checks` must be a list of checks, got {shown(configs)}"]
    checks, problems = [], []
    for config in configs:
        try:
            checks.append(check_from_config(config))
        except EvaluationError as error:
            problems.append(f"`checks`: {error.headline}")
    return tuple(checks), problems


def _messages(items: list[Any]) -> tuple[tuple[Message, ...], list[str]]:
    messages, problems = [], []
    for number, item in enumerate(items, 1):
        good = isinstance(item, Mapping) and set(item) == {"role", "content"}
        if good and item["role"] in _ROLES and isinstance(item["content"], str):
            messages.append(Message(item["role"], item["content"]))
        else:
            problems.append(
                f"`prompt`: message {number} needs `role` ({', '.join(_ROLES)}) and `content` as "
                f"text, got {shown(item)}"
            )
    return tuple(messages), problems


# Writing.


def _to_json_lines(configs: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(config, ensure_ascii=False) + "\n" for config in configs)


def _to_yaml(configs: list[dict[str, Any]]) -> str:
    return str(_yaml().safe_dump(configs, sort_keys=False, allow_unicode=True, width=100))


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
