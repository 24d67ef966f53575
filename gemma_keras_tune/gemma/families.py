"""Gemma families: the family of a model, and its weights by the rows of the table.

`tables` holds the facts; this module finds them in a model. Loading, LoRA, adapters and exports ask
here: no other package compares the name of a family.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.head import Head
from gemma_keras_tune.gemma.state import is_named_as_media_model
from gemma_keras_tune.gemma.tables import (
    BESIDE_EXPERTS,
    KEYS_AND_VALUES,
    TABLES,
    FamilyTable,
    FusedPart,
    WeightSpec,
)


def join(parts: Mapping[FusedPart | None, np.ndarray]) -> np.ndarray:
    """Join the parts of a foreign tensor.

    Args:
        parts: Every part of one tensor, in the foreign layout; a whole tensor under `None`.

    Returns:
        The joined array.
    """
    if None in parts:
        return parts[None]
    ordered = sorted((part for part in parts if part), key=lambda part: part.index)
    together = np.stack if ordered[0].stacked else np.concatenate
    return together([parts[part] for part in ordered], axis=ordered[0].axis)


def joined_shape(shape: tuple[int, ...], part: FusedPart | None, count: int) -> tuple[int, ...]:
    """Return the shape of the foreign tensor that `join` makes.

    Args:
        shape: Shape of one part, in the foreign layout.
        part: The part, or `None` for a whole tensor.
        count: Number of parts.

    Returns:
        The shape.
    """
    if part is None:
        return shape
    before, after = shape[: part.axis], shape[part.axis :]
    return (*before, count, *after) if part.stacked else (*before, after[0] * count, *after[1:])


def split(tensor: np.ndarray, part: FusedPart | None, count: int) -> np.ndarray:
    """Cut one part out of a foreign tensor; the inverse of `join`.

    Args:
        tensor: The joined array.
        part: The part to return, or `None` for a whole tensor.
        count: Number of parts it holds.

    Returns:
        The part, in the foreign layout.
    """
    if part is None:
        return tensor
    if part.stacked:
        return np.take(tensor, part.index, axis=part.axis)
    return np.split(tensor, count, axis=part.axis)[part.index]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of one model.

    Attributes:
        variable: The Keras variable.
        path: Stable id, for example `decoder_block_0/attention/query`.
        spec: Its row of the table.
        hugging_face: Full Hugging Face name, most with `.weight`. Weights with the same name are
            `spec.part`s of one tensor; `join` makes it.
        gguf: Full GGUF name; `spec.gguf_part` likewise.
        gguf_offset: The number GGUF adds to the value (1 for the norms of Gemma 1 to 3).
        output_axes: Axes of the variable that make the rows of the `[outputs, inputs]` matrix.
        input_axes: Axes that make its columns.
        jax: Full path in the Gemma library's tree for JAX, or `None` where the table has none;
            `spec.jax_part` likewise.
        jax_transposed: True if that library holds it with its last two axes exchanged.
        jax_inner: Size of the inner axis, if that library splits one of ours into two.
        layer: The Keras layer that holds it, or the variable itself if no layer does.
        used: True if the model reads it. Gemma 3n's checkpoints hold keys and values for layers
            that take those of an earlier layer.
    """

    variable: keras.Variable
    path: str
    spec: WeightSpec
    hugging_face: str
    gguf: str
    gguf_offset: float = 0.0
    output_axes: tuple[int, ...] = ()
    input_axes: tuple[int, ...] = ()
    jax: str | None = None
    jax_transposed: bool = False
    jax_inner: int | None = None
    layer: Any = None
    used: bool = True

    @property
    def text_name(self) -> str:
        """Hugging Face name in a text model, also if this model sees or hears."""
        return self.hugging_face.replace("model.language_model.", "model.")

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape in Hugging Face and GGUF, of the weight or of its part of a tensor."""
        shape = tuple(self.variable.shape)
        if self.spec.kind == "experts":
            return (shape[0], shape[2], shape[1])
        if self.spec.kind == "scalar":
            return (1,)
        if not self.output_axes:
            return shape
        axes = (self.output_axes, self.input_axes)
        return tuple(math.prod(shape[axis] for axis in group) for group in axes)

    def to_matrix(self, value: np.ndarray) -> np.ndarray:
        """Convert a value to Hugging Face's and GGUF's layout: `[outputs, inputs]` if linear."""
        if self.spec.kind == "experts":
            return value.swapaxes(1, 2)
        if self.spec.kind == "scalar":
            return value.reshape(1)
        return to_matrix(value, self.output_axes, self.input_axes)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """Convert a value from Hugging Face's or GGUF's layout to the variable's shape."""
        if self.spec.kind == "experts":
            return matrix.swapaxes(1, 2)
        return from_matrix(matrix, tuple(self.variable.shape), self.output_axes, self.input_axes)

    @property
    def jax_shape(self) -> tuple[int, ...]:
        """Shape in the Gemma library for JAX, of the weight or of its part of an array."""
        if self.spec.kind == "scalar":
            return (1,)
        shape = self._jax_split_shape
        if self.spec.jax_first:
            axis = self.spec.jax_axis
            shape = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return (*shape[:-2], shape[-1], shape[-2]) if self.jax_transposed else shape

    @property
    def _jax_split_shape(self) -> tuple[int, ...]:
        shape, axis = tuple(self.variable.shape), self.spec.jax_axis
        if self.jax_inner is None:
            return shape
        return (*shape[:axis], shape[axis] // self.jax_inner, self.jax_inner, *shape[axis + 1 :])

    def to_jax(self, value: np.ndarray) -> np.ndarray:
        """Convert a value to the layout of the Gemma library for JAX."""
        if self.spec.kind == "scalar":
            return value.reshape(1)
        if self.jax_inner is not None:
            value = value.reshape(self._jax_split_shape)
        if self.spec.jax_first:
            value = np.moveaxis(value, self.spec.jax_axis, 0)
        return value.swapaxes(-1, -2) if self.jax_transposed else value

    def from_jax(self, value: np.ndarray) -> np.ndarray:
        """Invert `to_jax`."""
        value = value.swapaxes(-1, -2) if self.jax_transposed else value
        if self.spec.jax_first:
            value = np.moveaxis(value, 0, self.spec.jax_axis)
        return value.reshape(tuple(self.variable.shape))


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear layer of the text tower.

    Attributes:
        layer: The Keras layer, an `EinsumDense` or `Dense`.
        path: Stable id, for example `decoder_block_0/attention/query`.
        target: Hugging Face's module name, for example `q_proj`.
        block: Index of its decoder block.
        hugging_face: Full module name, for example `model.layers.0.self_attn.q_proj`.
        gguf: Full GGUF name without `.weight`.
        output_axes: Axes of the kernel that make the rows of the `[outputs, inputs]` matrix.
        input_axes: Axes that make its columns.
    """

    layer: Any
    path: str
    target: str
    block: int
    hugging_face: str
    gguf: str
    output_axes: tuple[int, ...]
    input_axes: tuple[int, ...]


def to_matrix(
    value: np.ndarray, output_axes: tuple[int, ...], input_axes: tuple[int, ...]
) -> np.ndarray:
    """Reshape a kernel to an `[outputs, inputs]` matrix; return other arrays unchanged."""
    if not output_axes:
        return value
    rows = math.prod(value.shape[axis] for axis in output_axes)
    return value.transpose(output_axes + input_axes).reshape(rows, -1)


def from_matrix(
    matrix: np.ndarray,
    shape: tuple[int, ...],
    output_axes: tuple[int, ...],
    input_axes: tuple[int, ...],
) -> np.ndarray:
    """Invert `to_matrix`."""
    if not output_axes:
        return matrix.reshape(shape)
    order = output_axes + input_axes
    return matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


_AXES: dict[str | None, tuple[tuple[int, ...], tuple[int, ...]]] = {
    None: ((1,), (0,)),
    "split": ((0, 2), (1,)),
    "joined": ((2,), (0, 1)),
}


@dataclasses.dataclass(frozen=True)
class Family(FamilyTable):
    """A Gemma family: its table, and the way to find its rows in a model."""

    @property
    def backbone_class(self) -> Any:
        """KerasHub's backbone, such as `keras_hub.models.Gemma3Backbone`."""
        return getattr(keras_hub.models, f"{self.keras_hub}Backbone")

    @property
    def causal_lm_class(self) -> Any:
        """KerasHub's model that generates text.

        Named, because `CausalLM.from_preset` takes any class of a backbone, and Gemma 4 has a
        second one: the assistant of speculative decoding.
        """
        return getattr(keras_hub.models, f"{self.keras_hub}CausalLM")

    @property
    def preprocessor_class(self) -> Any:
        """KerasHub's preprocessor of that model."""
        return getattr(keras_hub.models, f"{self.keras_hub}CausalLMPreprocessor")

    @property
    def tokenizer_class(self) -> Any:
        """KerasHub's tokenizer."""
        return getattr(keras_hub.tokenizers, f"{self.keras_hub}Tokenizer")

    @property
    def config_names(self) -> tuple[str, ...]:
        """Names of the family in a `config.json`: KerasHub's class, the types of `transformers`."""
        types = (self.hugging_face.model_type, self.hugging_face.media_type)
        return (f"{self.keras_hub}Backbone", *filter(None, types))

    def builds(self, backbone: Any) -> bool:
        """Tell if a KerasHub backbone is one of this family."""
        return isinstance(backbone, self.backbone_class) and all(
            getattr(backbone, name) == value for name, value in self.told_by.items()
        )

    def spec(self, name: str) -> WeightSpec:
        """Return the row of a weight.

        Args:
            name: Its Hugging Face name in the table, such as `"self_attn.k_proj"`.

        Returns:
            The row.
        """
        return next(spec for spec in (*self.model, *self.block) if spec.hugging_face == name)

    def gguf_name(self, name: str, block: int = 0) -> str:
        """Return the full GGUF name of a weight.

        Args:
            name: Its Hugging Face name in the table, such as `"self_attn.k_proj"`.
            block: Index of its decoder block, if it is in one.

        Returns:
            The name, such as `"blk.0.attn_k.weight"`.
        """
        spec = self.spec(name)
        prefix = f"blk.{block}." if spec in self.block else ""
        return f"{prefix}{spec.gguf}{spec.suffixes[1]}"

    def linears(self, model: keras.Model) -> tuple[Linear, ...]:
        """List the linear layers of the text tower that LoRA and adapters can address.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this family.

        Returns:
            `Linear`s in layer order. Layers that a block does not have (Gemma 4 shares keys and
            values) or never runs (Gemma 3n's shared ones) are left out.
        """
        return tuple(
            Linear(
                layer=weight.layer,
                path=f"{weight.path.rpartition('/')[0]}/{weight.layer.name}",
                target=weight.spec.hugging_face.rpartition(".")[2],
                block=block,
                hugging_face=weight.hugging_face.removesuffix(".weight"),
                gguf=weight.gguf.removesuffix(".weight"),
                output_axes=weight.output_axes,
                input_axes=weight.input_axes,
            )
            for block, weight in self._block_weights(model, "linear")
            if weight.used
        )

    def weights(self, model: keras.Model) -> tuple[Weight, ...]:
        """List the text tower's weights with their foreign names, the embedding first.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this family.

        Returns:
            A `Weight` for each row of the table that the model has.
        """
        text, prefix = _text_model(model), _hugging_face_prefix(model)
        rows = itertools.chain.from_iterable(_expand(text, row) for row in self.model)
        once = (self._weight(text, row, prefix, "", "", "") for row in rows)
        blocks = (weight for _, weight in self._block_weights(model))
        return (*(weight for weight in once if weight is not None), *blocks)

    def _block_weights(
        self, model: keras.Model, kind: str | None = None
    ) -> Iterator[tuple[int, Weight]]:
        """Yield the weights of each decoder block with its index; of one kind alone, if given."""
        prefix = _hugging_face_prefix(model)
        for index, block in enumerate(decoder_blocks(model)):
            names = (f"{prefix}layers.{index}.", f"blk.{index}.", f"layer_{index}/", block.name)
            for row in self.block:
                weight = self._weight(block, row, *names) if kind in (None, row.kind) else None
                if weight is not None:
                    yield index, weight

    def idle_names(self, model: keras.Model) -> frozenset[str]:
        """Return foreign names of keys and values stored for layers that take those of another.

        Some checkpoints of Gemma 3n and 4 hold them; no model reads them.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this family.

        Returns:
            Their Hugging Face names, as in a text model, and their GGUF names.
        """
        keyed = {linear.block for linear in self.linears(model) if linear.target == "k_proj"}
        return frozenset(
            name
            for index in range(len(decoder_blocks(model)))
            for spec in self.block
            if index not in keyed and spec.hugging_face in KEYS_AND_VALUES
            for name in (
                f"model.layers.{index}.{spec.hugging_face}{spec.suffixes[0]}",
                self.gguf_name(spec.hugging_face, index),
            )
        )

    def _weight(
        self, owner: Any, spec: WeightSpec, hugging_face: str, gguf: str, jax: str, place: str
    ) -> Weight | None:
        layer = _resolve(owner, spec.keras)
        if layer is None:
            return None
        if self.jax:
            spec = _in_this_block(owner, spec)
        in_matrix = spec.kind in ("linear", "matrix")
        outputs, inputs = _AXES[spec.heads] if in_matrix else ((), ())
        suffix, gguf_suffix = spec.suffixes
        return Weight(
            variable=_variable(layer, spec.kind),
            path="/".join(filter(None, (place, spec.keras.replace(".", "/")))),
            spec=spec,
            hugging_face=f"{hugging_face}{spec.hugging_face}{suffix}",
            gguf=f"{gguf}{spec.gguf}{gguf_suffix}",
            gguf_offset=self.gguf.norm_offset if spec.kind == "norm" else 0.0,
            output_axes=outputs,
            input_axes=inputs,
            jax=f"{jax}{spec.jax}" if self.jax and spec.jax else None,
            jax_transposed=self._jax_transposed(layer, spec),
            jax_inner=self._jax_inner(owner, spec),
            layer=layer,
            used=not (_shares_keys(owner) and spec.hugging_face in KEYS_AND_VALUES),
        )

    def _jax_transposed(self, layer: Any, spec: WeightSpec) -> bool:
        if self.jax is None or "gating_einsum" not in (spec.jax or ""):
            return False
        return spec.kind == "experts" or stored_kernel(layer).shape[0] not in self.jax.untransposed

    def _jax_inner(self, owner: Any, spec: WeightSpec) -> int | None:
        if self.jax is None or spec.jax_split is None:
            return None
        return int(_resolve(owner, spec.jax_split))

    def unlike(self, given: Mapping[str, Any], runtime: str, fixed: Mapping[str, Any]) -> list[str]:
        """Name the settings of a model that a runtime cannot compute with.

        Args:
            given: `backbone_settings` of the model.
            runtime: Name of the runtime, for the text.
            fixed: Settings that this runtime alone has fixed, with their values; those that are
                fixed for the whole family are added.

        Returns:
            A sentence for each setting that differs.
        """
        return [
            f"{name} is {given[name]!r}; {runtime} computes with {expected!r}"
            for name, expected in {**self.fixed, **fixed}.items()
            if given.get(name, expected) != expected
        ]

    def head(self, model: keras.Model) -> Head:
        """Return the output head: the embedding, tied with the input's, and its soft cap.

        Args:
            model: A KerasHub Gemma `CausalLM` of this family.

        Returns:
            The `Head`.

        Raises:
            LoadError: The logits are capped twice.
        """
        text = _text_model(model)
        layer = _resolve(text, self.spec("embed_tokens").keras)
        cap = getattr(layer, "logit_soft_cap", getattr(text, "final_logit_soft_cap", None))
        # The task of Gemma 4 may cap, too.
        task_cap = getattr(model, "final_logit_cap", None)
        if cap is not None and task_cap is not None:
            raise LoadError(
                f"The logits are capped twice, at {cap} by the backbone and at {task_cap} by "
                "the task, which is not one cap.",
                next_step=f"Make the `{self.keras_hub}CausalLM` without `final_logit_cap`.",
            )
        return Head(layer.embeddings, task_cap if cap is None else cap, layer)

    def empty_cache(self, model: keras.Model, rows: int, length: int) -> Any:
        """Return an empty key/value cache, as the model's `call_with_cache` takes it.

        Args:
            model: A KerasHub Gemma `CausalLM` of this family.
            rows: Rows of the batch.
            length: Tokens of each row that it has room for.

        Returns:
            Zeros in the model's compute dtype: one array, or a tuple with one array or a pair of
            them for each layer.
        """
        backbone: Any = _backbone(model)
        layers = len(decoder_blocks(model))
        width = max(backbone.head_dim, getattr(backbone, "global_head_dim", None) or 0)
        heads = backbone.num_key_value_heads
        sizes = {"b": rows, "n": layers, "2": 2, "t": length, "h": heads, "d": width}
        shape = [sizes[axis] for axis in self.cache_axes]

        def empty() -> Any:
            return ops.zeros(shape, model.compute_dtype)

        if "n" in self.cache_axes:
            return empty()
        pairs = "2" not in self.cache_axes
        return tuple((empty(), empty()) if pairs else empty() for _ in range(layers))


FAMILIES: Mapping[str, Family] = {table.name: Family(**vars(table)) for table in TABLES}
# Values examined together, so that little memory is needed beside the model.
_CHUNK_VALUES = 1 << 22


def family_of(model: keras.Model) -> Family:
    """Return the family of a KerasHub Gemma.

    Args:
        model: A KerasHub `CausalLM` or backbone.

    Returns:
        Its `Family`.

    Raises:
        LoadError: It is not a Gemma that generates text.
    """
    backbone = _backbone(model)
    found = next((family for family in FAMILIES.values() if family.builds(backbone)), None)
    if found is None:
        raise LoadError(
            f"Expected a KerasHub Gemma. Received: {type(model).__name__}",
            next_step="Load one with `load(...)`, or pass a `keras_hub.models.Gemma…CausalLM`.",
        )
    return found


def context_length(model: keras.Model) -> int:
    """Return the longest prompt and response together that a model was made for.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Returns:
        Tokens.
    """
    return family_of(model).context_length(_backbone(model))


def backbone_settings(model: keras.Model) -> dict[str, Any]:
    """Return the settings of a backbone, with the cap of the logits also if the task has it.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Returns:
        The backbone's `get_config`; `final_logit_soft_cap` is that of the head.
    """
    config: dict[str, Any] = model.backbone.get_config()
    if "final_logit_soft_cap" in config:
        config["final_logit_soft_cap"] = family_of(model).head(model).soft_cap
    return config


def backbone_inputs(backbone: keras.Model, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
    """Return the inputs of a backbone for a batch of text alone.

    Args:
        backbone: A KerasHub Gemma backbone.
        token_ids: `[batch, length]` int32.
        padding_mask: `[batch, length]`, 1 at tokens.

    Returns:
        The backbone's inputs by name; images and sounds are given as none.

    Raises:
        LoadError: The backbone has an input this library does not know.
    """
    batch, length = ops.shape(token_ids)
    inputs: dict[str, Any] = {}
    for tensor in keras.tree.flatten(backbone.input):
        name, shape = tensor.name, tensor.shape
        if name == "token_ids":
            inputs[name] = ops.convert_to_tensor(token_ids, dtype="int32")
        elif name == "padding_mask":
            inputs[name] = ops.cast(padding_mask, tensor.dtype)
        elif name == "position_ids":
            inputs[name] = ops.broadcast_to(ops.arange(length, dtype="int32"), (batch, length))
        elif name in ("vision_mask", "audio_mask"):
            inputs[name] = ops.zeros((batch, length), tensor.dtype)
        elif name in _NO_MEDIA:
            empty = [batch, 0, *(size or 1 for size in shape[2:])]
            inputs[name] = ops.zeros(empty, tensor.dtype)
        else:
            raise LoadError(f"The backbone has an unknown input {name!r} of shape {shape}.")
    return inputs


_NO_MEDIA = (
    "images",
    "vision_indices",
    "pixel_values",
    "pixel_position_ids",
    "input_features",
    "input_features_mask",
    "audio_indices",
    "audio_mel",
    "audio_mel_mask",
)


def fingerprint(model: keras.Model) -> str:
    """Compute a short hash of the base model: its sizes and a sample of its base weights.

    LoRA does not change it, nor does saving and loading in the same dtype.

    Args:
        model: A KerasHub Gemma.

    Returns:
        16 hexadecimal digits.
    """
    family = family_of(model)
    digest = hashlib.sha256()
    sizes = {
        linear.hugging_face.partition("layers.")[2]: list(stored_kernel(linear.layer).shape)
        for linear in family.linears(model)
    }
    digest.update(json.dumps([family.name, sizes], sort_keys=True).encode())
    embedding = family.head(model).embedding
    rows = np.linspace(0, embedding.shape[0] - 1, 16).astype("int32")
    sample = ops.take(embedding, rows, axis=0)
    digest.update(np.asarray(ops.cast(sample, "float32")).round(3).tobytes())
    for linear in family.linears(model)[:: max(1, len(family.linears(model)) // 8)]:
        kernel = stored_kernel(linear.layer)
        part = ops.cast(kernel[tuple(slice(0, 4) for _ in kernel.shape)], "float32")
        digest.update(np.asarray(part).round(3).tobytes())
    return digest.hexdigest()[:16]


def broken_weights(model: keras.Model) -> list[str]:
    """List the paths of the text tower's weights that hold NaN or infinite values."""
    weights = family_of(model).weights(model)
    return [weight.path for weight in weights if not all_finite(np.asarray(weight.variable))]


def quantizations(model: keras.Model) -> dict[str, str]:
    """Return the mode of each weight that Keras quantized, such as `"int8"`, by its path."""
    modes = {
        weight.path: getattr(weight.layer, "quantization_mode", None)
        for weight in family_of(model).weights(model)
    }
    return {path: str(mode) for path, mode in modes.items() if mode is not None}


def all_finite(values: np.ndarray) -> bool:
    """Tell if an array holds no NaN and nothing infinite; little memory is used beside it."""
    flat = values.reshape(-1)
    parts = range(0, flat.size, _CHUNK_VALUES)
    return all(np.isfinite(flat[start : start + _CHUNK_VALUES]).all() for start in parts)


def stored_kernel(layer: Any) -> keras.Variable:
    """Return a layer's kernel as it is stored.

    The private `_kernel` is read here alone. The public `kernel` of a layer with LoRA on is the
    merged one, computed anew at every look.
    """
    return layer._kernel


def _variable(layer: Any, kind: str) -> keras.Variable:
    if kind in ("linear", "matrix"):
        return stored_kernel(layer)
    if kind == "embedding":
        return layer.embeddings
    return layer.scale if kind == "norm" else layer


def _backbone(model: keras.Model) -> Any:
    return getattr(model, "backbone", model)


def decoder_blocks(model: keras.Model) -> list[Any]:
    """Return the Keras layers that are the decoder blocks of the text tower, in order."""
    return list(_text_model(model).transformer_layers)


def _text_model(model: keras.Model) -> Any:
    backbone = _backbone(model)
    return getattr(backbone, "language_model", backbone)


def _shares_keys(block: Any) -> bool:
    """Tell if a block takes the keys and values of an earlier one."""
    return bool(getattr(block, "is_kv_shared_layer", False))


def _in_this_block(block: Any, spec: WeightSpec) -> WeightSpec:
    """Return the row with the name that the Gemma library for JAX has for it in this block."""
    keys = spec.keras == "attention.key_dense"
    if keys and getattr(block.attention, "value_dense", None) is None:
        # Keys serve as values.
        return dataclasses.replace(spec, jax="attn/k_einsum/w", jax_part=None)
    if getattr(block, "moe_router", None) is not None and not spec.keras.endswith("_moe"):
        return dataclasses.replace(spec, jax=BESIDE_EXPERTS.get(str(spec.jax), spec.jax))
    return spec


def _expand(owner: Any, spec: WeightSpec) -> list[WeightSpec]:
    """Return one row for each layer, if the row describes a list of layers."""
    if not spec.keras.endswith(".*"):
        return [spec]
    layers = _resolve(owner, spec.keras.removesuffix(".*")) or ()
    return [
        dataclasses.replace(
            spec,
            keras=spec.keras.replace("*", str(index)),
            hugging_face=spec.hugging_face.format(index),
            jax=spec.jax and spec.jax.format(index),
            gguf_part=spec.gguf_part and dataclasses.replace(spec.gguf_part, index=index),
        )
        for index in range(len(layers))
    ]


def _resolve(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name, None)
        if owner is None:
            return None
    return owner


def _hugging_face_prefix(model: keras.Model) -> str:
    backbone = _backbone(model)
    names = {tensor.name for tensor in keras.tree.flatten(backbone.input)}
    media = names & {"images", "pixel_values", "input_features", "audio_mel"}
    multimodal = media or is_named_as_media_model(backbone)
    return "model.language_model." if multimodal else "model."
