"""The facts of each Gemma family, as data: weights, names, layouts, sizes.

One row for each weight of the text tower says where it is in the KerasHub model, its name in
Hugging Face checkpoints, in GGUF files and in the Gemma library for JAX, and how its axes map to
each of them. Some foreign tensors hold several of our weights (keys and values, the gates of all
experts): a `FusedPart` says which part is meant. `families` computes with these tables; loading,
LoRA, adapters and exports read them through it. A new generation of Gemma is added here.

Sources: the KerasHub 0.32 model definitions, `transformers`' Gemma modules, llama.cpp's tensor name
map (`gguf.constants`), and the parameter trees of the Gemma library for JAX (`gemma.gm.nn`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class FusedPart:
    """The place of a weight in a foreign tensor that holds several.

    Attributes:
        index: Index of the part.
        axis: Axis on which the parts are joined.
        stacked: True: parts are stacked on a new axis. False: they are concatenated along an
            existing one.
    """

    index: int
    axis: int = 0
    stacked: bool = True


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One row of the table: a weight of every block, or one that the model has once.

    Attributes:
        keras: Dotted attribute path of its layer, from the block or the text model. `*` means
            every index of a list of layers; the index also replaces `{}` in the names.
        hugging_face: Name in Hugging Face checkpoints, after the block's prefix.
        gguf: Name in GGUF files, after the block's prefix.
        kind: `"linear"`: LoRA can address it; `"matrix"`: the same layout, but LoRA leaves it
            alone; `"norm"`; `"embedding"`; or, where `keras` leads to the variable itself,
            `"vector"` (as it is), `"scalar"` (one number) or `"experts"`
            (`[experts, inputs, outputs]`).
        heads: For a linear layer, `"split"` when the kernel is `[heads, inputs, head_dim]`,
            `"joined"` when it is `[heads, head_dim, outputs]`, else `None` for `[inputs, outputs]`.
        jax: Path in the tree of the Gemma library for JAX, after the block's prefix.
        suffixes: Endings of the Hugging Face name and of the GGUF name.
        part: Its part of Hugging Face's tensor, if that holds several weights.
        gguf_part: Its part of the GGUF tensor, likewise.
        jax_part: Its part of the Gemma library's array, likewise.
        jax_split: If the Gemma library splits one of our axes into two: dotted path of the
            attribute that holds the inner axis's size, from the block or the text model.
        jax_axis: The axis of ours that is split.
        jax_first: True if the outer of the two axes comes before all others there.
    """

    keras: str
    hugging_face: str
    gguf: str
    kind: str = "norm"
    heads: str | None = None
    jax: str | None = None
    suffixes: tuple[str, str] = (".weight", ".weight")
    part: FusedPart | None = None
    gguf_part: FusedPart | None = None
    jax_part: FusedPart | None = None
    jax_split: str | None = None
    jax_axis: int = 1
    jax_first: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """The turn format of a family's instruct models.

    Attributes:
        start: Opens a turn; the role follows at once.
        end: Closes a turn; the model must stop on it.
        system_role: True if there is a system role. Otherwise the system text is put in front of
            the first user message.
        no_thought: Text that opens and closes the thought which models without inputs for each
            layer, the larger ones, would begin a response with. The published template writes it
            when thinking is off.
        tools: Name of the format for tools, if the instruct models have one.
        marked: Name of the turn format, and of that for tools, of models whose tokenizer has its
            marks, as FunctionGemma's, if there are such models.
    """

    start: str
    end: str
    system_role: bool = False
    no_thought: str = ""
    tools: str = ""
    marked: str = ""


GELU = "gelu_pytorch_tanh"
SENTENCEPIECE = "llama"  # llama.cpp's name for it
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of attention in KerasHub's model.

    Attributes:
        theta: Base of its frequencies.
        setting: Backbone setting that replaces `theta`, or `None`: it is fixed.
        factor: Backbone setting that stretches the positions linearly, or `None`.
        share: Backbone setting of the share of each head that is rotated, or `None`: all of it.
    """

    theta: float
    setting: str | None = None
    factor: str | None = None
    share: str | None = None


@dataclasses.dataclass(frozen=True)
class HuggingFaceTable:
    """A family in `transformers`.

    Attributes:
        model_type: `model_type` of its text model.
        architecture: Class of its text model.
        fields: Names of settings in `config.json`, with KerasHub's names of the same; `None` for
            those that KerasHub has fixed or words otherwise.
        media_type: `model_type` of the model that sees or hears, or `None`.
        defaults: Values of fields that a config leaves out.
        fixed: Backbone settings that `transformers` has no field for, with the values it computes
            with; added to those of the family.
        period_field: Field of `full_attention_period`, or `None`.
        activations: Names of the activation function that mean KerasHub's, by field.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str | None]
    media_type: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    period_field: str | None = None
    activations: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: {"hidden_activation": (GELU,)}
    )


@dataclasses.dataclass(frozen=True)
class GgufTable:
    """A family in GGUF files and llama.cpp.

    Attributes:
        keys: Keys of the metadata in the order they are written, with the value that llama.cpp
            takes for one that is missing; `None`: it must be there. A float's key holds a float.
        norm_offset: The number added to norm scales.
        tokenizer: llama.cpp's name of the tokenizer.
        fixed: Backbone settings that llama.cpp computes with whatever a file says, by the settings
            of the model; added to those of the family.
        unsaid: Backbone settings that no key says.
        rows: Backbone settings that are the rows of a tensor, with its Hugging Face name.
        default_period: `full_attention_period` of a file that does not say which layers have
            full attention.
        layers_scaled_by_width: Layers of the one size that scales its queries by its width; no key
            says so.
        adapters: True if llama.cpp computes with an adapter what the model does.
        stretched: The factor of the positions of a file that says none, by the number of layers:
            Ollama leaves it out.
    """

    keys: Mapping[str, float | None]
    norm_offset: float = 1.0
    tokenizer: str = SENTENCEPIECE
    fixed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {}
    unsaid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_period: int | None = None
    layers_scaled_by_width: int | None = None
    adapters: bool = True
    stretched: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GemmaJaxTable:
    """A family in the Gemma library for JAX.

    Attributes:
        fixed: Backbone settings that its models have, whatever their size; added to those of the
            family.
        untransposed: Widths of the models whose gates were published with inputs before outputs,
            as we have them.
        one_key_head_a_query: True if it reads models with as many key heads as query heads.
        keeps_unread_keys: True if its tree has keys and values, unread, for layers that take those
            of an earlier one.
        reads_adapters: True if its LoRA knows all layers of the family.
    """

    fixed: Mapping[str, Any]
    untransposed: tuple[int, ...] = ()
    one_key_head_a_query: bool = False
    keeps_unread_keys: bool = False
    reads_adapters: bool = False


@dataclasses.dataclass(frozen=True)
class FamilyTable:
    """The facts of a Gemma family.

    Attributes:
        name: Short name, such as `"gemma3"`; llama.cpp's name of the architecture, too.
        title: The name people use.
        keras_hub: Prefix of the names of its KerasHub classes.
        block: The weights of each decoder block.
        model: The weights that the model has once.
        turn: Turn format of the instruct models.
        tiny: Backbone settings of a model of a few thousand parameters, for tests.
        context_length: The longest prompt and response together, in tokens, by the backbone.
        cache_axes: Axes of the key/value cache of `call_with_cache`: `b` rows, `n` layers, `2` keys
            and values, `t` tokens, `h` heads, `d` head size. Without `n`, each layer has its own
            array; without `2`, keys and values are two arrays.
        ropes: Rotary embedding of each kind of attention that differs.
        hugging_face: The family in `transformers`.
        gguf: The family in GGUF files and llama.cpp.
        told_by: Backbone settings that tell it from a family with the same KerasHub classes.
        built_with: Backbone settings of every text model of it, beside the sizes.
        fixed: Backbone settings that no runtime but KerasHub can change, with their values.
        widths_by_layer: True if KerasHub takes a feed-forward width for each layer.
        gates: Gates whose widths KerasHub's `intermediate_dim` adds up.
        full_attention_period: Distance between layers with full attention, the others having a
            sliding window; `None` if all have it, or if the setting `layer_types` says.
        tokenizer_options: Arguments of the KerasHub tokenizer of a model for text alone.
        vocabulary_settings: Backbone settings that count tokens.
        tiny_moe: Changes to `tiny` for a mixture of experts; empty if the family has none.
        scales_queries: True if KerasHub's backbone takes `query_head_dim_normalize` and its
            blocks do not; see `building.set_attention_scale`.
        quantized_lora: True if KerasHub computes LoRA on quantized layers rightly.
        jax: The family in the Gemma library for JAX; `None` if the rows lack its names.
        litert: True if LiteRT-LM was seen to answer as the model does.
        overflows: True if activations, or gradients, of its models can leave the range of float16.
    """

    name: str
    title: str
    keras_hub: str
    block: tuple[WeightSpec, ...]
    model: tuple[WeightSpec, ...]
    turn: Turn
    tiny: Mapping[str, Any]
    context_length: Callable[[Any], int]
    cache_axes: str
    ropes: Mapping[str, Rope]
    hugging_face: HuggingFaceTable
    gguf: GgufTable
    told_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    built_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    widths_by_layer: bool = False
    gates: int = 1
    full_attention_period: int | None = None
    tokenizer_options: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    vocabulary_settings: tuple[str, ...] = ("vocabulary_size",)
    tiny_moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales_queries: bool = False
    quantized_lora: bool = True
    jax: GemmaJaxTable | None = None
    litert: bool = False
    overflows: bool = False


# The weights.

_LINEARS = (
    WeightSpec(
        "attention.query_dense", "self_attn.q_proj", "attn_q", "linear", "split",
        jax="attn/q_einsum/w",
    ),
    WeightSpec(
        "attention.key_dense", "self_attn.k_proj", "attn_k", "linear", "split",
        jax="attn/kv_einsum/w", jax_part=FusedPart(0),
    ),
    WeightSpec(
        "attention.value_dense", "self_attn.v_proj", "attn_v", "linear", "split",
        jax="attn/kv_einsum/w", jax_part=FusedPart(1),
    ),
    WeightSpec(
        "attention.output_dense", "self_attn.o_proj", "attn_output", "linear", "joined",
        jax="attn/attn_vec_einsum/w",
    ),
    WeightSpec(
        "gating_ffw", "mlp.gate_proj", "ffn_gate", "linear",
        jax="mlp/gating_einsum", jax_part=FusedPart(0),
    ),
    WeightSpec(
        "gating_ffw_2", "mlp.up_proj", "ffn_up", "linear",
        jax="mlp/gating_einsum", jax_part=FusedPart(1),
    ),
    WeightSpec("ffw_linear", "mlp.down_proj", "ffn_down", "linear", jax="mlp/linear"),
)  # fmt: skip
_GEMMA_NORMS = (
    WeightSpec("pre_attention_norm", "input_layernorm", "attn_norm"),
    WeightSpec("pre_ffw_norm", "post_attention_layernorm", "ffn_norm"),
)
_GEMMA2_NORMS = (
    WeightSpec(
        "pre_attention_norm", "input_layernorm", "attn_norm", jax="pre_attention_norm/scale"
    ),
    WeightSpec(
        "post_attention_norm", "post_attention_layernorm", "post_attention_norm",
        jax="post_attention_norm/scale",
    ),
    WeightSpec("pre_ffw_norm", "pre_feedforward_layernorm", "ffn_norm", jax="pre_ffw_norm/scale"),
    WeightSpec(
        "post_ffw_norm", "post_feedforward_layernorm", "post_ffw_norm", jax="post_ffw_norm/scale"
    ),
)  # fmt: skip
_GEMMA3_NORMS = (
    *_GEMMA2_NORMS,
    WeightSpec(
        "attention.query_norm", "self_attn.q_norm", "attn_q_norm", jax="attn/_query_norm/scale"
    ),
    WeightSpec("attention.key_norm", "self_attn.k_norm", "attn_k_norm", jax="attn/_key_norm/scale"),
)  # fmt: skip
_GEMMA_MODEL = (
    WeightSpec(
        "token_embedding", "embed_tokens", "token_embd", "embedding",
        jax="embedder/input_embedding",
    ),
    WeightSpec("layer_norm", "norm", "output_norm", jax="final_norm/scale"),
)  # fmt: skip

# Inputs of each layer in Gemma 3n and 4, beside the token's embedding.
_PER_LAYER_MODEL = (
    WeightSpec("per_layer_model_projection", "per_layer_model_projection", "per_layer_model_proj",
        "matrix", jax="embedder/per_layer_input_projection/w",
        jax_split="hidden_size_per_layer_input"),
    WeightSpec("per_layer_projection_norm", "per_layer_projection_norm", "per_layer_proj_norm",
        jax="embedder/per_layer_projection_norm/scale"),
)  # fmt: skip
_PER_LAYER_BLOCK = (
    WeightSpec("per_layer_input_gate", "per_layer_input_gate", "inp_gate", "matrix",
        jax="per_layer_mapping/per_layer_input_gate/w"),
    WeightSpec("post_per_layer_input_norm", "post_per_layer_input_norm", "post_norm",
        jax="per_layer_mapping/post_per_layer_input_norm/scale"),
)  # fmt: skip

_GEMMA3N_BLOCK = (
    WeightSpec("attention.q_proj", "self_attn.q_proj", "attn_q", "linear",
        jax="attn/q_einsum/w", jax_split="attention.head_dim", jax_first=True),
    WeightSpec("attention.k_proj", "self_attn.k_proj", "attn_k", "linear", jax="attn/kv_einsum/w",
        jax_part=FusedPart(0), jax_split="attention.head_dim", jax_first=True),
    WeightSpec("attention.v_proj", "self_attn.v_proj", "attn_v", "linear", jax="attn/kv_einsum/w",
        jax_part=FusedPart(1), jax_split="attention.head_dim", jax_first=True),
    WeightSpec("attention.o_proj", "self_attn.o_proj", "attn_output", "linear",
        jax="attn/attn_vec_einsum/w", jax_split="attention.head_dim", jax_axis=0),
    WeightSpec("mlp.gate_proj", "mlp.gate_proj", "ffn_gate", "linear",
        jax="mlp/gating_einsum", jax_part=FusedPart(0)),
    WeightSpec("mlp.up_proj", "mlp.up_proj", "ffn_up", "linear",
        jax="mlp/gating_einsum", jax_part=FusedPart(1)),
    WeightSpec("mlp.down_proj", "mlp.down_proj", "ffn_down", "linear", jax="mlp/linear"),
    WeightSpec("attention.q_norm", "self_attn.q_norm", "attn_q_norm", jax="attn/query_norm/scale"),
    WeightSpec("attention.k_norm", "self_attn.k_norm", "attn_k_norm", jax="attn/key_norm/scale"),
    WeightSpec("input_layernorm", "input_layernorm", "attn_norm", jax="pre_attention_norm/scale"),
    WeightSpec("post_attention_layernorm", "post_attention_layernorm", "post_attention_norm",
        jax="post_attention_norm/scale"),
    WeightSpec("pre_feedforward_layernorm", "pre_feedforward_layernorm", "ffn_norm",
        jax="pre_ffw_norm/scale"),
    WeightSpec("post_feedforward_layernorm", "post_feedforward_layernorm", "post_ffw_norm",
        jax="post_ffw_norm/scale"),
    WeightSpec("altup.correct_output_scale", "altup.correct_output_scale", "altup_correct_scale",
        "vector", suffixes=("", ".weight"), jax="altup/correct_output_scale"),
    WeightSpec("altup.correction_coefs", "altup.correction_coefs", "altup_correct_coef", "matrix",
        jax="altup/correction_coefs"),
    WeightSpec("altup.prediction_coefs", "altup.prediction_coefs", "altup_predict_coef", "matrix",
        jax="altup/prediction_coefs", jax_split="altup.altup_num_inputs"),
    WeightSpec("altup.modality_router", "altup.modality_router", "altup_router", "matrix",
        jax="altup/modality_router/w"),
    WeightSpec("altup.router_norm", "altup.router_norm", "altup_router_norm",
        jax="altup/router_norm_layer/scale"),
    WeightSpec("laurel.linear_left", "laurel.linear_left", "laurel_l", "matrix",
        jax="laurel/linear_left/w"),
    WeightSpec("laurel.linear_right", "laurel.linear_right", "laurel_r", "matrix",
        jax="laurel/linear_right/w"),
    WeightSpec("laurel.post_laurel_norm", "laurel.post_laurel_norm", "laurel_post_norm",
        jax="post_laurel_norm/scale"),
    *_PER_LAYER_BLOCK,
    WeightSpec("per_layer_projection", "per_layer_projection", "proj", "matrix",
        jax="per_layer_mapping/per_layer_projection/w"),
)  # fmt: skip
_GEMMA3N_MODEL = (
    WeightSpec("embed_tokens.embedding", "embed_tokens", "token_embd", "embedding",
        jax="embedder/input_embedding"),
    WeightSpec("embed_tokens_per_layer.embedding", "embed_tokens_per_layer", "per_layer_token_embd",
        "embedding", jax="embedder/per_layer_input_embedding",
        jax_split="hidden_size_per_layer_input"),
    *_PER_LAYER_MODEL,
    WeightSpec("altup_projections.*", "altup_projections.{}", "altup_proj", "matrix",
        gguf_part=FusedPart(0), jax="altup_projection_{0}/altup_projection_{0}"),
    WeightSpec("altup_unembed_projections.*", "altup_unembed_projections.{}", "altup_unembd_proj",
        "matrix", gguf_part=FusedPart(0),
        jax="altup_unembed_projection_{0}/altup_unembed_projection_{0}"),
    WeightSpec("final_normalization", "norm", "output_norm", jax="final_norm/scale"),
)  # fmt: skip


def _in_jax(rows: tuple[WeightSpec, ...], **names: str) -> tuple[WeightSpec, ...]:
    """Rows with other names in the Gemma library for JAX, by the last part of their Keras names."""
    ends = ((row, row.keras.rpartition(".")[2]) for row in rows)
    return tuple(dataclasses.replace(row, jax=names.get(end, row.jax)) for row, end in ends)


# A block has the rows from `post_ffw_norm_dense` on if it has a mixture of experts.
_GEMMA4_BLOCK = (
    *_LINEARS,
    *_in_jax(_GEMMA3_NORMS, query_norm="attn/query_norm/scale", key_norm="attn/key_norm/scale"),
    *_in_jax(
        _PER_LAYER_BLOCK,
        per_layer_input_gate="per_layer_input_gate/w",
        post_per_layer_input_norm="post_per_layer_input_norm/scale",
    ),
    WeightSpec("per_layer_up_proj", "per_layer_projection", "proj", "matrix",
        jax="per_layer_projection/w"),
    WeightSpec("layer_scalar", "layer_scalar", "layer_output_scale", "scalar",
        suffixes=("", ".weight"), jax="skip_scale"),
    WeightSpec("post_ffw_norm_dense", "post_feedforward_layernorm_1", "post_ffw_norm_1",
        jax="post_ffw2_norm/scale"),
    WeightSpec("pre_ffw_norm_moe", "pre_feedforward_layernorm_2", "pre_ffw_norm_2",
        jax="pre_ffw_norm/scale"),
    WeightSpec("post_ffw_norm_moe_path", "post_feedforward_layernorm_2", "post_ffw_norm_2",
        jax="post_ffw1_norm/scale"),
    WeightSpec("moe_router.per_dim_scale", "router.scale", "ffn_gate_inp.scale", "vector",
        suffixes=("", ""), jax="mlp/router_scale"),
    WeightSpec("moe_router.proj", "router.proj", "ffn_gate_inp", "matrix",
        jax="mlp/router_logits/w"),
    WeightSpec("moe_expert_bank.gate_proj", "experts.gate_up_proj", "ffn_gate_up_exps", "experts",
        suffixes=("", ".weight"), part=FusedPart(0, 1, False), gguf_part=FusedPart(0, 1, False),
        jax="mlp/gating_einsum/w", jax_part=FusedPart(0, 1)),
    WeightSpec("moe_expert_bank.up_proj", "experts.gate_up_proj", "ffn_gate_up_exps", "experts",
        suffixes=("", ".weight"), part=FusedPart(1, 1, False), gguf_part=FusedPart(1, 1, False),
        jax="mlp/gating_einsum/w", jax_part=FusedPart(1, 1)),
    WeightSpec("moe_expert_bank.down_proj", "experts.down_proj", "ffn_down_exps", "experts",
        suffixes=("", ".weight"), jax="mlp/linear/w"),
    WeightSpec("moe_expert_bank.per_expert_scale", "router.per_expert_scale", "ffn_down_exps.scale",
        "vector", suffixes=("", ""), jax="mlp/per_expert_scale"),
)  # fmt: skip
_GEMMA4_MODEL = (
    *_GEMMA_MODEL,
    WeightSpec("per_layer_token_embedding", "embed_tokens_per_layer", "per_layer_token_embd",
        "embedding", jax="embedder/per_layer_embeddings",
        jax_split="hidden_size_per_layer_input"),
    *_in_jax(
        _PER_LAYER_MODEL, per_layer_model_projection="embedder/per_layer_model_projection/w"
    ),
)  # fmt: skip
# Other names in that library in a block with experts, where the experts have the usual ones.
BESIDE_EXPERTS = {
    "mlp/gating_einsum": "mlp2/gating_einsum",
    "mlp/linear": "mlp2/linear",
    "pre_ffw_norm/scale": "pre_ffw2_norm/scale",
}
# Small matrices that llama.cpp's own converter leaves in float32, by their GGUF names.
GGUF_PRECISE = ("altup_correct_coef", "altup_predict_coef")
# Keys and values of a block, by their Hugging Face names.
KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")


# Settings.

# transformers' name of a setting, and KerasHub's.
_OLD_FIELDS: Mapping[str, str | None] = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": None,
}
_CAPPED_FIELDS: Mapping[str, str | None] = {
    **_OLD_FIELDS,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "sliding_window": "sliding_window_size",
}
_GEMMA3N_FIELDS = {
    "vocab_size": "text_vocab_size",
    "hidden_size": "text_hidden_size",
    "final_logit_softcapping": "final_logit_soft_cap",
    **{
        name: name
        for name in (
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "layer_types", "sliding_window", "rms_norm_eps",
            "max_position_embeddings", "vocab_size_per_layer_input",
            "hidden_size_per_layer_input", "altup_num_inputs", "altup_active_idx",
            "altup_coef_clip", "altup_correct_scale", "laurel_rank", "num_kv_shared_layers",
            "activation_sparsity_pattern", "attention_bias", "attention_dropout",
        )
    },
}  # fmt: skip
_GEMMA4_FIELDS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "global_head_dim": "global_head_dim",
    "num_global_key_value_heads": "num_global_key_value_heads",
    "intermediate_size": "intermediate_dim",
    "layer_types": "layer_types",
    "sliding_window": "sliding_window_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "final_logit_softcapping": "final_logit_soft_cap",
    "vocab_size_per_layer_input": "vocab_size_per_layer_input",
    "hidden_size_per_layer_input": "hidden_size_per_layer_input",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "use_double_wide_mlp": "use_double_wide_mlp",
    "enable_moe_block": "enable_moe_block",
    "num_experts": "num_experts",
    "moe_intermediate_size": "expert_intermediate_dim",
    "top_k_experts": "num_experts_per_token",
}
EPSILON = 1e-6
# KerasHub's blocks of Gemma 1 to 3 have it fixed; `layer_norm_epsilon` is for the last norm alone.
_FIXED_EPSILON: Mapping[str, Any] = {"layer_norm_epsilon": EPSILON}
_GENERATES: Mapping[str, Any] = dict(use_bidirectional_attention=False, is_embedding_model=False)


# GGUF's keys for settings that `transformers` has, too.
GGUF_KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "altup.num_inputs": "altup_num_inputs",
    "altup.active_idx": "altup_active_idx",
    "expert_count": "num_experts",
    "expert_used_count": "top_k_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_OLD_KEYS: Mapping[str, float | None] = {
    **dict.fromkeys((
        "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length",
    )),
    "attention.layer_norm_rms_epsilon": EPSILON,
}  # fmt: skip
_NEW_KEYS: Mapping[str, float | None] = dict.fromkeys((
    "context_length", "embedding_length", "embedding_length_per_layer_input", "block_count",
    "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length",
))  # fmt: skip
_GEMMA3N_PERIOD = 5


def _gemma3n_in_llama_cpp(given: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in llama.cpp's code: 10 layers with a sparse feed-forward, 20 with own keys."""
    layers = range(given["num_hidden_layers"])
    return {
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": len(layers) - 20,
        "layer_types": [SLIDING if (i + 1) % _GEMMA3N_PERIOD else FULL for i in layers],
        "activation_sparsity_pattern": [0.95 if i < 10 else 0.0 for i in layers],
        "rope_local_base_freq": 10_000.0,
        "attention_bias": False,
        "final_logit_soft_cap": 30.0,
    }


# The families.

_OLD_TURN = Turn("<start_of_turn>", "<end_of_turn>")
_LONG_CONTEXT = 131_072
_TINY: Mapping[str, Any] = dict(
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    # As in KerasHub's configs for Gemma 1 and 2: twice the width of one gate.
    intermediate_dim=48,
    head_dim=8,
)
_POST_NORMS: Mapping[str, Any] = dict(use_post_ffw_norm=True, use_post_attention_norm=True)
_TINY_WINDOW: Mapping[str, Any] = dict(use_sliding_window_attention=True, sliding_window_size=8)

_GEMMA = FamilyTable(
    name="gemma",
    title="Gemma 1",
    keras_hub="Gemma",
    told_by={"use_post_ffw_norm": False},
    block=_LINEARS + _GEMMA_NORMS,
    model=_GEMMA_MODEL,
    turn=_OLD_TURN,
    tiny=_TINY,
    context_length=lambda backbone: 8192,
    cache_axes="b2thd",
    scales_queries=True,
    ropes={FULL: Rope(10_000.0)},
    gates=2,
    fixed=dict(
        **_FIXED_EPSILON,
        use_post_ffw_norm=False,
        use_post_attention_norm=False,
        query_head_dim_normalize=True,
        attention_logit_soft_cap=None,
        final_logit_soft_cap=None,
        use_sliding_window_attention=False,
    ),
    hugging_face=HuggingFaceTable(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        fields=_OLD_FIELDS,
        defaults={"rms_norm_eps": EPSILON},
        # It was published with "gelu", which transformers, too, takes for the approximation.
        activations=dict.fromkeys(("hidden_act", "hidden_activation"), (GELU, "gelu")),
    ),
    gguf=GgufTable(_OLD_KEYS),
)
_GEMMA2 = FamilyTable(
    name="gemma2",
    title="Gemma 2",
    keras_hub="Gemma",
    told_by={"use_post_ffw_norm": True},
    block=_LINEARS + _GEMMA2_NORMS,
    model=_GEMMA_MODEL,
    turn=_OLD_TURN,
    tiny=dict(
        **_TINY,
        **_POST_NORMS,
        **_TINY_WINDOW,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
    ),
    context_length=lambda backbone: 8192,
    cache_axes="b2thd",
    scales_queries=True,
    ropes={FULL: Rope(10_000.0)},
    gates=2,
    full_attention_period=2,
    built_with=_POST_NORMS,
    fixed={**_FIXED_EPSILON, **_POST_NORMS},
    hugging_face=HuggingFaceTable(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        fields=_CAPPED_FIELDS,
        defaults={
            "rms_norm_eps": EPSILON,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    ),
    jax=GemmaJaxTable(
        fixed=dict(attention_logit_soft_cap=50.0, final_logit_soft_cap=30.0),
        untransposed=(2304,),  # the 2B
        reads_adapters=True,
    ),
    gguf=GgufTable(
        {
            **_OLD_KEYS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 4096,
        },
        layers_scaled_by_width=46,
    ),
)
_GEMMA3 = FamilyTable(
    name="gemma3",
    title="Gemma 3",
    keras_hub="Gemma3",
    overflows=True,
    block=_LINEARS + _GEMMA3_NORMS,
    model=_GEMMA_MODEL,
    turn=dataclasses.replace(_OLD_TURN, marked="functiongemma"),
    tiny={
        **_TINY,
        **_POST_NORMS,
        **_TINY_WINDOW,
        "num_key_value_heads": 1,
        "intermediate_dim": 24,
        "image_size": 16,
    },
    # The sizes that see were stretched.
    context_length=lambda backbone: (
        32_768 if backbone.global_rope_scaling_factor == 1 else _LONG_CONTEXT
    ),
    cache_axes="bthd",
    tokenizer_options={"has_vision_tokens": False},
    scales_queries=True,
    ropes={
        FULL: Rope(1_000_000.0, factor="global_rope_scaling_factor"),
        SLIDING: Rope(10_000.0, factor="local_rope_scaling_factor"),
    },
    full_attention_period=6,
    built_with=dict(**_POST_NORMS, use_query_key_norm=True, image_size=None),
    fixed=dict(**_FIXED_EPSILON, **_POST_NORMS, **_GENERATES, use_query_key_norm=True),
    hugging_face=HuggingFaceTable(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        media_type="gemma3",
        fields=_CAPPED_FIELDS,
        defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": EPSILON,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 4096,
        },
        fixed={"local_rope_scaling_factor": 1.0},
        period_field="sliding_window_pattern",
    ),
    jax=GemmaJaxTable(
        fixed=dict(attention_logit_soft_cap=None, final_logit_soft_cap=None),
        reads_adapters=True,
    ),
    litert=True,
    gguf=GgufTable(
        {
            **_OLD_KEYS,
            "rope.freq_base": None,
            "rope.freq_base_swa": None,
            "attention.sliding_window": 1024,
        },
        layers_scaled_by_width=62,
        stretched={34: 8.0, 48: 8.0, 62: 8.0},
    ),
)
_GEMMA3N = FamilyTable(
    name="gemma3n",
    title="Gemma 3n",
    keras_hub="Gemma3n",
    overflows=True,
    block=_GEMMA3N_BLOCK,
    model=_GEMMA3N_MODEL,
    turn=_OLD_TURN,
    tiny=dict(
        text_hidden_size=16,
        num_hidden_layers=4,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=[24] * 4,
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        rope_theta=1_000_000.0,
        max_position_embeddings=32_768,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        altup_coef_clip=120.0,
        num_kv_shared_layers=2,
        final_logit_soft_cap=30.0,
    ),
    context_length=lambda backbone: int(backbone.max_position_embeddings),
    cache_axes="bn2htd",
    vocabulary_settings=("text_vocab_size", "vocab_size_per_layer_input"),
    ropes={FULL: Rope(1_000_000.0, "rope_theta"), SLIDING: Rope(10_000.0, "rope_local_base_freq")},
    built_with=dict(hidden_activation="gelu_approximate", pad_token_id=0),
    widths_by_layer=True,
    fixed=dict(rope_scaling=None),
    hugging_face=HuggingFaceTable(
        model_type="gemma3n_text",
        architecture="Gemma3nForCausalLM",
        media_type="gemma3n",
        fields=_GEMMA3N_FIELDS,
        fixed=dict(hidden_activation="gelu_approximate", pad_token_id=0),
    ),
    jax=GemmaJaxTable(
        fixed=dict(
            altup_num_inputs=4,
            altup_active_idx=0,
            altup_correct_scale=True,
            attention_bias=False,
            rms_norm_eps=EPSILON,
        ),
    ),
    gguf=GgufTable(
        {
            **_NEW_KEYS,
            "attention.layer_norm_rms_epsilon": EPSILON,
            "attention.sliding_window": None,
            "attention.sliding_window_pattern": None,
            "attention.shared_kv_layers": 0,
            "altup.num_inputs": None,
            "altup.active_idx": 0,
            "activation_sparsity_scale": None,
            "rope.freq_base": None,
            "rope.freq_base_swa": None,
            "final_logit_softcapping": 30.0,
        },
        norm_offset=0.0,
        fixed=_gemma3n_in_llama_cpp,
        unsaid=dict(altup_coef_clip=120.0),
        rows=dict(
            vocab_size_per_layer_input="embed_tokens_per_layer", laurel_rank="laurel.linear_left"
        ),
        default_period=_GEMMA3N_PERIOD,
        adapters=False,
    ),
)
_GEMMA4 = FamilyTable(
    name="gemma4",
    title="Gemma 4",
    keras_hub="Gemma4",
    overflows=True,
    block=_GEMMA4_BLOCK,
    model=_GEMMA4_MODEL,
    turn=Turn(
        "<|turn>",
        "<turn|>",
        system_role=True,
        no_thought="<|channel>thought\n<channel|>",
        tools="gemma4",
    ),
    tiny={
        **_TINY,
        **_TINY_WINDOW,
        "image_size": 16,
        "num_layers": 4,
        "intermediate_dim": 24,
        "global_head_dim": 16,
        "final_logit_soft_cap": 30.0,
        "sliding_window_pattern": 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "global_rope_partial_rotary_factor": 0.5,
    },
    tiny_moe=dict(
        enable_moe_block=True,
        num_experts=4,
        expert_intermediate_dim=8,
        num_experts_per_token=2,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        num_global_key_value_heads=1,
    ),
    # Twice as long for the sizes without an "E" in their names.
    context_length=lambda backbone: (
        _LONG_CONTEXT if backbone.hidden_size_per_layer_input else 2 * _LONG_CONTEXT
    ),
    cache_axes="bn2thd",
    tokenizer_options={"has_vision_tokens": False, "has_video_tokens": False},
    quantized_lora=False,
    ropes={
        FULL: Rope(
            1_000_000.0, "global_rope_wavelength", share="global_rope_partial_rotary_factor"
        ),
        SLIDING: Rope(10_000.0, "local_rope_wavelength"),
    },
    built_with=dict(image_size=None),
    fixed=dict(
        attention_logit_soft_cap=None,
        use_sliding_window_attention=True,
        local_rope_scaling_factor=1.0,
        global_rope_scaling_factor=1.0,
        **_GENERATES,
    ),
    hugging_face=HuggingFaceTable(
        model_type="gemma4_text",
        architecture="Gemma4ForCausalLM",
        media_type="gemma4",
        fields=_GEMMA4_FIELDS,
        defaults={
            "num_global_key_value_heads": None,
            "num_experts": None,
            "moe_intermediate_size": None,
            "top_k_experts": None,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
        },
    ),
    jax=GemmaJaxTable(
        fixed=dict(
            final_logit_soft_cap=30.0,
            local_rope_wavelength=None,
            global_rope_wavelength=None,
            layer_norm_epsilon=EPSILON,
            # Of models with experts, or with keys that serve as values, it computes other logits.
            enable_moe_block=False,
            num_global_key_value_heads=None,
        ),
        one_key_head_a_query=True,
        keeps_unread_keys=True,
    ),
    gguf=GgufTable(
        {
            **_NEW_KEYS,
            "embedding_length_per_layer_input": 0,
            "attention.key_length_swa": None,
            "attention.value_length_swa": None,
            "attention.layer_norm_rms_epsilon": EPSILON,
            "attention.sliding_window": None,
            "attention.sliding_window_pattern": None,
            "attention.shared_kv_layers": 0,
            "rope.dimension_count": None,
            "rope.dimension_count_swa": None,
            "rope.freq_base": None,
            "rope.freq_base_swa": None,
            "final_logit_softcapping": 0.0,
            "expert_count": None,
            "expert_used_count": None,
            "expert_feed_forward_length": None,
        },
        norm_offset=0.0,
        tokenizer="gemma4",
    ),
)

TABLES = (_GEMMA, _GEMMA2, _GEMMA3, _GEMMA3N, _GEMMA4)
