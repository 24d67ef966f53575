"""The memory of a training step: an estimate before anything is compiled, XLA's figure after it."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import keras

from gemma_keras_tune._support.memory import free_memory
from gemma_keras_tune.adapters.lora import kernel_shape
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.training.settings import Method

# Activations may take this share of the memory that is free before the first step.
MEMORY_SHARE = 0.6


class StepOptions(TypedDict):
    """Keyword arguments of `step_bytes`."""

    method: Method
    accumulates: bool
    rematerialize: bool


def step_bytes(
    model: keras.Model,
    batch_size: int,
    length: int,
    *,
    method: Method = "lora",
    accumulates: bool = False,
    rematerialize: bool = False,
) -> int:
    """Estimate the bytes that a training step needs beyond the weights.

    The activations, with what the compiler takes beside them; and, where every weight trains, the
    gradients, the two moments of AdamW, and the sum of the gradients that are accumulated. LoRA's
    factors are too small to count.

    Args:
        model: A KerasHub Gemma.
        batch_size: Rows in a batch.
        length: Tokens in a row.
        method: `"lora"` or `"full"`.
        accumulates: True if the gradients of several batches are summed.
        rematerialize: True if each decoder block is computed again in the backward pass.

    Returns:
        Bytes.
    """
    activations = activation_bytes(model, batch_size, length, rematerialize=rematerialize)
    activations = int(activations / MEMORY_SHARE)
    if method == "lora":
        return activations
    weights = sum(math.prod(v.shape) * _item_bytes(v.dtype) for v in model.variables)
    return activations + (3 + accumulates) * weights


def _item_bytes(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def activation_bytes(
    model: keras.Model, batch_size: int, length: int, *, rematerialize: bool = False
) -> int:
    """Estimate the bytes of the activations that one training step keeps.

    Counted from the arrays of a decoder block that the backward pass needs. With recomputation
    these are held for one block at a time, and twice, with their gradients; of each block its
    input is kept.

    Args:
        model: A KerasHub Gemma.
        batch_size: Rows in a batch.
        length: Tokens in a row.
        rematerialize: True if each decoder block is computed again in the backward pass.

    Returns:
        Bytes.
    """
    family = family_of(model)
    linears = family.linears(model)
    blocks = 1 + max(linear.block for linear in linears)
    width = family.head(model).embedding.shape[1]
    feed_forward = max(
        (math.prod(kernel_shape(n.layer)) // width for n in linears if n.target == "gate_proj"),
        default=4 * width,
    )
    backbone = model.backbone
    heads = int(getattr(backbone, "num_query_heads", getattr(backbone, "num_attention_heads", 8)))
    a_token = 14 * width + 4 * feed_forward + 3 * heads * length
    streams = int(getattr(backbone, "altup_num_inputs", 1))
    of_model = blocks * a_token
    if rematerialize:
        of_model = min(of_model, blocks * streams * width + 2 * a_token)
    return batch_size * length * of_model * _item_bytes(model.compute_dtype)


def what_helps(
    model: keras.Model, batch_size: int, length: int, **options: Unpack[StepOptions]
) -> str:
    """Name the setting that takes most off the memory of a step.

    Args:
        model: A KerasHub Gemma.
        batch_size: Rows in a batch.
        length: Tokens in a row.
        **options: As for `step_bytes`.

    Returns:
        A setting and its value, with the estimate of the memory that is needed with it.
    """
    needed = functools.partial(step_bytes, model)
    half = length // 2
    choices = {f"rows of at most {half:,} tokens": needed(batch_size, half, **options)}
    if batch_size > 1:
        choices["`batch_size=1`"] = needed(1, length, **options)
    if not options["rematerialize"]:
        again: StepOptions = {**options, "rematerialize": True}
        choices["`rematerialize=True`"] = needed(batch_size, length, **again)
    if options["method"] == "full":
        lora: StepOptions = {**options, "method": "lora"}
        choices["`method='lora'`"] = needed(batch_size, length, **lora)
    best = min(choices, key=lambda choice: choices[choice])
    return f"{best} (then about {choices[best] / 1e9:.1f} GB)"


class CheckedStep:
    """Compiled training step that refuses to start where XLA says that it does not fit.

    For each shape of the data, XLA's own analysis of the compiled program is compared with what
    was free before the first step. JAX keeps the program, and does not compile it again.

    Args:
        step: A training step of Keras, compiled by `jax.jit`.
        helps: Names the setting that helps most, from the rows and tokens of a batch.
    """

    def __init__(self, step: Any, helps: Callable[[int, int], str]) -> None:
        self._step = step
        self._helps = helps
        self._free: int | None = None
        self._seen: set[Any] = set()

    def __call__(self, state: Any, data: Any) -> Any:
        """Make a step.

        Raises:
            PlanError: It needs more memory than is free.
        """
        shapes = tuple(array.shape for array in jax.tree.leaves(data))
        if shapes not in self._seen:
            self._check(state, data)
            self._seen.add(shapes)
        return self._step(state, data)

    def _check(self, state: Any, data: Any) -> None:
        if not self._seen:
            self._free = free_memory()
        try:
            analysis = self._step.lower(state, data).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise self._too_large(data, "The compiler says so", f"{error}") from error
        if analysis is None or self._free is None:
            return
        made = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        needed = analysis.temp_size_in_bytes + max(made, 0)
        if needed > self._free:
            raise self._too_large(
                data,
                f"XLA's analysis of the compiled step: {needed / 1e9:.2f} GB beyond the weights",
                f"free: {self._free / 1e9:.2f} GB",
            )

    def _too_large(self, data: Any, *problems: str) -> PlanError:
        rows, length = data[0]["token_ids"].shape
        return PlanError(
            f"A step of {rows:,} x {length:,} tokens does not fit into memory.",
            problems,
            f"{self._helps(rows, length)} helps most.",
        )
