"""Save what was tuned: a merged KerasHub preset, or an adapter in PEFT's layout.

Whatever is saved holds weights derived from Gemma, and is under the Gemma terms of use.
"""

import contextlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from gemma_keras_tune._bases import base_record, wrong_base
from gemma_keras_tune._files import new_folder
from gemma_keras_tune.adapter_layouts import CONFIG, PEFT_WEIGHTS, check_finite, read_adapter
from gemma_keras_tune.backend import check_backend
from gemma_keras_tune.errors import AdapterError, ExportError, TemplateError
from gemma_keras_tune.families import (
    family_of,
    is_instruct,
    locked,
    origin_of,
    quantizations,
)
from gemma_keras_tune.lora import LoraConfig, lora_active, lora_linears
from gemma_keras_tune.receipts import Check, refuse_unknown_check, write_receipt
from gemma_keras_tune.switching import (
    ACTIVE,
    DEFAULT,
    Active,
    adapter_factors,
    add_adapter,
    chosen_adapter,
    name_conflict,
    use_adapter,
)
from gemma_keras_tune.templates import (
    Template,
    read_sidecar,
    read_template,
    template_of,
    write_sidecar,
)

_PREFIX = "base_model.model."


def save_preset(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    adapter: str | Active | None = ACTIVE,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: Check = False,
) -> pathlib.Path:
    """Save the model as a KerasHub preset, with the LoRA that is on merged in.

    `keras_hub.models.CausalLM.from_preset(path)` loads it in a process without this library, one of
    Gemma 4 `Gemma4CausalLM.from_preset(path)`: KerasHub 0.32 has two classes with that backbone.
    The template and its stop tokens are recorded beside the weights, in `gemma_keras_tune.json`,
    and the files' hashes in `receipt.json`. The model in memory keeps its LoRA; where it is
    switched off, the base is saved. The preset is under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma.
        path: The folder to make.
        adapter: Which adapter is merged in: one of `list_adapters(model)`, or `None` for the base.
            Left out, what is on.
        overwrite: Whether to replace an existing folder.
        prompts: What to record answers to; `None` takes a few general prompts.
        check: Whether to record answers, to which `verify` holds what was saved; `"run"` does so at
            once, before the preset takes its name.

    Returns:
        The folder.

    Raises:
        BackendError: Keras does not run on JAX.
        AdapterError: There is no such adapter.
        ExportError: The folder exists, LoRA is on a quantized base, or the preset does not answer
            as the model does.
    """
    check_backend()
    refuse_unknown_check(check)
    stored = str(family_of(model).head(model).embedding.dtype)
    with use_adapter(model, adapter), new_folder(path, overwrite=overwrite) as folder:
        write_preset(model, folder)
        write_receipt(model, folder, format="keras", dtype=stored, prompts=prompts, check=check)
    return pathlib.Path(path).expanduser()


def write_preset(
    model: keras.Model, folder: pathlib.Path, *, shard_size: int = 5_000_000_000
) -> None:
    """Write the files of `save_preset` into an existing folder.

    Args:
        model: A KerasHub Gemma.
        folder: An existing, empty folder.
        shard_size: Bytes of weights in one file at most.

    Raises:
        ExportError: LoRA is on a quantized base.
    """
    codes = quantizations(model) if lora_active(model) else {}
    if codes:
        raise ExportError(
            "LoRA cannot be merged into quantized kernels: Keras would round it away.",
            [f"{path}: {mode}" for path, mode in codes.items()],
            "Save the adapter with `save_adapter`, and the base within `lora_disabled(model)`. Or "
            "load the adapter onto the model before quantization, and save that.",
        )
    if _scaled_otherwise(model):
        warnings.warn(
            "This model scales its queries by hidden size over heads, and KerasHub's decoder "
            "blocks take the head size whatever a preset says: opened by KerasHub alone it will "
            "compute something else. `load` opens the preset as it is; or export it to "
            "'safetensors' or 'gguf'.",
            UserWarning,
            stacklevel=3,
        )
    with _unmixed(model):
        model.save_to_preset(str(folder), max_shard_size=shard_size / 2**30)
    write_record(model, folder)


def _scaled_otherwise(model: Any) -> bool:
    """Whether the queries are scaled as KerasHub's own blocks never do; see `building`."""
    if family_of(model).name not in ("gemma", "gemma2", "gemma3"):
        return False
    backbone = model.backbone
    by_head = backbone.transformer_layers[0].attention.query_head_dim_normalize
    return not by_head and backbone.head_dim * backbone.num_query_heads != backbone.hidden_dim


@contextlib.contextmanager
def _unmixed(model: keras.Model) -> Iterator[None]:
    """Layers under a `mixed_*` policy have that of their weights for a while.

    Keras rounds merged kernels to what a layer computes in, and KerasHub opens no preset that names
    a mixed policy.
    """
    layers = [model, model.backbone, *model.backbone.layers]
    layers += [linear.layer for linear in lora_linears(model)]
    mixed = [
        (layer, layer.dtype_policy)
        for layer in layers
        # Keras takes the name off a quantized layer's policy when it writes down the settings.
        if str(layer.dtype_policy.name).startswith("mixed_")
    ]
    for layer, policy in mixed:
        layer.dtype_policy = policy.variable_dtype
    try:
        yield
    finally:
        for layer, policy in mixed:
            layer.dtype_policy = policy


@locked
def save_adapter(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    name: str | Active = ACTIVE,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: Check = False,
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
        check: Whether to record answers, to which `verify` holds what was saved; `"run"` does so at
            once: the files are loaded beside the adapters of this model.

    Returns:
        The folder.

    Raises:
        AdapterError: LoRA is not on, or its weights are not finite.
        ExportError: The folder exists, or what was saved does not answer as the model does.
    """
    from safetensors.numpy import save_file

    refuse_unknown_check(check)
    chosen = chosen_adapter(model, name)
    config, factors = adapter_factors(model, chosen)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
    check_finite(tensors)
    with use_adapter(model, chosen), new_folder(path, overwrite=overwrite) as folder:
        save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(model, config), indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_record(model, folder)
        write_receipt(
            model, folder, format="adapter", dtype="float32", prompts=prompts, check=check
        )
    return pathlib.Path(path).expanduser()


@locked
def load_adapter(
    model: keras.Model,
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    name: str = DEFAULT,
    check_base: bool = True,
) -> LoraConfig:
    """Put an adapter on its base model, and switch to it.

    Adapters saved by this library, PEFT, TRL, Unsloth and Axolotl share a layout; those of mlx-lm,
    of KerasHub's `save_lora_weights` (`.lora.h5`) and of the Gemma library for JAX are read too.
    Where ranks differ from layer to layer, the smaller ones are filled up with zeros; where scales
    do, they are multiplied into the factors: what the model computes is the same. Several may be
    on one base, each under a name; `set_adapter`, `use_adapter` and `generate(adapter=…)` switch
    between them. The template recorded with it is attached; one that cannot be, such as a Python
    function, is left out with a warning.

    The base may be loaded in another dtype, or quantized, than it was trained in: a sample of its
    weights, recorded with the adapter, is compared within what rounding explains. Adapters made
    elsewhere bring none; where one names its base and that is not this model's name, a warning says
    so.

    Args:
        model: A KerasHub Gemma: the base the adapter was trained on.
        path: The adapter's folder or file; or the nested dictionary of parameters that the Gemma
            library for JAX trains.
        name: What to call it. An adapter of that name is replaced.
        check_base: Whether other weights than those of the adapter's base are refused. Without it
            the generation and every shape must still fit.

    Returns:
        The adapter's `LoraConfig`.

    Raises:
        AdapterError: A file is missing or broken, the adapter needs something this library cannot
            do, or it does not fit the model; every mismatch is listed and the model is unchanged.
    """
    adapter = read_adapter(path, model)
    folder = None if isinstance(path, Mapping) else pathlib.Path(path).expanduser()
    own = LoraConfig(
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        rank_stabilized=adapter.rank_stabilized,
        parameters=sum(a.size + b.size for a, b in adapter.factors.values()),
        total_parameters=0,
    )
    record = _record(folder) if folder else {}
    problems = [
        *_wrong_generation(model, record),
        *filter(None, [_other_base(model, record, adapter.base) if check_base else None]),
        *adapter.problems,
        *filter(None, [name_conflict(model, name, own)]),
    ]
    if problems:
        raise AdapterError(
            f"The adapter in {folder or 'memory'} does not fit this model.", problems
        )
    template = _template(folder) if folder else None
    add_adapter(model, name, own, dict(adapter.factors), template)
    return adapter_factors(model, name)[0]


def write_record(model: keras.Model, folder: pathlib.Path) -> None:
    """Write this library's record: generation, base fingerprint, template and stop tokens."""
    template = template_of(model)
    entries: dict[str, Any] = {
        "generation": family_of(model).name,
        **base_record(model),
    }
    instruct = is_instruct(model)
    if instruct is not None:
        entries["instruct"] = instruct
    if template is not None:
        entries["template"] = template.to_config()
        entries["stop_tokens"] = list(template.stop_tokens)
    write_sidecar(folder, entries)


def _peft_config(model: keras.Model, config: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(model),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilized,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }


def _record(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return read_sidecar(folder)
    except TemplateError as error:
        raise AdapterError(error.headline, error.problems, error.next_step) from error


def _template(folder: pathlib.Path) -> Template | None:
    try:
        return read_template(folder)
    except TemplateError as error:
        warnings.warn(f"{folder}: its template is left out. {error}", UserWarning, stacklevel=3)
        return None


def _wrong_generation(model: keras.Model, record: Mapping[str, Any]) -> list[str]:
    name = family_of(model).name
    there = record.get("generation", name)
    return [] if there == name else [f"it was trained on {there}, this is {name}"]


def _other_base(model: keras.Model, record: Mapping[str, Any], named: str | None) -> str | None:
    """By the sample of weights in our record; of adapters made elsewhere, by names alone."""
    different = wrong_base(model, record)
    if different:
        base = f": {named}" if named else ""
        return (
            f"{different}. Load the base it was trained on{base}; or pass `check_base=False`, if "
            "this is that base in other weights, such as requantized ones"
        )
    here = _base_name(model)
    names = {pathlib.PurePath(name).name for name in (named, here) if name}
    if not record and len(names) == 2:
        warnings.warn(
            f"The adapter names {named} as its base, and this model came from {here}.",
            UserWarning,
            stacklevel=3,
        )
    return None


def _base_name(model: keras.Model) -> str | None:
    """Where PEFT finds the base: its name on the Hugging Face Hub, or its folder."""
    origin = origin_of(model)
    if origin is None:
        return None
    if origin.source.startswith("hf://"):
        return origin.source.removeprefix("hf://")
    folder = pathlib.Path(origin.source)
    # KerasHub's presets, other hubs and packages are nothing that PEFT opens.
    is_theirs = (folder / "config.json").is_file() and not (folder / "task.json").is_file()
    return origin.source if is_theirs else None
