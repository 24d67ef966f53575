"""Test plans: prove that a tuned model does what it should, refuses what it must, forgot nothing.

`plans` and `checks` define cases and conditions; `running` runs them; `judging` and `statistics`
judge; `leakage`, `few_shot` and `retention` measure what else may explain the results; `results`
contains them as data, and `report` and `reporting` write them.
"""

from gemma_keras_tune.evaluation import checks, safety
from gemma_keras_tune.evaluation.cross_validation import CrossValidation, cross_validate
from gemma_keras_tune.evaluation.plans import Case, TestPlan
from gemma_keras_tune.evaluation.report import Report
from gemma_keras_tune.evaluation.retention import Retention, measure_retention
from gemma_keras_tune.evaluation.running import evaluate

__all__ = [
    "Case",
    "CrossValidation",
    "Report",
    "Retention",
    "TestPlan",
    "checks",
    "cross_validate",
    "evaluate",
    "measure_retention",
    "safety",
]
