"""Building KerasHub models from their parts: a backbone without values, and the model around it.

Two workarounds of Keras and KerasHub are kept here: `without_values` and `set_attention_scale`.
"""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import keras

from gemma_keras_tune._support.quiet import quiet_stderr
from gemma_keras_tune.gemma.families import Family, family_of
from gemma_keras_tune.gemma.quantization import quantize_while_filled

_Result = TypeVar("_Result")


def empty_backbone(family: Family, arguments: Mapping[str, Any], dtype: str) -> keras.Model:
    """Build a backbone whose variables have no values yet; quantized later, within `quantizing`.

    Args:
        family: The family.
        arguments: Arguments of KerasHub's class.
        dtype: Keras dtype of the weights.

    Returns:
        KerasHub's backbone of that family.
    """
    backbone = without_values(lambda: family.backbone_class(**arguments, dtype=dtype))
    set_attention_scale(backbone)
    quantize_while_filled(backbone)
    return backbone


def set_attention_scale(backbone: keras.Model) -> None:
    """Let a Gemma 1, 2 or 3 scale its queries as its settings say.

    KerasHub 0.32 takes `query_head_dim_normalize`, and its decoder blocks pass `True` to their
    attention all the same (`gemma_decoder_block.py`, `gemma3_decoder_block.py`). The 27B models of
    Gemma 2 and 3 alone were trained with the other scale.

    Args:
        backbone: A KerasHub Gemma backbone.
    """
    if family_of(backbone).scales_queries:
        for block in backbone.transformer_layers:
            block.attention.query_head_dim_normalize = backbone.query_head_dim_normalize


def scales_otherwise(backbone: Any) -> bool:
    """Tell if KerasHub alone would scale the queries differently; see `set_attention_scale`."""
    if not family_of(backbone).scales_queries:
        return False
    by_head = backbone.transformer_layers[0].attention.query_head_dim_normalize
    return not by_head and backbone.head_dim * backbone.num_query_heads != backbone.hidden_dim


def tokenizer(family: Family, proto: bytes) -> keras.layers.Layer:
    """Build the KerasHub tokenizer of a model for text alone around a SentencePiece model."""
    with quiet_stderr():
        return family.tokenizer_class(proto=proto, **family.tokenizer_options)


def causal_lm(family: Family, backbone: keras.Model, proto: bytes, **options: Any) -> keras.Model:
    """Build a KerasHub `CausalLM` for text around a backbone and a SentencePiece model.

    Args:
        family: The family.
        backbone: Its KerasHub backbone.
        proto: The serialized SentencePiece model.
        **options: Further arguments of the preprocessor.

    Returns:
        The `CausalLM`.
    """
    preprocessor = family.preprocessor_class(tokenizer(family, proto), **options)
    return family.causal_lm_class(backbone=backbone, preprocessor=preprocessor)


def without_values(build: Callable[[], _Result]) -> _Result:
    """Build a model whose variables have no values yet, so that none are drawn at random.

    Keras keeps a list of such variables for each thread, and draws the values of all on it when it
    next leaves one of its scopes; the list of a finished thread is never read again. This is a
    detail of Keras 3, for which it has no public way.

    Args:
        build: Builds the model, in a thread made for it.

    Returns:
        The result of `build`.
    """
    distribution = keras.distribution.distribution()

    def run() -> _Result:
        if distribution is not None:
            keras.distribution.set_distribution(distribution)
        with keras.StatelessScope(initialize_variables=False):
            return build()

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()
