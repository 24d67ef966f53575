"""Tune Google's Gemma models with Keras: from pairs to a tested, deployable model.

Importing chooses the JAX backend, unless Keras is imported already or `KERAS_BACKEND` is set, and
changes nothing else in the process. As a program, `python -m gemma_keras_tune`, it takes over
Ctrl-C first: some of the imports below lose it.
"""

import os as _os
import sys as _sys

from gemma_keras_tune._support.interrupts import ENDING as _ENDING
from gemma_keras_tune._support.interrupts import runs_as_program as _runs_as_program
from gemma_keras_tune._support.quiet import quiet_tensorflow as _quiet_tensorflow

if _runs_as_program(__name__):
    _ENDING.install()
if "keras" not in _sys.modules:
    _os.environ.setdefault("KERAS_BACKEND", "jax")
with _quiet_tensorflow():
    import keras_hub as _keras_hub  # noqa: F401

from gemma_keras_tune import adapters, errors, pairs
from gemma_keras_tune.adapters.lora import (
    LoraConfig,
    enable_lora,
    lora_config,
    lora_disabled,
    merge_lora,
    remove_lora,
)
from gemma_keras_tune.adapters.reading import load_adapter
from gemma_keras_tune.errors import GemmaTuneError
from gemma_keras_tune.evaluation import (
    Case,
    CrossValidation,
    Report,
    Retention,
    TestPlan,
    checks,
    cross_validate,
    evaluate,
    measure_retention,
    safety,
)
from gemma_keras_tune.exporting import callbacks
from gemma_keras_tune.exporting.exporter import export
from gemma_keras_tune.exporting.saving import save_adapter, save_preset
from gemma_keras_tune.exporting.verifying import Verdict, verify
from gemma_keras_tune.gemma.templates import Template, attach_template, get_template, template_of
from gemma_keras_tune.generation.answers import Answer, generate, generate_answers
from gemma_keras_tune.generation.streaming import stream
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import Message, Pair, read_pairs, split_pairs
from gemma_keras_tune.training import losses
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.optimizer import make_optimizer
from gemma_keras_tune.training.pipeline import make_dataset
from gemma_keras_tune.training.planning import Plan
from gemma_keras_tune.training.preparing import make_plan
from gemma_keras_tune.training.previewing import Preview, preview
from gemma_keras_tune.training.tuning import TuneResult, tune

__all__ = [
    "Answer",
    "Case",
    "CrossValidation",
    "GemmaTuneError",
    "LoraConfig",
    "Message",
    "Pair",
    "Plan",
    "Preview",
    "Report",
    "Retention",
    "Template",
    "TestPlan",
    "TuneResult",
    "TuningModel",
    "Verdict",
    "adapters",
    "attach_template",
    "callbacks",
    "checks",
    "cross_validate",
    "enable_lora",
    "errors",
    "evaluate",
    "export",
    "generate",
    "generate_answers",
    "get_template",
    "load",
    "load_adapter",
    "lora_config",
    "lora_disabled",
    "losses",
    "make_dataset",
    "make_optimizer",
    "make_plan",
    "measure_retention",
    "merge_lora",
    "pairs",
    "preview",
    "read_pairs",
    "remove_lora",
    "safety",
    "save_adapter",
    "save_preset",
    "split_pairs",
    "stream",
    "template_of",
    "tune",
    "verify",
]
