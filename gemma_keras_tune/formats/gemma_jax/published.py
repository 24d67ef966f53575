"""Settings of published checkpoints of the Gemma library for JAX, which hold weights alone.

The settings are those of `gm.nn`'s models of Gemma 2 and 3; the number of layers tells them apart.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import FAMILIES, Family

# By number of layers: sliding window, stretch of the global RoPE, and whether queries are scaled
# by the size of a head; 27B alone scales them by width over heads.
_PUBLISHED: Mapping[str, Mapping[int, tuple[int, float, bool]]] = {
    "gemma2": {26: (4096, 1.0, True), 42: (4096, 1.0, True), 46: (4096, 1.0, False)},
    "gemma3": {
        18: (512, 1.0, True),
        26: (512, 1.0, True),
        34: (1024, 8.0, True),
        48: (1024, 8.0, True),
        62: (1024, 8.0, False),
    },
}
_CAPS = {"attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0}
# Rows for tokens that do not exist.
_TOKENS = {256_128: 256_000}


def published_settings(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Family, dict[str, Any]]:
    """Tell the model from the sizes of its weights.

    Args:
        folder: The checkpoint, for the message.
        shapes: Shapes of its weights by path.

    Returns:
        The family, and the arguments of its backbone.

    Raises:
        LoadError: No published Gemma 2 or 3 has such weights.
    """
    newer = "layer_0/attn/_query_norm/scale" in shapes
    name = "gemma3" if newer else "gemma2"
    layers = len({path.partition("/")[0] for path in shapes if path.startswith("layer_")})
    try:
        window, stretch, by_head = _PUBLISHED[name][layers]
        rows, width = shapes["embedder/input_embedding"]
        heads, _, head_dim = shapes["layer_0/attn/q_einsum/w"]
        keys = shapes["layer_0/attn/kv_einsum/w"][1]
        inner = shapes["layer_0/mlp/linear"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise LoadError(
            f"The weights in {folder} are those of no published Gemma 2 or 3, and nothing beside "
            f"them says which model it is. Received: {layers} layers",
            next_step="Load a folder that `export(..., format='gemma_jax')` wrote, with its "
            "gemma_keras_tune.json; or a KerasHub preset or a Hugging Face folder of that Gemma.",
        ) from error
    config: dict[str, Any] = {
        "vocabulary_size": _TOKENS.get(rows, rows),
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": keys,
        "hidden_dim": width,
        # KerasHub gives Gemma 1 and 2 the width of both gates together.
        "intermediate_dim": inner if newer else 2 * inner,
        "head_dim": head_dim,
        "query_head_dim_normalize": by_head,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
        "sliding_window_size": window,
    }
    if newer:
        own = {
            "image_size": None,
            "use_query_key_norm": True,
            "global_rope_scaling_factor": stretch,
        }
        return FAMILIES[name], config | own | {"global_rope_scaling_factor": stretch}
    return FAMILIES[name], config | _CAPS
