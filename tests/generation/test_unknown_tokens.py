"""No id is written that the tokenizer does not know."""

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.testing import tiny_model

KNOWN = 620


@pytest.fixture(scope="module")
def model():
    """A model that would write the rows beyond its tokenizer alone."""
    model = tiny_model("gemma3", num_layers=1, vocabulary_size=KNOWN + 80)
    embedding = model.backbone.token_embedding.embeddings
    values = np.array(embedding)
    values[model.preprocessor.tokenizer.vocabulary_size() :] *= 50
    embedding.assign(values)
    return model


def assert_known(model, ids):
    size = model.preprocessor.tokenizer.vocabulary_size()
    assert size < model.backbone.vocabulary_size
    assert len(ids) > 3 and (np.asarray(ids) < size).all()


@pytest.mark.parametrize("sampler", ["greedy", pytest.param("top_k", marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_answers_hold_known_ids_alone(length, sampler, model):
    """With 150 tokens some are guessed."""
    (answer,) = gkt.generate_answers(
        model, "Hello there", max_new_tokens=length, sampler=sampler, seed=1
    )
    assert_known(model, answer.ids)


@pytest.mark.slow
def test_streamed_answers_too(model):
    pieces = gkt.stream(model, "Hello there", max_new_tokens=8)
    assert "".join(pieces) == gkt.generate(model, "Hello there", max_new_tokens=8, strip=False)
