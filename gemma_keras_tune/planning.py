"""From the pairs, their lengths and the machine to a plan that trains something.

The defaults start from how many pairs there are, because the usual ones do not: with 20 pairs and
settings made for thousands, most tools make a handful of updates, all of them inside the warm-up.
Here a small set is passed over until about `TARGET_UPDATES` updates have been made, within limits.
"""

import dataclasses
import math
import os
from typing import Any, Literal

import keras

from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.families import family_of
from gemma_keras_tune.pipeline import Shape

Method = Literal["lora", "full"]

TARGET_UPDATES = 60
MAX_EPOCHS = 15
# Activations may take this share of the memory that is free before the first step.
MEMORY_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every setting of a run, resolved. Pass it to `tune` to run the same again.

    Attributes:
        method: `"lora"` or `"full"`.
        rank: LoRA's rank; `None` for full tuning.
        alpha: LoRA's alpha; `None` for full tuning.
        epochs: Passes over the pairs.
        batch_size: Rows in a batch.
        gradient_accumulation_steps: Batches that make one update.
        learning_rate: Peak learning rate.
        warmup_updates: Updates over which the rate rises.
        weight_decay: Decoupled weight decay.
        sequence_length: `"auto"`, or the one length all rows are padded to.
        seed: Seed of shuffling and of LoRA's start.
        pairs: Rows trained on.
        tokens: Tokens fed in one epoch, padding left out.
        response_tokens: Trained tokens in one epoch.
        padding: Share of the fed positions that are padding.
        shapes: Static shapes, each one compiled program.
        batches: Batches in the whole run.
        updates: Updates in the whole run.
        template: Name of the template.
        dropped: Row numbers left out on request.
        truncated: Row numbers cut on request.
    """

    method: Method
    rank: int | None
    alpha: float | None
    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_updates: int
    weight_decay: float
    sequence_length: int | Literal["auto"]
    seed: int
    pairs: int = 0
    tokens: int = 0
    response_tokens: int = 0
    padding: float = 0.0
    shapes: tuple[Shape, ...] = ()
    batches: int = 0
    updates: int = 0
    template: str = ""
    dropped: tuple[int, ...] = ()
    truncated: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """The settings a user may choose, as `tune` takes them."""
        names = (
            "method rank alpha epochs batch_size gradient_accumulation_steps learning_rate "
            "warmup_updates weight_decay sequence_length seed"
        )
        return {name: getattr(self, name) for name in names.split()}

    def __str__(self) -> str:
        what = "LoRA rank " + f"{self.rank}, alpha {self.alpha:g}" if self.rank else "all weights"
        rows = self.batch_size * self.gradient_accumulation_steps
        shapes = ", ".join(f"{s.batch_size} x {s.length}" for s in self.shapes)
        lines = [
            f"Plan: {what}, {self.epochs} epoch{'s' * (self.epochs > 1)} over {self.pairs:,} pairs "
            f"({self.tokens:,} tokens, {self.response_tokens:,} of them trained)",
            f"  batch {rows} rows"
            + (
                f" ({self.gradient_accumulation_steps} x {self.batch_size})"
                if self.gradient_accumulation_steps > 1
                else ""
            )
            + f", {self.updates:,} updates, learning rate {self.learning_rate:g}, "
            f"{self.warmup_updates} of warm-up, weight decay {self.weight_decay:g}",
            f"  {len(self.shapes)} shape{'s' * (len(self.shapes) > 1)} to compile: {shapes}; "
            f"{100 * self.padding:.0f} % padding; template {self.template}; seed {self.seed}",
        ]
        for rows_out, what_happened in ((self.dropped, "left out"), (self.truncated, "cut")):
            if rows_out:
                listed = ", ".join(map(str, rows_out[:20])) + ("…" if len(rows_out) > 20 else "")
                lines.append(f"  {len(rows_out):,} rows {what_happened} as asked: {listed}")
        return "\n".join(lines)


def plan_settings(
    model: keras.Model,
    pairs: int,
    longest: int,
    *,
    method: Method = "lora",
    rank: int | Literal["auto"] | None = "auto",
    alpha: float | Literal["auto"] | None = "auto",
    epochs: int | Literal["auto"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    gradient_accumulation_steps: int | Literal["auto"] = "auto",
    learning_rate: float | Literal["auto"] = "auto",
    warmup_updates: int | Literal["auto"] = "auto",
    weight_decay: float | Literal["auto"] = "auto",
    sequence_length: int | Literal["auto"] = "auto",
    seed: int = 0,
) -> Plan:
    """Resolve every `"auto"` from the number of pairs, their lengths and the machine.

    Args:
        model: A KerasHub Gemma.
        pairs: How many rows there are.
        longest: Tokens of the longest row.
        method: `"lora"` or `"full"`.
        rank: `"auto"` is 8 under 1,000 pairs, else 16.
        alpha: `"auto"` equals the rank, a scale of 1.
        epochs: `"auto"` aims at 60 updates, between 1 (3 under 5,000 pairs) and 15 passes.
        batch_size: `"auto"` is 4 rows under 64 pairs, 8 under 5,000, else 16; fewer, with
            accumulation instead, where the activations would not fit into memory.
        gradient_accumulation_steps: `"auto"` is 1, or what keeps the batch when it is cut.
        learning_rate: `"auto"` is 5e-4 for LoRA (2e-4 above 1.5 billion parameters) and 5e-5
            (1e-5) for full tuning.
        warmup_updates: `"auto"` is 5 % of the updates.
        weight_decay: `"auto"` is 0.01.
        sequence_length: Passed on.
        seed: Passed on.

    Returns:
        A `Plan`, its figures about the data not yet filled in.

    Raises:
        PlanError: A setting is out of range; all of them are listed.
    """
    _check_settings(locals())
    large = model.count_params() > 1.5e9
    if batch_size == "auto":
        wanted = 4 if pairs < 64 else 8 if pairs < 5_000 else 16
        rows = _rows_that_fit(model, longest, wanted)
        if gradient_accumulation_steps == "auto":
            gradient_accumulation_steps = max(1, wanted // rows)
        batch_size = rows
    if gradient_accumulation_steps == "auto":
        gradient_accumulation_steps = 1
    updates_an_epoch = math.ceil(pairs / (batch_size * gradient_accumulation_steps))
    if epochs == "auto":
        least = 3 if pairs < 5_000 else 1
        epochs = int(min(MAX_EPOCHS, max(least, math.ceil(TARGET_UPDATES / updates_an_epoch))))
    if learning_rate == "auto":
        learning_rate = {"lora": (5e-4, 2e-4), "full": (5e-5, 1e-5)}[method][large]
    updates = updates_an_epoch * int(epochs)
    if warmup_updates == "auto":
        warmup_updates = int(min(round(0.05 * updates), updates - 1))
    lora_rank = (8 if pairs < 1_000 else 16) if rank == "auto" else rank
    lora_alpha = float(lora_rank or 0) if alpha in ("auto", None) else float(alpha)
    lora = method == "lora"
    return Plan(
        method=method,
        rank=lora_rank if lora else None,
        alpha=lora_alpha if lora else None,
        epochs=int(epochs),
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        warmup_updates=int(warmup_updates),
        weight_decay=0.01 if weight_decay == "auto" else weight_decay,
        sequence_length=sequence_length,
        seed=seed,
    )


def _check_settings(given: dict[str, Any]) -> None:
    problems = []
    if given["method"] not in ("lora", "full"):
        problems.append(f"`method` must be 'lora' or 'full'. Received: {given['method']!r}")
    least = {
        "epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "warmup_updates": 0,
        "rank": 1, "sequence_length": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = given[name]
        if value == "auto" or (name == "rank" and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            problems.append(
                f"`{name}` must be 'auto' or an integer of at least {low}. Received: {value!r}"
            )
    floors = {"learning_rate": 0.0, "weight_decay": -1e-30, "alpha": 0.0}
    for name, floor in floors.items():
        value = given[name]
        if value == "auto" or (name == "alpha" and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"`{name}` must be 'auto' or a number. Received: {value!r}")
        elif not floor < value < math.inf:
            problems.append(f"`{name}` must be above {max(floor, 0.0):g}. Received: {value!r}")
    if problems:
        raise PlanError("The plan cannot be carried out.", problems)


def check_updates(plan: Plan) -> None:
    """Refuse a plan that would train nothing.

    Args:
        plan: A plan whose figures about the data are filled in.

    Raises:
        PlanError: There are no updates, or all of them are warm-up.
    """
    if plan.updates < 1 or plan.warmup_updates >= plan.updates:
        raise PlanError(
            f"The plan makes {plan.updates} updates, {plan.warmup_updates} of them warm-up: it "
            "would train nothing.",
            next_step="Raise `epochs`, or lower `warmup_updates` or `batch_size`.",
        )


def _rows_that_fit(model: keras.Model, longest: int, wanted: int) -> int:
    free = free_memory()
    if free is None:
        return wanted
    rows = wanted
    while rows > 1 and activation_bytes(model, rows, longest) > MEMORY_SHARE * free:
        rows //= 2
    return rows


def activation_bytes(model: keras.Model, batch_size: int, length: int) -> int:
    """Rough bytes of the activations one training step keeps, for choosing a batch.

    Counted from the arrays of a decoder block that the backward pass needs; on Gemma 3 270M at
    4 x 512 tokens it gives 3.6 GB where XLA's own analysis says 3.5.

    Args:
        model: A KerasHub Gemma.
        batch_size: Rows in a batch.
        length: Tokens in a row.

    Returns:
        Bytes.
    """
    family = family_of(model)
    linears = family.linears(model)
    blocks = 1 + max(linear.block for linear in linears)
    width = family.head(model).embedding.shape[1]
    feed_forward = max(
        (math.prod(n.layer.kernel.shape) // width for n in linears if n.target == "gate_proj"),
        default=4 * width,
    )
    backbone = model.backbone
    heads = int(getattr(backbone, "num_query_heads", getattr(backbone, "num_attention_heads", 8)))
    size = 2 if model.compute_dtype in ("bfloat16", "float16") else 4
    a_token = 14 * width + 4 * feed_forward + 3 * heads * length
    return blocks * batch_size * length * a_token * size


def free_memory() -> int | None:
    """Bytes free for a training step on the first accelerator, or on the host where there is none.

    Returns:
        Bytes, or `None` where nothing says.
    """
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(limit - stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
