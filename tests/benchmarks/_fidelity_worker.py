"""One runtime's logits and greedy answers. Runs by itself, in that runtime's environment.

    python _fidelity_worker.py RUNTIME REQUEST.npz ANSWER.npz

The request has `path` (and `adapter`), `ids` `[rows, length]` (prompt and answer, padded with 0 on
the right), `prompts` and `lengths` `[rows]` (tokens of the prompt, and of both), `stops`, and how
many `positions` before the end of each row to give logits for.
"""

import sys
from typing import Any

import numpy as np


def last_logits(logits: Any, asked: Any) -> np.ndarray:
    """`[rows, positions, vocabulary]`: those before the end of each row."""
    count = int(asked["positions"])
    return np.stack(
        [np.asarray(logits[i, n - count : n], "float32") for i, n in enumerate(asked["lengths"])]
    )


def greedy(step: Any, asked: Any, new_tokens: int = 24) -> np.ndarray:
    """Greedy answers out of a function from ids and places to the logits at these places."""
    rows, width = asked["ids"].shape
    ids = np.zeros((rows, width + new_tokens), np.int32)
    places = asked["prompts"] - 1
    for row, count in enumerate(asked["prompts"]):
        ids[row, :count] = asked["ids"][row, :count]
    done = np.zeros(rows, bool)
    written = np.full((rows, new_tokens), -1, np.int32)
    for turn in range(new_tokens):
        chosen = np.asarray(step(ids, places)).argmax(axis=-1)
        done |= np.isin(chosen, asked["stops"])
        if done.all():
            break
        written[~done, turn] = chosen[~done]
        places = places + 1
        ids[np.arange(rows), places] = chosen
    return written


def from_transformers(asked: Any) -> dict[str, np.ndarray]:
    """transformers, with an adapter of PEFT's where there is one."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(asked["path"]), dtype="float32")
    if "adapter" in asked:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(asked["adapter"]))
    model.eval()
    written = np.full((len(asked["ids"]), 24), -1, np.int32)
    found = []
    with torch.inference_mode():
        for row, (prompt, length) in enumerate(
            zip(asked["prompts"], asked["lengths"], strict=True)
        ):
            ids = torch.tensor(asked["ids"][row : row + 1, :length].astype("int64"))
            logits = model(ids).logits
            found.append(logits[0, -int(asked["positions"]) :].float().numpy())
            new = model.generate(ids[:, :prompt], max_new_tokens=24, do_sample=False)
            new = new[0, prompt:].numpy()
            # Its own `eos_token_id` ends an answer: what came after a stop would be no equal one.
            new = new[:-1] if new[-1] in asked["stops"] else new
            written[row, : len(new)] = new
    return {"logits": np.stack(found), "written": written}


def from_keras(asked: Any) -> dict[str, np.ndarray]:
    """KerasHub alone."""
    import keras_hub

    # Without its preprocessor `generate` takes token ids.
    model = keras_hub.models.CausalLM.from_preset(
        str(asked["path"]), dtype="float32", preprocessor=None
    )
    rows, width = asked["ids"].shape
    embedding = np.asarray(model.backbone.token_embedding.embeddings)
    mask = np.arange(width)[None] < asked["lengths"][:, None]
    hidden = model.backbone({"token_ids": asked["ids"], "padding_mask": mask.astype("int32")})
    count = int(asked["positions"])
    picked = last_logits(np.asarray(hidden), asked).reshape(rows * count, -1)
    logits = (picked @ embedding.T).reshape(rows, count, -1)
    ids = np.zeros((rows, width + 24), np.int32)
    prompt = np.arange(width + 24)[None] < asked["prompts"][:, None]
    ids[:, :width] = asked["ids"]
    ids[~prompt] = 0
    model.compile(sampler="greedy")
    stops = [int(stop) for stop in asked["stops"]]
    inputs = {"token_ids": ids, "padding_mask": prompt.astype("int32")}
    # `generate` cannot join the outputs of a text model given token ids: its images are None.
    given = model.make_generate_function()(inputs, stop_token_ids=tuple(stops))
    given = np.asarray(given["token_ids"])
    written = np.full((rows, 24), -1, np.int32)
    for row, start in enumerate(asked["prompts"]):
        new = given[row, start : start + 24]
        stop = np.flatnonzero(np.isin(new, stops))
        new = new[: stop[0]] if len(stop) else new
        written[row, : len(new)] = new
    assert not [name for name in sys.modules if name.startswith("gemma_keras_tune")]
    return {"logits": logits, "written": written}


def from_gemma_jax(asked: Any) -> dict[str, np.ndarray]:
    """The Gemma library for JAX."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from gemma import gm

    model = dataclasses.replace(gm.nn.Gemma3_270M(), dtype=jnp.float32)
    params = gm.ckpts.load_params(str(asked["path"]))

    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, ids).logits

    logits = run(params, asked["ids"])

    @jax.jit
    def step(ids: Any, places: Any) -> Any:
        return run(params, ids)[jnp.arange(len(places)), places]

    return {"logits": last_logits(np.asarray(logits), asked), "written": greedy(step, asked)}


RUNTIMES = {"transformers": from_transformers, "keras": from_keras, "gemma_jax": from_gemma_jax}

if __name__ == "__main__":
    np.savez(sys.argv[3], **RUNTIMES[sys.argv[1]](np.load(sys.argv[2])))
