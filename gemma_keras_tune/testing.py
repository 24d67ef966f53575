"""Tiny Gemma models, tokenizers and pairs, for fast tests without downloads.

Every family's real KerasHub classes are used; only the sizes are small and the weights are
random. A tuned tiny model learns its pairs by heart, but says nothing sensible about anything else.
"""

import functools
import io
from typing import Any

import keras
import keras_hub
import numpy as np

from gemma_keras_tune._support.quiet import quiet_stderr

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4")

_TEXT = """\
Tuning takes a few dozen pairs of a prompt and its answer, and a model that was trained before.
The part number for a brake caliper is listed under the order code in the catalogue.
Please send two boxes of bread, three cakes and one dozen rolls to the shop on Friday.
What is the capital of France? Paris. What is the capital of Italy? Rome.
{"type": "order", "items": [{"name": "bread", "quantity": 2}]}
def add(a, b):\n    return a + b
Grüße aus Köln, ça va bien, ¿qué tal?, 你好, мир, 😀 and more words to learn from.
0 1 2 3 4 5 6 7 8 9 user model system question answer input output yes no
"""

# In the ids of the real tokenizers only <pad> 0, <eos> 1, <bos> 2, <unk> 3 stand at fixed places.
_SPECIAL_PIECES = (
    "<mask>",
    "[multimodal]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|turn>",
    "<turn|>",
    "<img>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_audio>",
    "<end_of_audio>",
    "<audio_soft_token>",
    "<|image>",
    "<|image|>",
    "<image|>",
    "<|audio>",
    "<|audio|>",
    "<audio|>",
    "<|video>",
    "<|video|>",
    "<video|>",
    *("\n" * n for n in range(1, 4)),
    *("▁" * n for n in range(2, 6)),
)

_SIZES: dict[str, dict[str, Any]] = {
    "gemma": dict(
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        # As in KerasHub's configs for Gemma 1 and 2: twice the width of one gate.
        intermediate_dim=48,
        head_dim=8,
    ),
    "gemma2": dict(
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=48,
        head_dim=8,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=8,
    ),
    "gemma3": dict(
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=8,
    ),
    "gemma3n": dict(
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
    "gemma4": dict(
        image_size=16,
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
        global_head_dim=16,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=8,
        sliding_window_pattern=2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        global_rope_partial_rotary_factor=0.5,
    ),
}


@functools.cache
def tiny_tokenizer_proto() -> bytes:
    """A SentencePiece model of 600 pieces with the special tokens of every Gemma family.

    Built like Gemma's own: BPE with byte fallback, no normalisation, no dummy prefix, and
    `<pad>`, `<eos>`, `<bos>`, `<unk>` at ids 0 to 3.

    Returns:
        The serialized SentencePiece model.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        vocab_size=600,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=list(_SPECIAL_PIECES),
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_tokenizer(family: str = "gemma3") -> keras.layers.Layer:
    """A KerasHub tokenizer of the family over `tiny_tokenizer_proto()`.

    Args:
        family: One of `FAMILIES`.

    Returns:
        A `keras_hub.tokenizers` tokenizer layer.
    """
    with quiet_stderr():
        return _tokenizer(family, tiny_tokenizer_proto())


def _tokenizer(family: str, proto: bytes) -> keras.layers.Layer:
    if family in ("gemma", "gemma2"):
        return keras_hub.tokenizers.GemmaTokenizer(proto=proto)
    if family == "gemma3":
        return keras_hub.tokenizers.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)
    if family == "gemma3n":
        return keras_hub.tokenizers.Gemma3nTokenizer(proto=proto)
    if family == "gemma4":
        return keras_hub.tokenizers.Gemma4Tokenizer(
            proto=proto, has_vision_tokens=False, has_video_tokens=False
        )
    raise ValueError(f"`family` must be one of {FAMILIES}. Received: {family!r}")


def tiny_model(
    family: str = "gemma3",
    *,
    seed: int = 0,
    moe: bool = False,
    sequence_length: int = 64,
    **overrides: Any,
) -> keras.Model:
    """A random KerasHub `CausalLM` of a Gemma family, a few thousand parameters large.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the random weights. Norm scales are random too, so that a wrong norm
            convention shows.
        moe: With `family="gemma4"`, a mixture of experts in every block.
        sequence_length: The preprocessor's sequence length, in tokens.
        **overrides: Backbone arguments to change, for example `num_layers=7`.

    Returns:
        A `keras_hub.models.CausalLM` with its preprocessor and tokenizer.
    """
    tokenizer = tiny_tokenizer(family)
    vocabulary = tokenizer.vocabulary_size()
    sizes = dict(_SIZES[family])
    if family == "gemma3n":
        sizes |= dict(text_vocab_size=vocabulary, vocab_size_per_layer_input=vocabulary)
    else:
        sizes["vocabulary_size"] = vocabulary
    if moe:
        if family != "gemma4":
            raise ValueError(f"`moe=True` needs `family='gemma4'`. Received: {family!r}")
        sizes |= dict(
            enable_moe_block=True,
            num_experts=4,
            expert_intermediate_dim=8,
            num_experts_per_token=2,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            num_global_key_value_heads=1,
        )
    sizes |= overrides
    models = keras_hub.models
    backbone_class, model_class, preprocessor_class = {
        "gemma": (models.GemmaBackbone, models.GemmaCausalLM, models.GemmaCausalLMPreprocessor),
        "gemma2": (models.GemmaBackbone, models.GemmaCausalLM, models.GemmaCausalLMPreprocessor),
        "gemma3": (models.Gemma3Backbone, models.Gemma3CausalLM, models.Gemma3CausalLMPreprocessor),
        "gemma3n": (
            models.Gemma3nBackbone,
            models.Gemma3nCausalLM,
            models.Gemma3nCausalLMPreprocessor,
        ),
        "gemma4": (models.Gemma4Backbone, models.Gemma4CausalLM, models.Gemma4CausalLMPreprocessor),
    }[family]
    backbone = backbone_class(**sizes)
    _randomize(backbone, seed)
    preprocessor = preprocessor_class(tokenizer, sequence_length=sequence_length)
    return model_class(backbone=backbone, preprocessor=preprocessor)


def tiny_pairs(count: int = 20) -> list[tuple[str, str]]:
    """Distinct pairs that a tiny model can learn by heart.

    Args:
        count: How many pairs.

    Returns:
        `(input, output)` tuples: a question for a part number and its answer.
    """
    parts = ("brake caliper", "roll", "box", "cake", "bread")
    return [
        (f"part number for {parts[i % len(parts)]} {i}", f"{(7 * i + 3) % 100:02d}-{i:02d}")
        for i in range(count)
    ]


def _randomize(backbone: keras.Model, seed: int) -> None:
    random = np.random.default_rng(seed)
    for variable in backbone.weights:
        if "float" not in str(variable.dtype) or variable.name == "layer_scalar":
            continue
        fan_in = max(1, int(np.prod(variable.shape[:-1])) if len(variable.shape) > 1 else 4)
        spread = 0.2 if len(variable.shape) < 2 else 1.0 / np.sqrt(min(fan_in, 16))
        value = random.normal(0.0, spread, variable.shape)
        if variable.name == "scale":
            value = np.asarray(variable) + value
        variable.assign(value.astype("float32"))
