"""Intervals and tests against scipy and statsmodels, and verdicts against their own promise."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.proportion import proportion_confint

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.statistics import (
    cases_to_show,
    compare,
    exact_bounds,
    judge,
    mcnemar,
    wilson_interval,
)

COUNTS = [(0, 1), (1, 1), (0, 8), (3, 8), (8, 8), (19, 20), (57, 60), (500, 1000)]


@pytest.mark.parametrize(("passed", "cases"), COUNTS)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_intervals_equal_statsmodels(passed, cases, confidence):
    alpha = 1 - confidence
    wilson = proportion_confint(passed, cases, alpha, method="wilson")
    np.testing.assert_allclose(wilson_interval(passed, cases, confidence), wilson, atol=1e-9)
    # Two one-sided bounds at this level are the two-sided ones at twice the error.
    exact = proportion_confint(passed, cases, 2 * alpha, method="beta")
    np.testing.assert_allclose(exact_bounds(passed, cases, confidence), exact, atol=1e-9)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (6, 0), (5, 2), (12, 12), (30, 11)])
def test_mcnemar_equals_statsmodels(won, lost):
    base = [True] * lost + [False] * won + [True] * 4 + [False] * 3
    tuned = [False] * lost + [True] * won + [True] * 4 + [False] * 3
    table = [[4, lost], [won, 3]]
    np.testing.assert_allclose(
        mcnemar(base, tuned), their_mcnemar(table, exact=True).pvalue, atol=1e-9
    )


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.99])
def test_a_verdict_is_wrong_at_most_as_often_as_it_says(target):
    # Every outcome is counted with its probability: exact where a simulation would be noisy.
    for cases, confidence in itertools.product((1, 5, 8, 20, 24, 100), (0.9, 0.95)):
        verdicts = np.array([judge(k, cases, target, confidence).verdict for k in range(cases + 1)])
        below = stats.binom.pmf(np.arange(cases + 1), cases, np.nextafter(target, 0))
        at = stats.binom.pmf(np.arange(cases + 1), cases, target)
        assert below[verdicts == "pass"].sum() <= 1 - confidence + 1e-9
        assert at[verdicts == "fail"].sum() <= 1 - confidence + 1e-9


def test_a_simulated_user_is_misled_at_most_one_time_in_twenty():
    draw = np.random.default_rng(0)
    passed = draw.binomial(24, 0.899, 4000)
    verdicts = {k: judge(int(k), 24, 0.9).verdict for k in np.unique(passed)}
    assert np.mean([verdicts[k] == "pass" for k in passed]) <= 0.05


def test_small_plans_are_told_what_they_cannot_show():
    assert judge(8, 8, 0.9).verdict == "cannot tell"
    assert judge(29, 29, 0.9).verdict == "pass" and cases_to_show(0.9) == 29
    assert judge(28, 28, 0.9).verdict == "cannot tell"
    assert judge(99, 100, 1.0).verdict == "fail"
    assert judge(100, 100, 1.0).verdict == "cannot tell" and cases_to_show(1.0) is None
    assert "8 of 8" in judge(8, 8, 0.9).words and "29" in judge(8, 8, 0.9).words
    assert "cannot show" in compare([False] * 5, [True] * 5)
    assert compare([False] * 6, [True] * 6).endswith("The tuned model is better.")
    assert compare([True] * 6, [False] * 6).endswith("The tuned model is worse.")


def test_impossible_numbers():
    for call in (
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: judge(1, 2, 0.0),
        lambda: judge(1, 2, 0.9, 1.0),
    ):
        with pytest.raises(EvaluationError):
            call()
