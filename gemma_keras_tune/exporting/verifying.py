"""Check that an export has not changed, and that it answers as the model in memory did."""

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from gemma_keras_tune._support.files import sha256, write_text
from gemma_keras_tune.errors import ExportError, GemmaTuneError
from gemma_keras_tune.exporting.llama_cpp import NotRunError
from gemma_keras_tune.exporting.receipts import (
    FILE_NAME,
    Checking,
    FileRecord,
    Receipt,
    Recording,
    Status,
    Verification,
    read_receipt,
    receipt_path,
    write_receipt,
)
from gemma_keras_tune.exporting.runtimes import (
    Answered,
    Base,
    WrongBaseError,
    ask,
    check_receipt,
)

# Largest difference allowed between a logit and the recorded one, by the dtype of the weights or of
# the computation.
TOLERANCES = {
    "float32": 1e-3,
    "float16": 0.05,
    "bfloat16": 0.5,
    # Of Keras, which rounds the activations too.
    "int8": 0.5,
    "int4": 5.0,
    "Q8_0": 0.5,
    "Q4_0": 5.0,
    "Q6_K": 0.5,
    "Q5_K_M": 2.0,
    "Q5_K_S": 2.0,
    "Q4_K_M": 5.0,
    "Q4_K_S": 5.0,
    "Q3_K_L": 5.0,
    "Q3_K_M": 5.0,
    "Q3_K_S": 5.0,
    "Q2_K": 10.0,
}
_OTHER = 0.5
# llama.cpp computes some functions in float16, whatever the weights are stored in.
_LLAMA_CPP = ("gguf", "gguf_adapter", "ollama")
# Files that people put beside weights and no runtime reads.
_HARMLESS = (".md", ".txt", ".png", ".jpg", ".html", ".pdf", ".log")
# Files that LiteRT-LM leaves beside a model that it has opened, and makes again if they are gone.
_CACHES = (".xnnpack_cache",)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of `verify`.

    Attributes:
        path: The export.
        format: Its format.
        problems: The faults, one line each.
        checks: The checks that passed.
        skipped: The checks that were not made, with the reasons.
        runtime: The runtime that opened the export, with its version, or `None`.
    """

    path: pathlib.Path
    format: str
    problems: tuple[str, ...]
    checks: tuple[str, ...]
    skipped: tuple[str, ...]
    runtime: str | None = None

    @property
    def passed(self) -> bool:
        """True if there are no faults; `skipped` lists the checks that were not made."""
        return not self.problems

    @property
    def verification(self) -> Verification:
        """The entry of the receipt."""
        status: Status = "failed" if self.problems else "passed" if self.runtime else "not run"
        return Verification(status, self.runtime, self.checks, self.problems + self.skipped)

    def raise_if_failed(self) -> None:
        """Raise an `ExportError` with all faults, if there are any."""
        if self.problems:
            raise ExportError(
                f"{self.path} is not what was written.",
                self.problems,
                "Export it again, or copy it again from where it was whole.",
            )

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}): {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  wrong: {text}" for text in self.problems]
        lines += [f"  right: {text}" for text in self.checks]
        lines += [f"  not run: {text}" for text in self.skipped]
        return "\n".join(lines)


def write_checked_receipt(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    check: Checking = False,
    file_name: str = FILE_NAME,
    **written: Any,
) -> Receipt:
    """Write a receipt and, with `check="run"`, verify the export.

    Args:
        model: The model that was written.
        folder: The folder, complete.
        check: Whether to record answers; `"run"` also opens the export in its runtime.
        file_name: Name of the receipt.
        **written: `format`, `dtype`, `quantization` and `prompts`, as for `write_receipt`.

    Returns:
        The receipt.

    Raises:
        ExportError: As from `write_receipt`, or the export does not answer as the model does.
    """
    receipt = write_receipt(model, folder, answers=bool(check), file_name=file_name, **written)
    return _check_now(model, folder, file_name) if check == "run" else receipt


def _check_now(model: keras.Model, folder: pathlib.Path, file_name: str) -> Receipt:
    """Verify the export, write the result into its receipt, and raise if it failed."""
    lone = file_name.removesuffix(FILE_NAME).removesuffix(".")
    written = folder / lone if lone else folder
    receipt = read_receipt(written)
    verdict = verify(written, base=model if receipt.format == "adapter" else None)
    if not verdict.passed:
        raise ExportError(
            f"What was written as {receipt.format!r} does not answer as the model in memory does.",
            verdict.problems,
            "Nothing was kept. To keep it and look into it, pass `check=True` and run `verify`.",
        )
    for reason in verdict.skipped:
        warnings.warn(f"{receipt.format}: {reason}", UserWarning, stacklevel=4)
    return read_receipt(written)


def verify(
    path: str | os.PathLike[str], *, base: Base = None, run: bool = True, update: bool = True
) -> Verdict:
    """Compare an export with its receipt.

    The size and hash of every file are compared. Then, if the receipt holds answers, the export is
    opened in the runtime of its format, which answers the same prompts. The token ids must be
    equal, the logits of the most probable tokens within the tolerance of the dtype, and the greedy
    answers equal, except where two tokens were closer to each other than the tolerance. If the
    runtime is not installed, the files alone are compared, and `skipped` names what to install.
    Files that changed are not opened. The result is written into the receipt, where "not run" does
    not replace an earlier "passed" or "failed".

    Args:
        path: A folder or file that `export`, `save_preset` or `save_adapter` wrote.
        base: For an adapter, the model it belongs on, or a source that `load` takes; for a GGUF
            adapter, the base's GGUF file. Without it only the files of an adapter are compared.
        run: Whether to open the export in its runtime.
        update: Whether to write the result into the receipt. If that is not permitted, `skipped`
            says so.

    Returns:
        The verdict.

    Raises:
        ExportError: The export or its receipt is missing, the receipt is not valid, or the adapter
            does not belong on `base`. The receipt keeps the result it had.
    """
    target = pathlib.Path(path).expanduser()
    if not target.exists():
        raise ExportError(f"There is no file or folder {target}.")
    receipt = read_receipt(target)
    check_receipt(target, receipt)
    verdict = _verdict(target, receipt, base, run)
    verification = verdict.verification
    told = verification.status != "not run" or receipt.verification.status == "not run"
    if update and told and verification != receipt.verification:
        try:
            told_now = dataclasses.replace(receipt, verification=verification)
            write_text(receipt_path(target), told_now.to_json())
        except ExportError as error:
            note = f"the result was not written into the receipt: {error.headline}"
            return dataclasses.replace(verdict, skipped=(*verdict.skipped, note))
    return verdict


def _verdict(target: pathlib.Path, receipt: Receipt, base: Base, run: bool) -> Verdict:
    problems = list(_file_problems(target, receipt))
    checks, skipped, runtime = [], [], None
    if not problems:
        size = sum(file.bytes for file in receipt.files)
        checks.append(f"{len(receipt.files)} files, {size:,} bytes: as they were written")
    if not run:
        skipped.append("the export was not opened: `run=False`")
    elif problems:
        skipped.append("the export was not opened: its files are not those that were written")
    elif not receipt.recordings:
        skipped.append("the export was not opened: no answers were recorded (`check=False`)")
    else:
        try:
            runtime, answers = ask(target, receipt, base=base)
            wrong, right = _compare(receipt, runtime, answers)
            problems += wrong
            checks += right
        except NotRunError as reason:
            skipped.append(f"the export was not opened: {reason}")
        except WrongBaseError:
            raise
        except GemmaTuneError as error:
            problems += [error.headline, *error.problems]
    found = (tuple(problems), tuple(checks), tuple(skipped))
    return Verdict(target, receipt.format, *found, runtime)


# The files.


def _file_problems(target: pathlib.Path, receipt: Receipt) -> Iterator[str]:
    folder = target if target.is_dir() else target.parent
    for file in receipt.files:
        problem = _problem(folder, file)
        if problem:
            yield f"{file.path}: {problem}"
    names = {file.path for file in receipt.files}
    if not target.is_dir():
        if names != {target.name}:
            yield f"{target.name}: the receipt is that of {', '.join(sorted(names))}"
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        known = name in names or name == FILE_NAME or path.suffix.lower() in _HARMLESS + _CACHES
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not known and not hidden and not path.is_dir():
            yield f"{name}: it was not there when the export was written"


def _problem(folder: pathlib.Path, file: FileRecord) -> str | None:
    path = folder / file.path
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "it lies outside the folder"
        if not path.is_file():
            return "it is missing"
        size = path.stat().st_size
        if size != file.bytes:
            return f"{size:,} bytes, {file.bytes:,} were written"
        if sha256(path) != file.sha256:
            return "its content changed"
    except (OSError, ValueError, RuntimeError) as error:
        return f"it cannot be read: {error}"
    return None


# The answers.


def tolerance_of(receipt: Receipt) -> float:
    """Return the largest difference of logits allowed: the larger one of storing and computing."""
    names = [receipt.compute_dtype, receipt.quantization or receipt.dtype]
    if receipt.format in _LLAMA_CPP:
        names.append("float16")
    return max(TOLERANCES.get(name, _OTHER) for name in names)


def _compare(receipt: Receipt, name: str, answers: list[Answered]) -> tuple[list[str], list[str]]:
    allowed = tolerance_of(receipt)
    problems, same, worst = [], 0, 0.0
    for number, (one, found) in enumerate(zip(receipt.recordings, answers, strict=True), 1):
        where = f"prompt {number} ({one.text[:40]!r}) in {name}"
        if found.ids != one.ids:
            problems.append(f"{where}: {_difference('token ids', one.ids, found.ids)}")
        distance = 0.0 if found.logits is None else _distance(one, found.logits)
        worst = max(worst, distance)
        if not distance <= allowed:
            problems.append(f"{where}: logits differ by {distance:.2g}, allowed is {allowed:g}")
        same += found.answer_ids == one.answer_ids
        if not _near(one, found.answer_ids, allowed):
            text = _difference("the answer's token ids", one.answer_ids, found.answer_ids)
            problems.append(f"{where}: {text}")
    count = len(receipt.recordings)
    if problems:
        return problems, []
    right = [
        f"{name}: token ids of {count} prompts are the same",
        f"{name}: {same} of {count} answers are the same",
    ]
    if answers[0].logits is not None:
        right.append(f"{name}: logits differ by {worst:.2g} at most, allowed is {allowed:g}")
    return [], right


def _difference(what: str, recorded: tuple[int, ...], found: tuple[int, ...]) -> str:
    place = _first_difference(recorded, found)
    shown = [str(list(ids[place : place + 4]))[1:-1] or "nothing" for ids in (recorded, found)]
    return f"{what} differ from token {place + 1} on: {shown[0]} recorded, {shown[1]} found"


def _first_difference(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _near(one: Recording, found: tuple[int, ...], allowed: float) -> bool:
    """Return whether an answer is the recorded one, or first differs at two equally good tokens."""
    if found == one.answer_ids:
        return True
    place = _first_difference(one.answer_ids, found)
    return place < len(one.margins) and one.margins[place] <= 2 * allowed


def _distance(one: Recording, found: tuple[float, ...]) -> float:
    """Return the largest difference of logits, up to a constant: llama.cpp normalizes its own."""
    if len(found) != len(one.top_logits):
        return math.inf
    pairs = zip(one.top_logits, found, strict=True)
    differences = [(a - one.top_logits[0]) - (b - found[0]) for a, b in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(map(abs, differences))
