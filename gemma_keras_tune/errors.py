"""The exceptions of the library.

Every error a user can cause is a `GemmaTuneError`:

```
GemmaTuneError
├── BackendError       Keras runs on another backend than JAX
├── PairsError         rows that cannot be trained on      (also a ValueError)
├── TemplateError      a template that cannot be applied   (also a ValueError)
├── LoadError          a model that cannot be opened
├── LoraError          LoRA that would train nothing       (also a ValueError)
├── PlanError          a plan that would train nothing     (also a ValueError)
├── TrainingError      training that cannot go on
├── GenerationError    an answer that cannot be written    (also a ValueError)
├── AdapterError       an adapter that does not fit        (also a ValueError)
├── ExportError        a hand-over that cannot be written
└── EvaluationError    a test plan that cannot be run      (also a ValueError)
```

`PairsWarning` is the warning category for rows that can be trained on but look wrong.
"""

import warnings
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "BackendError",
    "EvaluationError",
    "ExportError",
    "GemmaTuneError",
    "GenerationError",
    "LoadError",
    "LoraError",
    "PairsError",
    "PairsWarning",
    "PlanError",
    "TemplateError",
    "TrainingError",
]


class GemmaTuneError(Exception):
    """Base of every error this library raises on purpose.

    The message is a headline, one line for each problem, and the next step.

    Args:
        headline: What went wrong, in one sentence.
        problems: Every problem of this kind, one line each. At most
            `MAX_LISTED` are printed; all are kept in `problems`.
        next_step: What the user can do about it.
    """

    MAX_LISTED = 50

    def __init__(
        self, headline: str, problems: Iterable[str] = (), next_step: str | None = None
    ) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        self.next_step = next_step
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.headline]
        lines += [f"  - {problem}" for problem in self.problems[: self.MAX_LISTED]]
        hidden = len(self.problems) - self.MAX_LISTED
        if hidden > 0:
            lines.append(f"  … and {hidden:,} more (all of them in `error.problems`)")
        if self.next_step:
            lines.append(self.next_step)
        return "\n".join(lines)


class BackendError(GemmaTuneError):
    """Keras runs on another backend than JAX."""


class PairsError(GemmaTuneError, ValueError):
    """Rows that cannot be trained on."""


class TemplateError(GemmaTuneError, ValueError):
    """A prompt template that cannot be applied."""


class LoadError(GemmaTuneError):
    """A model that cannot be opened."""


class LoraError(GemmaTuneError, ValueError):
    """LoRA settings that fit no layer, or would train nothing."""


class PlanError(GemmaTuneError, ValueError):
    """A training plan that cannot be carried out, or would train nothing."""


class TrainingError(GemmaTuneError):
    """Training that cannot go on, such as a loss that is not finite."""


class GenerationError(GemmaTuneError, ValueError):
    """An answer that cannot be written: numbers out of range, or a prompt that is too long."""


class AdapterError(GemmaTuneError, ValueError):
    """An adapter that does not fit the model."""


class ExportError(GemmaTuneError):
    """A hand-over that cannot be written or read back."""


class EvaluationError(GemmaTuneError, ValueError):
    """A test plan that cannot be read or run."""


class PairsWarning(UserWarning):
    """Rows that can be trained on but look wrong."""


def warn_of_pairs(
    headline: str, findings: Sequence[str], everything: str | None = None, *, stacklevel: int = 3
) -> None:
    """Give one `PairsWarning` with a line for each finding, made like the message of an error.

    Args:
        headline: What was found, in one sentence.
        findings: One line each. At most `PairsError.MAX_LISTED` are shown.
        everything: Where the user finds all of them.
        stacklevel: As `warnings.warn` takes it; 3 is the caller of the function that warns.
    """
    most = PairsError.MAX_LISTED
    text = [headline, *(f"  - {finding}" for finding in findings[:most])]
    if len(findings) > most:
        where = f" (all of them in `{everything}`)" if everything else ""
        text.append(f"  … and {len(findings) - most:,} more{where}")
    warnings.warn("\n".join(text), PairsWarning, stacklevel=stacklevel)
