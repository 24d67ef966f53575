"""The Keras model that trains: hidden states at response positions in, loss out.

`TuningModel` is an ordinary `keras.Model` around a KerasHub Gemma: compile it with any Keras
optimizer, `fit` it on `make_dataset(...)`, with any callbacks, under any `keras.distribution`. It
shares the Gemma's variables, so when it has been trained, the Gemma has.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import ops

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.interrupts import held_interrupts
from gemma_keras_tune._support.memory import free_memory, kept_memory
from gemma_keras_tune.adapters.lora import lora_config, lora_linears
from gemma_keras_tune.errors import GemmaTuneError, LoraError, PlanError
from gemma_keras_tune.gemma.attention import keep_soft_cap
from gemma_keras_tune.gemma.families import backbone_inputs, decoder_blocks, family_of
from gemma_keras_tune.gemma.recomputation import recomputed
from gemma_keras_tune.gemma.state import training
from gemma_keras_tune.training.callbacks import FiniteLoss, HeldValues, Interruptible
from gemma_keras_tune.training.losses import token_cross_entropy
from gemma_keras_tune.training.memory import CheckedStep, StepOptions, step_bytes, what_helps
from gemma_keras_tune.training.optimizer import (
    batches_per_step,
    default_optimizer,
    inner_optimizer,
)
from gemma_keras_tune.training.settings import SETTINGS, Auto


class TuningModel(keras.Model):
    """Trains a KerasHub Gemma on response tokens alone, without ever building the logits.

    The loss is the mean cross entropy, in nats, over the trained tokens of a batch. Reported beside
    it is `accuracy`, the share of trained tokens the model would have picked greedily given the
    right tokens before them. Both are averaged over tokens and not over batches.

    Args:
        model: A KerasHub Gemma `CausalLM` of any family.
        rematerialize: Compute each decoder block again in the backward pass, and do not keep its
            activations. `"auto"`: where a step is estimated not to fit into memory otherwise.

    Raises:
        PlanError: `rematerialize` is something else.
        LoraError: LoRA is on but base weights train too (as after `model.trainable = True`), or
            nothing trains at all; or the embedding is quantized.
        BackendError: Keras does not run on JAX, or keeps floats in half precision.

    Example:
    ```python
    gkt.enable_lora(model, rank=8)
    trainer = gkt.TuningModel(model)
    trainer.compile(optimizer=gkt.make_optimizer(5e-4, steps=60))
    trainer.fit(gkt.make_dataset(model, pairs), epochs=3)
    ```
    """

    def __init__(
        self, model: keras.Model, *, rematerialize: bool | Auto = "auto", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_backend()
        family = family_of(model)
        self._rematerialize = SETTINGS["rematerialize"].read("rematerialize", rematerialize)
        self._free_memory = free_memory()
        _check_trainable(model)
        family.head(model).check_floating(LoraError)
        keep_soft_cap(model.backbone)
        self.backbone = model.backbone
        # A function is not tracked. Of a tracked task Keras would draw a batch, to build its
        # preprocessor.
        self._task = lambda: model
        self._nll = keras.metrics.Mean(name="loss")
        self._accuracy = keras.metrics.Mean(name="accuracy")
        # Everything has its weights already; else Keras would draw a batch to find out.
        self.built = True

    @property
    def gemma(self) -> keras.Model:
        """The KerasHub model that is trained."""
        return self._task()

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Token-weighted loss and accuracy."""
        return [self._nll, self._accuracy]

    def compile(self, optimizer: keras.optimizers.Optimizer | str = "auto", **kwargs: Any) -> None:
        """Choose the optimizer, as in Keras.

        Args:
            optimizer: A Keras optimizer or the name of one, with Keras's defaults. `"auto"` is
                AdamW with the learning rate that `tune` would choose, held constant.
            **kwargs: `jit_compile`, `steps_per_execution`, `run_eagerly` and `auto_scale_loss`, as
                in Keras.

        Raises:
            PlanError: `loss`, `loss_weights`, `metrics` or `weighted_metrics`, which this model
                has already.
        """
        fixed = ("loss", "loss_weights", "metrics", "weighted_metrics")
        ignored = [f"`{name}`: {kwargs[name]!r}" for name in fixed if kwargs.get(name) is not None]
        if ignored:
            raise PlanError(
                "The loss of `TuningModel` is the cross entropy of the trained tokens, and its "
                "metrics are that loss and the accuracy. These would be ignored.",
                ignored,
                "Leave them out, or measure more in a callback.",
            )
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = default_optimizer(self.gemma)
        super().compile(optimizer=optimizer, **kwargs)

    def call(self, x: Mapping[str, Any], training: bool | None = None) -> Any:
        """Compute the hidden states at the trained positions.

        Args:
            x: `token_ids` and `padding_mask` `[batch, length]`, `positions` `[positions]`.
            training: Whether dropout is on.

        Returns:
            `[positions, width]` hidden states after the final norm.
        """
        backbone = self.gemma.backbone
        inputs = backbone_inputs(backbone, x["token_ids"], x["padding_mask"])
        with recomputed(self._recomputed(*x["token_ids"].shape) if training else ()):
            hidden = backbone(inputs, training=training)
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        return ops.take(flat, x["positions"], axis=0)

    def _recomputed(self, rows: int, length: int) -> list[Any]:
        """Choose the layers that are computed again in the backward pass.

        Without recomputation these are the layers in int4: Keras would keep their kernels unpacked.
        """
        again = self._rematerialize
        if again == "auto":
            needed = step_bytes(self.gemma, rows, length, **self._step_options(False))
            again = self._free_memory is not None and needed > self._free_memory
        if again:
            return decoder_blocks(self.gemma)
        linears = family_of(self.gemma).linears(self.gemma)
        return [n.layer for n in linears if n.layer.quantization_mode == "int4"]

    def _step_options(self, rematerialize: bool) -> StepOptions:
        return {
            "method": "lora" if lora_config(self.gemma) else "full",
            "accumulates": self.compiled and batches_per_step(self.optimizer) > 1,
            "rematerialize": rematerialize,
        }

    def _what_helps(self, rows: int, length: int) -> str:
        options = self._step_options(self._rematerialize is True)
        return what_helps(self.gemma, rows, length, **options)

    def _make_function(self, step_function: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the compiled training step: Keras's trainer calls this for each step it has."""
        if getattr(step_function, "__wrapped__", None) == self.train_step:
            step_function = CheckedStep(step_function, self._what_helps)
        return super()._make_function(step_function, *args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does; on the CPU, freed memory is kept from step to step.

        A first batch that fails leaves the model its weights.

        It waits for answers that other threads are writing with the model. Until it returns, calls
        of other threads that need the model raise a `TrainingError`.

        A Ctrl-C, or the stop button of a notebook, takes effect after the step that runs: the model
        has the weights of that step. A second one takes effect at once.

        Raises:
            TrainingError: A loss or gradient was not finite: the weights are those before that
                step. Or another thread trains the model.
            PlanError: A step needs more memory than is free, as XLA says of the compiled step.
        """
        call = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = keras.tree.flatten(call.arguments.get("callbacks") or [])
        held = HeldValues()
        try:
            with training(self.gemma), kept_memory(), held_interrupts() as raise_held:
                ours = [held, FiniteLoss(), Interruptible(raise_held)]
                call.arguments["callbacks"] = [*ours, *callbacks]
                return super().fit(*call.args, **call.kwargs)
        except BaseException as error:
            held.put_back(error)
            raise

    def train_step(self, state: Any, data: Any) -> Any:
        """Make a step as Keras does, but without an update once a loss is not finite.

        From the first loss or gradient of an epoch that is not finite, the reported loss is NaN and
        all weights stay as they are. With an optimizer that scales the loss, gradients may
        overflow: that optimizer skips such an update itself.

        Args:
            state: The values of trainable and other variables, optimizer and metrics.
            data: A batch of `(x, y, sample_weight)`.

        Returns:
            The metrics' results, and the new state.
        """
        trainable, fixed, optimizer, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        differentiate = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (_, (_, _, fixed, metrics)), gradients = differentiate(
            trainable, fixed, metrics, x, y, sample_weight,
            training=True, optimizer_variables=optimizer,
        )  # fmt: skip
        total = next(i for i, v in enumerate(self.metrics_variables) if v is self._nll.total)
        finite = jnp.isfinite(metrics[total])
        if inner_optimizer(self.optimizer) is self.optimizer:
            finite &= jnp.isfinite(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        metrics[total] = jnp.where(finite, metrics[total], jnp.nan)
        # A branch, not a choice for each weight: XLA compiles that for a minute longer on a CPU.
        trainable, optimizer = jax.lax.cond(
            finite, self.optimizer.stateless_apply, lambda held, _, weights: (weights, held),
            optimizer, gradients, trainable,
        )  # fmt: skip
        with keras.StatelessScope(zip(self.metrics_variables, metrics, strict=True)):
            logs = self.get_metrics_result()
        return logs, (trainable, fixed, optimizer, metrics)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: what this model computes are hidden states, and not predictions.

        Raises:
            GemmaTuneError: Always.
        """
        raise GemmaTuneError(
            "`TuningModel` trains and does not predict.",
            next_step="Call `generate(model, prompts)` with the KerasHub model, or the KerasHub "
            "model itself for its logits.",
        )

    predict_on_batch = predict

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Sum the cross entropies, weighted; the weights of a batch sum to 1.

        Args:
            x: Unused.
            y: `[positions]` labels.
            y_pred: `[positions, width]` hidden states.
            sample_weight: `[positions]` weights, 0 where a position only fills the shape.
            training: Unused.

        Returns:
            A float32 scalar.
        """
        head = family_of(self.gemma).head(self.gemma)
        embedding = ops.convert_to_tensor(head.embedding)
        scores = token_cross_entropy(
            y_pred,
            ops.cast(embedding, y_pred.dtype),
            y,
            soft_cap=head.soft_cap,
            train_embedding=head.embedding.trainable,
        )
        live = ops.cast(sample_weight > 0, "float32")
        self._nll.update_state(scores.losses, sample_weight=live)
        self._accuracy.update_state(ops.cast(scores.correct, "float32"), sample_weight=live)
        return ops.sum(scores.losses * sample_weight)


def _check_trainable(model: keras.Model) -> None:
    training = list(model.trainable_variables)
    if not training:
        raise LoraError(
            "No variable of this model trains.",
            next_step="Call `enable_lora(model)`, or set `model.trainable = True`.",
        )
    if lora_config(model) is None:
        return
    factors = {
        id(factor)
        for linear in lora_linears(model)
        for factor in (linear.layer.lora_kernel_a, linear.layer.lora_kernel_b)
    }
    loose = [v.path for v in training if id(v) not in factors]
    if loose:
        raise LoraError(
            "LoRA is on, but base weights train too (setting `trainable = True` thaws them).",
            loose,
            "Leave `trainable` alone after `enable_lora`, or call `remove_lora(model)`.",
        )
