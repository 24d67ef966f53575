"""Prompts from files."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.sources import Broken, open_source

Messages = list[Any]


def read_prompts(path: str | os.PathLike[str]) -> list[str | Messages]:
    """Read prompts from a file.

    Args:
        path: A `.txt` file with a prompt on each line that is not empty; or another file that
            `read_pairs` takes, whose rows have `prompt` (a text or messages) or `messages`. Other
            keys are not read.

    Returns:
        The prompts, as `generate` takes them.

    Raises:
        PairsError: The file cannot be read, has no prompts, or has rows without one; all are named.
    """
    file = pathlib.Path(path).expanduser()
    if file.suffix.lower() == ".txt":
        prompts: list[str | Messages] = [line for line in _text(file).splitlines() if line.strip()]
    else:
        prompts = _rows(path)
    if not prompts:
        raise PairsError(f"{path} has no prompts.", next_step="Pass at least one.")
    return prompts


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{file} cannot be read: {error}") from error


def _rows(path: str | os.PathLike[str]) -> list[str | Messages]:
    prompts, problems = [], []
    for number, (_, _, record) in enumerate(open_source(path).records(None), 1):
        if isinstance(record, Broken):
            problems.append(f"row {number}: {record.text}")
        elif isinstance(prompt := _prompt(record), (str, list)):
            prompts.append(prompt)
        else:
            problems.append(f"row {number}: has neither `prompt` nor `messages`")
    if problems:
        raise PairsError(f"{path} has rows without a prompt.", problems)
    return prompts


def _prompt(record: Any) -> Any:
    if not isinstance(record, Mapping):
        return record
    return next((record[name] for name in ("prompt", "messages") if record.get(name)), None)


def with_system(prompts: list[str | Messages], system: str) -> list[Messages]:
    """Put a system message before each prompt.

    Args:
        prompts: Prompts, as `read_prompts` gives them.
        system: The text of the message.

    Returns:
        Conversations.

    Raises:
        PairsError: Prompts that have a system message already; all are named.
    """
    found = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    both = [
        f"prompt {number} begins with a system message of its own"
        for number, messages in enumerate(found, 1)
        if isinstance(messages[0], Mapping) and messages[0].get("role") in ("system", "developer")
    ]
    if both:
        raise PairsError("`system` would be a second system message.", both)
    return [[{"role": "system", "content": system}, *messages] for messages in found]
