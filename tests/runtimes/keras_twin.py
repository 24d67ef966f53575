"""What KerasHub alone makes of presets. Runs by itself, without this library.

python keras_twin.py INPUTS.npz ANSWERS.npz PRESET...
"""

import pathlib
import sys


def main(inputs: str, answers: str, *presets: str) -> None:
    import keras_hub
    import numpy as np

    given, found = np.load(inputs), {}
    for preset in presets:
        # `CausalLM.from_preset` may take Gemma 4 for the assistant of speculative decoding.
        gemma4 = '"Gemma4Backbone"' in (pathlib.Path(preset) / "config.json").read_text("utf-8")
        owner = keras_hub.models.Gemma4CausalLM if gemma4 else keras_hub.models.CausalLM
        model = owner.from_preset(preset, dtype="float32")
        names = [tensor.name for tensor in model.backbone.inputs]
        fed = {name: given[f"{preset}:{name}"] for name in names}
        found[f"{preset}:hidden"] = np.asarray(model.backbone(fed))
        found[f"{preset}:ids"] = np.asarray(model.preprocessor.tokenizer(str(given["text"])))
    assert not [name for name in sys.modules if name.startswith("gemma_keras_tune")]
    np.savez(answers, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
