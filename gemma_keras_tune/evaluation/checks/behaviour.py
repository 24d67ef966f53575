"""Checks of how a model behaves: it refuses, it stops, it is safe; and functions of your own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks.base import Check, Outcome, quoted
from gemma_keras_tune.evaluation.policy_scores import (
    THRESHOLD,
    Judged,
    PolicyCheck,
    policy_scores,
    policy_threshold,
)
from gemma_keras_tune.evaluation.refusals import LANGUAGES, find_refusal
from gemma_keras_tune.evaluation.values import Flag, Share
from gemma_keras_tune.generation.answers import Answer


@dataclasses.dataclass(frozen=True)
class Refuses(Check):
    """The response refuses, in words that are known to refuse.

    The usual refusals of nine languages are found, and no others; one that is followed by what was
    asked for all the same still counts. Read some responses yourself, and add the forms that your
    model was taught.

    Attributes:
        expected: False if the response must not refuse.
        languages: Languages to look for: `"en"`, `"de"`, `"fr"`, `"es"`, `"it"`, `"pt"`, `"ja"`,
            `"zh"`, `"hi"`; all by default.
        forms: More phrases that refuse. Case, typographic quotes and white space do not count.
    """

    expected: Flag = True
    languages: Sequence[str] = LANGUAGES
    forms: Sequence[str] = ()
    name: ClassVar[str] = "refuses"
    main: ClassVar[str] = "expected"

    def __post_init__(self) -> None:
        super().__post_init__()
        languages = self._read_texts("languages", "a list of texts")
        forms = self._read_texts("forms", "a list of texts")
        known = set(languages) <= set(LANGUAGES)
        self._require("languages", known, f"languages out of {', '.join(LANGUAGES)}")
        self._require("forms", bool(languages or forms), "at least one form, or a language")

    def describe(self) -> str:
        """Write the check in words."""
        return "refuses" if self.expected else "does not refuse"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Look for a refusal in the response."""
        found = find_refusal(response.text, self.languages, self.forms)
        reason = "no refusal was recognised" if found is None else f"it says {quoted(found)}"
        passed = (found is not None) == self.expected
        return Outcome(passed, reason if found is not None or not passed else "")


@dataclasses.dataclass(frozen=True)
class Stops(Check):
    """The model ends the response itself, before the limit of tokens.

    Attributes:
        expected: False if it must not.
    """

    expected: Flag = True
    name: ClassVar[str] = "stops"
    main: ClassVar[str] = "expected"

    def describe(self) -> str:
        """Write the check in words."""
        return "stops by itself" if self.expected else "does not stop by itself"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Test for a stop token."""
        if response.stopped == self.expected:
            return Outcome(True)
        limit = f"it went on to the limit, {len(response.ids)} tokens"
        return Outcome(False, "it stopped" if response.stopped else limit)


@dataclasses.dataclass(frozen=True)
class Safe(Check):
    """The response, the prompt, or both do not violate a policy.

    `evaluate(policy=…)` brings the policy: a `ShieldGemma`, or any function that takes a prompt and
    a response and gives the probability that the response violates it, or such a score for each of
    several policies by name. To judge a prompt alone it is given `None` for the response.

    Attributes:
        threshold: Score from which a text counts as a violation; `None` is the policy's own.
        of: Texts to judge: `"answer"`, `"prompt"` or `"both"`.
        policies: Names of the policies that count, such as `"dangerous"`; all if there are none.
        policy: The policy, if it is not `evaluate` that brings it.
    """

    threshold: Annotated[Share | None, Meta(description="a number over 0 and up to 1")] = None
    of: Annotated[
        Literal["answer", "prompt", "both"], Meta(description="answer, prompt or both")
    ] = "answer"
    policies: Sequence[str] = ()
    policy: PolicyCheck | None = dataclasses.field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "safe"
    main: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        given: Any = self.threshold
        if given is True:  # {"safe": true}
            object.__setattr__(self, "threshold", None)
        super().__post_init__()
        self._read_texts("policies", "a list of names")
        self._require("policy", self.policy is None or callable(self.policy), "a function")

    def describe(self) -> str:
        """Write the check in words."""
        who = {"answer": "", "prompt": "its prompt ", "both": "with its prompt "}[self.of]
        under = f"the policy {', '.join(self.policies)}" if self.policies else "the policy"
        limit = "" if self.threshold is None else f" (score under {self.threshold:g})"
        return f"{who}is safe under {under}{limit}"

    def judged(self, prompt: str, response: str) -> tuple[Judged, ...]:
        """List the texts to judge: prompt and response, prompt and `None`, or both."""
        asked: dict[str, Judged] = {"answer": (prompt, response), "prompt": (prompt, None)}
        return tuple(asked.values()) if self.of == "both" else (asked[self.of],)

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the highest score, which is the outcome's, with the threshold."""
        if self.policy is None:
            raise EvaluationError(
                "A `safe` check needs a policy to judge by.",
                next_step="Pass `evaluate(…, policy=ShieldGemma())`, or a function of yours.",
            )
        texts = self.judged(prompt, response.text)
        found = [policy_scores(self.policy, [text])[0] for text in texts]
        return self.outcome(found, policy_threshold(self.policy))

    def outcome(
        self, found: Sequence[Mapping[str, float]], threshold: float = THRESHOLD
    ) -> Outcome:
        """Judge by the scores of each text of `judged`, by the policies' names."""
        wanted = self.policies or tuple(found[0])
        lacking = [name for name in wanted if any(name not in scores for scores in found)]
        if lacking:
            raise EvaluationError(
                f"The policy gave no score for {', '.join(lacking)}; it gave {', '.join(found[0])}"
            )
        parts = ("answer", "prompt") if self.of == "both" else (self.of,)
        score, name, part = max(
            (scores[name], name, part)
            for part, scores in zip(parts, found, strict=True)
            for name in wanted
        )
        limit = threshold if self.threshold is None else self.threshold
        if score < limit:
            return Outcome(True, "", score)
        under = f" under {name}" if name else ""
        of = "" if self.of == "answer" else f" of the {part}"
        return Outcome(False, f"the policy's score{of}{under} is {score:.3g}", score)

    def to_config(self) -> dict[str, Any]:
        """Convert the check to JSON data. The policy is not a part of the plan."""
        config = super().to_config()[self.name]
        given = config if isinstance(config, dict) else {"threshold": config}
        given = {k: v for k, v in given.items() if v is not None and k != "policy"}
        if not given:
            return {self.name: True}
        return {self.name: given["threshold"] if set(given) == {"threshold"} else given}


@dataclasses.dataclass(frozen=True)
class Function(Check):
    """The response passes a Python function.

    It is written to files by its name, and not read from them: a file must not run code.

    Attributes:
        function: Takes the prompt and the response's text; gives true or false, or an `Outcome`.
        label: Name in reports; by default the function's module and name.
    """

    function: Callable[[str, str], Any] | None
    label: str = ""
    name: ClassVar[str] = "function"
    main: ClassVar[str] = "label"

    def __post_init__(self) -> None:
        callable_ = self.function is None or callable(self.function)
        self._require("function", callable_, "a function of prompt and answer")
        if not self.label:
            module = getattr(self.function, "__module__", "")
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            object.__setattr__(self, "label", f"{module}.{name}")

    def describe(self) -> str:
        """Write the check in words."""
        return f"passes {self.label}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Call the function. An error within it fails the response, and is the reason."""
        if self.function is None:
            raise EvaluationError(f"The function {self.label} was not kept, only its name.")
        try:
            found = self.function(prompt, response.text)
        except Exception as error:
            return Outcome(False, f"{self.label} raised {type(error).__name__}: {error}")
        if isinstance(found, Outcome):
            return found
        return Outcome(bool(found), "" if found else f"{self.label} says no")

    def to_config(self) -> dict[str, Any]:
        """Convert the check to its name."""
        return {self.name: self.label}
