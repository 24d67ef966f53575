"""Save what was tuned: a merged KerasHub preset, or an adapter in PEFT's layout.

Whatever is saved holds weights derived from Gemma, and is under the Gemma terms of use.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import keras

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.files import new_folder
from gemma_keras_tune.adapters.active import (
    ACTIVE,
    Active,
    adapter_factors,
    chosen_adapter,
    use_adapter,
)
from gemma_keras_tune.adapters.bases import base_name, write_metadata
from gemma_keras_tune.adapters.layouts import CONFIG, PEFT_WEIGHTS, check_finite
from gemma_keras_tune.adapters.lora import LoraConfig
from gemma_keras_tune.exporting.receipts import Checking, refuse_wrong_check
from gemma_keras_tune.exporting.verifying import write_checked_receipt
from gemma_keras_tune.formats.keras_preset import write_preset
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.state import locked

_PREFIX = "base_model.model."


def save_preset(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    adapter: str | Active | None = ACTIVE,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: Checking = False,
) -> pathlib.Path:
    """Save the model as a KerasHub preset, with the LoRA that is on merged in.

    `keras_hub.models.CausalLM.from_preset(path)` loads it in a process without this library, one of
    Gemma 4 `Gemma4CausalLM.from_preset(path)`: KerasHub 0.32 has two classes with that backbone.
    The template and its stop tokens are recorded beside the weights, in `gemma_keras_tune.json`,
    and the files' hashes in `receipt.json`. The model in memory keeps its LoRA; if it is switched
    off, the base is saved. The preset is under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma.
        path: The folder to make.
        adapter: The adapter to merge in: one of `gkt.adapters.list(model)`, or `None` for the
            base. Defaults to the active one.
        overwrite: Whether to replace an existing folder.
        prompts: Prompts to answer; needs `check`. Defaults to a few general ones.
        check: `False` does not run the model. `True` records its answers, so that `verify` can open
            the preset and compare. `"run"` does both at once, before the preset takes its name.

    Returns:
        The folder.

    Raises:
        BackendError: Keras does not run on JAX.
        AdapterError: There is no such adapter.
        ExportError: The folder exists, LoRA is on a quantized base, or the preset does not answer
            as the model does.
    """
    check_backend()
    refuse_wrong_check(check, prompts)
    stored = str(family_of(model).head(model).embedding.dtype)
    with use_adapter(model, adapter), new_folder(path, overwrite=overwrite) as folder:
        write_preset(model, folder)
        write_checked_receipt(
            model, folder, format="keras", dtype=stored, prompts=prompts, check=check
        )
    return pathlib.Path(path).expanduser()


@locked
def save_adapter(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    adapter: str | Active = ACTIVE,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: Checking = False,
) -> pathlib.Path:
    """Save the LoRA of a model in PEFT's layout, at the rank it was trained with.

    The folder holds `adapter_config.json`, `adapter_model.safetensors`, this library's metadata
    (the base model's fingerprint, its family, the template and the stop tokens) and a receipt with
    the files' hashes. It is under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma with LoRA on.
        path: The folder to make.
        adapter: One of `gkt.adapters.list(model)`. Defaults to the active one.
        overwrite: Whether to replace an existing folder.
        prompts: Prompts to answer; needs `check`. Defaults to a few general ones.
        check: `False` does not run the model. `True` records its answers, so that `verify` can load
            the adapter and compare. `"run"` does both at once, beside the adapters of this model.

    Returns:
        The folder.

    Raises:
        AdapterError: The model has no such adapter, or its weights are not finite.
        ExportError: The folder exists, or the adapter does not answer as the model does.
    """
    from safetensors.numpy import save_file

    refuse_wrong_check(check, prompts)
    chosen = chosen_adapter(model, adapter)
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
        write_metadata(model, folder)
        write_checked_receipt(
            model, folder, format="adapter", dtype="float32", prompts=prompts, check=check
        )
    return pathlib.Path(path).expanduser()


def _peft_config(model: keras.Model, config: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
