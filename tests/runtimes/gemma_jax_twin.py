"""What the Gemma library for JAX makes of a checkpoint. Runs by itself, where `gemma` is installed.

python gemma_jax_twin.py FOLDER REQUEST.json ANSWER.json
"""

import dataclasses
import json
import pathlib
import sys


def main(folder: str, request: str, answer: str) -> None:
    import jax
    import numpy as np
    from gemma import gm

    asked = json.loads(pathlib.Path(request).read_text())
    published = getattr(gm.nn, asked["model"])
    kinds = [type(published.config.attention_types[0])[kind] for kind in asked["kinds"]]
    sizes = asked["sizes"]
    shared = sizes.pop("shared", None)
    if shared is not None:
        sizes["kv_cache_sharing_config"] = dataclasses.replace(
            published.config.kv_cache_sharing_config, frac_shared_layers=shared / len(kinds)
        )
    config = dataclasses.replace(
        published.config, attention_types=tuple(kinds), vision_encoder=None, **sizes
    )
    model = published(config=config)
    ids = np.asarray(asked["ids"], "int32")
    expected = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = gm.ckpts.load_params(str(pathlib.Path(folder, "params").absolute()))
    shapes = [jax.tree.map(lambda leaf: list(leaf.shape), tree) for tree in (expected, params)]
    assert shapes[0] == shapes[1], shapes
    with jax.default_matmul_precision("highest"):
        logits = model.apply({"params": params}, ids).logits
    pathlib.Path(answer).write_text(json.dumps(np.asarray(logits, "float64").tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
