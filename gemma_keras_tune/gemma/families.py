"""The facts of each Gemma family, as data.

One table says, for each family and each weight of the text tower: where it stands in the
KerasHub model, its name in Hugging Face checkpoints and in GGUF files, how its axes map to Hugging
Face's `[outputs, inputs]` matrices, and what GGUF adds to it. Some foreign tensors hold several
weights of ours (keys and values, the gates of all experts): `Piece` says which part. Loading, LoRA,
adapters and exports read this table; no other module knows a foreign tensor name.

Sources: the KerasHub 0.32 model definitions, `transformers`' Gemma modules, llama.cpp's tensor name
map (`gguf.constants`), and the parameter trees of the Gemma library for JAX (`gemma.gm.nn`).
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras_tune.errors import GemmaTuneError, LoadError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The place of a weight in a foreign tensor that holds several.

    Attributes:
        index: Its place among them.
        axis: The axis they are joined on.
        stacked: Whether that axis is theirs alone; else they lie behind each other on it.
    """

    index: int
    axis: int = 0
    stacked: bool = True


def join(pieces: Mapping[Piece | None, np.ndarray]) -> np.ndarray:
    """The foreign tensor that holds these pieces.

    Args:
        pieces: Every piece of one tensor, in the foreign layout; under `None` a whole one.

    Returns:
        The joined array.
    """
    if None in pieces:
        return pieces[None]
    ordered = sorted((piece for piece in pieces if piece), key=lambda piece: piece.index)
    arrays = [pieces[piece] for piece in ordered]
    first = ordered[0]
    together = np.stack if first.stacked else np.concatenate
    return together(arrays, axis=first.axis)


def split(tensor: np.ndarray, piece: Piece, count: int) -> np.ndarray:
    """One piece of a foreign tensor; the inverse of `join`.

    Args:
        tensor: The joined array.
        piece: Which of them.
        count: How many it holds.

    Returns:
        The piece, in the foreign layout.
    """
    if piece.stacked:
        return np.take(tensor, piece.index, axis=piece.axis)
    return np.split(tensor, count, axis=piece.axis)[piece.index]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a weight that stands in every block, or once in the model.

    Attributes:
        keras: Dotted attribute path of its layer, from the block or the text model; `*` stands for
            every index of a list of layers, which is also put in place of `{}` in the names.
        hugging_face: Name in Hugging Face checkpoints, after the block's prefix.
        gguf: Name in GGUF files, after the block's prefix.
        kind: `"linear"`: LoRA can address it; `"matrix"`: laid out alike, but LoRA leaves it alone;
            `"norm"`; `"embedding"`; or, where `keras` leads to the variable itself, `"vector"` (as
            it is), `"scalar"` (one number) or `"experts"` (`[experts, inputs, outputs]`).
        heads: For a linear layer, `"split"` when the kernel is `[heads, inputs, head_dim]`,
            `"joined"` when it is `[heads, head_dim, outputs]`, else `None` for `[inputs, outputs]`.
        jax: Path in the Gemma library's tree for JAX, after the block's prefix.
        suffixes: What follows the Hugging Face name and the GGUF name.
        piece: Its place in Hugging Face's tensor, where that holds several.
        gguf_piece: The same in GGUF.
        jax_piece: The same in the Gemma library for JAX.
        jax_split: Where that library gives an axis of ours two: the attribute, from the block or
            the text model, with the size of the inner one.
        jax_axis: The axis of ours it splits.
        jax_first: Whether the outer one stands before all others there.
    """

    keras: str
    hugging_face: str
    gguf: str
    kind: str = "norm"
    heads: str | None = None
    jax: str | None = None
    suffixes: tuple[str, str] = (".weight", ".weight")
    piece: Piece | None = None
    gguf_piece: Piece | None = None
    jax_piece: Piece | None = None
    jax_split: str | None = None
    jax_axis: int = 1
    jax_first: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """The turn format of a family.

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
        hugging_face: Full Hugging Face name, most with `.weight`. Weights with the same name are
            `entry.piece`s of one tensor; `join` makes it.
        gguf: Full GGUF name; `entry.gguf_piece` likewise.
        gguf_offset: What GGUF adds to the stored value (1 for the norms of Gemma 1 to 3).
        output_axes: Axes of the variable that make the rows of the `[outputs, inputs]` matrix.
        input_axes: Axes that make its columns.
        jax: Full path in the Gemma library's tree for JAX, or `None` where the table has none;
            `entry.jax_piece` likewise.
        jax_transposed: Whether that library holds it with its last two axes exchanged.
        jax_inner: Size of the inner one of the two axes it gives one of ours, or `None`.
        layer: The Keras layer that holds it; the variable itself where there is none.
        used: Whether the model reads it. Gemma 3n's checkpoints hold keys and values for layers
            that take those of an earlier layer.
    """

    variable: keras.Variable
    path: str
    entry: Entry
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
        """Its Hugging Face name in a text model, also where this one sees or hears."""
        return self.hugging_face.replace("model.language_model.", "model.")

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape in which Hugging Face and GGUF hold it, or its piece of a tensor."""
        shape = tuple(self.variable.shape)
        if self.entry.kind == "experts":
            return (shape[0], shape[2], shape[1])
        if self.entry.kind == "scalar":
            return (1,)
        if not self.output_axes:
            return shape
        axes = (self.output_axes, self.input_axes)
        return tuple(math.prod(shape[axis] for axis in group) for group in axes)

    def to_matrix(self, value: np.ndarray) -> np.ndarray:
        """The value as Hugging Face and GGUF hold it: `[outputs, inputs]` for a linear layer."""
        if self.entry.kind == "experts":
            return value.swapaxes(1, 2)
        if self.entry.kind == "scalar":
            return value.reshape(1)
        return to_matrix(value, self.output_axes, self.input_axes)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The value in the variable's shape, from Hugging Face's or GGUF's layout."""
        if self.entry.kind == "experts":
            return matrix.swapaxes(1, 2)
        return from_matrix(matrix, tuple(self.variable.shape), self.output_axes, self.input_axes)

    @property
    def jax_shape(self) -> tuple[int, ...]:
        """The shape in which the Gemma library for JAX holds it, or its piece of a tensor."""
        if self.entry.kind == "scalar":
            return (1,)
        shape = self._jax_split_shape
        if self.entry.jax_first:
            axis = self.entry.jax_axis
            shape = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return (*shape[:-2], shape[-1], shape[-2]) if self.jax_transposed else shape

    @property
    def _jax_split_shape(self) -> tuple[int, ...]:
        shape, axis = tuple(self.variable.shape), self.entry.jax_axis
        if self.jax_inner is None:
            return shape
        return (*shape[:axis], shape[axis] // self.jax_inner, self.jax_inner, *shape[axis + 1 :])

    def to_jax(self, value: np.ndarray) -> np.ndarray:
        """The value as the Gemma library for JAX holds it (or its piece of a tensor)."""
        if self.entry.kind == "scalar":
            return value.reshape(1)
        if self.jax_inner is not None:
            value = value.reshape(self._jax_split_shape)
        if self.entry.jax_first:
            value = np.moveaxis(value, self.entry.jax_axis, 0)
        return value.swapaxes(-1, -2) if self.jax_transposed else value

    def from_jax(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_jax`."""
        value = value.swapaxes(-1, -2) if self.jax_transposed else value
        if self.entry.jax_first:
            value = np.moveaxis(value, 0, self.entry.jax_axis)
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


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head.

    Attributes:
        embedding: `[vocabulary, width]` variable, tied with the input embedding.
        soft_cap: Soft cap on the logits, or `None`.
    """

    embedding: keras.Variable
    soft_cap: float | None

    def check_floating(self, error: type[GemmaTuneError]) -> None:
        """Refuse an embedding that Keras has quantized: its integers are no logits' weights.

        Args:
            error: The error to raise.
        """
        dtype = str(self.embedding.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise error(
                "The output embedding must be of floating point, or all logits would be wrong. "
                f"Received: one that is quantized ({dtype})",
                next_step="Load the base anew and quantize it without its embedding, such as "
                "`model.backbone.quantize('int8', filters=lambda layer: 'embedding' not in "
                "layer.name)`.",
            )


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
    Entry(
        "attention.query_dense", "self_attn.q_proj", "attn_q", "linear", "split",
        jax="attn/q_einsum/w",
    ),
    Entry(
        "attention.key_dense", "self_attn.k_proj", "attn_k", "linear", "split",
        jax="attn/kv_einsum/w", jax_piece=Piece(0),
    ),
    Entry(
        "attention.value_dense", "self_attn.v_proj", "attn_v", "linear", "split",
        jax="attn/kv_einsum/w", jax_piece=Piece(1),
    ),
    Entry(
        "attention.output_dense", "self_attn.o_proj", "attn_output", "linear", "joined",
        jax="attn/attn_vec_einsum/w",
    ),
    Entry(
        "gating_ffw", "mlp.gate_proj", "ffn_gate", "linear",
        jax="mlp/gating_einsum", jax_piece=Piece(0),
    ),
    Entry(
        "gating_ffw_2", "mlp.up_proj", "ffn_up", "linear",
        jax="mlp/gating_einsum", jax_piece=Piece(1),
    ),
    Entry("ffw_linear", "mlp.down_proj", "ffn_down", "linear", jax="mlp/linear"),
)  # fmt: skip
_GEMMA_NORMS = (
    Entry("pre_attention_norm", "input_layernorm", "attn_norm"),
    Entry("pre_ffw_norm", "post_attention_layernorm", "ffn_norm"),
)
_GEMMA2_NORMS = (
    Entry("pre_attention_norm", "input_layernorm", "attn_norm", jax="pre_attention_norm/scale"),
    Entry(
        "post_attention_norm", "post_attention_layernorm", "post_attention_norm",
        jax="post_attention_norm/scale",
    ),
    Entry("pre_ffw_norm", "pre_feedforward_layernorm", "ffn_norm", jax="pre_ffw_norm/scale"),
    Entry(
        "post_ffw_norm", "post_feedforward_layernorm", "post_ffw_norm", jax="post_ffw_norm/scale"
    ),
)  # fmt: skip
_GEMMA3_NORMS = (
    *_GEMMA2_NORMS,
    Entry(
        "attention.query_norm", "self_attn.q_norm", "attn_q_norm", jax="attn/_query_norm/scale"
    ),
    Entry("attention.key_norm", "self_attn.k_norm", "attn_k_norm", jax="attn/_key_norm/scale"),
)  # fmt: skip
_GEMMA_MODEL = (
    Entry(
        "token_embedding", "embed_tokens", "token_embd", "embedding",
        jax="embedder/input_embedding",
    ),
    Entry("layer_norm", "norm", "output_norm", jax="final_norm/scale"),
)  # fmt: skip

# What Gemma 3n and 4 feed into each layer beside the token's embedding.
_PER_LAYER_MODEL = (
    Entry("per_layer_model_projection", "per_layer_model_projection", "per_layer_model_proj",
          "matrix", jax="embedder/per_layer_input_projection/w",
          jax_split="hidden_size_per_layer_input"),
    Entry("per_layer_projection_norm", "per_layer_projection_norm", "per_layer_proj_norm",
          jax="embedder/per_layer_projection_norm/scale"),
)  # fmt: skip
_PER_LAYER_BLOCK = (
    Entry("per_layer_input_gate", "per_layer_input_gate", "inp_gate", "matrix",
          jax="per_layer_mapping/per_layer_input_gate/w"),
    Entry("post_per_layer_input_norm", "post_per_layer_input_norm", "post_norm",
          jax="per_layer_mapping/post_per_layer_input_norm/scale"),
)  # fmt: skip

_GEMMA3N_BLOCK = (
    Entry("attention.q_proj", "self_attn.q_proj", "attn_q", "linear",
          jax="attn/q_einsum/w", jax_split="attention.head_dim", jax_first=True),
    Entry("attention.k_proj", "self_attn.k_proj", "attn_k", "linear", jax="attn/kv_einsum/w",
          jax_piece=Piece(0), jax_split="attention.head_dim", jax_first=True),
    Entry("attention.v_proj", "self_attn.v_proj", "attn_v", "linear", jax="attn/kv_einsum/w",
          jax_piece=Piece(1), jax_split="attention.head_dim", jax_first=True),
    Entry("attention.o_proj", "self_attn.o_proj", "attn_output", "linear",
          jax="attn/attn_vec_einsum/w", jax_split="attention.head_dim", jax_axis=0),
    Entry("mlp.gate_proj", "mlp.gate_proj", "ffn_gate", "linear",
          jax="mlp/gating_einsum", jax_piece=Piece(0)),
    Entry("mlp.up_proj", "mlp.up_proj", "ffn_up", "linear",
          jax="mlp/gating_einsum", jax_piece=Piece(1)),
    Entry("mlp.down_proj", "mlp.down_proj", "ffn_down", "linear", jax="mlp/linear"),
    Entry("attention.q_norm", "self_attn.q_norm", "attn_q_norm", jax="attn/query_norm/scale"),
    Entry("attention.k_norm", "self_attn.k_norm", "attn_k_norm", jax="attn/key_norm/scale"),
    Entry("input_layernorm", "input_layernorm", "attn_norm", jax="pre_attention_norm/scale"),
    Entry("post_attention_layernorm", "post_attention_layernorm", "post_attention_norm",
          jax="post_attention_norm/scale"),
    Entry("pre_feedforward_layernorm", "pre_feedforward_layernorm", "ffn_norm",
          jax="pre_ffw_norm/scale"),
    Entry("post_feedforward_layernorm", "post_feedforward_layernorm", "post_ffw_norm",
          jax="post_ffw_norm/scale"),
    Entry("altup.correct_output_scale", "altup.correct_output_scale", "altup_correct_scale",
          "vector", suffixes=("", ".weight"), jax="altup/correct_output_scale"),
    Entry("altup.correction_coefs", "altup.correction_coefs", "altup_correct_coef", "matrix",
          jax="altup/correction_coefs"),
    Entry("altup.prediction_coefs", "altup.prediction_coefs", "altup_predict_coef", "matrix",
          jax="altup/prediction_coefs", jax_split="altup.altup_num_inputs"),
    Entry("altup.modality_router", "altup.modality_router", "altup_router", "matrix",
          jax="altup/modality_router/w"),
    Entry("altup.router_norm", "altup.router_norm", "altup_router_norm",
          jax="altup/router_norm_layer/scale"),
    Entry("laurel.linear_left", "laurel.linear_left", "laurel_l", "matrix",
          jax="laurel/linear_left/w"),
    Entry("laurel.linear_right", "laurel.linear_right", "laurel_r", "matrix",
          jax="laurel/linear_right/w"),
    Entry("laurel.post_laurel_norm", "laurel.post_laurel_norm", "laurel_post_norm",
          jax="post_laurel_norm/scale"),
    *_PER_LAYER_BLOCK,
    Entry("per_layer_projection", "per_layer_projection", "proj", "matrix",
          jax="per_layer_mapping/per_layer_projection/w"),
)  # fmt: skip
_GEMMA3N_MODEL = (
    Entry("embed_tokens.embedding", "embed_tokens", "token_embd", "embedding",
          jax="embedder/input_embedding"),
    Entry("embed_tokens_per_layer.embedding", "embed_tokens_per_layer", "per_layer_token_embd",
          "embedding", jax="embedder/per_layer_input_embedding",
          jax_split="hidden_size_per_layer_input"),
    *_PER_LAYER_MODEL,
    Entry("altup_projections.*", "altup_projections.{}", "altup_proj", "matrix",
          gguf_piece=Piece(0), jax="altup_projection_{0}/altup_projection_{0}"),
    Entry("altup_unembed_projections.*", "altup_unembed_projections.{}", "altup_unembd_proj",
          "matrix", gguf_piece=Piece(0),
          jax="altup_unembed_projection_{0}/altup_unembed_projection_{0}"),
    Entry("final_normalization", "norm", "output_norm", jax="final_norm/scale"),
)  # fmt: skip


def _in_jax(rows: tuple[Entry, ...], **names: str) -> tuple[Entry, ...]:
    """Rows with other names in the Gemma library for JAX, by the last part of their Keras names."""
    ends = ((row, row.keras.rpartition(".")[2]) for row in rows)
    return tuple(dataclasses.replace(row, jax=names.get(end, row.jax)) for row, end in ends)


# Rows from `post_ffw_norm_dense` on stand where a mixture of experts does.
_GEMMA4_BLOCK = (
    *_LINEARS,
    *_in_jax(_GEMMA3_NORMS, query_norm="attn/query_norm/scale", key_norm="attn/key_norm/scale"),
    *_in_jax(
        _PER_LAYER_BLOCK,
        per_layer_input_gate="per_layer_input_gate/w",
        post_per_layer_input_norm="post_per_layer_input_norm/scale",
    ),
    Entry("per_layer_up_proj", "per_layer_projection", "proj", "matrix",
          jax="per_layer_projection/w"),
    Entry("layer_scalar", "layer_scalar", "layer_output_scale", "scalar",
          suffixes=("", ".weight"), jax="skip_scale"),
    Entry("post_ffw_norm_dense", "post_feedforward_layernorm_1", "post_ffw_norm_1",
          jax="post_ffw2_norm/scale"),
    Entry("pre_ffw_norm_moe", "pre_feedforward_layernorm_2", "pre_ffw_norm_2",
          jax="pre_ffw_norm/scale"),
    Entry("post_ffw_norm_moe_path", "post_feedforward_layernorm_2", "post_ffw_norm_2",
          jax="post_ffw1_norm/scale"),
    Entry("moe_router.per_dim_scale", "router.scale", "ffn_gate_inp.scale", "vector",
          suffixes=("", ""), jax="mlp/router_scale"),
    Entry("moe_router.proj", "router.proj", "ffn_gate_inp", "matrix", jax="mlp/router_logits/w"),
    Entry("moe_expert_bank.gate_proj", "experts.gate_up_proj", "ffn_gate_up_exps", "experts",
          suffixes=("", ".weight"), piece=Piece(0, 1, False), gguf_piece=Piece(0, 1, False),
          jax="mlp/gating_einsum/w", jax_piece=Piece(0, 1)),
    Entry("moe_expert_bank.up_proj", "experts.gate_up_proj", "ffn_gate_up_exps", "experts",
          suffixes=("", ".weight"), piece=Piece(1, 1, False), gguf_piece=Piece(1, 1, False),
          jax="mlp/gating_einsum/w", jax_piece=Piece(1, 1)),
    Entry("moe_expert_bank.down_proj", "experts.down_proj", "ffn_down_exps", "experts",
          suffixes=("", ".weight"), jax="mlp/linear/w"),
    Entry("moe_expert_bank.per_expert_scale", "router.per_expert_scale", "ffn_down_exps.scale",
          "vector", suffixes=("", ""), jax="mlp/per_expert_scale"),
)  # fmt: skip
_GEMMA4_MODEL = (
    *_GEMMA_MODEL,
    Entry("per_layer_token_embedding", "embed_tokens_per_layer", "per_layer_token_embd",
          "embedding", jax="embedder/per_layer_embeddings",
          jax_split="hidden_size_per_layer_input"),
    *_in_jax(
        _PER_LAYER_MODEL, per_layer_model_projection="embedder/per_layer_model_projection/w"
    ),
)  # fmt: skip
# What that library calls otherwise in a block with experts: there its usual names are theirs.
_BESIDE_EXPERTS = {
    "mlp/gating_einsum": "mlp2/gating_einsum",
    "mlp/linear": "mlp2/linear",
    "pre_ffw_norm/scale": "pre_ffw2_norm/scale",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A Gemma family.

    Attributes:
        name: `"gemma"`, `"gemma2"`, `"gemma3"`, `"gemma3n"` or `"gemma4"`.
        title: The name people use.
        block: Rows of the table for each decoder block.
        model: Rows that stand once.
        turn: Turn format of the instruct models.
        gguf_norm_offset: What GGUF adds to norm scales.
        jax_complete: Whether the table carries the whole tree of the Gemma library for JAX.
    """

    name: str
    title: str
    block: tuple[Entry, ...]
    model: tuple[Entry, ...]
    turn: Turn
    gguf_norm_offset: float = 1.0
    jax_complete: bool = False

    def linears(self, model: keras.Model) -> tuple[Linear, ...]:
        """The linear layers of the text tower that LoRA and adapters can address.

        Args:
            model: A KerasHub Gemma `CausalLM` or backbone of this family.

        Returns:
            `Linear`s in layer order. Layers that a block does not have (Gemma 4 shares keys and
            values) or never runs (Gemma 3n's shared ones) are left out.
        """
        found = []
        prefix = _hugging_face_prefix(model)
        for index, block in enumerate(_blocks(model)):
            for entry in self.block:
                layer = _resolve(block, entry.keras)
                target = entry.hugging_face.rpartition(".")[2]
                if entry.kind != "linear" or layer is None:
                    continue
                if _shares_keys(block) and entry.hugging_face in _KEYS_AND_VALUES:
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
            model: A KerasHub Gemma `CausalLM` or backbone of this family.

        Returns:
            A `Weight` for each row of the table that the model has.
        """
        text = _text_model(model)
        prefix = _hugging_face_prefix(model)
        rows = [
            self._weight(text, entry, prefix, "", "", "")
            for entry in itertools.chain.from_iterable(_expand(text, row) for row in self.model)
        ]
        for index, block in enumerate(_blocks(model)):
            names = (f"{prefix}layers.{index}.", f"blk.{index}.", f"layer_{index}/", block.name)
            rows += [self._weight(block, entry, *names) for entry in self.block]
        return tuple(row for row in rows if row is not None)

    def _weight(
        self, owner: Any, entry: Entry, hugging_face: str, gguf: str, jax: str, place: str
    ) -> Weight | None:
        layer = _resolve(owner, entry.keras)
        if layer is None:
            return None
        if self.jax_complete:
            entry = _in_this_block(owner, entry)
        in_matrix = entry.kind in ("linear", "matrix")
        outputs, inputs = _AXES[entry.heads] if in_matrix else ((), ())
        suffix, gguf_suffix = entry.suffixes
        return Weight(
            variable=_variable(layer, entry.kind),
            path="/".join(filter(None, (place, entry.keras.replace(".", "/")))),
            entry=entry,
            hugging_face=f"{hugging_face}{entry.hugging_face}{suffix}",
            gguf=f"{gguf}{entry.gguf}{gguf_suffix}",
            gguf_offset=self.gguf_norm_offset if entry.kind == "norm" else 0.0,
            output_axes=outputs,
            input_axes=inputs,
            jax=f"{jax}{entry.jax}" if self.jax_complete and entry.jax else None,
            jax_transposed=self._jax_transposed(layer, entry),
            jax_inner=self._jax_inner(owner, entry),
            layer=layer,
            used=not (_shares_keys(owner) and entry.hugging_face in _KEYS_AND_VALUES),
        )

    def _jax_transposed(self, layer: Any, entry: Entry) -> bool:
        if not self.jax_complete or "gating_einsum" not in (entry.jax or ""):
            return False
        if entry.kind == "experts":
            return True
        # Gemma 2 2B alone was published the other way round.
        return not (self.name == "gemma2" and _kernel(layer).shape[0] == _GEMMA2_2B_WIDTH)

    def _jax_inner(self, owner: Any, entry: Entry) -> int | None:
        if not self.jax_complete or entry.jax_split is None:
            return None
        return int(_resolve(owner, entry.jax_split))

    def head(self, model: keras.Model) -> Head:
        """The output embedding and its soft cap.

        Args:
            model: A KerasHub Gemma `CausalLM` of this family.

        Returns:
            The `Head`.

        Raises:
            LoadError: The logits are capped twice.
        """
        backbone = _backbone(model)
        if self.name == "gemma3n":
            text = backbone.language_model
            return Head(text.embed_tokens.embedding.embeddings, text.final_logit_soft_cap)
        layer = backbone.token_embedding
        # The task of Gemma 4 may cap, too.
        caps = [layer.logit_soft_cap, getattr(model, "final_logit_cap", None)]
        found = [cap for cap in caps if cap is not None]
        if len(found) > 1:
            raise LoadError(
                f"The logits are capped twice, at {found[0]} by the backbone and at {found[1]} by "
                "the task, which is not one cap.",
                next_step="Make the `Gemma4CausalLM` without `final_logit_cap`.",
            )
        return Head(layer.embeddings, found[0] if found else None)


_KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
_GEMMA2_2B_WIDTH = 2304
# Values looked at together: what lies beside the model stays small.
_CHUNK_VALUES = 1 << 22
_OLD_TURN = Turn("<start_of_turn>", "<end_of_turn>")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("gemma", "Gemma 1", _LINEARS + _GEMMA_NORMS, _GEMMA_MODEL, _OLD_TURN),
        Family(
            "gemma2", "Gemma 2", _LINEARS + _GEMMA2_NORMS, _GEMMA_MODEL, _OLD_TURN,
            jax_complete=True,
        ),
        Family(
            "gemma3", "Gemma 3", _LINEARS + _GEMMA3_NORMS, _GEMMA_MODEL, _OLD_TURN,
            jax_complete=True,
        ),
        Family(
            "gemma3n", "Gemma 3n", _GEMMA3N_BLOCK, _GEMMA3N_MODEL, _OLD_TURN, gguf_norm_offset=0.0,
            jax_complete=True,
        ),
        Family(
            "gemma4", "Gemma 4", _GEMMA4_BLOCK, _GEMMA4_MODEL,
            Turn("<|turn>", "<turn|>", system="system"), gguf_norm_offset=0.0, jax_complete=True,
        ),
    )
}  # fmt: skip


def family_of(model: keras.Model) -> Family:
    """The family of a KerasHub Gemma.

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


def context_length(model: keras.Model) -> int:
    """The longest prompt and answer together that a model was made for.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Returns:
        Tokens.
    """
    family, backbone = family_of(model).name, model.backbone
    if family == "gemma3n":
        return int(backbone.max_position_embeddings)
    if family == "gemma4" and not backbone.hidden_size_per_layer_input:
        return 2 * _LONG_CONTEXT  # the sizes without an "E" in their names
    if family == "gemma3" and backbone.global_rope_scaling_factor != 1:
        return _LONG_CONTEXT
    return {"gemma3": 32_768, "gemma4": _LONG_CONTEXT}.get(family, 8192)


_LONG_CONTEXT = 131_072


def backbone_settings(model: keras.Model) -> dict[str, Any]:
    """The settings of a model's backbone, with the cap of its logits wherever the model keeps it.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Returns:
        What the backbone's `get_config` gives; `final_logit_soft_cap` is that of the head.
    """
    config: dict[str, Any] = model.backbone.get_config()
    if "final_logit_soft_cap" in config:
        config["final_logit_soft_cap"] = family_of(model).head(model).soft_cap
    return config


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


def broken_weights(model: keras.Model) -> list[str]:
    """The text tower's weights that hold NaN or infinite values, by their paths."""
    weights = family_of(model).weights(model)
    return [weight.path for weight in weights if not all_finite(np.asarray(weight.variable))]


def quantizations(model: keras.Model) -> dict[str, str]:
    """How Keras quantized the text tower's weights: the mode, such as `"int8"`, by their paths."""
    modes = {
        weight.path: getattr(weight.layer, "quantization_mode", None)
        for weight in family_of(model).weights(model)
    }
    return {path: str(mode) for path, mode in modes.items() if mode is not None}


def all_finite(values: np.ndarray) -> bool:
    """Whether an array holds no NaN and nothing infinite; little lies in memory beside it."""
    flat = values.reshape(-1)
    parts = range(0, flat.size, _CHUNK_VALUES)
    return all(np.isfinite(flat[start : start + _CHUNK_VALUES]).all() for start in parts)


def _kernel(layer: Any) -> keras.Variable:
    """The stored kernel. The public `kernel` of a layer with LoRA on is the merged one."""
    return layer._kernel


def _variable(layer: Any, kind: str) -> keras.Variable:
    if kind in ("linear", "matrix"):
        return _kernel(layer)
    if kind == "embedding":
        return layer.embeddings
    return layer.scale if kind == "norm" else layer


def _backbone(model: keras.Model) -> Any:
    return getattr(model, "backbone", model)


def _blocks(model: keras.Model) -> list[Any]:
    return list(_text_model(model).transformer_layers)


def _text_model(model: keras.Model) -> Any:
    backbone = _backbone(model)
    return getattr(backbone, "language_model", backbone)


def _shares_keys(block: Any) -> bool:
    """Whether a block takes the keys and values of an earlier one."""
    return bool(getattr(block, "is_kv_shared_layer", False))


def _in_this_block(block: Any, entry: Entry) -> Entry:
    """The row with the name the Gemma library for JAX has for it in a Gemma 4's block."""
    keys = entry.keras == "attention.key_dense"
    if keys and getattr(block.attention, "value_dense", None) is None:
        # Keys serve as values.
        return dataclasses.replace(entry, jax="attn/k_einsum/w", jax_piece=None)
    if getattr(block, "moe_router", None) is not None and not entry.keras.endswith("_moe"):
        return dataclasses.replace(entry, jax=_BESIDE_EXPERTS.get(str(entry.jax), entry.jax))
    return entry


def _expand(owner: Any, entry: Entry) -> list[Entry]:
    """One row for each layer of a list, where the row stands for a list."""
    if not entry.keras.endswith(".*"):
        return [entry]
    layers = _resolve(owner, entry.keras.removesuffix(".*")) or ()
    return [
        dataclasses.replace(
            entry,
            keras=entry.keras.replace("*", str(index)),
            hugging_face=entry.hugging_face.format(index),
            jax=entry.jax and entry.jax.format(index),
            gguf_piece=entry.gguf_piece and dataclasses.replace(entry.gguf_piece, index=index),
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
    names = {tensor.name for tensor in keras.tree.flatten(_backbone(model).input)}
    multimodal = names & {"images", "pixel_values", "input_features", "audio_mel"}
    return "model.language_model." if multimodal else "model."
