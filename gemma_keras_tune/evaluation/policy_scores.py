"""Scores of a safety policy, in one form for functions and for `ShieldGemma`.

A policy is a function of a prompt and a response that gives the probability that the response
violates it, 0 to 1, or such a score for each of several policies by name. Called with `None` for
the response it judges the prompt alone. It may have these attributes:

- `scores(prompts, responses)` gives `[texts, policies]` at once, with the policies' `names`;
- `threshold` is the score from which a text counts as a violation;
- `identity` is a text that names all that the scores depend on, so that they can be kept.
"""

import hashlib
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.response_log import ResponseLog

PolicyCheck = Callable[[str, Any], Any]
Judged = tuple[str, str | None]
THRESHOLD = 0.5
BATCH = 16


def policy_threshold(policy: PolicyCheck) -> float:
    """Return the score from which a text counts as a violation: the policy's own, or a half."""
    return float(getattr(policy, "threshold", THRESHOLD))


def policy_names(policy: PolicyCheck) -> tuple[str, ...]:
    """Return the names of the policies it judges by, if it has a list of them."""
    return tuple(getattr(policy, "names", ()))


def policy_scores(policy: PolicyCheck, texts: Sequence[Judged]) -> list[dict[str, float]]:
    """Compute the probabilities that texts violate each policy, by the policies' names.

    The texts have a response each, or `None` each. A policy without a name is `""`.

    Raises:
        EvaluationError: The policy raised, or gave no scores.
    """
    in_batches = getattr(policy, "scores", None)
    try:
        if in_batches is None:
            given = [policy(*text) for text in texts]
        else:
            responses = None if texts[0][1] is None else [response for _, response in texts]
            given = _rows(in_batches([prompt for prompt, _ in texts], responses), policy)
    except Exception as error:
        raise EvaluationError(f"The policy raised {type(error).__name__}: {error}") from error
    if len(given) != len(texts):
        raise EvaluationError(f"The policy gave {len(given)} scores for {len(texts)} texts.")
    return [_scores(value) for value in given]


def score_texts(
    policy: PolicyCheck,
    wanted: Mapping[Judged, str],
    log: ResponseLog,
    progress: Callable[[int], None],
) -> dict[Judged, dict[str, float]]:
    """Score many texts, those of similar length together, and keep the scores in the log.

    Args:
        policy: The policy. Its scores are kept if it has an `identity`.
        wanted: The texts, each with the id of one of its cases.
        log: File of scores.
        progress: Called with the number of texts each time some are judged.

    Raises:
        EvaluationError: As for `policy_scores`; the cases are named.
    """
    keys = {text: _key(policy, text) for text in wanted}
    found = {text: log.scores[key] for text, key in keys.items() if key in log.scores}
    progress(len(found))
    left = sorted((t for t in wanted if t not in found), key=lambda t: len(t[0]) + len(t[1] or ""))
    size = BATCH if hasattr(policy, "scores") else 1
    for alone in (False, True):
        own = [text for text in left if (text[1] is None) == alone]
        for start in range(0, len(own), size):
            batch = own[start : start + size]
            try:
                new = dict(zip(batch, policy_scores(policy, batch), strict=True))
            except EvaluationError as error:
                cases = ", ".join(dict.fromkeys(wanted[text] for text in batch))
                raise EvaluationError(
                    f"Case {cases} cannot be judged. {error.headline}",
                    next_step="Answers are not lost where `resume` names a file.",
                ) from error
            found |= new
            log.add_scores({key: new[text] for text in batch if (key := keys[text])})
            progress(len(batch))
    return found


def _key(policy: PolicyCheck, text: Judged) -> str | None:
    """Hash of all that a text's scores depend on, if that is known."""
    identity = getattr(policy, "identity", None)
    if identity is None:
        return None
    return hashlib.sha256(json.dumps([str(identity), *text]).encode()).hexdigest()[:32]


def _rows(found: Any, policy: PolicyCheck) -> list[Any]:
    """Split a matrix into one row for each text, by the policies' names if there are any."""
    rows = np.asarray(found, float)
    rows = rows.reshape(len(rows), -1)
    names = policy_names(policy)
    if len(names) != rows.shape[1]:
        return [row.max() for row in rows]
    return [dict(zip(names, row.tolist(), strict=True)) for row in rows]


def _scores(given: Any) -> dict[str, float]:
    scores = given if isinstance(given, Mapping) else {"": given}
    good = bool(scores) and all(
        isinstance(name, str)
        and isinstance(score, (numbers.Real, np.bool_))
        and 0 <= float(score) <= 1
        for name, score in scores.items()
    )
    if not good:
        raise EvaluationError(
            f"The policy must give a score from 0 to 1, or one by name. It gave {given!r:.80}"
        )
    return {name: float(score) for name, score in scores.items()}
