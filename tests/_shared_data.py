"""Public data that some tests read: beside the checkout, and no part of it."""

import pathlib

import pytest

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> pathlib.Path:
    """A file or folder of the public data; the test is skipped where it is not there."""
    found = DATA / name
    if not found.exists():
        pytest.skip(f"the public data {found} is not there")
    return found
