"""Threads that ask one model with several adapters each get their own adapter's answer."""

import concurrent.futures
import itertools
import pathlib
import random
import threading
from typing import Any

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.adapters.lora import is_lora_on, lora_linears
from gemma_keras_tune.evaluation.requests import ModelPair
from gemma_keras_tune.gemma.state import model_lock
from gemma_keras_tune.testing import tiny_model, tiny_pairs

NAMES = ("one", "two", None)
THREADS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Two adapters that change what is answered."""
    root, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(("one", "two")):
        model = tiny_model("gemma3", num_layers=1)
        gkt.enable_lora(model, 2, verbose=0)
        draw = np.random.default_rng(seed)
        for linear in lora_linears(model):
            factor = linear.layer.lora_kernel_b
            factor.assign(draw.normal(0, 0.6, factor.shape))
        made[name] = gkt.save_adapter(model, root / name)
    return made


@pytest.fixture(scope="module")
def model(folders: dict[str, pathlib.Path]) -> Any:
    model = tiny_model("gemma3", num_layers=1)
    for name, folder in folders.items():
        gkt.load_adapter(model, folder, name=name)
    gkt.adapters.set(model, None)
    return model


def ask(model: Any, name: str | None) -> str:
    answer = gkt.generate(model, "Say something.", max_new_tokens=6, adapter=name, strip=False)
    assert isinstance(answer, str)
    return answer


def pieces(model: Any, name: str | None) -> str:
    stream = gkt.stream(model, "Say something.", max_new_tokens=6, adapter=name, every=2)
    return "".join(stream)


def used(model: Any, name: str | None) -> str:
    with gkt.adapters.use(model, name):
        answers = gkt.generate(model, ["Say something."] * 2, max_new_tokens=6, strip=False)
    assert answers[0] == answers[1]
    return answers[0]


def evaluated(model: Any) -> tuple[str, str]:
    """What an evaluation sees of the base and of the adapter that is on."""
    case = gkt.Case(prompt="Say something.", kind="success", checks=[gkt.checks.Exact("x")])
    report = gkt.evaluate(model, [case], max_new_tokens=6, retention=False, few_shot=0, verbose=0)
    seen = report.cases[0].variants
    return seen["base"][0].text, seen["tuned"][0].text


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str | None, str]:
    """What each answers where one thread asks."""
    answers = {name: ask(model, name) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)
    return answers


def wrong(run: Any, tasks: list[Any], expected: dict[str | None, str]) -> list[Any]:
    """Tasks that are answered otherwise than expected, with several threads at them."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        answers = list(threads.map(run, tasks))
    return [(t, a) for t, a in zip(tasks, answers, strict=True) if a != expected[t[0]]]


def test_each_call_answers_with_its_own_adapter(
    model: Any, expected: dict[str | None, str]
) -> None:
    tasks = [(name, how) for name in NAMES for how in (ask, ask, used, pieces) for _ in range(9)]
    random.Random(0).shuffle(tasks)
    assert wrong(lambda task: task[1](model, task[0]), tasks, expected) == []
    assert gkt.adapters.active(model) is None


@pytest.mark.slow
def test_evaluations_go_on_while_others_answer(model: Any, expected: dict[str | None, str]) -> None:
    gkt.adapters.set(model, "one")
    before = [(name, how) for name in NAMES for how in (ask, used, pieces) for _ in range(4)]
    random.Random(0).shuffle(before)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        evaluations = [threads.submit(evaluated, model) for _ in range(3)]
        answers = [threads.submit(how, model, name) for name, how in before]
        assert [a.result() for a in answers] == [expected[name] for name, _ in before]
        want = (expected[None].strip(), expected["one"].strip())
        assert [tuple(t.strip() for t in e.result()) for e in evaluations] == [want] * 3
    assert gkt.adapters.active(model) == "one"
    gkt.adapters.set(model, None)


def test_adapters_come_and_go_while_others_answer(
    folders: dict[str, pathlib.Path], model: Any, expected: dict[str | None, str]
) -> None:
    def run(task: Any) -> str:
        name, how = task
        if how is not None:
            return how(model, name)
        own = f"own {threading.get_ident()}"
        gkt.load_adapter(model, folders[name or "two"], name=own)
        answer = ask(model, own)
        gkt.adapters.remove(model, own)
        return answer if name else ask(model, None)

    tasks = [(name, how) for name in NAMES for how in (None, ask, used, pieces)] * 4
    random.Random(0).shuffle(tasks)
    assert wrong(run, tasks, expected) == []
    assert gkt.adapters.list(model) == ("one", "two")
    gkt.adapters.set(model, None)


def test_the_streams_of_one_thread_may_take_turns(
    model: Any, expected: dict[str | None, str]
) -> None:
    made = dict.fromkeys(NAMES, "")
    options: dict[str, Any] = dict(max_new_tokens=6, every=1)
    streams = [gkt.stream(model, "Say something.", adapter=name, **options) for name in NAMES]
    for turn in itertools.zip_longest(*streams, fillvalue=""):
        for name, piece in zip(NAMES, turn, strict=True):
            made[name] += piece
    assert made == expected


def test_a_stream_holds_the_model_only_while_it_computes(model: Any) -> None:
    stream = gkt.stream(model, "Say something.", max_new_tokens=6, adapter="one", every=1)
    next(stream)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(model_lock(model).acquire, timeout=5).result(10)
        threads.submit(model_lock(model).release).result(10)


@pytest.mark.parametrize(
    "held",
    [
        lambda model: gkt.adapters.use(model, "one"),
        lambda model: gkt.adapters.use(model),
        lambda model: gkt.lora_disabled(model),
        lambda model: ModelPair(model, model).on("base"),
        lambda model: ModelPair(model, model).on("tuned"),
    ],
)
def test_a_context_keeps_others_from_switching(model: Any, held: Any) -> None:
    gkt.adapters.set(model, "two")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with held(model):
            before = gkt.adapters.active(model)
            switched = threads.submit(gkt.adapters.set, model, None)
            with pytest.raises(concurrent.futures.TimeoutError):
                switched.result(0.2)
            assert gkt.adapters.active(model) == before
        switched.result(10)
    assert not is_lora_on(model)


def test_names_are_told_while_another_thread_answers(model: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads, gkt.adapters.use(model, "one"):
        assert threads.submit(gkt.adapters.list, model).result(10) == ("one", "two")
        assert threads.submit(gkt.adapters.active, model).result(10) == "one"


def test_a_template_goes_to_the_adapter_a_thread_sees(
    folders: dict[str, pathlib.Path],
) -> None:
    """It does not go to the one that another thread answers with just now."""
    model = tiny_model("gemma3", num_layers=1)
    gkt.load_adapter(model, folders["one"], name="one")
    template = gkt.get_template(model, "{prompt}>{response}")
    gkt.adapters.set(model, None)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with gkt.adapters.use(model, "one"):
            attached = threads.submit(gkt.attach_template, model, template)
            assert gkt.template_of(model) is None
        attached.result(10)
    assert gkt.template_of(model) == template
    assert gkt.adapters.active(model) is None


def test_an_evaluation_keeps_its_adapter_when_another_thread_switches(model: Any) -> None:
    gkt.adapters.set(model, "two", scale=0.5)
    sides = ModelPair(model, model)
    factor = lora_linears(model)[0].layer.lora_kernel_b
    before = np.asarray(factor)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        threads.submit(gkt.adapters.set, model, "one").result(10)
    with sides.on("tuned"):
        assert gkt.adapters.active(model) == "two"
        np.testing.assert_array_equal(np.asarray(factor), before)
    assert gkt.adapters.active(model) == "one"


@pytest.mark.slow
def test_training_keeps_the_model_and_tells_other_threads(
    folders: dict[str, pathlib.Path],
) -> None:
    model = tiny_model("gemma3", num_layers=1)
    gkt.load_adapter(model, folders["one"], name="one")
    found: dict[str, Any] = {}

    class Asking(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            found["list"] = threads.submit(gkt.adapters.list, model).result(10)
            for call in (ask, gkt.adapters.set, gkt.adapters.remove):
                found[call.__name__] = threads.submit(call, model, "one").exception(10)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        gkt.tune(model, tiny_pairs(4), epochs=1, callbacks=[Asking()], verbose=0)
        assert found.pop("list") == ("one",)
        assert [type(error) for error in found.values()] == [gkt.errors.TrainingError] * 3
        assert threads.submit(ask, model, "one").result(60) == ask(model, "one")
