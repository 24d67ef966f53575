"""A LoRA training step with the Gemma library for JAX. Runs by itself, where `gemma` is installed.

    python _gemma_jax_step.py REQUEST.json ANSWER.json

Gemma 3 270M in float32 with random weights, the library's own LoRA at rank 4 (it knows no targets:
all linear layers), cross entropy on the response, AdamW on the factors alone, a jitted step.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any


def main(request: str, answer: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from gemma import gm

    asked = json.loads(pathlib.Path(request).read_text())
    ids, mask = np.asarray(asked["ids"], "int32"), np.asarray(asked["mask"], "float32")
    plain = dataclasses.replace(gm.nn.Gemma3_270M(), dtype=jnp.float32)
    model = gm.nn.LoRA(rank=4, model=plain, dtype=jnp.float32)
    everything = jax.jit(model.init)(jax.random.key(0), ids[0])["params"]
    frozen, factors = gm.peft.split_params(everything)
    optimizer = optax.adamw(5e-5, weight_decay=0.01)

    def loss(factors: Any, frozen: Any, ids: Any, mask: Any) -> Any:
        params = gm.peft.merge_params(frozen, factors)
        logits = model.apply({"params": params}, ids).logits[:, :-1]
        found = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (found * mask).sum() / mask.sum()

    @jax.jit
    def step(factors: Any, state: Any, frozen: Any, ids: Any, mask: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(factors, frozen, ids, mask)
        updates, state = optimizer.update(gradients, state, factors)
        return optax.apply_updates(factors, updates), state, value

    state = optimizer.init(factors)
    seconds = []
    for _ in range(asked["epochs"]):
        begin = time.perf_counter()
        for batch, live in zip(ids, mask, strict=True):
            factors, state, value = step(factors, state, frozen, batch, live)
        jax.block_until_ready(value)
        seconds.append(time.perf_counter() - begin)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(factors)[0]]
    names = ["/".join(str(key.key) for key in path) for path in paths]
    kinds = {re.sub(r"layer_\d+/|/lora/.*", "", name) for name in names}
    size = sum(factor.size for factor in jax.tree.leaves(factors))
    told = {"rate": asked["pairs"] / min(seconds[1:]), "layers": sorted(kinds), "parameters": size}
    pathlib.Path(answer).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
