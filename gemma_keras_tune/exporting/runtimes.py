"""Ask the runtime of each format the prompts of a receipt."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from gemma_keras_tune.adapters.active import (
    active_adapter,
    list_adapters,
    remove_adapter,
    use_adapter,
)
from gemma_keras_tune.adapters.bases import wrong_base
from gemma_keras_tune.adapters.lora import lora_config
from gemma_keras_tune.adapters.reading import load_adapter
from gemma_keras_tune.errors import ExportError, GemmaTuneError, LoadError
from gemma_keras_tune.exporting.llama_cpp import NotRunError, open_runtime
from gemma_keras_tune.exporting.receipts import MAX_NEW_TOKENS, Receipt, answer_texts
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.templates import read_sidecar
from gemma_keras_tune.loading.loader import load

_WORKER = pathlib.Path(__file__).with_name("foreign.py")
_TIMEOUT = 3600
# The recorded tokens are looked for among this many of the most probable ones.
_LOOKED_AT = 64

Base: TypeAlias = "keras.Model | str | os.PathLike[str] | None"


class WrongBaseError(ExportError):
    """A `base` that the adapter does not belong on; the adapter itself may be sound."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """The answer of a runtime to one prompt.

    Attributes:
        ids: Token ids of the prompt.
        answer_ids: Token ids of the greedy answer.
        logits: Logits, up to one constant, that the tokens of the receipt have as the first of the
            answer. NaN for a token far from the most probable; `None` if the runtime gives none.
    """

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    logits: tuple[float, ...] | None


Asked = tuple[str, list[Answered]]


def ask(path: pathlib.Path, receipt: Receipt, *, base: Base = None) -> Asked:
    """Let the runtime of an export's format answer the prompts of its receipt.

    Args:
        path: The export.
        receipt: Its receipt.
        base: For an adapter, the model it belongs on.

    Returns:
        The runtime's name, and an `Answered` for each recording.

    Raises:
        NotRunError: The runtime is not installed, or `base` is missing.
        WrongBaseError: The adapter does not belong on the base.
        ExportError: The runtime fails on the export.
    """
    return _RUNTIMES[receipt.format](path, receipt, base)


# Some runtimes need other versions of the packages of this library. These variables name the Python
# of an environment that has them.
_PYTHONS = {"gemma_jax": "GEMMA_JAX_PYTHON", "litert": "LITERT_PYTHON"}


def _foreign(runtime: str) -> Callable[[pathlib.Path, Receipt, Base], Asked]:
    def run(path: pathlib.Path, receipt: Receipt, base: Base) -> Asked:
        python = os.environ.get(_PYTHONS.get(runtime, ""))
        with tempfile.TemporaryDirectory() as folder:
            request, answer = (pathlib.Path(folder, name) for name in ("asked", "answer"))
            request.write_text(json.dumps(_request(path, receipt, base)), encoding="utf-8")
            _ask_process(python or sys.executable, runtime, [request, answer], path)
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        if "missing" in found:
            raise NotRunError(f"{runtime} is not installed: {found['missing']}")
        return found["runtime"], [
            Answered(
                tuple(one["ids"]),
                tuple(one["answer_ids"]),
                None if one["logits"] is None else tuple(one["logits"]),
            )
            for one in found["answers"]
        ]

    return run


def _ask_process(
    python: str, runtime: str, files: Sequence[pathlib.Path], path: pathlib.Path
) -> None:
    try:
        done = subprocess.run(
            [python, "-P", str(_WORKER), runtime, *files],
            # This process holds the accelerator.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"{runtime} did not answer the prompts of {path} within {_TIMEOUT:,} seconds."
        ) from error
    except OSError as error:
        raise ExportError(f"{runtime} cannot be asked: {python} cannot be run: {error}") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        code = f"it ended with exit code {done.returncode}"
        raise ExportError(f"{runtime} cannot open {path}.", last or [code])


def _request(path: pathlib.Path, receipt: Receipt, base: Any) -> Mapping[str, Any]:
    on = {"base": os.path.abspath(base)} if receipt.format == "adapter" else {}
    return on | {
        "path": str(path.absolute()),
        "stop_token_ids": receipt.stop_token_ids,
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompts": [
            {
                "text": one.text,
                "ids": one.ids,
                "top_ids": one.top_ids,
                "answer": one.answer,
                "answer_ids": one.answer_ids,
            }
            for one in receipt.recordings
        ],
    }


def _llama_cpp(path: pathlib.Path, receipt: Receipt, base: Base) -> Asked:
    options: dict[str, Any] = {}
    if receipt.format == "gguf_adapter":
        if base is None:
            raise NotRunError("pass the GGUF file of its base as `base`")
        path, options["adapter"] = _gguf_base(base, receipt), _adapter_file(path, receipt)
    longest = max(len(one.ids) for one in receipt.recordings) + MAX_NEW_TOKENS
    runtime = open_runtime(path, context_length=max(512, 2 * longest), **options)
    try:
        answers = []
        for one in receipt.recordings:
            ids = list(one.ids)
            logits = runtime.next_logits(ids)
            known = [int(i) for i in one.top_ids if i < len(logits)]
            answers.append(
                Answered(
                    tuple(runtime.tokenize(one.text)),
                    tuple(runtime.generate(ids, MAX_NEW_TOKENS)),
                    tuple(float(logits[i]) for i in known),
                )
            )
    finally:
        runtime.close()
    return runtime.name, answers


def _gguf_base(base: Any, receipt: Receipt) -> pathlib.Path:
    """Find the file of the base, and check it before llama.cpp opens it."""
    from gemma_keras_tune.formats.gguf.reader import read_header

    if not isinstance(base, (str, os.PathLike)):
        raise WrongBaseError(f"`base` of a GGUF adapter is a GGUF file. Received: {base!r:.80}")
    path = pathlib.Path(base).expanduser()
    if not path.exists():
        raise WrongBaseError(f"`base`: there is no file or folder {path}.")
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise WrongBaseError(f"`base`: {path} must hold one .gguf file. Found: {len(files)}")
    try:
        metadata = read_header(files[0]).metadata
    except LoadError as error:
        raise _unusable(error) from error
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise WrongBaseError(f"`base`: {files[0]} holds no model, but: {kind!r}")
    _check_family(str(metadata.get("general.architecture")), receipt)
    return files[0]


def check_receipt(path: pathlib.Path, receipt: Receipt) -> None:
    """Refuse a receipt of an export that this library does not write.

    Args:
        path: The export.
        receipt: Its receipt.

    Raises:
        ExportError: Its format is unknown, or it lacks a file that the format needs.
    """
    if receipt.format not in _RUNTIMES:
        raise ExportError(
            f"The receipt of {path} has a format this library does not write.",
            [f"format must be one of {tuple(_RUNTIMES)}. Received: {receipt.format!r:.80}"],
        )
    if receipt.format == "gguf_adapter":
        _adapter_file(path, receipt)


def _adapter_file(path: pathlib.Path, receipt: Receipt) -> pathlib.Path:
    files = [file.path for file in receipt.files if file.path.endswith(".gguf")]
    if len(files) != 1:
        raise ExportError(
            f"The receipt of {path} is that of a GGUF adapter, and must name one .gguf file. "
            f"Found: {len(files)}"
        )
    return path if path.is_file() else path / files[0]


def _unusable(error: GemmaTuneError) -> WrongBaseError:
    return WrongBaseError(f"`base`: {error.headline}", error.problems, error.next_step)


def _check_family(found: str, receipt: Receipt) -> None:
    if found != receipt.family:
        raise WrongBaseError(
            f"`base`: the adapter was trained on {receipt.family}. Received: {found}"
        )


def _adapter(path: pathlib.Path, receipt: Receipt, base: Base) -> Asked:
    """Ask PEFT if the base is a Hugging Face folder, and this library otherwise."""
    if isinstance(base, (str, os.PathLike)) and is_hugging_face(pathlib.Path(base)):
        config = json.loads(pathlib.Path(base, "config.json").read_text(encoding="utf-8"))
        _check_family(str(config["model_type"]).removesuffix("_text"), receipt)
        with contextlib.suppress(NotRunError):
            return _foreign("transformers")(path, receipt, base)
    return _this_library(path, receipt, base)


def is_hugging_face(folder: pathlib.Path) -> bool:
    """Return whether a folder holds a model as transformers saves it."""
    with contextlib.suppress(OSError, ValueError):
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return False


def _this_library(path: pathlib.Path, receipt: Receipt, base: Base) -> Asked:
    if base is None:
        raise NotRunError("pass the model it belongs on as `base`")
    model = _base_model(base, path, receipt)
    name = "adapter to check"
    while name in list_adapters(model):
        name += "'"
    with use_adapter(model, active_adapter(model)):
        load_adapter(model, path, name=name)
        try:
            texts = [one.text for one in receipt.recordings]
            found = answer_texts(model, texts, receipt.stop_token_ids, top=_LOOKED_AT)
        finally:
            remove_adapter(model, name)
    answers = []
    for one, other in zip(receipt.recordings, found, strict=True):
        by_id = dict(zip(other.top_ids, other.top_logits, strict=True))
        logits = tuple(by_id.get(i, float("nan")) for i in one.top_ids)
        answers.append(Answered(other.ids, other.answer_ids, logits))
    version = importlib.metadata.version("gemma-keras-tune")
    return f"gemma_keras_tune {version}", answers


def _base_model(base: Any, path: pathlib.Path, receipt: Receipt) -> keras.Model:
    """Load the base, and check that the adapter belongs on it."""
    try:
        model = load(base)
        family = family_of(model)
    except GemmaTuneError as error:
        raise _unusable(error) from error
    _check_family(family.name, receipt)
    if lora_config(model) is None and any(n.layer.lora_enabled for n in family.linears(model)):
        raise WrongBaseError(
            "`base`: Keras's own LoRA is on it.",
            next_step="Load the base anew, without `enable_lora` of Keras or KerasHub.",
        )
    different = wrong_base(model, read_sidecar(path))
    if different:
        raise WrongBaseError(f"`base`: {different}.")
    return model


_RUNTIMES: Mapping[str, Callable[[pathlib.Path, Receipt, Base], Asked]] = {
    "keras": _foreign("keras_hub"),
    "safetensors": _foreign("transformers"),
    "gguf": _llama_cpp,
    "gguf_adapter": _llama_cpp,
    "ollama": _llama_cpp,
    "gemma_jax": _foreign("gemma_jax"),
    "litert": _foreign("litert"),
    "adapter": _adapter,
}
