"""What transformers makes of a folder. Runs by itself: torch beside TensorFlow may crash.

python _transformers_twin.py FOLDER REQUEST.json ANSWER.json
"""

import json
import pathlib
import sys


def main(folder: str, request: str, answer: str) -> None:
    import torch
    import transformers

    asked = json.loads(pathlib.Path(request).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.tensor(asked["ids"])
    with torch.no_grad():
        logits = model(ids).logits
    found = {
        "logits": logits.tolist(),
        "texts": [tokenizer.encode(text) for text in asked["texts"]],
        "chat": tokenizer.apply_chat_template(
            asked["chat"], add_generation_prompt=True, tokenize=False
        ),
        "spoken": tokenizer.decode(asked["spoken"], skip_special_tokens=True),
        "stops": model.generation_config.eos_token_id,
    }
    pathlib.Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
