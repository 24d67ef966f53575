"""The receipt: a small JSON file beside the weights that says what was written.

It holds each file's size and sha256, versions, template, stop tokens and adapter; where asked for,
recordings: what the model in memory answered to a few prompts; and the outcome of comparing these
with what the target's own runtime answers. `exporting.verifying` does that.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from gemma_keras_tune.adapters.active import active_adapter, adapter_config, adapter_strength
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import backbone_inputs, family_of, fingerprint, quantizations
from gemma_keras_tune.gemma.templates import Segment, Template, get_template
from gemma_keras_tune.generation.answers import generate_ids
from gemma_keras_tune.pairs.reader import Message

SCHEMA = "gemma_keras_tune.receipt/3"
# The first is without an outcome; both are without the version of the format.
_OLD_SCHEMAS = ("gemma_keras_tune.receipt/1", "gemma_keras_tune.receipt/2")
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
_LENGTH_STEP = 32
# A receipt of a few prompts takes a few kilobytes.
_MOST_BYTES = 1 << 26
_PACKAGES = ("gemma-keras-tune", "keras", "keras-hub", "jax", "numpy")
# What writes a format, and what opens it, where that is installed beside this library.
_TARGET_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "keras": ("h5py",),
    "safetensors": ("safetensors", "transformers"),
    "gguf": ("gguf", "xllamacpp"),
    "gguf_adapter": ("gguf", "xllamacpp"),
    "ollama": ("gguf", "xllamacpp"),
    "gemma_jax": ("orbax-checkpoint", "gemma"),
    "litert": ("litert-torch", "litert-lm-api", "safetensors"),
    "adapter": ("safetensors", "peft"),
}
# Files that begin with a name and the version of their format.
_VERSIONED: Mapping[str, tuple[bytes, int]] = {".gguf": (b"GGUF", 1), ".litertlm": (b"LITERTLM", 3)}


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as it was written.

    Attributes:
        path: Where it lies, relative to the receipt, with forward slashes.
        bytes: Its size.
        sha256: Of its content, in hexadecimal.
    """

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """What the model in memory made of one prompt.

    Attributes:
        text: The prompt through the template, as a runtime is given it.
        ids: Its token ids, `<bos>` first.
        answer_ids: The greedy answer's token ids, without the stop token.
        answer: The same as text.
        stopped: Whether the model ended the answer itself.
        margins: For every token of the answer, and the stop token, how far its logit lies above
            the next best: a runtime that rounds may choose otherwise where this is small.
        top_ids: The most probable first tokens of the answer, the best first.
        top_logits: Their logits.
    """

    text: str
    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer: str
    stopped: bool
    margins: tuple[float, ...]
    top_ids: tuple[int, ...]
    top_logits: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What the last check of an export came to.

    Attributes:
        verdict: `"passed"`, `"failed"` or `"not run"`: the export was not opened.
        runtime: What opened it, with its version, or `None`.
        checked: What was looked at and found right.
        reasons: What is wrong, or why it was not opened.
    """

    verdict: str
    runtime: str | None = None
    checked: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


VERDICTS = ("passed", "failed", "not run")
NOT_CHECKED = Outcome("not run", reasons=("it was not asked for; `verify` does it",))
Check = bool | Literal["run"]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """What was written, and what it shall answer.

    Attributes:
        format: A format of `export`, or `"adapter"`.
        dtype: What the weights are stored in.
        quantization: Of a GGUF file, or `None`.
        compute_dtype: What the model in memory computed the recordings in: a dtype, or the mode in
            which Keras quantized it.
        family: Such as `"gemma3"`.
        base_fingerprint: Of the base model.
        template: Name of the prompt template.
        stop_tokens: What ends an answer.
        stop_token_ids: Their ids.
        adapter: Of the adapter that was on, its `name`, its own `rank`, `alpha`,
            `target_modules` and `use_rslora`, the `scale` that comes to, and its `strength`, by
            which that was multiplied; `None` for the base.
        packages: Versions by package.
        files: All files, but for the receipt.
        recordings: Empty where the model was not run.
        outcome: Of the check.
        format_version: Of GGUF and LiteRT-LM files, the version they begin with; `None` where the
            format has none of its own.
    """

    format: str
    dtype: str
    quantization: str | None
    compute_dtype: str
    family: str
    base_fingerprint: str
    template: str
    stop_tokens: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    adapter: Mapping[str, Any] | None
    packages: Mapping[str, str]
    files: tuple[FileRecord, ...]
    recordings: tuple[Recording, ...]
    outcome: Outcome = NOT_CHECKED
    format_version: str | None = None

    def to_json(self) -> str:
        """The text of the file."""
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
    """Describe all files of a folder, in a file beside them.

    Args:
        model: The model that was written.
        folder: The folder, complete.
        format: What was written.
        dtype: What the weights are stored in.
        quantization: Of a GGUF file.
        prompts: As for `record`.
        answers: Whether to record answers.
        file_name: Name of the receipt; that of a lone file is `x.gguf.receipt.json`.

    Returns:
        The receipt.

    Raises:
        ExportError: As from `record`.
    """
    template = get_template("auto", model)
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
        packages=_versions(format),
        files=files,
        recordings=record(model, prompts) if answers else (),
        format_version=next(filter(None, (_format_version(folder / f.path) for f in files)), None),
    )
    (folder / file_name).write_text(receipt.to_json(), encoding="utf-8")
    return receipt


def refuse_unknown_check(check: Any) -> None:
    """Refuse what `check` cannot be, before any work is done.

    Args:
        check: What a caller passed.

    Raises:
        ExportError: It is not `True`, `False` or `"run"`.
    """
    if not (isinstance(check, bool) or check == "run"):
        raise ExportError(f"`check` must be True, False or 'run'. Received: {check!r}")


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


def _versions(format: str) -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *_TARGET_PACKAGES.get(format, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _describe(folder: pathlib.Path, receipt: str) -> Iterator[FileRecord]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != receipt:
            yield FileRecord(name, path.stat().st_size, sha256(path))


def sha256(path: pathlib.Path) -> str:
    """A file's sha256 in hexadecimal; a small part of the file at a time lies in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(model: keras.Model, prompts: Iterable[str] | None = None) -> tuple[Recording, ...]:
    """Let the model in memory answer a few prompts, with the LoRA that is on.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        prompts: What users would write; the template is put around it. `None` takes `PROMPTS`.

    Returns:
        One `Recording` a prompt, none for no prompts.

    Raises:
        ExportError: `prompts` are no texts, or the model has no tokenizer.
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
    template = get_template("auto", model)
    tokenizer: Any = model.preprocessor.tokenizer
    texts = [_rendered(template, prompt) for prompt in asked]
    return answer_texts(model, texts, template.stop_token_ids(tokenizer))


def answer_texts(
    model: Any, texts: Sequence[str], stop_token_ids: Iterable[int], *, top: int = TOP
) -> tuple[Recording, ...]:
    """Let the model in memory continue texts, with the LoRA that is on.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor.
        texts: Prompts through their template.
        stop_token_ids: Ids at which an answer ends.
        top: How many logits to keep.

    Returns:
        One `Recording` a text.
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
    # Where each token of the answer was chosen, and the stop token if one was.
    places = [
        np.arange(len(row) - 1, len(whole) - (not stopped))
        for row, whole, (_, stopped) in zip(rows, wholes, answers, strict=True)
    ]
    best = _best_logits(model, wholes, places, top)
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


def _best_logits(
    model: Any, rows: Sequence[np.ndarray], places: Sequence[np.ndarray], top: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The largest logits of each row at some of its places: ids and logits, `[places, top]`."""
    import jax

    program = jax.jit(_program(model, top))
    backbone = model.backbone
    trainable = [v.value for v in backbone.trainable_variables]
    fixed = [v.value for v in backbone.non_trainable_variables]
    length = -(-max(map(len, rows)) // _LENGTH_STEP) * _LENGTH_STEP
    found = []
    for start in range(0, len(rows), _BATCH):
        batch = range(start, min(start + _BATCH, len(rows)))
        ids = np.zeros((_BATCH, length), np.int32)
        mask = np.zeros((_BATCH, length), np.int32)
        mask[:, 0] = 1
        wanted = np.zeros((_BATCH, MAX_NEW_TOKENS + 1), np.int32)
        for place, row in enumerate(batch):
            ids[place, : len(rows[row])], mask[place, : len(rows[row])] = rows[row], 1
            wanted[place, : len(places[row])] = places[row]
        logits, tokens = map(np.asarray, program(trainable, fixed, ids, mask, wanted))
        for place, row in enumerate(batch):
            count = len(places[row])
            found.append((tokens[place, :count], logits[place, :count].astype("float32")))
    return found


def _program(model: Any, top: int) -> Any:
    backbone = model.backbone
    variables = [*backbone.trainable_variables, *backbone.non_trainable_variables]
    cap = family_of(model).head(model).soft_cap

    def best(trainable: Any, fixed: Any, ids: Any, mask: Any, places: Any) -> tuple[Any, Any]:
        inputs = backbone_inputs(backbone, ids, mask)
        hidden, _ = backbone.stateless_call(trainable, fixed, inputs, training=False)
        chosen = ops.take_along_axis(hidden, places[..., None], axis=1)
        values = zip(variables, [*trainable, *fixed], strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            logits = ops.cast(_reversed(model, chosen), "float32")
        if cap is not None and family_of(model).name == "gemma3n":
            logits = ops.tanh(logits / cap) * cap
        return ops.top_k(logits, top)

    return best


def _reversed(model: Any, hidden: Any) -> Any:
    """Logits as the model's own output embedding makes them, quantized or not."""
    if family_of(model).name == "gemma3n":
        embedding = family_of(model).head(model).embedding
        return ops.matmul(hidden, ops.transpose(ops.cast(embedding, hidden.dtype)))
    return model.backbone.token_embedding(hidden, reverse=True)


# Reading. A receipt may come from anywhere: whatever it holds, it is read as data or refused.


def receipt_path(path: pathlib.Path) -> pathlib.Path:
    """Where the receipt of a folder, or of a lone file, lies."""
    return path / FILE_NAME if path.is_dir() else path.with_name(f"{path.name}.{FILE_NAME}")


def read_receipt(path: pathlib.Path) -> Receipt:
    """Read the receipt of an export.

    Args:
        path: A folder, or a lone file such as `model.gguf`.

    Returns:
        The receipt. Its paths stay inside the folder.

    Raises:
        ExportError: There is none, or it is none this library writes; every fault is listed.
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
    reader = _Reader()
    receipt = _receipt(reader, data)
    if reader.problems:
        raise ExportError(f"{file} is not a receipt of this library.", reader.problems)
    return receipt


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


class _Reader:
    """Takes values of known types out of JSON data, and collects what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def say(self, where: str, expected: str, value: Any) -> None:
        shown = repr(value)
        self.problems.append(f"{where} must be {expected}. Received: {shown[:80]}")

    def mapping(self, value: Any, where: str, fields: type | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.say(where, "an object", value)
            return {}
        if fields is not None:
            names = {field.name for field in dataclasses.fields(fields)} | {"schema"}
            extra = sorted(set(value) - names)
            if extra:
                self.problems.append(f"{where} holds unknown entries: {', '.join(extra)[:200]}")
        return value

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self.say(where, "text", value)
            return ""
        return value

    def whole(self, value: Any, where: str, most: int = 2**63 - 1) -> int:
        if type(value) is not int or not 0 <= value <= most:
            self.say(where, f"a whole number from 0 to {most}", value)
            return 0
        return value

    def number(self, value: Any, where: str) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            self.say(where, "a finite number", value)
            return 0.0
        return float(value)

    def flag(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            self.say(where, "true or false", value)
            return False
        return value

    def many(self, read: Any, value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            self.say(where, "a list", value)
            return ()
        return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(value))

    def token(self, value: Any, where: str) -> int:
        return self.whole(value, where, 2**31 - 1)


def _receipt(reader: _Reader, data: Any) -> Receipt:
    values = reader.mapping(data, "the receipt", Receipt)
    schema = values.get("schema")
    if schema not in (SCHEMA, *_OLD_SCHEMAS):
        reader.say("schema", repr(SCHEMA), schema)
        values = {}
    if not values:
        return Receipt("", "", None, "", "", "", "", (), (), None, {}, (), ())
    get, text = values.get, reader.text
    quantization, adapter, version = get("quantization"), get("adapter"), get("format_version")
    packages = reader.mapping(get("packages"), "packages")
    receipt = Receipt(
        format=text(get("format"), "format"),
        dtype=text(get("dtype"), "dtype"),
        quantization=None if quantization is None else text(quantization, "quantization"),
        compute_dtype=text(get("compute_dtype"), "compute_dtype"),
        family=text(get("family"), "family"),
        base_fingerprint=text(get("base_fingerprint"), "base_fingerprint"),
        template=text(get("template"), "template"),
        stop_tokens=reader.many(text, get("stop_tokens"), "stop_tokens"),
        stop_token_ids=reader.many(reader.token, get("stop_token_ids"), "stop_token_ids"),
        adapter=None if adapter is None else reader.mapping(adapter, "adapter"),
        packages={name: text(value, f"packages.{name}") for name, value in packages.items()},
        files=reader.many(lambda v, w: _file(reader, v, w), get("files"), "files"),
        recordings=reader.many(
            lambda v, w: _recording(reader, v, w), get("recordings"), "recordings"
        ),
        outcome=NOT_CHECKED if schema == _OLD_SCHEMAS[0] else _outcome(reader, get("outcome")),
        format_version=None if version is None else text(version, "format_version"),
    )
    names = [file.path for file in receipt.files]
    if not names:
        reader.problems.append("files is empty")
    reader.problems += [
        f"files: {name!r} comes twice" for name in {*names} if names.count(name) > 1
    ]
    return receipt


def _outcome(reader: _Reader, data: Any) -> Outcome:
    values = reader.mapping(data, "outcome", Outcome)
    verdict, runtime = values.get("verdict"), values.get("runtime")
    if verdict not in VERDICTS:
        reader.say("outcome.verdict", f"one of {VERDICTS}", verdict)
        verdict = NOT_CHECKED.verdict
    return Outcome(
        verdict,
        None if runtime is None else reader.text(runtime, "outcome.runtime"),
        reader.many(reader.text, values.get("checked"), "outcome.checked"),
        reader.many(reader.text, values.get("reasons"), "outcome.reasons"),
    )


def _file(reader: _Reader, data: Any, where: str) -> FileRecord:
    values = reader.mapping(data, where, FileRecord)
    path = reader.text(values.get("path"), f"{where}.path")
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in path
        or ":" in parts[0]
        or ("\0" in path)
    ):
        reader.say(f"{where}.path", "a path inside the folder", path)
        path = ""
    digest = reader.text(values.get("sha256"), f"{where}.sha256")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        reader.say(f"{where}.sha256", "64 hexadecimal digits", digest)
    return FileRecord(path, reader.whole(values.get("bytes"), f"{where}.bytes"), digest)


def _recording(reader: _Reader, data: Any, where: str) -> Recording:
    values = reader.mapping(data, where, Recording)

    def take(name: str, read: Any) -> Any:
        return read(values.get(name), f"{where}.{name}")

    def several(name: str, read: Any) -> Any:
        return reader.many(read, values.get(name), f"{where}.{name}")

    recording = Recording(
        text=take("text", reader.text),
        ids=several("ids", reader.token),
        answer_ids=several("answer_ids", reader.token),
        answer=take("answer", reader.text),
        stopped=take("stopped", reader.flag),
        margins=several("margins", reader.number),
        top_ids=several("top_ids", reader.token),
        top_logits=several("top_logits", reader.number),
    )
    steps = len(recording.answer_ids) + recording.stopped
    if not recording.ids or not recording.top_ids:
        reader.problems.append(f"{where} has no token ids")
    if len(recording.margins) != steps or steps > MAX_NEW_TOKENS + 1:
        reader.problems.append(f"{where}.margins must be one for each of {steps} tokens")
    if len(recording.top_ids) != len(recording.top_logits):
        reader.problems.append(f"{where}.top_ids and top_logits differ in length")
    return recording
