"""What transformers makes of folders. Runs by itself: torch beside TensorFlow may crash.

python transformers_twin.py REQUESTS.json ANSWERS.json

The requests are by folder.
"""

import json
import pathlib
import sys
from typing import Any


def main(requests: str, answers: str) -> None:
    asked = json.loads(pathlib.Path(requests).read_text())
    found = {folder: look(folder, request) for folder, request in asked.items()}
    pathlib.Path(answers).write_text(json.dumps(found))


def look(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    ids = torch.tensor(asked["ids"])
    with torch.no_grad():
        logits = model(ids).logits
    return {
        "class": type(model).__name__,
        "loading": {name: sorted(map(str, keys)) for name, keys in loading.items() if keys},
        "logits": logits.tolist(),
        "texts": [tokenizer.encode(text) for text in asked["texts"]],
        "chat": tokenizer.apply_chat_template(
            asked["chat"], add_generation_prompt=True, tokenize=False
        ),
        "spoken": tokenizer.decode(asked["spoken"], skip_special_tokens=True),
        "stops": model.generation_config.eos_token_id,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
