"""Folders that tests read from."""

import pathlib

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
RUNTIMES = TESTS / "runtimes"
