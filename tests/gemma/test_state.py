"""One state for each model: made once, gone with the model; threads take turns with the model."""

import concurrent.futures
import gc
import threading
import weakref
from typing import Any

import keras
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.gemma.state import locked, mark_origin, origin_of, state_of, training


def bare() -> Any:
    return keras.Sequential([keras.layers.Dense(1)])


def test_threads_that_meet_a_model_first_get_one_state() -> None:
    for _ in range(20):
        model, start = bare(), threading.Barrier(8)

        def meet(_: int, model: Any = model, start: threading.Barrier = start) -> int:
            start.wait(10)
            return id(state_of(model))

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert set(threads.map(meet, range(8))) == {id(state_of(model))}


def test_the_state_goes_with_its_model() -> None:
    model = bare()
    mark_origin(model, "somewhere", True)
    assert origin_of(model) == state_of(model).origin and origin_of(bare()) is None
    gone = weakref.ref(state_of(model))
    del model
    gc.collect()
    assert gone() is None


def test_a_model_in_training_is_refused_to_other_threads() -> None:
    model = bare()
    use = locked(lambda model: "used")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with training(model), training(model):
            assert use(model) == "used"
            with pytest.raises(gkt.errors.TrainingError, match="Another thread trains this model"):
                threads.submit(use, model).result(10)
        assert threads.submit(use, model).result(10) == "used"


@pytest.mark.parametrize(
    "call",
    [
        gkt.adapters.list,
        gkt.enable_lora,
        gkt.preview,
        gkt.TuningModel,
        gkt.template_of,
        lambda model, *_: gkt.adapters.set(model, "one"),
        lambda model, *_: gkt.load_adapter(model, "somewhere"),
    ],
)
def test_what_is_no_model_is_told_in_words(call):
    for wrong in (None, "package://gemma3_270m"):
        more = ([("a", "b")],) if call is gkt.preview else ()
        with pytest.raises(gkt.errors.LoadError, match=r"a KerasHub Gemma\. Received: "):
            call(wrong, *more)
