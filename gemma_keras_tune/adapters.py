"""Save what was tuned: a merged KerasHub preset, or an adapter in PEFT's layout.

Whatever is saved holds weights derived from Gemma, and is under the Gemma terms of use.
"""

import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from gemma_keras_tune._files import new_folder
from gemma_keras_tune.adapter_layouts import CONFIG, PEFT_WEIGHTS, check_finite, read_adapter
from gemma_keras_tune.errors import AdapterError, TemplateError
from gemma_keras_tune.families import family_of, fingerprint, is_instruct, origin_of
from gemma_keras_tune.lora import LoraConfig
from gemma_keras_tune.receipts import record, write_receipt
from gemma_keras_tune.switching import (
    ACTIVE,
    DEFAULT,
    Active,
    adapter_factors,
    add_adapter,
    chosen_adapter,
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
        recordings = record(model, prompts) if check else ()
        write_receipt(model, folder, format="adapter", dtype="float32", recordings=recordings)
    return pathlib.Path(path)


def load_adapter(
    model: keras.Model,
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    name: str = DEFAULT,
) -> LoraConfig:
    """Put an adapter on its base model, and switch to it.

    Adapters saved by this library, PEFT, TRL, Unsloth and Axolotl share a layout; those of mlx-lm,
    of KerasHub's `save_lora_weights` (`.lora.h5`) and of the Gemma library for JAX are read too.
    Where ranks differ from layer to layer, the smaller ones are filled up with zeros; where scales
    do, they are multiplied into the factors: what the model computes is the same. Several may be
    on one base, each under a name; `set_adapter`, `use_adapter` and `generate(adapter=…)` switch
    between them. The template recorded with it is attached; one that cannot be, such as a Python
    function, is left out with a warning.

    Args:
        model: A KerasHub Gemma: the base the adapter was trained on.
        path: The adapter's folder or file; or the nested dictionary of parameters that the Gemma
            library for JAX trains.
        name: What to call it. An adapter of that name is replaced.

    Returns:
        The adapter's `LoraConfig`.

    Raises:
        AdapterError: A file is missing or broken, the adapter needs something this library cannot
            do, or it does not fit the model; every mismatch is listed and the model is unchanged.
    """
    adapter = read_adapter(path, model)
    folder = None if isinstance(path, Mapping) else pathlib.Path(path)
    problems = [*_wrong_base(model, _record(folder) if folder else {}), *adapter.problems]
    if problems:
        raise AdapterError(
            f"The adapter in {folder or 'memory'} does not fit this model.", problems
        )
    own = LoraConfig(
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        rank_stabilized=adapter.rank_stabilized,
        parameters=sum(a.size + b.size for a, b in adapter.factors.values()),
        total_parameters=0,
    )
    template = _template(folder) if folder else None
    add_adapter(model, name, own, dict(adapter.factors), template)
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
