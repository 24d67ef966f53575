"""Ask a foreign runtime, in a process without this library.

python -P foreign.py RUNTIME REQUEST.json ANSWER.json

torch and TensorFlow in one process may crash, and a preset must open with KerasHub alone.
"""

import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

BATCH = 4


class MissingError(Exception):
    """Packages that are not installed; the message is the command that installs them."""


def main(runtime: str, request: str, answer: str) -> None:
    """Answer a request.

    Args:
        runtime: A key of `RUNTIMES`.
        request: File with `path`, `stop_token_ids`, `max_new_tokens` and `prompts`, each with
            `text`, `ids` and `top_ids`, and the recorded `answer` and `answer_ids`.
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
    """Open a preset with KerasHub's classes, tokenizer and `generate`."""
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

    # By its own class: the base class may take Gemma 4 for the assistant of speculative decoding.
    config = json.loads((pathlib.Path(asked["path"]) / "config.json").read_text("utf-8"))
    owner = config["class_name"].removesuffix("Backbone") + "CausalLM"
    model = getattr(keras_hub.models, owner).from_preset(asked["path"])
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
    """Open a Hugging Face folder, or an adapter on one, in float32: the check is of the file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingError(
            "pip install transformers torch, or gemma-keras-tune[interop]"
        ) from error

    path = asked.get("base", asked["path"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    ends = model.generation_config.eos_token_id
    stops = tuple(ends) if isinstance(ends, list) else (ends,)
    opened = f"transformers {transformers.__version__}"
    if "base" in asked:
        try:
            import peft
        except ModuleNotFoundError as error:
            raise MissingError("pip install peft, or gemma-keras-tune[interop]") from error
        model = peft.PeftModel.from_pretrained(model, asked["path"]).eval()
        # The base knows nothing of the template the adapter was tuned with.
        stops = tuple({*stops, *asked["stop_token_ids"]})
        opened = f"PEFT {peft.__version__} on {opened}"
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
                eos_token_id=list(stops),
            )
        answer = cut(written[0, ids.shape[1] :].tolist(), stops)
        seen = tokenizer.encode(prompt["text"])
        found.append({"ids": seen, "answer_ids": answer, "logits": logits})
    return opened, found


# A model of each family in the Gemma library for JAX; the sizes come from the checkpoint. Named
# here, and not in `gemma/tables`: this script runs in Pythons that do not have this library.
_PUBLISHED = {
    "gemma2": "Gemma2_2B",
    "gemma3": "Gemma3_1B",
    "gemma3n": "Gemma3n_E2B",
    "gemma4": "Gemma4_E2B",
}


def gemma_jax(asked: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Open a checkpoint with the loader, tokenizer and model of the Gemma library for JAX."""
    try:
        gemma: Any = importlib.import_module("gemma")
        gm: Any = importlib.import_module("gemma.gm")
        load = gm.ckpts.load_params
    except ImportError as error:
        raise MissingError("pip install gemma, or name its Python in GEMMA_JAX_PYTHON") from error
    import jax
    import numpy as np

    with open(os.path.join(asked["path"], "gemma_keras_tune.json"), encoding="utf-8") as file:
        record = json.load(file)
    family = record["family"]
    params = load(os.path.join(asked["path"], "params"))
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    kind = getattr(gm.nn, _PUBLISHED[family], None)
    if kind is None:
        raise MissingError(f"gemma {gemma.__version__} has no {family}: pip install -U gemma")
    configure = {"gemma3n": gemma3n_config, "gemma4": gemma4_config}.get(family, gemma_config)
    config = configure(kind.config, family, record["backbone"], params)
    model = kind(config=config)
    tokenizer = getattr(gm.text, f"G{family[1:]}Tokenizer")(
        os.path.join(asked["path"], "tokenizer.model")
    )
    step = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)
    new, stops = asked["max_new_tokens"], tuple(asked["stop_token_ids"])
    length = max(len(prompt["ids"]) for prompt in asked["prompts"]) + new
    found: list[dict[str, Any]] = []
    for prompt in asked["prompts"]:
        ids, count = np.zeros((1, length), "int32"), len(prompt["ids"])
        ids[0, :count] = prompt["ids"]
        logits = []
        with jax.default_matmul_precision("highest"):
            for place in range(count, count + new):
                logits.append(np.asarray(step(ids), "float32")[0, place - 1])
                ids[0, place] = logits[-1].argmax()
                if ids[0, place] in stops:
                    break
        found.append(
            {
                "ids": tokenizer.encode(prompt["text"], add_bos=True),
                "answer_ids": cut(ids[0, count : count + len(logits)].tolist(), stops),
                "logits": logits[0][prompt["top_ids"]].tolist(),
            }
        )
    return f"gemma {gemma.__version__}", found


def gemma_config(published: Any, family: str, given: dict[str, Any], params: Any) -> Any:
    """Make the library's configuration of a model of any size from that of a published one."""
    import dataclasses

    every = {"gemma2": 2, "gemma3": 6}[family]
    local, whole = published.attention_types[0], published.attention_types[every - 1]
    wide = family == "gemma2"
    return dataclasses.replace(
        published,
        num_embed=len(params["embedder"]["input_embedding"]),
        embed_dim=given["hidden_dim"],
        # KerasHub gives Gemma 2 the width of both gates together.
        hidden_dim=given["intermediate_dim"] // (2 if wide else 1),
        num_heads=given["num_query_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        sliding_window_size=given["sliding_window_size"],
        attention_types=tuple(
            local if (layer + 1) % every else whole for layer in range(given["num_layers"])
        ),
        query_pre_attn_norm=type(published.query_pre_attn_norm)[
            "BY_ONE_OVER_SQRT_HEAD_DIM"
            if given["query_head_dim_normalize"]
            else "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"
        ],
        transpose_gating_einsum=not (wide and given["hidden_dim"] == 2304),
        global_scale_factor=given.get("global_rope_scaling_factor", 1.0),
        vision_encoder=None,
    )


def gemma3n_config(published: Any, family: str, given: dict[str, Any], params: Any) -> Any:
    """Make the configuration of a Gemma 3n."""
    import dataclasses

    del family
    layers = given["num_hidden_layers"]
    local, whole = published.attention_types[0], published.attention_types[4]
    kinds = {"sliding_attention": local, "full_attention": whole}
    return dataclasses.replace(
        published,
        num_embed=len(params["embedder"]["input_embedding"]),
        embed_dim=given["text_hidden_size"],
        hidden_dim=given["intermediate_size"][0],
        num_heads=given["num_attention_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        sliding_window_size=given["sliding_window"],
        attention_types=tuple(kinds[kind] for kind in given["layer_types"]),
        local_base_frequency=given["rope_local_base_freq"],
        global_base_frequency=given["rope_theta"],
        activation_sparsity_pattern=tuple(given["activation_sparsity_pattern"] or [0.0] * layers),
        altup_coef_clip=given["altup_coef_clip"],
        per_layer_input_dim=given["hidden_size_per_layer_input"],
        laurel_rank=given["laurel_rank"],
        kv_cache_sharing_config=shared_layers(published, given, layers),
        # Its published configuration leaves the cap out, which changes no greedy answer.
        final_logit_softcap=given["final_logit_soft_cap"],
        vision_encoder=None,
    )


def gemma4_config(published: Any, family: str, given: dict[str, Any], params: Any) -> Any:
    """Make the configuration of a Gemma 4, dense or with experts."""
    import dataclasses

    del family
    local, whole = published.attention_types[0], published.attention_types[4]
    kinds = {"sliding_attention": local, "full_attention": whole}
    width = given["intermediate_dim"]
    experts = {
        "enable_moe": True,
        "num_experts": given["num_experts"],
        "expert_dim": given["expert_intermediate_dim"],
        "top_k_experts": given["num_experts_per_token"],
        "moe_dense_hidden_dim": width,
    }
    return dataclasses.replace(
        published,
        num_embed=len(params["embedder"]["input_embedding"]),
        embed_dim=given["hidden_dim"],
        hidden_dim=width,
        num_heads=given["num_query_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        global_key_size=given["global_head_dim"],
        num_global_kv_heads=given["num_global_key_value_heads"],
        k_eq_v_global=any("k_einsum" in layer.get("attn", {}) for layer in params.values()),
        global_rope_proportion=given["global_rope_partial_rotary_factor"],
        sliding_window_size=given["sliding_window_size"],
        attention_types=tuple(kinds[kind] for kind in given["layer_types"]),
        final_logit_softcap=given["final_logit_soft_cap"],
        per_layer_input_dim=given["hidden_size_per_layer_input"],
        kv_cache_sharing_config=shared_layers(published, given, given["num_layers"]),
        override_kv_shared_ffw_hidden=2 * width if given["use_double_wide_mlp"] else None,
        vision_encoder=None,
        audio_encoder=None,
        **(experts if given["enable_moe_block"] else {}),
    )


def shared_layers(published: Any, given: dict[str, Any], layers: int) -> Any:
    """Set the share of layers without their own keys and values; the library rounds it."""
    import dataclasses

    shared = given["num_kv_shared_layers"]
    share = max(0.0, shared - 0.5) / layers
    return dataclasses.replace(published.kv_cache_sharing_config, frac_shared_layers=share)


def cut(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Return the ids before the first stop token."""
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0]] if ends else ids


def litert(asked: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Open a `.litertlm` file with LiteRT-LM, which gives texts and no logits."""
    try:
        lm: Any = importlib.import_module("litert_lm")
    except ModuleNotFoundError as error:
        raise MissingError(
            "pip install litert-lm-api, or name its Python in LITERT_PYTHON"
        ) from error
    with tempfile.TemporaryDirectory() as cache:  # else it leaves its cache beside the model
        return f"LiteRT-LM {importlib.metadata.version('litert-lm-api')}", _litert(lm, asked, cache)


def _litert(lm: Any, asked: dict[str, Any], cache: str) -> list[dict[str, Any]]:
    engine = lm.Engine(
        os.path.join(asked["path"], "model.litertlm"),
        backend=lm.Backend.CPU(thread_count=1),
        cache_dir=cache,
        activation_data_type=lm.ActivationDataType.FLOAT32,
    )
    greedy = lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=1)
    found: list[dict[str, Any]] = []
    for prompt in asked["prompts"]:
        session = engine.create_session(
            apply_prompt_template=False,
            sampler_config=greedy,
            max_output_tokens=asked["max_new_tokens"],
        )
        session.run_prefill([prompt["text"]])
        text = session.run_decode().texts[0]
        same = text.strip() == prompt["answer"].strip()
        found.append(
            {
                "ids": [engine.bos_token_id, *engine.tokenize(prompt["text"])],
                # One text may be written in several ids.
                "answer_ids": prompt["answer_ids"] if same else engine.tokenize(text),
                "logits": None,
            }
        )
    return found


RUNTIMES = {
    "keras_hub": keras_hub,
    "transformers": transformers,
    "gemma_jax": gemma_jax,
    "litert": litert,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
