"""What the benchmarks share: the pairs, the peers at their documented settings, and the table."""

import argparse
import gc
import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import gemma_keras_tune as gkt

MODEL = "package://gemma3_270m"


def arguments(description: str, pairs: int | None = 64) -> argparse.Namespace:
    """The options `--json` and, where there are pairs to choose, `--pairs`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    if pairs is not None:
        parser.add_argument("--pairs", type=int, default=pairs, help="pairs in an epoch")
    return parser.parse_args()


def shared_data(name: str) -> pathlib.Path:
    """A folder of public data beside the checkout; the benchmark ends where it is not there."""
    folder = pathlib.Path(__file__).parents[3] / "shared" / "data" / name
    if not folder.is_dir():
        sys.exit(f"There is no {folder}. Put this public data there; docs/examples.md says whose.")
    return folder


def kerashub_recipe(length: int) -> keras.Model:
    """KerasHub's documented LoRA recipe: rank 4, AdamW 5e-5, all logits over the padded length."""
    model = gkt.load(MODEL)
    model.backbone.enable_lora(rank=4)
    model.preprocessor.sequence_length = length
    optimizer = keras.optimizers.AdamW(learning_rate=5e-5, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        sampler="greedy",
    )
    return model


QUERY_AND_VALUE = ("q_proj", "v_proj")


def ours(
    model: keras.Model, target_modules: Any = QUERY_AND_VALUE, rematerialize: bool = False
) -> gkt.TuningModel:
    """LoRA of rank 4, with the same optimizer."""
    gkt.enable_lora(model, 4, target_modules=target_modules, verbose=0)
    trainer = gkt.TuningModel(model, rematerialize=rematerialize)
    trainer.compile(gkt.make_optimizer(5e-5, steps=1000, weight_decay=0.01))
    return trainer


def variables_of(trainer: keras.Model) -> tuple[list[Any], ...]:
    """The variables a Keras train step takes and gives back, in its groups."""
    trainer.optimizer.build(trainer.trainable_variables)
    return (
        trainer.trainable_variables,
        trainer.non_trainable_variables,
        trainer.optimizer.variables,
        trainer.metrics_variables,
    )


def state_of(trainer: keras.Model) -> tuple[list[Any], ...]:
    """The values of those variables."""
    return tuple([v.value for v in group] for group in variables_of(trainer))


def attempt(name: str, measure: Callable[[], Any]) -> Any:
    """What a peer measures; `None` and the reason in print where it fails."""
    try:
        return measure()
    except Exception as error:
        print(f"{name} was not measured: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def shown(figure: float | None, form: str) -> str:
    """A figure as a cell of a table, a dash where there is none."""
    width = int("0" + re.match(r"\d*", form)[0])
    return format(figure, form) if figure is not None else f"{'-':>{width}}"


def forget() -> None:
    """Let go of a model before the next one is loaded."""
    keras.utils.clear_session(free_memory=True)
    gc.collect()


def report(title: str, lines: list[str], figures: dict[str, Any], path: Any) -> None:
    """Print the table and the machine, and write the figures."""
    import jax

    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}"
    print(f"\n{title}\n{machine}, {jax.devices()[0].device_kind}, jax {jax.__version__}, keras "
          f"{keras.__version__}, numpy {np.__version__}")  # fmt: skip
    print("\n".join(lines))
    if path:
        path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")
