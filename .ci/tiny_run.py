"""Tune, ask, save and load a tiny model of every family, as a user would.

`python .ci/tiny_run.py FOLDER`
"""

import pathlib
import sys

import gemma_keras_tune as gkt
from gemma_keras_tune.testing import FAMILIES, tiny_model

PAIRS = [("What colour is the sky?", "Blue."), ("And the grass?", "Green.")] * 2


def run(family: str, folder: pathlib.Path) -> str:
    """Return the answer of a model before and after it was saved, which must be the same."""
    model = tiny_model(family)
    gkt.tune(model, PAIRS, epochs=2, rank=2, batch_size=4, verbose=0)
    answer = gkt.generate(model, PAIRS[0][0], max_new_tokens=8)
    adapter = gkt.save_adapter(model, folder / "adapter")
    preset = gkt.save_preset(model, folder / "preset")
    assert gkt.generate(gkt.load(preset), PAIRS[0][0], max_new_tokens=8) == answer
    again = tiny_model(family)
    gkt.load_adapter(again, adapter)
    assert gkt.generate(again, PAIRS[0][0], max_new_tokens=8) == answer
    return answer


for name in FAMILIES:
    print(name, repr(run(name, pathlib.Path(sys.argv[1], name))), flush=True)
