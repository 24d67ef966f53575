"""Cases whose prompt was trained on are found, and no others."""

import numpy as np
import pytest

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import Exact
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.evaluation.plans import Case
from gemma_keras_tune.pairs import read_pairs


def case(name, prompt):
    return Case(id=name, prompt=prompt, kind="success", checks=(Exact("x"),))


CASES = [
    case("same", "What are your opening hours on Sunday?"),
    case("near", "What are your opening hours on a Sunday"),
    case("new", "Do you deliver to the airport?"),
    case("short", "Hi"),
]
PAIRS = [
    ("Do you sell bread?", "Yes."),
    ("what ARE your opening hours, on sunday", "10 to 4"),
    ("hi!", "Hello."),
]


def test_equal_and_nearly_equal_prompts_are_found_with_their_rows():
    leaks = find_leaks(CASES, read_pairs(PAIRS))
    assert set(leaks) == {"same", "near", "short"}
    assert leaks["same"].exact and leaks["same"].rows == (2,) and leaks["same"].similarity == 1
    assert not leaks["near"].exact and 0.7 <= leaks["near"].similarity < 1
    assert leaks["short"].rows == (3,)
    assert set(find_leaks(CASES, read_pairs(PAIRS), threshold=1)) == {"same", "short"}


def test_likeness_is_the_share_of_common_runs():
    first, second = "abcdefghij", "abcdefgxyz"
    runs = [{t[i : i + 5] for i in range(6)} for t in (first, second)]
    expected = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    leaks = find_leaks([case("a", first)], read_pairs([(second, "x")]), threshold=expected)
    np.testing.assert_allclose(leaks["a"].similarity, expected)
    assert not find_leaks(
        [case("a", first)], read_pairs([(second, "x")]), threshold=expected + 0.01
    )


def test_a_conversation_is_compared_at_every_turn_without_its_system_message():
    pair = {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Do you deliver to the airport?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And at night?"},
        {"role": "assistant", "content": "No."},
    ]}  # fmt: skip
    assert set(find_leaks(CASES, read_pairs([pair]))) == {"new"}


def test_a_threshold_that_means_nothing():
    with pytest.raises(EvaluationError, match="threshold"):
        find_leaks(CASES, read_pairs(PAIRS), threshold=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 12 + 7?", "What is 12 - 7?"),
        ("Absolute value of -5", "Absolute value of 5"),
        ("A loop in C?", "A loop in C++?"),
        ("A loop in C?", "A loop in C#?"),
        ("की", "के"),
    ],
)
def test_signs_that_change_a_question_are_compared(first, second):
    assert not find_leaks([case("a", first)], read_pairs([(second, "x")]), threshold=1)
    assert find_leaks([case("a", first)], read_pairs([(f"  {first.upper()} !", "x")]), threshold=1)
