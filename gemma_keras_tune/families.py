"""The facts of each Gemma generation, as data.

One table says, for each generation and each weight of the text tower: where it stands in the
KerasHub model, its name in Hugging Face checkpoints and in GGUF files, how its axes map to Hugging
Face's `[outputs, inputs]` matrices, and what GGUF adds to it. Loading, LoRA, adapters and exports
read this table; no other module knows a foreign tensor name.

Sources: the KerasHub 0.32 model definitions, `transformers`' Gemma modules, and llama.cpp's tensor
name map (`gguf.constants`).
"""

import dataclasses
import hashlib
import json
import math
import weakref
from collections.abc import Mapping
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras_tune.errors import LoadError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a weight that stands in every block, or once in the model.

    Attributes:
        keras: Dotted attribute path of its layer, from the block or the backbone.
        hugging_face: Name in Hugging Face checkpoints, after the block's prefix.
        gguf: Name in GGUF files, after the block's prefix.
        kind: `"linear"`, `"norm"`, `"embedding"` or `"scalar"`.
        heads: For a linear layer, `"split"` when the kernel is `[heads, inputs, head_dim]`,
            `"joined"` when it is `[heads, head_dim, outputs]`, else `None` for `[inputs, outputs]`.
    """

    keras: str
    hugging_face: str
    gguf: str
    kind: str = "norm"
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """The turn format of a generation.

    Attributes:
        start: Opens a turn; the role follows at once.
        end: Closes a turn; the model must stop on it.
        user: Name of the user's role.
        model: Name of the model's role.
        system: Name of the system role, or `None` where the system text opens the first user turn.
    """

    start: str
    end: str
    user: str = "user"
    model: str = "model"
    system: str | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of one model.

    Attributes:
        variable: The Keras variable.
        path: Stable id, for example `decoder_block_0/attention/query`.
        entry: Its row of the table.
        hugging_face: Full Hugging Face name with `.weight`.
        gguf: Full GGUF name.
        gguf_offset: What GGUF adds to the stored value (1 for the norms of Gemma 1 to 3).
        output_axes: Axes of the variable that make the rows of the `[outputs, inputs]` matrix.
        input_axes: Axes that make its columns.
    """

    variable: keras.Variable
    path: str
    entry: Entry
    hugging_face: str
    gguf: str
    gguf_offset: float = 0.0
    output_axes: tuple[int, ...] = ()
    input_axes: tuple[int, ...] = ()

    def to_matrix(self, value: np.ndarray) -> np.ndarray:
        """The value as Hugging Face and GGUF hold it: `[outputs, inputs]` for a linear layer."""
        return to_matrix(value, self.output_axes, self.input_axes)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The value in the variable's shape, from Hugging Face's or GGUF's layout."""
        return from_matrix(matrix, tuple(self.variable.shape), self.output_axes, self.input_axes)


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


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head.

    Attributes:
        embedding: `[vocabulary, width]` variable, tied with the input embedding.
        soft_cap: Soft cap on the logits, or `None`.
    """

    embedding: keras.Variable
    soft_cap: float | None


def to_matrix(
    value: np.ndarray, output_axes: tuple[int, ...], input_axes: tuple[int, ...]
) -> np.ndarray:
    """Any kernel as an `[outputs, inputs]` matrix; other arrays unchanged."""
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
    """The inverse of `to_matrix`."""
    if not output_axes:
        return matrix.reshape(shape)
    order = output_axes + input_axes
    return matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


_AXES: dict[str | None, tuple[tuple[int, ...], tuple[int, ...]]] = {
    None: ((1,), (0,)),
    "split": ((0, 2), (1,)),
    "joined": ((2,), (0, 1)),
}

_LINEARS = (
    Entry("attention.query_dense", "self_attn.q_proj", "attn_q", "linear", "split"),
    Entry("attention.key_dense", "self_attn.k_proj", "attn_k", "linear", "split"),
    Entry("attention.value_dense", "self_attn.v_proj", "attn_v", "linear", "split"),
    Entry("attention.output_dense", "self_attn.o_proj", "attn_output", "linear", "joined"),
    Entry("gating_ffw", "mlp.gate_proj", "ffn_gate", "linear"),
    Entry("gating_ffw_2", "mlp.up_proj", "ffn_up", "linear"),
    Entry("ffw_linear", "mlp.down_proj", "ffn_down", "linear"),
)
_GEMMA_NORMS = (
    Entry("pre_attention_norm", "input_layernorm", "attn_norm"),
    Entry("pre_ffw_norm", "post_attention_layernorm", "ffn_norm"),
)
_GEMMA2_NORMS = (
    Entry("pre_attention_norm", "input_layernorm", "attn_norm"),
    Entry("post_attention_norm", "post_attention_layernorm", "post_attention_norm"),
    Entry("pre_ffw_norm", "pre_feedforward_layernorm", "ffn_norm"),
    Entry("post_ffw_norm", "post_feedforward_layernorm", "post_ffw_norm"),
)
_GEMMA3_NORMS = (
    *_GEMMA2_NORMS,
    Entry("attention.query_norm", "self_attn.q_norm", "attn_q_norm"),
    Entry("attention.key_norm", "self_attn.k_norm", "attn_k_norm"),
)
_GEMMA_MODEL = (
    Entry("token_embedding", "embed_tokens", "token_embd", "embedding"),
    Entry("layer_norm", "norm", "output_norm"),
)
_GEMMA3N_BLOCK = (
    Entry("attention.q_proj", "self_attn.q_proj", "attn_q", "linear"),
    Entry("attention.k_proj", "self_attn.k_proj", "attn_k", "linear"),
    Entry("attention.v_proj", "self_attn.v_proj", "attn_v", "linear"),
    Entry("attention.o_proj", "self_attn.o_proj", "attn_output", "linear"),
    Entry("mlp.gate_proj", "mlp.gate_proj", "ffn_gate", "linear"),
    Entry("mlp.up_proj", "mlp.up_proj", "ffn_up", "linear"),
    Entry("mlp.down_proj", "mlp.down_proj", "ffn_down", "linear"),
)
_GEMMA4_MODEL = _GEMMA_MODEL


@dataclasses.dataclass(frozen=True)
class Family:
    """A Gemma generation.

    Attributes:
        name: `"gemma"`, `"gemma2"`, `"gemma3"`, `"gemma3n"` or `"gemma4"`.
        title: The name people use.
        block: Rows of the table for each decoder block.
        model: Rows that stand once.
        turn: Turn format of the instruct models.
        gguf_norm_offset: What GGUF adds to norm scales.
        gguf_complete: Whether the table carries every weight a GGUF of this generation has.
    """

    name: str
    title: str
    block: tuple[Entry, ...]
    model: tuple[Entry, ...]
    turn: Turn
    gguf_norm_offset: float = 1.0
    gguf_complete: bool = False

    def linears(self, model: keras.Model) -> tuple[Linear, ...]:
        """The linear layers of the text tower that LoRA and adapters can address.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this generation.

        Returns:
            `Linear`s in layer order. Layers that a block does not have (Gemma 4 shares keys and
            values) or never runs (Gemma 3n's shared ones) are left out.
        """
        found = []
        prefix = _hugging_face_prefix(model)
        for index, block in enumerate(_blocks(model)):
            shared = self.name == "gemma3n" and getattr(block, "is_kv_shared_layer", False)
            for entry in self.block:
                layer = _resolve(block, entry.keras)
                target = entry.hugging_face.rpartition(".")[2]
                if entry.kind != "linear" or layer is None:
                    continue
                if shared and target in ("k_proj", "v_proj"):
                    continue
                outputs, inputs = _AXES[entry.heads]
                place = entry.keras.rpartition(".")[0].replace(".", "/")
                found.append(
                    Linear(
                        layer=layer,
                        path="/".join(filter(None, (block.name, place, layer.name))),
                        target=target,
                        block=index,
                        hugging_face=f"{prefix}layers.{index}.{entry.hugging_face}",
                        gguf=f"blk.{index}.{entry.gguf}",
                        output_axes=outputs,
                        input_axes=inputs,
                    )
                )
        return tuple(found)

    def weights(self, model: keras.Model) -> tuple[Weight, ...]:
        """The text tower's weights with their foreign names, the embedding first.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this generation.

        Returns:
            A `Weight` for each row of the table that the model has.
        """
        backbone = _backbone(model)
        prefix = _hugging_face_prefix(model)
        rows = [self._weight(backbone, entry, prefix, "", "") for entry in self.model]
        for index, block in enumerate(_blocks(model)):
            rows += [
                self._weight(block, entry, f"{prefix}layers.{index}.", f"blk.{index}.", block.name)
                for entry in self.block
            ]
        return tuple(row for row in rows if row is not None)

    def _weight(
        self, owner: Any, entry: Entry, hugging_face: str, gguf: str, place: str
    ) -> Weight | None:
        layer = _resolve(owner, entry.keras)
        if layer is None:
            return None
        outputs, inputs = _AXES[entry.heads] if entry.kind == "linear" else ((), ())
        return Weight(
            variable=_variable(layer, entry.kind),
            path="/".join(filter(None, (place, entry.keras.replace(".", "/")))),
            entry=entry,
            hugging_face=f"{hugging_face}{entry.hugging_face}.weight",
            gguf=f"{gguf}{entry.gguf}.weight",
            gguf_offset=self.gguf_norm_offset if entry.kind == "norm" else 0.0,
            output_axes=outputs,
            input_axes=inputs,
        )

    def head(self, model: keras.Model) -> Head:
        """The output embedding and its soft cap.

        Args:
            model: A KerasHub Gemma `CausalLM` of this generation.

        Returns:
            The `Head`.
        """
        backbone = _backbone(model)
        if self.name == "gemma3n":
            text = backbone.language_model
            return Head(text.embed_tokens.embedding.embeddings, text.final_logit_soft_cap)
        layer = backbone.token_embedding
        # Gemma 4 may cap once more in the task; two caps in a row are not one.
        return Head(layer.embeddings, layer.logit_soft_cap)


_OLD_TURN = Turn("<start_of_turn>", "<end_of_turn>")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "gemma", "Gemma 1", _LINEARS + _GEMMA_NORMS, _GEMMA_MODEL, _OLD_TURN, gguf_complete=True
        ),
        Family(
            "gemma2", "Gemma 2", _LINEARS + _GEMMA2_NORMS, _GEMMA_MODEL, _OLD_TURN,
            gguf_complete=True,
        ),
        Family(
            "gemma3", "Gemma 3", _LINEARS + _GEMMA3_NORMS, _GEMMA_MODEL, _OLD_TURN,
            gguf_complete=True,
        ),
        Family("gemma3n", "Gemma 3n", _GEMMA3N_BLOCK, (), _OLD_TURN, gguf_norm_offset=0.0),
        Family(
            "gemma4", "Gemma 4", _LINEARS + _GEMMA3_NORMS, _GEMMA4_MODEL,
            Turn("<|turn>", "<turn|>", system="system"), gguf_norm_offset=0.0,
        ),
    )
}  # fmt: skip


def family_of(model: keras.Model) -> Family:
    """The generation of a KerasHub Gemma.

    Args:
        model: A KerasHub `CausalLM` or backbone.

    Returns:
        Its `Family`.

    Raises:
        LoadError: It is not a Gemma that generates text.
    """
    backbone = _backbone(model)
    models = keras_hub.models
    if isinstance(backbone, models.Gemma3nBackbone):
        return FAMILIES["gemma3n"]
    if isinstance(backbone, models.Gemma4Backbone):
        return FAMILIES["gemma4"]
    if isinstance(backbone, models.Gemma3Backbone):
        return FAMILIES["gemma3"]
    if isinstance(backbone, models.GemmaBackbone):
        return FAMILIES["gemma2" if backbone.use_post_ffw_norm else "gemma"]
    raise LoadError(
        f"Expected a KerasHub Gemma. Received: {type(model).__name__}",
        next_step="Load one with `load(...)`, or pass a `keras_hub.models.Gemma…CausalLM`.",
    )


def backbone_inputs(backbone: keras.Model, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
    """What the backbone wants to be fed for a batch of text alone.

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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        source: What `load` was given.
        instruct: Whether it is instruction-tuned; `None` where nothing says.
    """

    source: str
    instruct: bool | None


_origins: "weakref.WeakKeyDictionary[keras.Model, Origin]" = weakref.WeakKeyDictionary()


def mark_origin(model: keras.Model, source: str, instruct: bool | None) -> None:
    """Remember where a model came from.

    Args:
        model: A KerasHub Gemma.
        source: What it was loaded from.
        instruct: Whether it is instruction-tuned, if known.
    """
    _origins[model] = Origin(source, instruct)


def origin_of(model: keras.Model) -> Origin | None:
    """Where a model came from, or `None` for one this library did not load."""
    return _origins.get(model)


def is_instruct(model: keras.Model) -> bool | None:
    """Whether the model is instruction-tuned, or `None` where nothing says."""
    origin = _origins.get(model)
    return origin.instruct if origin else None


def fingerprint(model: keras.Model) -> str:
    """A short hash of the base model: its sizes and a sample of its base weights.

    LoRA does not change it, nor does saving and loading in the same dtype.

    Args:
        model: A KerasHub Gemma.

    Returns:
        16 hexadecimal digits.
    """
    family = family_of(model)
    digest = hashlib.sha256()
    sizes = {
        linear.hugging_face.partition("layers.")[2]: list(_kernel(linear.layer).shape)
        for linear in family.linears(model)
    }
    digest.update(json.dumps([family.name, sizes], sort_keys=True).encode())
    embedding = family.head(model).embedding
    rows = np.linspace(0, embedding.shape[0] - 1, 16).astype("int32")
    sample = ops.take(embedding, rows, axis=0)
    digest.update(np.asarray(ops.cast(sample, "float32")).round(3).tobytes())
    for linear in family.linears(model)[:: max(1, len(family.linears(model)) // 8)]:
        kernel = _kernel(linear.layer)
        part = ops.cast(kernel[tuple(slice(0, 4) for _ in kernel.shape)], "float32")
        digest.update(np.asarray(part).round(3).tobytes())
    return digest.hexdigest()[:16]


def _kernel(layer: Any) -> keras.Variable:
    """The stored kernel. The public `kernel` of a layer with LoRA on is the merged one."""
    return layer._kernel


def _variable(layer: Any, kind: str) -> keras.Variable:
    if kind == "linear":
        return _kernel(layer)
    if kind == "embedding":
        return layer.embeddings
    return layer.scale


def _backbone(model: keras.Model) -> Any:
    return getattr(model, "backbone", model)


def _blocks(model: keras.Model) -> list[Any]:
    backbone = _backbone(model)
    return list(getattr(backbone, "language_model", backbone).transformer_layers)


def _resolve(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return None
    return owner


def _hugging_face_prefix(model: keras.Model) -> str:
    names = {tensor.name for tensor in keras.tree.flatten(_backbone(model).input)}
    multimodal = names & {"images", "pixel_values", "input_features", "audio_mel"}
    wrapped = multimodal or isinstance(_backbone(model), keras_hub.models.Gemma3nBackbone)
    return "model.language_model." if wrapped else "model."
