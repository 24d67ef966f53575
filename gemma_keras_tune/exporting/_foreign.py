"""Asks a foreign runtime. Runs by itself, in a process without this library.

python -P _foreign.py RUNTIME REQUEST.json ANSWER.json

torch beside TensorFlow in one process may crash, and KerasHub shall open a preset alone.
"""

import json
import os
import sys
from typing import Any

BATCH = 4


class MissingError(Exception):
    """Packages are not installed: the command that installs them."""


def main(runtime: str, request: str, answer: str) -> None:
    """Answer a request.

    Args:
        runtime: A key of `RUNTIMES`.
        request: File with `path`, `stop_token_ids`, `max_new_tokens` and `prompts`, each with
            `text`, `ids` and `top_ids`.
        answer: File to write: `runtime` and `answers`, each with `ids`, `answer_ids` and
            `logits`; or `missing`.
    """
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    found: dict[str, Any]
    try:
        name, answers = RUNTIMES[runtime](asked)
        found = {"runtime": name, "answers": answers}
    except MissingError as error:
        found = {"missing": str(error)}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(found, file)


def keras_hub(asked: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A preset, by KerasHub's own classes, tokenizer and `generate`."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras
        import keras_hub
    except ModuleNotFoundError as error:
        raise MissingError("pip install keras-hub") from error
    import numpy as np

    def forward(model: Any, inputs: dict[str, Any]) -> Any:
        # From a preset, its forward pass has an output embedding of its own, which nothing fills;
        # `generate` takes the right one.
        if isinstance(model, keras_hub.models.Gemma3nCausalLM):
            return None
        places = np.arange(inputs["token_ids"].shape[1])
        fed = {"position_ids": np.broadcast_to(places, inputs["token_ids"].shape), **inputs}
        names = [tensor.name for tensor in keras.tree.flatten(model.input)]
        if any(fed.get(name) is None for name in names):
            return None
        return np.asarray(model({name: fed[name] for name in names}), "float32")

    model = keras_hub.models.CausalLM.from_preset(asked["path"])
    model.compile(sampler="greedy")
    write = model.make_generate_function()
    new, stops = asked["max_new_tokens"], tuple(asked["stop_token_ids"])
    length = max(len(prompt["ids"]) for prompt in asked["prompts"]) + new
    found: list[dict[str, Any]] = []
    for start in range(0, len(asked["prompts"]), BATCH):
        prompts = asked["prompts"][start : start + BATCH]
        texts = [prompt["text"] for prompt in prompts]
        inputs = model.preprocessor.generate_preprocess(texts, sequence_length=length)
        ids, mask = np.asarray(inputs["token_ids"]), np.asarray(inputs["padding_mask"], bool)
        written = np.asarray(write(inputs, stop_token_ids=stops)["token_ids"])
        logits = forward(model, inputs)
        for row, prompt in enumerate(prompts):
            count = int(mask[row].sum())
            found.append(
                {
                    "ids": ids[row][mask[row]].tolist(),
                    "answer_ids": cut(written[row, count : count + new].tolist(), stops),
                    "logits": None
                    if logits is None
                    else logits[row, count - 1, prompt["top_ids"]].tolist(),
                }
            )
    assert not [name for name in sys.modules if name.startswith("gemma_keras_tune")]
    return f"KerasHub {keras_hub.__version__}", found


def transformers(asked: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A Hugging Face folder. Computed in float32: what is judged is the file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingError("pip install transformers torch") from error

    path = asked["path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    ends = model.generation_config.eos_token_id
    stops = tuple(ends) if isinstance(ends, list) else (ends,)
    found = []
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt["ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1, prompt["top_ids"]].tolist()
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=asked["max_new_tokens"],
            )
        answer = cut(written[0, ids.shape[1] :].tolist(), stops)
        seen = tokenizer.encode(prompt["text"])
        found.append({"ids": seen, "answer_ids": answer, "logits": logits})
    return f"transformers {transformers.__version__}", found


def cut(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Ids up to the first stop token."""
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0]] if ends else ids


RUNTIMES = {"keras_hub": keras_hub, "transformers": transformers}

if __name__ == "__main__":
    main(*sys.argv[1:])
