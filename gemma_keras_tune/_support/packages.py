"""Installed packages: their versions, and those that only one feature needs."""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from gemma_keras_tune.errors import GemmaTuneError


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Look up the versions of packages.

    Args:
        names: Names of distributions.

    Returns:
        The versions of those that are installed, by name.
    """
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def import_extra(module: str, extra: str, feature: str, error: type[GemmaTuneError]) -> Any:
    """Import a module that one of this library's extras brings.

    Args:
        module: Dotted name of the module.
        extra: The extra that installs it.
        feature: What needs it: the start of a sentence, such as `"JSON schemas"`.
        error: The class of the error to raise.

    Returns:
        The module.

    Raises:
        GemmaTuneError: As `error`: it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        raise error(
            f"{feature} need the package {cause.name or module}, which is not installed.",
            next_step=f'pip install "gemma-keras-tune[{extra}]"',
        ) from cause
