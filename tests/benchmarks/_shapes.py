"""The published text models of Gemma 3 by their sizes, for models without values."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from gemma_keras_tune import testing
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import FAMILIES

_SAME = dict(
    vocabulary_size=262144, image_size=896, head_dim=256, use_query_key_norm=True,
    query_head_dim_normalize=True, use_post_ffw_norm=True, use_post_attention_norm=True,
    use_sliding_window_attention=True,
)  # fmt: skip
_NAMES = (
    "num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim",
    "sliding_window_size",
)  # fmt: skip
_SIZES = {
    "270M": (18, 4, 1, 640, 2048, 512),
    "1B": (26, 4, 1, 1152, 6912, 512),
    "4B": (34, 8, 4, 2560, 10240, 1024),
    "12B": (48, 16, 8, 3840, 15360, 1024),
    "27B": (62, 32, 16, 5376, 21504, 1024),
}
GEMMA3 = {name: dict(zip(_NAMES, sizes, strict=True)) for name, sizes in _SIZES.items()}
GEMMA3["27B"]["head_dim"] = 128


def gemma3(name: str, dtype: str) -> keras.Model:
    """A Gemma 3 of a published size whose variables have no values."""
    family = FAMILIES["gemma3"]
    backbone = empty_backbone(family, {**_SAME, **GEMMA3[name]}, dtype)
    return causal_lm(family, backbone, testing.tiny_tokenizer_proto())
