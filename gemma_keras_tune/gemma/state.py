"""The state this library keeps of a model beside its weights, and the model's lock.

It is held beside the model and not on it: Keras would track and save what is set on a model. The
table is weak, so the state goes with the model.
"""

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import keras

from gemma_keras_tune.errors import LoadError, TrainingError


@dataclasses.dataclass(frozen=True)
class Origin:
    """Origin of a model.

    Attributes:
        source: The argument `load` was given.
        instruct: True if it is instruction-tuned, `None` if unknown.
    """

    source: str
    instruct: bool | None


@dataclasses.dataclass(eq=False)
class ModelState:
    """State of one model. Packages above this one read their parts through their own functions.

    Attributes:
        lock: Re-entrant; held by the thread that answers with the model, trains or changes it.
        trainer: The thread that trains the model, while it does.
        origin: Where the model came from, if known.
        templates: `Template` of each adapter by name; that of the base under `None`.
        active: The adapter that was switched to last; `None` is the base.
        adapters: The `AdapterSet` of the model, while LoRA is on it.
        programs: Compiled programs by what they were compiled for.
        compilations: Number of programs compiled so far.
        media_names: True for the backbone of a text model whose Hugging Face folder holds a model
            that sees or hears: its weights have the names they have there.
    """

    lock: Any = dataclasses.field(default_factory=threading.RLock)
    trainer: int | None = None
    origin: Origin | None = None
    templates: dict[str | None, Any] = dataclasses.field(default_factory=dict)
    active: str | None = None
    adapters: Any = None
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    compilations: int = 0
    media_names: bool = False

    def template(self, adapter: str | None) -> Any:
        """Template of an adapter, or that of the base where the adapter has none."""
        return self.templates.get(adapter) or self.templates.get(None)


_states: "weakref.WeakKeyDictionary[keras.Model, ModelState]" = weakref.WeakKeyDictionary()


def state_of(model: keras.Model) -> ModelState:
    """Return the one state of a model, made at the first call.

    Raises:
        LoadError: It is no model, such as the name of one.
    """
    try:
        return _states.get(model) or _states.setdefault(model, ModelState())
    except TypeError:  # text, and None, cannot be referred to weakly
        raise LoadError(
            f"`model` must be a KerasHub Gemma. Received: {model!r:.80}",
            next_step="Open it first: `model = gkt.load(…)`.",
        ) from None


def model_lock(model: keras.Model) -> Any:
    """Return the re-entrant lock of a model, held while an adapter is switched, or is to stay on.

    Raises:
        TrainingError: Another thread trains the model.
    """
    state = state_of(model)
    if state.trainer not in (None, threading.get_ident()):
        raise TrainingError(
            "Another thread trains this model, and has its weights until the training ends.",
            next_step="Wait until `fit` or `tune` returns, or use another copy of the model.",
        )
    return state.lock


@contextlib.contextmanager
def training(model: keras.Model) -> Iterator[None]:
    """Keep the model for the thread that trains it: others get a `TrainingError` meanwhile.

    Raises:
        TrainingError: Another thread trains the model.
    """
    with model_lock(model):
        state = state_of(model)
        before, state.trainer = state.trainer, threading.get_ident()
        try:
            yield
        finally:
            state.trainer = before


_Function = TypeVar("_Function", bound=Callable[..., Any])


def locked(function: _Function) -> _Function:
    """Let one thread at a time into a function whose first argument is `model`."""

    @functools.wraps(function)
    def call(model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        with model_lock(model):
            return function(model, *args, **kwargs)

    return cast(_Function, call)


def mark_origin(model: keras.Model, source: str, instruct: bool | None) -> None:
    """Remember where a model came from.

    Args:
        model: A KerasHub Gemma.
        source: What it was loaded from.
        instruct: True if it is instruction-tuned, `None` if unknown.
    """
    state_of(model).origin = Origin(source, instruct)


def origin_of(model: keras.Model) -> Origin | None:
    """Return where a model came from, `None` for one this library did not load."""
    return state_of(model).origin


def is_instruct(model: keras.Model) -> bool | None:
    """Return True if the model is instruction-tuned, `None` if unknown."""
    origin = origin_of(model)
    return origin.instruct if origin else None


def name_as_media_model(model: keras.Model) -> None:
    """Remember that Hugging Face's model of these weights sees or hears: an adapter goes on it."""
    state_of(model.backbone).media_names = True


def is_named_as_media_model(backbone: keras.Model) -> bool:
    """Tell if `name_as_media_model` was called for the model of this backbone."""
    state = _states.get(backbone)
    return state is not None and state.media_names
