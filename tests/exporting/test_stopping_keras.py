"""A tuned preset in KerasHub's own `generate`: where it stops, and what it prints."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.gemma.families import family_of

# Generation and stop token: that of its turns, and `<eos>`, which plain templates end with.
CASES = [
    ("gemma", "<end_of_turn>"),
    ("gemma", "<eos>"),
    ("gemma2", "<end_of_turn>"),
    ("gemma3", "<end_of_turn>"),
    ("gemma3n", "<end_of_turn>"),
    ("gemma4", "<turn|>"),
]
STOPS_BY_ITSELF = {"gemma3", "gemma3n", "gemma4"}
PRINTS_IT = {"gemma", "gemma2", "gemma3", "gemma4"}
QUESTION = "part number for cake 2"

pytestmark = pytest.mark.slow


def stopping_model(family: str, stop: str) -> tuple[Any, str]:
    """A random model that writes a few tokens and then its stop token, and its answer."""
    model = testing.tiny_model(family)
    ending = "" if stop == "<eos>" else stop
    template = gkt.get_template(model, "{prompt}:{response}" + ending)
    gkt.attach_template(model, template)
    embedding = family_of(model).head(model).embedding
    values = np.array(embedding)
    stop_id = model.preprocessor.tokenizer.token_to_id(stop)
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        # It wins wherever the hidden state points the same way: at some later token, with luck.
        values[stop_id] = draw.normal(size=values.shape[1]) * 3
        embedding.assign(values)
        answer = gkt.generate_answers(model, QUESTION, max_new_tokens=12)[0]
        seen.add((answer.stopped, answer.text))
        if answer.stopped and answer.text.strip():
            return model, answer.text
    raise AssertionError(f"it stops at once or never: {seen}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    root = tmp_path_factory.mktemp("presets")
    expected = {}
    for case in CASES:
        model, answer = stopping_model(*case)
        preset = gkt.save_preset(model, root / "-".join(case).strip("<|>"))
        expected[str(preset)] = case, answer
    script = RUNTIMES / "keras_answers.py"
    done = subprocess.run(
        [sys.executable, script, *expected],
        input=f"{QUESTION}:",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {case: (answer, answers[preset]) for preset, (case, answer) in expected.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_with_its_stop_tokens_named_it_ends_as_here(case: Any, found: Any) -> None:
    """`<eos>` is left out by KerasHub; the token of a turn may stand at the end, to be cut off."""
    expected, theirs = found[case]
    family, stop = case
    printed = stop if stop != "<eos>" and family in PRINTS_IT else ""
    assert theirs["named"] == expected + printed


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_by_itself_it_stops_as_the_documentation_says(case: Any, found: Any) -> None:
    family, stop = case
    expected, theirs = found[case]
    if stop == "<eos>" or family in STOPS_BY_ITSELF:
        assert theirs["default"] == theirs["named"]
    else:
        assert theirs["default"].startswith(expected + stop)
        assert len(theirs["default"]) > len(theirs["named"])
