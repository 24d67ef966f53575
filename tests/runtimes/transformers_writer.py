"""Writes folders as transformers saves them. Runs by itself: torch beside TensorFlow may crash.

python transformers_writer.py REQUEST.json

The request holds, for each folder, the class of the model and the settings that differ from a tiny
model's; the ids to compute logits for, which are left beside each folder; and a tokenizer.
"""

import json
import pathlib
import sys
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS = ["sliding_attention", "full_attention"] * 2
LATER = {"sliding_window": 8, "query_pre_attn_scalar": 8}
MORE: dict[str, dict[str, Any]] = {
    "Gemma": {},
    "Gemma2": LATER,
    "Gemma3": {**LATER, "num_hidden_layers": 7},
    "Gemma3n": {
        "num_hidden_layers": 4,
        "intermediate_size": [24] * 4,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "layer_types": KINDS,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "Gemma4": {
        "num_hidden_layers": 4,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 4,
        "sliding_window": 8,
        "layer_types": KINDS,
    },
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}


def main(request: str) -> None:
    import numpy as np
    import torch
    import transformers

    asked = json.loads(pathlib.Path(request).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["tokenizer"])
    ids = torch.tensor(asked["ids"])
    torch.manual_seed(0)
    for folder, (name, changed) in asked["folders"].items():
        config = {**SIZES, **MORE[name], "vocab_size": asked["vocab_size"], **changed}
        sees = config.pop("sees", False)
        if name in ("Gemma3n", "Gemma4"):
            config["vocab_size_per_layer_input"] = asked["vocab_size"]
        made = getattr(transformers, f"{name}{'' if name in ('Gemma', 'Gemma2') else 'Text'}Config")
        kind = getattr(transformers, f"{name}ForCausalLM")
        settings = made(**config)
        if sees:
            whole = transformers.Gemma3Config(text_config=settings, vision_config=VISION)
            model = transformers.Gemma3ForConditionalGeneration(whole)
        else:
            model = kind(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim < 2:
                    parameter.add_(noise * 0.2)
                else:
                    parameter.copy_(noise / 4)
            logits = model.eval()(ids).logits
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        np.save(f"{folder}.npy", logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
