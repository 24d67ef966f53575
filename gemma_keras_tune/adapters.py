"""Save what was tuned: a merged KerasHub preset, or an adapter in PEFT's layout.

Whatever is saved holds weights derived from Gemma, and is under the Gemma terms of use.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._files import new_folder
from gemma_keras_tune.errors import AdapterError
from gemma_keras_tune.families import Linear, family_of, fingerprint, is_instruct, origin_of
from gemma_keras_tune.lora import LoraConfig
from gemma_keras_tune.receipts import record, write_receipt
from gemma_keras_tune.switching import ACTIVE, DEFAULT, Active, adapter_factors, add_adapter
from gemma_keras_tune.templates import (
    read_sidecar,
    read_template,
    template_of,
    write_sidecar,
)

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def save_preset(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: bool = False,
) -> pathlib.Path:
    """Save the model as a KerasHub preset, LoRA merged in.

    `keras_hub.models.CausalLM.from_preset(path)` loads it in a process without this library. The
    template and its stop tokens are recorded beside the weights, in `gemma_keras_tune.json`, and
    the files' hashes in `receipt.json`. The model in memory keeps its LoRA. The preset is under
    the Gemma terms of use.

    Args:
        model: A KerasHub Gemma.
        path: The folder to make.
        overwrite: Whether to replace an existing folder.
        prompts: What to record answers to; `None` takes a few general prompts.
        check: Whether to record answers, to which `verify` holds what was saved.

    Returns:
        The folder.

    Raises:
        ExportError: The folder exists.
    """
    stored = str(family_of(model).head(model).embedding.dtype)
    with new_folder(path, overwrite=overwrite) as folder:
        write_preset(model, folder)
        recordings = record(model, prompts) if check else ()
        write_receipt(model, folder, format="keras", dtype=stored, recordings=recordings)
    return pathlib.Path(path)


def write_preset(model: keras.Model, folder: pathlib.Path) -> None:
    """Write the files of `save_preset` into an existing folder."""
    model.save_to_preset(str(folder))
    write_record(model, folder)


def save_adapter(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    name: str | Active = ACTIVE,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: bool = False,
) -> pathlib.Path:
    """Save the LoRA of a model in PEFT's layout, at the rank it was trained with.

    The folder holds `adapter_config.json`, `adapter_model.safetensors`, and this library's record:
    the base model's fingerprint, its generation, the template and the stop tokens; and a receipt
    with the files' hashes. It is under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma with LoRA on.
        path: The folder to make.
        name: One of `list_adapters(model)`; by default the one that is on.
        overwrite: Whether to replace an existing folder.
        prompts: What to record answers to; `None` takes a few general prompts.
        check: Whether to record answers, to which `verify` holds what was saved.

    Returns:
        The folder.

    Raises:
        AdapterError: LoRA is not on, or its weights are not finite.
        ExportError: The folder exists.
    """
    from safetensors.numpy import save_file

    config, factors = adapter_factors(model, name)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
    _check_finite(tensors)
    with new_folder(path, overwrite=overwrite) as folder:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(model, config), indent=2)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        write_record(model, folder)
        recordings = record(model, prompts) if check else ()
        write_receipt(model, folder, format="adapter", dtype="float32", recordings=recordings)
    return pathlib.Path(path)


def load_adapter(
    model: keras.Model, path: str | os.PathLike[str], *, name: str = DEFAULT
) -> LoraConfig:
    """Put an adapter in PEFT's layout on its base model, and switch to it.

    Adapters saved by this library, PEFT, TRL, Unsloth and Axolotl share the layout. Several may be
    on one base, each under a name; `set_adapter`, `use_adapter` and `generate(adapter=…)` switch
    between them. The template recorded with it is attached.

    Args:
        model: A KerasHub Gemma: the base the adapter was trained on.
        path: The adapter's folder.
        name: What to call it. An adapter of that name is replaced.

    Returns:
        The adapter's `LoraConfig`.

    Raises:
        AdapterError: A file is missing or broken, the adapter needs something this library cannot
            do, or it does not fit the model; every mismatch is listed and the model is unchanged.
    """
    folder = pathlib.Path(path)
    config, tensors = _read(folder)
    record = read_sidecar(folder)
    linears = {linear.hugging_face: linear for linear in family_of(model).linears(model)}
    factors, problems = _match(tensors, linears, int(config["r"]))
    problems = _unsupported(config) + _wrong_base(model, record) + problems
    targets = sorted({linears[name].target for name in factors})
    adapted = {name for name, linear in linears.items() if linear.target in targets}
    problems += [
        f"{name}: the adapter has no factors for it" for name in sorted(adapted - set(factors))
    ]
    if problems:
        raise AdapterError(f"The adapter in {folder} does not fit this model.", problems)
    own = LoraConfig(
        rank=int(config["r"]),
        alpha=float(config.get("lora_alpha", config["r"])),
        targets=tuple(targets),
        rank_stabilized=bool(config.get("use_rslora", False)),
        parameters=sum(a.size + b.size for a, b in factors.values()),
        total_parameters=0,
    )
    add_adapter(model, name, own, factors, read_template(folder))
    return adapter_factors(model, name)[0]


def write_record(model: keras.Model, folder: pathlib.Path) -> None:
    """Write this library's record: generation, base fingerprint, template and stop tokens."""
    template = template_of(model)
    entries: dict[str, Any] = {
        "generation": family_of(model).name,
        "base_fingerprint": fingerprint(model),
    }
    instruct = is_instruct(model)
    if instruct is not None:
        entries["instruct"] = instruct
    if template is not None:
        entries["template"] = template.to_config()
        entries["stop_tokens"] = list(template.stop_tokens)
    write_sidecar(folder, entries)


def _peft_config(model: keras.Model, config: LoraConfig) -> dict[str, Any]:
    origin = origin_of(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.source if origin else None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilized,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }


def _read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"{folder} does not hold an adapter in PEFT's layout.",
            [f"{folder / name} is missing" for name in missing],
            "Pass the folder that `save_adapter` or PEFT's `save_pretrained` wrote.",
        )
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("r"), int):
            raise ValueError("it has no integer `r`")
    except ValueError as error:
        raise AdapterError(f"{folder / _CONFIG} cannot be read: {error}") from error
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    _check_finite(tensors)
    return config, tensors


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise AdapterError("The adapter holds values that are not finite numbers.", broken)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type must be 'LORA'. Received: {config.get('peft_type')!r}")
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if config.get(name):
            problems.append(f"{name}={config[name]!r} is not supported")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r} is not supported")
    return problems


def _wrong_base(model: keras.Model, record: Mapping[str, Any]) -> list[str]:
    problems = []
    name, base = family_of(model).name, fingerprint(model)
    if record.get("generation", name) != name:
        problems.append(f"it was trained on {record['generation']}, this is {name}")
    if record.get("base_fingerprint", base) != base:
        problems.append(
            f"its base has the fingerprint {record['base_fingerprint']}, this model {base}"
        )
    return problems


def _match(
    tensors: Mapping[str, np.ndarray], linears: Mapping[str, Linear], rank: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Factors by Hugging Face module name, and everything that does not fit."""
    by_place = {name.partition("layers.")[2]: name for name in linears}
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, value in tensors.items():
        place, _, kind = key.partition("layers.")[2].removesuffix(".weight").rpartition(".lora_")
        vision = "vision" in key or "audio" in key
        if kind not in ("A", "B") or place not in by_place or vision:
            problems.append(f"{key}: this model has no such layer")
            continue
        linear = linears[by_place[place]]
        kernel = linear.layer.kernel.shape
        outputs = int(np.prod([kernel[axis] for axis in linear.output_axes]))
        inputs = int(np.prod([kernel[axis] for axis in linear.input_axes]))
        expected = (rank, inputs) if kind == "A" else (outputs, rank)
        if value.shape != expected:
            problems.append(f"{key}: expected shape {expected}. Received: {value.shape}")
        found.setdefault(by_place[place], {})[kind] = np.asarray(value, "float32")
    for name, pair in found.items():
        if len(pair) < 2:
            problems.append(f"{name}: only one of its two factors is there")
    whole = {name: (pair["A"], pair["B"]) for name, pair in found.items() if len(pair) == 2}
    return whole, problems or ([] if whole else ["it holds no factors"])
