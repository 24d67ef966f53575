"""KerasHub models out of their parts: a backbone without values, and the model around it."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import keras_hub

from gemma_keras_tune._quiet import quiet_stderr
from gemma_keras_tune.families import Family

_Result = TypeVar("_Result")


def backbone_class(family: Family) -> Callable[..., keras.Model]:
    """KerasHub's backbone of a generation."""
    models = keras_hub.models
    classes: dict[str, Callable[..., keras.Model]] = {
        "gemma3": models.Gemma3Backbone,
        "gemma3n": models.Gemma3nBackbone,
        "gemma4": models.Gemma4Backbone,
    }
    return classes.get(family.name, models.GemmaBackbone)


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
