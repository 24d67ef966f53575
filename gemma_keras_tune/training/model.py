"""The Keras model that trains: hidden states at response positions in, loss out.

`TuningModel` is an ordinary `keras.Model` around a KerasHub Gemma: compile it with any Keras
optimizer, `fit` it on `make_dataset(...)`, with any callbacks, under any `keras.distribution`. It
shares the Gemma's variables, so when it has been trained, the Gemma has.
"""

import contextlib
import inspect
import math
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import ops

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.memory import kept_memory
from gemma_keras_tune.adapters.lora import lora_config, lora_linears
from gemma_keras_tune.errors import LoraError, PlanError, TrainingError
from gemma_keras_tune.gemma.families import backbone_inputs, family_of
from gemma_keras_tune.gemma.state import training
from gemma_keras_tune.training.losses import token_cross_entropy

# Suffixes of the variables that weight decay leaves alone: norms, biases and Gemma 4's scalars.
NO_DECAY = ("bias", "scale", "layer_scalar")


class TuningModel(keras.Model):
    """Trains a KerasHub Gemma on response tokens alone, without ever building the logits.

    The loss is the mean cross entropy, in nats, over the trained tokens of a batch. Reported beside
    it are `accuracy`, the share of trained tokens the model would have picked greedily given the
    right tokens before them, both averaged over tokens and not over batches.

    Args:
        model: A KerasHub Gemma `CausalLM` of any family.

    Raises:
        LoraError: LoRA is on but base weights train too (as after `model.trainable = True`), or
            nothing trains at all; or the embedding is quantized.
        BackendError: Keras does not run on JAX, or keeps floats in half precision.

    Example:
    ```python
    gkt.enable_lora(model, rank=8)
    trainer = gkt.TuningModel(model)
    trainer.compile(optimizer=gkt.make_optimizer(5e-4, updates=60))
    trainer.fit(gkt.make_dataset(pairs, model), epochs=3)
    ```
    """

    def __init__(self, model: keras.Model, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_backend()
        _check_trainable(model)
        self.backbone = model.backbone
        # Held where Keras does not look, or it would track the variables twice.
        self._held = types.SimpleNamespace(
            gemma=model, head=family_of(model).head(model), values=None
        )
        self._held.head.check_floating(LoraError)
        self._nll = keras.metrics.Mean(name="loss")
        self._accuracy = keras.metrics.Mean(name="accuracy")
        # Everything has its weights already; else Keras would draw a batch to find out.
        self.built = True

    @property
    def gemma(self) -> keras.Model:
        """The KerasHub model that is trained."""
        return self._held.gemma

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Token-weighted loss and accuracy."""
        return [self._nll, self._accuracy]

    def call(self, x: Mapping[str, Any], training: bool | None = None) -> Any:
        """Hidden states at the trained positions.

        Args:
            x: `token_ids` and `padding_mask` `[batch, length]`, `positions` `[positions]`.
            training: Whether dropout is on.

        Returns:
            `[positions, width]` hidden states after the final norm.
        """
        inputs = backbone_inputs(self.backbone, x["token_ids"], x["padding_mask"])
        hidden = self.backbone(inputs, training=training)
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        return ops.take(flat, x["positions"], axis=0)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`; on the CPU, freed memory is kept from step to step.

        It waits for answers that other threads are writing with the model. Until it returns, calls
        of other threads that need the model raise a `TrainingError`.

        Raises:
            TrainingError: A loss or gradient was not finite: the weights are those before that
                step. Or another thread trains the model.
        """
        call = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = keras.tree.flatten(call.arguments.get("callbacks") or [])
        call.arguments["callbacks"] = [_FiniteLoss(), *callbacks]
        with training(self.gemma), kept_memory(), self._weights_put_back():
            return super().fit(*call.args, **call.kwargs)

    def train_step(self, state: Any, data: Any) -> Any:
        """One step as Keras makes it, but no update any more where a loss is not finite.

        From the first loss or gradient of an epoch that is not finite the loss is told as NaN, and
        all weights stay as they are. A gradient that an optimizer scales the loss for may
        overflow: that optimizer leaves out such an update itself.

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
            finite &= jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]).all()
        metrics[total] = jnp.where(finite, metrics[total], jnp.nan)
        updated = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        trainable, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (trainable, optimizer)
        )
        with keras.StatelessScope(zip(self.metrics_variables, metrics, strict=True)):
            logs = self.get_metrics_result()
        return logs, (trainable, fixed, optimizer, metrics)

    def reset_metrics(self) -> None:
        """As in Keras, which does so before it takes the values out of all variables."""
        super().reset_metrics()
        if self._held.values is not None:  # elsewhere than in `fit` they would be held for good
            variables = (*self.variables, *self.optimizer.variables)
            self._held.values = [(v, v.value) for v in variables]

    @contextlib.contextmanager
    def _weights_put_back(self) -> Iterator[None]:
        """Give the variables their values where the first batch of an epoch fails.

        Keras takes the values out before it, and puts back those of the last batch that went well.
        An interrupt while the step is compiled, or too little memory, would leave a model without
        weights. That a variable is without a value can be told by its private `_value` alone.
        """
        self._held.values = []
        try:
            yield
        except BaseException as error:
            empty = [(v, value) for v, value in self._held.values if v._value is None]
            for variable, value in empty:
                if not value.is_deleted():
                    variable.assign(value)
            if any(value.is_deleted() for _, value in empty):
                error.add_note("The failed step has taken the model's weights: load it anew.")
            raise
        finally:
            self._held.values = None

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Weighted sum of the cross entropies; the weights of a batch sum to 1.

        Args:
            x: Unused.
            y: `[positions]` labels.
            y_pred: `[positions, width]` hidden states.
            sample_weight: `[positions]` weights, 0 where a position only fills the shape.
            training: Unused.

        Returns:
            A float32 scalar.
        """
        head = self._held.head
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


class _FiniteLoss(keras.callbacks.Callback):
    """Stops at the first step whose loss is not finite.

    The loss is a mean since the epoch began, which stays so. Keras has read it already, maybe in
    threads whose order is not sure.
    """

    async_safe = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the epoch."""
        self._epoch = epoch + 1
        self._failed = math.inf

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise where the loss is not finite."""
        if math.isfinite((logs or {})["loss"]):
            return
        self._failed = min(self._failed, batch + 1)
        several = self.model.steps_per_execution
        first = f"{self._failed - several + 1:,} to " if several > 1 else ""
        dtype = self.model.gemma.compute_dtype
        wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
        raise TrainingError(
            f"The loss or its gradient is not finite in step {first}{self._failed:,} of "
            f"epoch {self._epoch:,}. The model has the weights from before that step.",
            next_step="Load the model again and train it with a lower learning rate"
            + (f", or with `dtype` {wider} in place of {dtype}." if wider else "."),
        )


@keras.saving.register_keras_serializable("gemma_keras_tune")
class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over updates, for an optimizer that counts the batches it accumulates.

    Keras asks a schedule at every batch, and makes the update with the rate of the last of them.

    Args:
        schedule: A schedule by the number of the update, from 0.
        batches: Batches that make one update.
    """

    def __init__(
        self, schedule: keras.optimizers.schedules.LearningRateSchedule, batches: int
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.batches = batches

    def __call__(self, step: Any) -> Any:
        """The rate at a batch.

        Args:
            step: Number of the batch, from 0.

        Returns:
            A float scalar.
        """
        return self.schedule(ops.floor_divide(step, self.batches))

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON data."""
        inner = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": inner, "batches": self.batches}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PerUpdate":
        """The schedule that `get_config` described."""
        inner = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(inner, config["batches"])


def make_optimizer(
    learning_rate: float,
    *,
    updates: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clipnorm: float | None = 1.0,
    beta_2: float = 0.999,
    gradient_accumulation_steps: int = 1,
) -> keras.optimizers.Optimizer:
    """AdamW (arXiv:1711.05101) with linear warm-up and cosine decay to a tenth.

    Weight decay leaves norms and biases alone; the whole gradient is clipped by its global norm.

    Args:
        learning_rate: Peak learning rate.
        updates: Updates in the whole run.
        warmup_steps: Updates over which the rate rises linearly from zero; fewer than `updates`.
        weight_decay: Decoupled weight decay, as a share of the learning rate.
        clipnorm: Largest global gradient norm; `None` does not clip.
        beta_2: Decay of the second moment.
        gradient_accumulation_steps: Batches whose gradients make one update.

    Returns:
        A `keras.optimizers.AdamW`.

    Raises:
        PlanError: There are no updates, or all of them are warm-up.
    """
    if updates < 1 or not 0 <= warmup_steps < updates:
        raise PlanError(
            "The run would train nothing: it needs at least one update after the warm-up. "
            f"Received: updates={updates}, warmup_steps={warmup_steps}"
        )
    batches = gradient_accumulation_steps
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=learning_rate / (warmup_steps + 1) if warmup_steps else learning_rate,
        decay_steps=updates - warmup_steps,
        alpha=0.1,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(
        PerUpdate(schedule, batches) if batches > 1 else schedule,
        weight_decay=weight_decay,
        global_clipnorm=clipnorm,
        beta_2=beta_2,
        gradient_accumulation_steps=batches if batches > 1 else None,
    )
    optimizer.exclude_from_weight_decay(var_names=list(NO_DECAY))
    return optimizer


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer itself, or the one inside that Keras only scales the loss for."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def batches_per_update(optimizer: keras.optimizers.Optimizer) -> int:
    """Batches whose gradients an optimizer accumulates for one update."""
    return inner_optimizer(optimizer).gradient_accumulation_steps or 1


class TuningProgress(keras.callbacks.Callback):
    """A progress bar over the whole run: loss, tokens a second, time left.

    Args:
        batches: Batches in the whole run.
        tokens: Tokens fed in the whole run, padding left out.
        disable: Draw nothing, but measure all the same.

    Attributes:
        done: Batches so far.
        rates: The learning rate at the end of each epoch, and its batches.
        seconds: How long the run took.
        seconds_first_batch: How long the first batch took, compiling included.
    """

    def __init__(self, batches: int, tokens: int, *, disable: bool = False) -> None:
        super().__init__()
        self.batches = batches
        self.tokens = tokens
        self.disable = disable
        self.seconds_first_batch = 0.0
        self.seconds = 0.0
        self.done = 0
        self.rates: list[tuple[float, int]] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        self._begin = time.perf_counter()
        self._shown = 0.0
        self._bar = tqdm(
            total=self.batches, disable=self.disable, unit="batch", desc="Compiling", leave=True
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Advance the bar; read the loss a few times a second only, since reading waits for it."""
        self.done += 1
        now = time.perf_counter()
        if self.done == 1:
            self.seconds_first_batch = now - self._begin
            self._bar.set_description("Tuning")
        self._bar.update(1)
        if now - self._shown > 0.5 and logs:
            self._shown = now
            rate = self.tokens * self.done / self.batches / (now - self._begin)
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {rate:,.0f} tokens/s")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the learning rate, which other callbacks may change now."""
        batches = self.done - sum(count for _, count in self.rates)
        self.rates.append((float(self.model.optimizer.learning_rate), batches))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the bar."""
        self.seconds = time.perf_counter() - self._begin
        self._bar.close()


def trainable_parameters(variables: Iterable[keras.Variable]) -> int:
    """Number of entries in the variables that train."""
    return sum(math.prod(v.shape) for v in variables if v.trainable)


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
