"""Tune Google's Gemma models with Keras: from pairs to a tested, deployable model.

Importing chooses the JAX backend, unless Keras is imported already or `KERAS_BACKEND` is set, and
changes nothing else in the process.
"""

import os as _os
import sys as _sys

from gemma_keras_tune._support.quiet import quiet_tensorflow as _quiet_tensorflow

if "keras" not in _sys.modules:
    _os.environ.setdefault("KERAS_BACKEND", "jax")
with _quiet_tensorflow():
    import keras_hub as _keras_hub  # noqa: F401

from gemma_keras_tune import adapters
from gemma_keras_tune.adapters.lora import (
    LoraConfig,
    enable_lora,
    lora_config,
    lora_disabled,
    merge_lora,
    remove_lora,
)
from gemma_keras_tune.adapters.reading import load_adapter
from gemma_keras_tune.errors import (
    AdapterError,
    BackendError,
    EvaluationError,
    ExportError,
    GemmaTuneError,
    GenerationError,
    LoadError,
    LoraError,
    PairsError,
    PairsWarning,
    PlanError,
    TemplateError,
    TrainingError,
)
from gemma_keras_tune.evaluation import (
    Case,
    Check,
    Contains,
    CrossValidation,
    Exact,
    Function,
    JsonFields,
    JsonSchema,
    Length,
    NotContains,
    Number,
    OneOf,
    Outcome,
    Policy,
    Refuses,
    Regex,
    Report,
    Retention,
    Safe,
    ShieldGemma,
    Stops,
    TestPlan,
    cross_validate,
    evaluate,
    measure_retention,
)
from gemma_keras_tune.exporting.exporter import export
from gemma_keras_tune.exporting.saving import AdapterCheckpoint, save_adapter, save_preset
from gemma_keras_tune.exporting.verifying import Verdict, verify
from gemma_keras_tune.gemma.templates import Template, attach_template, get_template, template_of
from gemma_keras_tune.generation.answers import Answer, generate, generate_answers
from gemma_keras_tune.generation.streaming import stream
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import (
    Message,
    Pair,
    PairChecks,
    PairSource,
    Problem,
    read_pairs,
    split_pairs,
)
from gemma_keras_tune.training.losses import token_cross_entropy
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.optimizer import make_optimizer
from gemma_keras_tune.training.pipeline import make_dataset
from gemma_keras_tune.training.planning import Plan
from gemma_keras_tune.training.preparing import make_plan
from gemma_keras_tune.training.previewing import Preview, preview
from gemma_keras_tune.training.tuning import TuneResult, tune

__all__ = [
    "AdapterCheckpoint",
    "AdapterError",
    "Answer",
    "BackendError",
    "Case",
    "Check",
    "Contains",
    "CrossValidation",
    "EvaluationError",
    "Exact",
    "ExportError",
    "Function",
    "GemmaTuneError",
    "GenerationError",
    "JsonFields",
    "JsonSchema",
    "Length",
    "LoadError",
    "LoraConfig",
    "LoraError",
    "Message",
    "NotContains",
    "Number",
    "OneOf",
    "Outcome",
    "Pair",
    "PairChecks",
    "PairSource",
    "PairsError",
    "PairsWarning",
    "Plan",
    "PlanError",
    "Policy",
    "Preview",
    "Problem",
    "Refuses",
    "Regex",
    "Report",
    "Retention",
    "Safe",
    "ShieldGemma",
    "Stops",
    "Template",
    "TemplateError",
    "TestPlan",
    "TrainingError",
    "TuneResult",
    "TuningModel",
    "Verdict",
    "adapters",
    "attach_template",
    "cross_validate",
    "enable_lora",
    "evaluate",
    "export",
    "generate",
    "generate_answers",
    "get_template",
    "load",
    "load_adapter",
    "lora_config",
    "lora_disabled",
    "make_dataset",
    "make_optimizer",
    "make_plan",
    "measure_retention",
    "merge_lora",
    "preview",
    "read_pairs",
    "remove_lora",
    "save_adapter",
    "save_preset",
    "split_pairs",
    "stream",
    "template_of",
    "token_cross_entropy",
    "tune",
    "verify",
]
