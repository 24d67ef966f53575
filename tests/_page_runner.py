"""Runs a script in a process that has the library imported already."""

import os
import pathlib
import runpy
import warnings
from collections.abc import Mapping

import jax
from _quick_code import quick_code_generation


def run(script: str, output: str, work: str, environment: Mapping[str, str]) -> None:
    """The target of a process.

    Args:
        script: Python file to run.
        output: File for what it writes.
        work: Folder to run it in.
        environment: All of its environment.
    """
    with pathlib.Path(output).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(work)
    # As in conftest.py: pages that start here have tiny models.
    quick_code_generation()
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("default")
    runpy.run_path(script, run_name="__main__")
