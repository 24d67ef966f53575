"""The receipt: a small JSON file beside the weights that describes the export.

It holds each file's size and sha256, versions, template, stop tokens and adapter; where asked for,
recordings (the answers of the model in memory to a few prompts), and the result of comparing these
with the answers of the format's runtime. `exporting.verifying` compares them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import keras
import numpy as np
from msgspec import Meta

from gemma_keras_tune._support.files import sha256
from gemma_keras_tune._support.packages import installed_versions
from gemma_keras_tune._support.records import Finite, TokenId, Whole, read_record
from gemma_keras_tune.adapters.active import active_adapter, adapter_config, adapter_strength
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import family_of, fingerprint, quantizations
from gemma_keras_tune.gemma.templates import Segment, Template, get_template
from gemma_keras_tune.generation.answers import generate_ids
from gemma_keras_tune.generation.scoring import Scorer
from gemma_keras_tune.pairs import Message

SCHEMA = "gemma_keras_tune.receipt/1"
FILE_NAME = "receipt.json"
PROMPTS = (
    "Hello!",
    "What is the capital of France?",
    "Grüße aus Köln: ¿qué tal?  你好 😀",
    'Write {"item": "bread", "quantity": 2} as a sentence.',
)
MAX_NEW_TOKENS = 16
TOP = 8
_BATCH = 4
# A receipt of a few prompts takes a few kilobytes.
_MOST_BYTES = 1 << 26
_PACKAGES = ("gemma-keras-tune", "keras", "keras-hub", "jax", "numpy")
# Packages that write and open a format; the receipt names those that are installed.
_TARGET_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "keras": ("h5py",),
    "safetensors": ("safetensors", "transformers"),
    "gguf": ("gguf", "xllamacpp"),
    "gguf_adapter": ("gguf", "xllamacpp"),
    "ollama": ("gguf", "xllamacpp"),
    "gemma_jax": ("orbax-checkpoint", "gemma"),
    "litert": ("litert-torch", "litert-lm-api"),
    "adapter": ("safetensors", "peft"),
}
InnerPath = Annotated[
    str,
    Meta(
        pattern=r"^(?!(?:.*/)?\.{0,2}(?:/|$))[^\\\x00:/]+(?:/[^\\\x00/]+)*$",
        description="a path inside the folder",
    ),
]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="64 hexadecimal digits")]
# Files that begin with a name and the version of their format.
_VERSIONED: Mapping[str, tuple[bytes, int]] = {".gguf": (b"GGUF", 1), ".litertlm": (b"LITERTLM", 3)}


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """The description of one file.

    Attributes:
        path: Path relative to the receipt, with forward slashes.
        bytes: Size.
        sha256: SHA-256 of the content, in hexadecimal.
    """

    path: InnerPath
    bytes: Whole
    sha256: Digest


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """The answer of the model in memory to one prompt.

    Attributes:
        text: The prompt in its template, as a runtime receives it.
        ids: Its token ids, `<bos>` first.
        answer_ids: Token ids of the greedy answer, without the stop token.
        answer: The answer as text.
        stopped: Whether the model ended the answer itself.
        margins: For every token of the answer and the stop token, its logit minus the second best:
            where this is small, a runtime that rounds may choose another token.
        top_ids: The most probable first tokens of the answer, the best first.
        top_logits: Their logits.
    """

    text: str
    ids: tuple[TokenId, ...]
    answer_ids: tuple[TokenId, ...]
    answer: str
    stopped: bool
    margins: tuple[Finite, ...]
    top_ids: tuple[TokenId, ...]
    top_logits: tuple[Finite, ...]

    def faults(self) -> Iterator[str]:
        """Yield what is inconsistent between the fields."""
        steps = len(self.answer_ids) + self.stopped
        if not self.ids or not self.top_ids:
            yield "ids and top_ids must not be empty"
        if len(self.margins) != steps or steps > MAX_NEW_TOKENS + 1:
            yield f"margins must be one for each of {steps} tokens"
        if len(self.top_ids) != len(self.top_logits):
            yield "top_ids and top_logits must have the same length"


Status = Literal["passed", "failed", "not run"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """The result of the last check of an export.

    Attributes:
        status: `"passed"`, `"failed"` or `"not run"`: the export was not opened.
        runtime: The runtime that opened it, with its version, or `None`.
        checked: The checks that passed.
        reasons: The faults, or why it was not opened.
    """

    status: Status
    runtime: str | None = None
    checked: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


NOT_CHECKED = Verification("not run", reasons=("it was not asked for; `verify` does it",))
# The argument `check`: record answers, do not, or record them and open what was written at once.
Checking = bool | Literal["run"]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """The description of an export, and the answers expected of it.

    Attributes:
        format: A format of `export`, or `"adapter"`.
        dtype: Dtype of the stored weights.
        quantization: Quantization of a GGUF file, or `None`.
        compute_dtype: Dtype in which the model in memory computed the recordings, or the mode in
            which Keras quantized it.
        family: Family of the model, such as `"gemma3"`.
        base_fingerprint: Fingerprint of the base model.
        template: Name of the prompt template.
        stop_tokens: Tokens that end an answer.
        stop_token_ids: Their ids.
        adapter: `name`, `rank`, `alpha`, `target_modules` and `use_rslora` of the active adapter,
            its `scale`, and the `strength` that the scale was multiplied by; `None` for the base.
        packages: Versions by package.
        files: All files except the receipt.
        recordings: Empty if the model was not run.
        verification: Result of the last check.
        format_version: Version of the format that a GGUF or LiteRT-LM file begins with; `None` for
            other formats.
    """

    format: str
    dtype: str
    quantization: str | None
    compute_dtype: str
    family: str
    base_fingerprint: str
    template: str
    stop_tokens: tuple[str, ...]
    stop_token_ids: tuple[TokenId, ...]
    adapter: dict[str, Any] | None
    packages: dict[str, str]
    files: tuple[FileRecord, ...]
    recordings: tuple[Recording, ...]
    verification: Verification = NOT_CHECKED
    format_version: str | None = None

    def faults(self) -> Iterator[str]:
        """Yield the faults of the list of files."""
        names = [file.path for file in self.files]
        if not names:
            yield "files is empty"
        yield from (f"files: {name!r} comes twice" for name in {*names} if names.count(name) > 1)

    def to_json(self) -> str:
        """Return the text of the file."""
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


# Writing.


def write_receipt(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    format: str,
    dtype: str,
    quantization: str | None = None,
    prompts: Iterable[str] | None = None,
    answers: bool = False,
    file_name: str = FILE_NAME,
) -> Receipt:
    """Write a receipt for all files of a folder beside them.

    Args:
        model: The model that was written.
        folder: The folder, complete.
        format: A format of `export`, or `"adapter"`.
        dtype: Dtype of the stored weights.
        quantization: Quantization of a GGUF file.
        prompts: Prompts to answer, as for `record_answers`.
        answers: Whether to record answers.
        file_name: Name of the receipt; that of a single file is `x.gguf.receipt.json`.

    Returns:
        The receipt.

    Raises:
        ExportError: As from `record_answers`.
    """
    template = get_template(model)
    files = tuple(_describe(folder, file_name))
    tokenizer: Any = getattr(model, "preprocessor", None) and model.preprocessor.tokenizer
    receipt = Receipt(
        format=format,
        dtype=dtype,
        quantization=quantization,
        compute_dtype=_computed_in(model),
        family=family_of(model).name,
        base_fingerprint=fingerprint(model),
        template=template.name,
        stop_tokens=tuple(template.stop_tokens),
        stop_token_ids=tuple(template.stop_token_ids(tokenizer)) if tokenizer else (),
        adapter=_adapter_on(model),
        packages=installed_versions((*_PACKAGES, *_TARGET_PACKAGES.get(format, ()))),
        files=files,
        recordings=record_answers(model, prompts) if answers else (),
        format_version=next(filter(None, (_format_version(folder / f.path) for f in files)), None),
    )
    (folder / file_name).write_text(receipt.to_json(), encoding="utf-8")
    return receipt


def refuse_wrong_check(check: Any, prompts: Any) -> None:
    """Refuse a wrong `check`, and prompts that would not be answered, before any work is done.

    Args:
        check: The argument `check` of a caller.
        prompts: Its argument `prompts`.

    Raises:
        ExportError: `check` is not `True`, `False` or `"run"`, or is `False` beside prompts.
    """
    if not (isinstance(check, bool) or check == "run"):
        raise ExportError(f"`check` must be True, False or 'run'. Received: {check!r}")
    if prompts is not None and not check:
        raise ExportError(
            "`prompts` are answered only where `check` is True or 'run'. Received: check=False",
            next_step="Pass `check=True` to record answers to them, or leave `prompts` out.",
        )


def _computed_in(model: Any) -> str:
    modes = sorted({*quantizations(model).values()})
    return modes[0] if modes else str(model.compute_dtype)


def _adapter_on(model: keras.Model) -> dict[str, Any] | None:
    name, own = active_adapter(model), adapter_config(model)
    if name is None or own is None:
        return None
    more = {"name": name, "scale": own.scale, "strength": adapter_strength(model)}
    return more | dataclasses.asdict(own)


def _format_version(path: pathlib.Path) -> str | None:
    if path.suffix not in _VERSIONED:
        return None
    name, numbers = _VERSIONED[path.suffix]
    with path.open("rb") as file:
        is_one = file.read(len(name)) == name
        versions = np.frombuffer(file.read(4 * numbers), "<u4")
    return ".".join(map(str, versions)) if is_one else None


def _describe(folder: pathlib.Path, receipt: str) -> Iterator[FileRecord]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != receipt:
            yield FileRecord(name, path.stat().st_size, sha256(path))


def record_answers(
    model: keras.Model, prompts: Iterable[str] | None = None
) -> tuple[Recording, ...]:
    """Let the model in memory answer a few prompts, with the active adapter.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        prompts: Texts that users would write, without a template. `None` takes `PROMPTS`.

    Returns:
        One `Recording` for each prompt.

    Raises:
        ExportError: `prompts` are not texts, or the model has no tokenizer.
    """
    given = PROMPTS if prompts is None else prompts
    asked = [given] if isinstance(given, str) else list(given)
    if not asked:
        return ()
    if not all(isinstance(prompt, str) for prompt in asked):
        raise ExportError(f"`prompts` must be texts. Received: {prompts!r}")
    if getattr(model, "preprocessor", None) is None:
        raise ExportError(
            "The model has no preprocessor, so there is no tokenizer to write prompts with.",
            next_step="Attach one, or pass `check=False`.",
        )
    template = get_template(model)
    tokenizer: Any = model.preprocessor.tokenizer
    texts = [_rendered(template, prompt) for prompt in asked]
    return answer_texts(model, texts, template.stop_token_ids(tokenizer))


def answer_texts(
    model: Any, texts: Sequence[str], stop_token_ids: Iterable[int], *, top: int = TOP
) -> tuple[Recording, ...]:
    """Let the model in memory continue texts, with the active adapter.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor.
        texts: Prompts in their template.
        stop_token_ids: Ids at which an answer ends.
        top: How many logits to keep.

    Returns:
        One `Recording` for each text.
    """
    tokenizer = model.preprocessor.tokenizer
    encoder = RowTokenizer(tokenizer)
    rows = [encoder.encode([Segment(text, False)])[0] for text in texts]
    answers = generate_ids(
        model,
        rows,
        stop_token_ids=stop_token_ids,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=_BATCH,
        share_programs=True,
    )
    wholes = [np.concatenate([row, ids]) for row, (ids, _) in zip(rows, answers, strict=True)]
    # The positions at which the tokens of the answer, and the stop token, were chosen.
    places = [
        np.arange(len(row) - 1, len(whole) - (not stopped))
        for row, whole, (_, stopped) in zip(rows, wholes, answers, strict=True)
    ]
    best = Scorer(model).top_logits(wholes, places, top, batch_size=_BATCH)
    return tuple(
        Recording(
            text=text,
            ids=tuple(map(int, row)),
            answer_ids=tuple(map(int, ids)),
            answer=str(tokenizer.detokenize(ids)),
            stopped=bool(stopped),
            margins=tuple(float(step[0] - step[1]) for step in logits),
            top_ids=tuple(map(int, tokens[0])),
            top_logits=tuple(map(float, logits[0])),
        )
        for text, row, (ids, stopped), (tokens, logits) in zip(
            texts, rows, answers, best, strict=True
        )
    )


def _rendered(template: Template, prompt: str) -> str:
    segments = template.segments((Message("user", prompt),), generation_prompt=True)
    return "".join(segment.text for segment in segments)


# Reading. A receipt may come from anyone: its content is data, and checked.


def receipt_path(path: pathlib.Path) -> pathlib.Path:
    """Return the path of the receipt of a folder or a single file."""
    return path / FILE_NAME if path.is_dir() else path.with_name(f"{path.name}.{FILE_NAME}")


def read_receipt(path: pathlib.Path) -> Receipt:
    """Read the receipt of an export.

    Args:
        path: A folder, or a single file such as `model.gguf`.

    Returns:
        The receipt. Its paths stay inside the folder.

    Raises:
        ExportError: The receipt is missing or not valid; every fault is listed.
    """
    file = receipt_path(path)
    if not file.is_file():
        raise ExportError(
            f"There is no receipt: {file} is missing.",
            next_step="Pass what `export`, `save_preset` or `save_adapter` wrote.",
        )
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read: {error}") from error
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ExportError(
            f"{file} is not a receipt of this library.",
            [f"schema must be {SCHEMA!r}. Received: {schema!r:.80}"],
        )
    problems: list[str] = []
    receipt = read_record(Receipt, data, problems=problems)
    if receipt is None:
        raise ExportError(f"{file} is not a receipt of this library.", problems)
    return receipt


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
