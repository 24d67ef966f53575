"""KerasHub models out of their parts: a backbone without values, and the model around it."""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import keras
import keras_hub

from gemma_keras_tune._support.quiet import quiet_stderr
from gemma_keras_tune.gemma.families import Family

_Result = TypeVar("_Result")


def backbone_class(family: Family) -> Callable[..., keras.Model]:
    """KerasHub's backbone of a family."""
    models = keras_hub.models
    classes: dict[str, Callable[..., keras.Model]] = {
        "gemma3": models.Gemma3Backbone,
        "gemma3n": models.Gemma3nBackbone,
        "gemma4": models.Gemma4Backbone,
    }
    return classes.get(family.name, models.GemmaBackbone)


def empty_backbone(family: Family, arguments: Mapping[str, Any], dtype: str) -> keras.Model:
    """A backbone whose variables have no values yet.

    Args:
        family: The family.
        arguments: What KerasHub's class is built from.
        dtype: Keras dtype of the weights.

    Returns:
        KerasHub's backbone of that family.
    """
    build = backbone_class(family)
    backbone = without_values(lambda: build(**arguments, dtype=dtype))
    set_attention_scale(backbone)
    return backbone


def set_attention_scale(backbone: keras.Model) -> None:
    """Let a Gemma 1, 2 or 3 scale its queries as its settings say.

    KerasHub 0.32 takes `query_head_dim_normalize`, and its decoder blocks pass `True` to their
    attention all the same (`gemma_decoder_block.py`, `gemma3_decoder_block.py`). The 27B models of
    Gemma 2 and 3 alone were trained with the other scale.

    Args:
        backbone: A KerasHub Gemma backbone.
    """
    models = keras_hub.models
    if isinstance(backbone, models.GemmaBackbone | models.Gemma3Backbone):
        for block in backbone.transformer_layers:
            block.attention.query_head_dim_normalize = backbone.query_head_dim_normalize


def causal_lm(family: Family, backbone: keras.Model, proto: bytes) -> keras.Model:
    """A KerasHub `CausalLM` for text around a backbone and a SentencePiece model."""
    models, tokenizers = keras_hub.models, keras_hub.tokenizers
    parts: dict[str, tuple[Any, Any, Any, dict[str, bool]]] = {
        "gemma3": (
            tokenizers.Gemma3Tokenizer,
            models.Gemma3CausalLMPreprocessor,
            models.Gemma3CausalLM,
            {"has_vision_tokens": False},
        ),
        "gemma3n": (
            tokenizers.Gemma3nTokenizer,
            models.Gemma3nCausalLMPreprocessor,
            models.Gemma3nCausalLM,
            {},
        ),
        "gemma4": (
            tokenizers.Gemma4Tokenizer,
            models.Gemma4CausalLMPreprocessor,
            models.Gemma4CausalLM,
            {"has_vision_tokens": False, "has_video_tokens": False},
        ),
    }
    old: tuple[Any, Any, Any, dict[str, bool]] = (
        tokenizers.GemmaTokenizer,
        models.GemmaCausalLMPreprocessor,
        models.GemmaCausalLM,
        {},
    )
    tokenizer_class, preprocessor, model, options = parts.get(family.name, old)
    with quiet_stderr():
        tokenizer = tokenizer_class(proto=proto, **options)
    return model(backbone=backbone, preprocessor=preprocessor(tokenizer))


def without_values(build: Callable[[], _Result]) -> _Result:
    """Build a model whose variables have no values yet, so that none are drawn at random.

    Keras keeps a list of such variables for each thread, and would draw the values of all on it
    when it next leaves a scope of its own; the list of a finished thread is never looked at again.
    """
    distribution = keras.distribution.distribution()

    def run() -> _Result:
        if distribution is not None:
            keras.distribution.set_distribution(distribution)
        with keras.StatelessScope(initialize_variables=False):
            return build()

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()
