"""Which base a model is: a small sample of its weights, alike in every dtype and quantization."""

import base64
import binascii
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras_tune.adapters.lora import kernel_shape, without_lora
from gemma_keras_tune.gemma.families import Linear, family_of, fingerprint
from gemma_keras_tune.gemma.state import is_instruct, origin_of
from gemma_keras_tune.gemma.templates import template_of, write_sidecar

_LAYERS = 8
_INPUTS = 2
_OUTPUTS = 8
# How far a sample may be from another, relative to its length. Rounding to bfloat16 moves it by
# 0.002, Keras's int8 by 0.01 to 0.03, its int4 by 0.1 to 0.3; other weights by about 1.4.
_TOLERANCES: dict[Any, float] = {None: 0.01, "int8": 0.05}
_LOOSEST = 0.5


def base_record(model: keras.Model) -> dict[str, Any]:
    """Describe the base of an adapter, for `wrong_base` to compare another model with.

    Args:
        model: A KerasHub Gemma, with or without LoRA.

    Returns:
        `base_fingerprint`; `base_sample`, float32 in base64; `base_tolerance`, how far another
        sample may be from it, as a share of its length.
    """
    return {
        "base_fingerprint": fingerprint(model),
        "base_sample": base64.b64encode(_sample(model).astype("<f4").tobytes()).decode(),
        "base_tolerance": _tolerance(model),
    }


def write_metadata(model: keras.Model, folder: pathlib.Path) -> None:
    """Write this library's record: family, base fingerprint, template and stop tokens."""
    template = template_of(model)
    entries: dict[str, Any] = {
        "family": family_of(model).name,
        **base_record(model),
    }
    instruct = is_instruct(model)
    if instruct is not None:
        entries["instruct"] = instruct
    if template is not None:
        entries["template"] = template.to_config()
        entries["stop_tokens"] = list(template.stop_tokens)
    write_sidecar(folder, entries)


def base_name(model: keras.Model) -> str | None:
    """Return the place where PEFT finds the base: a name on the Hugging Face Hub, or a folder."""
    origin = origin_of(model)
    if origin is None:
        return None
    if origin.source.startswith("hf://"):
        return origin.source.removeprefix("hf://")
    folder = pathlib.Path(origin.source)
    # KerasHub's presets, other hubs and packages are nothing that PEFT opens.
    is_theirs = (folder / "config.json").is_file() and not (folder / "task.json").is_file()
    return origin.source if is_theirs else None


def wrong_base(model: keras.Model, record: Mapping[str, Any]) -> str | None:
    """Describe why this model cannot be an adapter's base; `None` if it can.

    Args:
        model: A KerasHub Gemma.
        record: What `base_record` gave, perhaps read back from JSON; nothing is asked of one that
            holds none of it.

    Returns:
        A line that says what differs.
    """
    if "base_sample" not in record:
        # Records of the first version hold the fingerprint alone, which depends on the dtype.
        here = fingerprint(model)
        there = record.get("base_fingerprint", here)
        return None if there == here else f"its base has the fingerprint {there}, this model {here}"
    theirs, ours = _decoded(record["base_sample"]), _sample(model)
    if theirs is None or theirs.shape != ours.shape or not np.isfinite(theirs).all():
        return "the sample of its base's weights is of another size, or broken"
    length = float(np.linalg.norm(theirs))
    difference = float(np.linalg.norm(ours - theirs)) / max(length, 1e-30)
    stated = record.get("base_tolerance")
    known = isinstance(stated, int | float) and 0 <= stated <= _LOOSEST
    allowed = max(_tolerance(model), float(stated) if known and stated else 0.0)
    if difference <= allowed:
        return None
    return (
        f"its base has other weights: a sample of them differs by {difference:.0%} of its length, "
        f"where rounding explains {allowed:.0%}"
    )


def _decoded(text: Any) -> np.ndarray | None:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (TypeError, ValueError, binascii.Error):
        return None


def _tolerance(model: keras.Model) -> float:
    modes = {linear.layer.quantization_mode for linear in _chosen(model)}
    return max(_TOLERANCES.get(mode, _LOOSEST) for mode in modes)


def _chosen(model: keras.Model) -> list[Linear]:
    linears = family_of(model).linears(model)
    return [linears[i] for i in np.unique(np.linspace(0, len(linears) - 1, _LAYERS).astype(int))]


def _sample(model: keras.Model) -> np.ndarray:
    """`[values]` float32: the kernels as the layers apply them, so codes need no decoding here."""
    return np.concatenate([_kernel_values(linear) for linear in _chosen(model)])


def _kernel_values(linear: Linear) -> np.ndarray:
    """A few numbers of a few rows: the outputs for inputs that are 1 at one place."""
    shape = kernel_shape(linear.layer)
    sizes = [shape[axis] for axis in linear.input_axes]
    places = np.linspace(0, np.prod(sizes) - 1, _INPUTS).astype(int)
    inputs = np.zeros((1, _INPUTS, int(np.prod(sizes))), "float32")
    inputs[0, np.arange(_INPUTS), places] = 1
    with without_lora(linear.layer):
        outputs = linear.layer(inputs.reshape(1, _INPUTS, *sizes))
    rows = np.asarray(ops.cast(outputs, "float32")).reshape(_INPUTS, -1)
    return rows[:, np.linspace(0, rows.shape[1] - 1, _OUTPUTS).astype(int)].reshape(-1)
