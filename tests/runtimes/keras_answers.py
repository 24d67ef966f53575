"""What KerasHub alone answers from presets. Runs by itself, without this library.

python keras_answers.py PRESET... < PROMPT > ANSWERS.json
"""

import json
import pathlib
import sys


def main(prompt: str, *presets: str) -> None:
    import keras_hub

    found = {}
    for preset in presets:
        gemma4 = '"Gemma4Backbone"' in (pathlib.Path(preset) / "config.json").read_text("utf-8")
        owner = keras_hub.models.Gemma4CausalLM if gemma4 else keras_hub.models.CausalLM
        model = owner.from_preset(preset, dtype="float32")
        model.compile(sampler="greedy")
        record = json.loads((pathlib.Path(preset) / "gemma_keras_tune.json").read_text("utf-8"))
        stops = record["stop_tokens"]
        ids = tuple(model.preprocessor.tokenizer.token_to_id(token) for token in stops)
        length = {"max_length": 48, "strip_prompt": True}
        answer = model.generate(prompt, stop_token_ids=ids, **length)
        found[preset] = {"named": answer, "default": model.generate(prompt, **length)}
    assert not [name for name in sys.modules if name.startswith("gemma_keras_tune")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.stdin.read(), *sys.argv[1:])
