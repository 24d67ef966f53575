"""Adapters as other tools keep them, read into one form.

| Layout | Where it stands | Written by |
| --- | --- | --- |
| `peft` | `adapter_config.json`, `adapter_model.safetensors` | this library, PEFT, TRL, Unsloth |
| `mlx` | `adapter_config.json`, `adapters.safetensors` | mlx-lm |
| `keras_hub` | a file that ends in `.lora.h5` | KerasHub's `save_lora_weights` |
| `gemma_jax` | an Orbax folder, or the tree itself | the Gemma library for JAX |

All of them hold, for a weight `[outputs, inputs]`, factors `A [rank, inputs]` and
`B [outputs, rank]` and a scale, in some order of axes. The ranks and scales may differ from layer
to layer; `Adapter` holds one of each, as every runtime takes it: smaller ranks are filled up with
zeros, which no training moves, and scales that differ are multiplied into `B`.
"""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import regex  # type: ignore[import-untyped]

from gemma_keras_tune._support.equality import ArrayEquality
from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune._support.packages import import_extra
from gemma_keras_tune.adapters._keras import layers_with_weights
from gemma_keras_tune.adapters.lora import LoraConfig, axis_sizes, kernel_shape, matrix_shape
from gemma_keras_tune.adapters.neighbours import ADAPTER_CONFIG, what_was_meant
from gemma_keras_tune.errors import AdapterError
from gemma_keras_tune.gemma.families import Family, Linear, Weight, family_of

CONFIG = ADAPTER_CONFIG
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
KERAS_HUB_ENDING = ".lora.h5"

_PICKLE = "adapter_model.bin"
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")
_PATTERN_SECONDS = 0.2
# Numbers from here on are no settings, and may not even be divided.
_HUGE = 10**9
# Of PEFT's settings, those that change what an adapter computes, or stand for weights beside it.
_NOT_PLAIN = (
    "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Modules that may stand beside the factors, if they are the base's own.
_EMBEDDING = ("embed_tokens", "lm_head")
# The others, such as PiSSA, change the base weights that the factors stand beside.
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True, eq=False)
class Factors(ArrayEquality):
    """Update of one `[outputs, inputs]` weight by an adapter: `scale * b @ a`.

    Attributes:
        a: `[rank, inputs]`, float32.
        b: `[outputs, rank]`, float32.
        scale: Factor on their product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in the form this library puts on a model.

    Attributes:
        layout: `"peft"`, `"mlx"`, `"keras_hub"` or `"gemma_jax"`.
        config: Its settings; `total_parameters` is 0, as the base counts them.
        factors: `A [rank, inputs]` and `B [outputs, rank]` by full Hugging Face module name, of
            every layer of the target_modules.
        base: What the file says it was trained on, or `None`.
        problems: What does not fit the model, or cannot be done; empty where it can be used.
    """

    layout: str
    config: LoraConfig
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    base: str | None = None
    problems: tuple[str, ...] = ()


@dataclasses.dataclass
class _Reading:
    """Factors of an adapter by Hugging Face module name, and the problems of its files."""

    layout: str
    factors: dict[str, Factors] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    base: str | None = None


def read_adapter(source: str | os.PathLike[str] | Mapping[str, Any], model: keras.Model) -> Adapter:
    """Read an adapter in any known layout; the model is only looked at.

    Args:
        source: A folder, a `.lora.h5` file, or the nested dictionary of LoRA parameters that the
            Gemma library for JAX trains.
        model: The KerasHub Gemma it shall go on.

    Returns:
        The `Adapter`, with its `problems`.

    Raises:
        AdapterError: It is in no known layout, or a file is broken.
    """
    if isinstance(source, Mapping):
        return _uniform(_from_jax_tree(source, model), model)
    path = pathlib.Path(source).expanduser()
    if path.name.endswith(KERAS_HUB_ENDING) and path.is_file():
        reading = _read_keras_hub(path, model)
    elif (path / MLX_WEIGHTS).is_file():
        reading = _read_mlx(path, model)
    elif (path / PEFT_WEIGHTS).is_file() and (path / CONFIG).is_file():
        reading = _read_peft(path, model)
    elif orbax := _orbax_folder(path):
        reading = _from_jax_tree(_restore(orbax, model), model)
    else:
        raise _unknown(path)
    return _uniform(reading, model)


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse values that are not finite numbers.

    Args:
        tensors: Arrays by name.

    Raises:
        AdapterError: Some are NaN or infinite.
    """
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise AdapterError("The adapter holds values that are not finite numbers.", broken)


def _unknown(path: pathlib.Path) -> AdapterError:
    if not path.exists():
        return AdapterError(f"There is no adapter at {path}: it is missing.")
    if path.name in (PEFT_WEIGHTS, MLX_WEIGHTS, CONFIG) and path.is_file():
        return AdapterError(
            f"{path} is one file of an adapter.", next_step=f"Pass its folder: {path.parent}"
        )
    problems = [f"{path / name} is missing" for name in (CONFIG, PEFT_WEIGHTS)
                if not (path / name).is_file()]  # fmt: skip
    if (path / _PICKLE).is_file():
        problems.append(f"{path / _PICKLE} is a pickle, which may run code when it is opened")
    return AdapterError(
        f"{path} does not hold an adapter in PEFT's layout, nor in mlx-lm's, KerasHub's "
        f"({KERAS_HUB_ENDING}) or that of the Gemma library for JAX.",
        problems,
        (what_was_meant(path, "adapter") if path.is_dir() else None)
        or "Pass what `save_adapter`, PEFT's `save_pretrained(…, safe_serialization=True)`, mlx-lm "
        "or `save_lora_weights` wrote.",
    )


# Shared by the readers.


def _read_factors(
    path: pathlib.Path, pattern: re.Pattern[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors that are factors, as float32, and the names of the others, which are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as opened:
            names = list(opened.keys())
            factors = {n: opened.get_tensor(n) for n in names if pattern.fullmatch(n)}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return _as_float32(factors), [name for name in names if name not in factors]


def _no_factor(name: str) -> str:
    return f"{name}: it is no factor of LoRA on a linear layer"


def _as_float32(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The factors as float32, which may not overflow."""
    found = {}
    for name, value in tensors.items():
        array = np.asarray(value)
        if array.dtype.kind in "cbOUSM":
            raise AdapterError(f"{name}: expected numbers. Received: {array.dtype}")
        with np.errstate(over="ignore"):
            found[name] = array.astype("float32")
    check_finite(found)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _HUGE


def _place(module: str) -> str:
    """Return the part of a name after `layers.`: tools differ in the part before it."""
    return "" if "vision" in module or "audio" in module else module.partition("layers.")[2]


def _places(family: Family, model: keras.Model) -> tuple[dict[str, Linear], set[str]]:
    """The linear layers by place, and the places of those that the model never runs."""
    linears = {_place(linear.hugging_face): linear for linear in family.linears(model)}
    unused = {
        _place(weight.hugging_face).removesuffix(".weight")
        for weight in family.weights(model)
        if weight.spec.kind == "linear" and not weight.used
    }
    return linears, unused


def _pair_up(
    tensors: Mapping[str, np.ndarray], pattern: re.Pattern[str], problems: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors by module and by kind, `a` or `b`."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            problems.append(_no_factor(key))
        else:
            modules.setdefault(match["module"], {})[match["kind"].lower()] = value
    return modules


def _add_matrices(
    reading: _Reading,
    modules: Mapping[str, Mapping[str, np.ndarray]],
    ranks: Mapping[str, tuple[int, float]],
    model: keras.Model,
) -> None:
    """Take factors `A [rank, inputs]`, `B [outputs, rank]` that stand under module names."""
    linears, unused = _places(family_of(model), model)
    rows = family_of(model).weights(model)
    others = {_place(row.hugging_face).removesuffix(".weight") for row in rows}
    for module, pair in modules.items():
        linear = linears.get(_place(module))
        idle = any(not value.any() for value in pair.values())
        if linear is None:
            # Factors no training moved, such as those of a tower that saw no picture.
            if _place(module) not in unused and not (idle and len(pair) == 2):
                reading.problems.append(
                    f"{module}: LoRA of this library cannot stand there. Train with "
                    f"`target_modules={sorted({one.target for one in linears.values()})}`"
                    if _place(module) in others - {""}
                    else f"{module}: this model has no such layer"
                )
            continue
        name = linear.hugging_face
        if name in reading.factors:
            reading.problems.append(f"{module}: it is there twice")
        rank, scale = ranks[module]
        outputs, inputs = matrix_shape(linear)
        expected = {"a": (rank, inputs), "b": (outputs, rank)}
        stated = "`lora_parameters`" if reading.layout == "mlx" else "`r` and `rank_pattern`"
        wrong = [
            f"{module}.lora_{kind.upper()}: expected shape {expected[kind]} by {stated} of "
            f"{CONFIG}. Received: {value.shape}"
            for kind, value in pair.items()
            if value.shape != expected[kind]
        ]
        if len(pair) < 2:
            wrong.append(f"{module}: only one of its two factors is there")
        reading.problems += wrong
        if not wrong:
            reading.factors[name] = Factors(pair["a"], pair["b"], scale)


# PEFT.

_PEFT_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<kind>[AB])"
                       r"(?:\.default)?\.weight")  # fmt: skip


def _read_peft(folder: pathlib.Path, model: keras.Model) -> _Reading:
    config = read_json_object(folder / CONFIG, AdapterError)
    if not _is_rank(config.get("r")):
        raise AdapterError(f"{folder / CONFIG} cannot be read: it has no positive integer `r`")
    problems = _malformed(config)
    if problems:
        raise AdapterError(f"{folder / CONFIG} cannot be read.", problems)
    reading = _Reading("peft", problems=_unsupported(config))
    reading.rank, reading.use_rslora = config["r"], bool(config.get("use_rslora"))
    reading.alpha = _alpha(config)
    base = config.get("base_model_name_or_path")
    reading.base = base if isinstance(base, str) and base else None
    factors, others = _read_factors(folder / PEFT_WEIGHTS, _PEFT_KEY)
    reading.problems += _modules_beside(config, others)
    reading.problems += _other_tensors(folder / PEFT_WEIGHTS, others, model)
    modules = _pair_up(factors, _PEFT_KEY, reading.problems)
    ranks = {module: _peft_rank(config, module) for module in modules}
    _add_matrices(reading, modules, ranks, model)
    reading.problems += _contradictions(config, modules, model)
    return reading


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """Settings of another type than PEFT's."""
    problems = []

    def expect(name: str, wanted: str, good: bool) -> None:
        if config.get(name) is not None and not good:
            problems.append(f"{name}: expected {wanted}. Received: {config[name]!r}")

    def texts(value: Any) -> bool:
        return isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(text, str) for text in value)
        )

    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        expect(name, "a text or a list of texts", texts(config.get(name)))
    layers = config.get("layers_to_transform")
    layers = layers if isinstance(layers, list) else [layers]
    expect("layers_to_transform", "integers", all(isinstance(layer, int) for layer in layers))
    expect("lora_alpha", "a number", _is_number(config.get("lora_alpha")))
    for name, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(name)
        fine = isinstance(pattern, dict) and all(good(value) for value in pattern.values())
        expect(name, "numbers by module name", fine)
    return problems


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type must be 'LORA'. Received: {config.get('peft_type')!r}")
    for name in _NOT_PLAIN:
        if config.get(name):
            problems.append(f"{name}={config[name]!r} is not supported")
    if config.get("bias", "none") not in ("none", None):
        problems.append(f"bias={config['bias']!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(
            f"init_lora_weights={start!r} changes the base: convert the adapter to plain LoRA with "
            "PEFT's `save_pretrained(…, path_initial_model_for_weight_conversion=…)`"
        )
    return problems


def _matches(pattern: str, text: str) -> bool:
    try:
        return bool(regex.fullmatch(pattern, text, timeout=_PATTERN_SECONDS))
    except (regex.error, TimeoutError, RecursionError, OverflowError, ValueError) as error:
        raise AdapterError(
            f"{CONFIG}: the pattern {pattern!r} cannot be used: {error or type(error).__name__}"
        ) from error


def _alpha(config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    return float(config["r"] if alpha is None else alpha)


def _peft_rank(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of one module: the first pattern that fits the end of its name counts."""

    def of(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if _matches(rf"(.*\.)?({pattern})", module):
                return value
        return default

    rank = of(config.get("rank_pattern"), config["r"])
    alpha = of(config.get("alpha_pattern"), _alpha(config))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _contradictions(
    config: Mapping[str, Any], modules: Iterable[str], model: keras.Model
) -> list[str]:
    """Modules that stand in only one of the configuration and the weights."""
    target_modules = config.get("target_modules")
    if target_modules is None or (
        isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    ):
        return []
    linears, _ = _places(family_of(model), model)
    there = {_place(module): module for module in modules}
    prefixes = {module[: -len(place)] for place, module in there.items() if place in linears}
    problems = []
    for place, linear in linears.items():
        names = [there[place]] if place in there else [prefix + place for prefix in prefixes]
        if any(_is_target(config, name) for name in names) == (place in there):
            continue
        problems.append(
            f"{there[place]}: `target_modules` of {CONFIG} leave it out, so PEFT would too"
            if place in there
            else f"{linear.hugging_face}: the adapter has no factors for it"
        )
    return problems


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell if PEFT puts LoRA on a module of this name."""
    excluded, target_modules = config.get("exclude_modules") or [], config["target_modules"]
    if _is_named(excluded, module):
        return False
    if isinstance(target_modules, str) or module in target_modules:
        return _is_named(target_modules, module)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return _is_named(target_modules, module)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = layers if isinstance(layers, list) else [layers]
    return _is_named(target_modules, module) and any(
        _layer_number(pattern, module) in numbers for pattern in patterns
    )


def _is_named(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return _matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer_number(pattern: str, module: str) -> int | None:
    """The first number behind a name that fits."""
    parts = module.split(".")
    for name, number in itertools.pairwise(parts):
        if number.isdigit() and _matches(pattern, name):
            return int(number)
    return None


# Weights beside the factors: PEFT adds the embedding where its size, or its name, looks changed.

_EMBEDDING_KEY = re.compile(
    rf"(.*\.)?({'|'.join(_EMBEDDING)})(\.modules_to_save(\.default)?|\.base_layer)?\.weight"
)
_ROWS = 4096


def _modules_beside(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Refuse modules trained beside the factors, but for an embedding, whose values tell."""
    saved = config.get("modules_to_save")
    there = {match[2] for name in names if (match := _EMBEDDING_KEY.fullmatch(name))}
    if not saved or (isinstance(saved, list) and all(str(name) in there for name in saved)):
        return []
    return [f"modules_to_save={saved!r} is not supported"]


def _other_tensors(path: pathlib.Path, names: Sequence[str], model: keras.Model) -> list[str]:
    """Name the tensors that are neither factors nor the embedding of the base as it is."""
    from safetensors import safe_open

    problems = [_no_factor(name) for name in names if not _EMBEDDING_KEY.fullmatch(name)]
    embedding = family_of(model).head(model).embedding
    with safe_open(path, "np") as opened:
        for name in names:
            if not _EMBEDDING_KEY.fullmatch(name):
                continue
            stored = opened.get_slice(name)
            shape, expected = tuple(stored.get_shape()), tuple(embedding.shape)
            if shape != expected:
                problems.append(
                    f"{name}: its shape is {shape}, and the base's {expected}: tokens were added, "
                    "or it was trained on another base"
                )
                continue
            changed = _changed_rows(stored, embedding)
            if changed:
                problems.append(
                    f"{name}: the embedding was trained too ({changed:,} of {shape[0]:,} rows are "
                    "not those of this base), and an adapter here is LoRA alone. Merge it in PEFT "
                    "with `merge_and_unload()`, and load that model"
                )
    return problems


def _changed_rows(stored: Any, embedding: keras.Variable) -> int:
    """Count rows that differ by more than rounding to the coarser dtype of the two."""
    changed = 0
    for start in range(0, embedding.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, embedding.shape[0]))
        theirs, ours = stored[rows], np.asarray(embedding.value[rows])
        coarse = min((theirs.dtype, ours.dtype), key=lambda dtype: _PRECISION.get(dtype.name, 0))
        same = theirs.astype("float32").astype(coarse) == ours.astype("float32").astype(coarse)
        changed += int((~same.all(axis=1)).sum())
    return changed


# Bits of the mantissa.
_PRECISION = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


# mlx-lm.

_MLX_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[ab])")


def _read_mlx(folder: pathlib.Path, model: keras.Model) -> _Reading:
    path = folder / CONFIG
    config = read_json_object(path, AdapterError)
    settings = config.get("lora_parameters")
    rank, scale = (settings.get(n) if isinstance(settings, dict) else None
                   for n in ("rank", "scale"))  # fmt: skip
    if not (_is_rank(rank) and _is_number(scale)):
        raise AdapterError(f"{path} cannot be read: `lora_parameters` lack `rank` and `scale`")
    assert isinstance(rank, int)
    assert scale is not None
    reading = _Reading("mlx")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        reading.problems.append(f"fine_tune_type={kind!r} is not supported")
    factors, others = _read_factors(folder / MLX_WEIGHTS, _MLX_KEY)
    reading.problems += map(_no_factor, others)
    modules = _pair_up(factors, _MLX_KEY, reading.problems)
    turned = {
        module: {kind: value.T for kind, value in pair.items()} for module, pair in modules.items()
    }
    _add_matrices(reading, turned, dict.fromkeys(modules, (rank, float(scale))), model)
    return reading


# KerasHub.


def _read_keras_hub(path: pathlib.Path, model: keras.Model) -> _Reading:
    import h5py

    reading = _Reading("keras_hub")
    linears = {id(linear.layer): linear for linear in family_of(model).linears(model)}
    layers = layers_with_weights(getattr(model, "backbone", model))
    try:
        with h5py.File(path, "r") as file:
            store = file["lora"]
            rank = _stored_rank(store["vars/rank"])
            for number in (name for name in store if name != "vars"):
                place = int(number)
                layer = layers[place] if 0 <= place < len(layers) else None
                where = f"layer {number} of {path.name} ({getattr(layer, 'path', 'none here')})"
                values = store[number]["vars"]
                a, b = values["lora_kernel_a"], values["lora_kernel_b"]
                linear = linears.get(id(layer))
                if linear is None:
                    if b.size > _MAX_IDLE or np.any(b[()]):
                        reading.problems.append(f"{where}: LoRA of this library cannot stand there")
                    continue
                # Before they are read: a small file may claim to hold anything.
                kernel = kernel_shape(linear.layer)
                expected = ((*kernel[:-1], rank), (rank, kernel[-1]))
                if (a.shape, b.shape) != expected:
                    reading.problems.append(
                        f"{where}: expected shapes {expected[0]} and {expected[1]}. "
                        f"Received: {a.shape} and {b.shape}"
                    )
                    continue
                both = _as_float32({f"{where}: a": a[()], f"{where}: b": b[()]})
                reading.factors[linear.hugging_face] = _from_keras(linear, *both.values())
    except AdapterError:
        raise
    except _H5_ERRORS as error:
        raise AdapterError(f"{path} cannot be read as KerasHub's LoRA weights: {error}") from error
    return reading


# What h5py raises on damaged files, and numpy on values that are no numbers.
_H5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError,
              OverflowError)  # fmt: skip
_MAX_IDLE = 1 << 24


def _stored_rank(stored: Any) -> int:
    """The rank; its size is looked at first, as a small file may claim to hold anything."""
    if stored.shape != () or stored.dtype.kind not in "iu":
        raise ValueError(f"its rank is no integer: {stored.dtype} of shape {stored.shape}")
    rank = int(stored[()])
    if not _is_rank(rank):
        raise ValueError(f"its rank is {rank}")
    return rank


def _from_keras(linear: Linear, a: np.ndarray, b: np.ndarray) -> Factors:
    """Factors of Keras's own LoRA, which splits off the kernel's last axis.

    On a kernel `[heads, inputs, head_dim]` every head has an `A` of its own and all share `B`. One
    pair of matrices then takes `heads` times the rank: the `A`s below each other, `B` repeated.
    """
    rank = b.shape[0]
    if len(linear.output_axes) == 1:
        return Factors(a.reshape(-1, rank).T, b.T)
    heads = a.shape[0]
    stacked = a.transpose(0, 2, 1).reshape(heads * rank, -1)
    return Factors(stacked, np.kron(np.eye(heads, dtype="float32"), b.T))


# The Gemma library for JAX.

_JAX_KEY = re.compile(r"(?:.*/)?(?P<module>layer_\d+/.+)/lora/(?P<kind>[ab])")


def _orbax_folder(path: pathlib.Path) -> pathlib.Path | None:
    for folder in (path, path / "params"):
        if any((folder / name).is_file() for name in _ORBAX):
            return folder
    return None


def _restore(folder: pathlib.Path, model: keras.Model) -> Mapping[str, Any]:
    orbax = import_extra("orbax.checkpoint", "gemma-jax", "Orbax checkpoints", AdapterError)
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            _check_sizes(checkpointer.metadata(folder.absolute()).item_metadata.tree, model)
            tree = checkpointer.restore(folder.absolute())
        if not isinstance(tree, Mapping):
            raise ValueError("it holds no tree of parameters")
    except AdapterError:
        raise
    except Exception as error:  # Orbax fails in many ways on damaged files.
        raise AdapterError(f"{folder} cannot be read as an Orbax checkpoint: {error}") from error
    return tree


def _check_sizes(tree: Any, model: keras.Model) -> None:
    """Before anything is read: a small checkpoint may claim to hold arrays of any size."""
    most = max(math.prod(weight.variable.shape) for weight in family_of(model).weights(model))
    problems = [
        f"{'/'.join(map(str, path))}: shape {tuple(leaf.shape)} is larger than any weight here"
        for path, leaf in keras.tree.flatten_with_path(tree)
        if math.prod(leaf.shape) > most
    ]
    if problems:
        raise AdapterError("The checkpoint does not fit this model.", problems)


def _from_jax_tree(tree: Mapping[str, Any], model: keras.Model) -> _Reading:
    reading = _Reading("gemma_jax")
    family = family_of(model)
    # Its LoRA does not know the layers of its own Gemma 3n and 4.
    if family.jax is None or not family.jax.reads_adapters:
        raise AdapterError(
            f"Adapters of the Gemma library for JAX are read for Gemma 2 and 3, this is "
            f"{family.title}.",
            next_step="Bring it as a PEFT adapter.",
        )
    leaves = _as_float32(
        {"/".join(map(str, path)): leaf for path, leaf in keras.tree.flatten_with_path(tree)}
    )
    modules = {
        # The wrapper's name stands below an einsum's, or holds that of the weight.
        re.sub(r"/_LoRA\w*_0$", "", re.sub(r"/_LoRAEinsum_(?!0$)", "/", module)): pair
        for module, pair in _pair_up(leaves, _JAX_KEY, reading.problems).items()
    }
    linears = {id(linear.layer): linear for linear in family.linears(model)}
    holders = collections.defaultdict(list)
    for weight in family.weights(model):
        if weight.jax is not None and id(weight.layer) in linears:
            holders[weight.jax.removesuffix("/w")].append(weight)
    for module, pair in modules.items():
        if module not in holders:
            if len(pair) < 2 or all(value.any() for value in pair.values()):
                reading.problems.append(f"{module}: this model has no such layer")
        elif len(pair) < 2:
            reading.problems.append(f"{module}: only one of its two factors is there")
        else:
            _add_jax(reading, module, pair, holders[module], linears)
    return reading


def _add_jax(
    reading: _Reading,
    module: str,
    pair: Mapping[str, np.ndarray],
    weights: Sequence[Weight],
    linears: Mapping[int, Linear],
) -> None:
    """Factors `a [*inputs, rank]`, `b [rank, *outputs]`; weights held in one tensor share `a`."""
    a, b = pair["a"], pair["b"]
    rank = a.shape[-1] if a.ndim else 0
    together = (len(weights),) if len(weights) > 1 else ()
    outputs, inputs = axis_sizes(linears[id(weights[0].layer)])
    expected = ((*inputs, rank), (rank, *together, *outputs))
    if rank < 1 or (a.shape, b.shape) != expected:
        reading.problems.append(
            f"{module}: expected a {(*inputs, 'rank')} and b {('rank', *together, *outputs)}. "
            f"Received: a {a.shape}, b {b.shape}"
        )
        return
    for weight in weights:
        piece = weight.spec.jax_part
        own = b if piece is None else b[:, piece.index]
        name = linears[id(weight.layer)].hugging_face
        reading.factors[name] = Factors(a.reshape(-1, rank).T, own.reshape(rank, -1).T)


# One rank and one scale.


def _uniform(reading: _Reading, model: keras.Model) -> Adapter:
    linears = {linear.hugging_face: linear for linear in family_of(model).linears(model)}
    found = {name: _compact(factors) for name, factors in reading.factors.items()}
    target_modules = {linears[name].target for name in found}
    adapted = {name: one for name, one in linears.items() if one.target in target_modules}
    rank = max((factors.a.shape[0] for factors in found.values()), default=0)
    problems = reading.problems or ([] if found else ["it holds no factors"])
    for name, linear in adapted.items():
        most = min(matrix_shape(linear))
        if rank > most:
            problems.append(f"{name}: the adapter needs rank {rank}, here it can be at most {most}")
    scales = {factors.scale for factors in found.values()}
    alpha, stabilized, fold = _scale(reading, rank, scales)
    padded = {
        name: _padded(found.get(name), linear, rank, fold=fold) for name, linear in adapted.items()
    }
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(sorted(target_modules)),
        use_rslora=stabilized,
        parameters=sum(a.size + b.size for a, b in padded.values()),
        total_parameters=0,
    )
    return Adapter(reading.layout, config, padded, reading.base, tuple(problems))


def _compact(factors: Factors) -> Factors:
    """A rank above the weight's own sides says nothing more: one factor becomes the identity."""
    rank, inputs = factors.a.shape
    outputs = factors.b.shape[0]
    if rank <= min(outputs, inputs):
        return factors
    product = factors.b @ factors.a
    if inputs <= outputs:
        return Factors(np.eye(inputs, dtype="float32"), product, factors.scale)
    return Factors(product, np.eye(outputs, dtype="float32"), factors.scale)


def _scale(reading: _Reading, rank: int, scales: set[float]) -> tuple[float, bool, bool]:
    """Alpha, whether it is divided by the root of the rank, and whether `B` takes the scales."""
    common = scales.pop() if len(scales) == 1 else 0.0
    if common <= 0:
        return float(max(rank, 1)), False, True
    if rank == reading.rank and reading.alpha:
        divisor = math.sqrt(rank) if reading.use_rslora else rank
        if reading.alpha / divisor == common:
            return reading.alpha, reading.use_rslora, False
    return common * rank, False, False


def _padded(
    factors: Factors | None, linear: Linear, rank: int, *, fold: bool
) -> tuple[np.ndarray, np.ndarray]:
    outputs, inputs = matrix_shape(linear)
    a, b = np.zeros((rank, inputs), "float32"), np.zeros((outputs, rank), "float32")
    if factors is not None:
        own = factors.a.shape[0]
        a[:own] = factors.a
        b[:, :own] = factors.b * np.float32(factors.scale if fold else 1.0)
    return a, b
