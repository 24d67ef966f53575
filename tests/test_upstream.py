"""The faults of other packages that this library works around are still there.

Each section of `docs/upstream.md` describes one, with a reproduction that sets `broken`. A test
that fails here is good news: a new version repaired the fault, so its workaround can go.
"""

import pathlib
import re
from typing import Any, NamedTuple

import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "upstream.md"
WORKAROUND = re.compile(r"^\*\*Workaround\.\*\* (.+?)\n\n", re.MULTILINE | re.DOTALL)
REPRODUCTION = re.compile(r"^```python\n(.+?)^```$", re.MULTILINE | re.DOTALL)


class Fault(NamedTuple):
    title: str
    workaround: str
    code: str


def faults_of(page: str) -> list[Fault]:
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        [workaround], [code] = WORKAROUND.findall(section), REPRODUCTION.findall(section)
        found.append(Fault(title, " ".join(workaround.split()), code))
    return found


def check(fault: Fault) -> None:
    names: dict[str, Any] = {}
    exec(compile(fault.code, f"{PAGE}: {fault.title}", "exec"), names)
    assert names["broken"], (
        f"Fixed upstream: {fault.title}. Remove the section from {PAGE.name}, and what worked "
        f"around it: {fault.workaround}"
    )


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
@pytest.mark.parametrize("fault", faults_of(PAGE.read_text("utf-8")), ids=lambda fault: fault.title)
def test_is_still_there(fault: Fault) -> None:
    check(fault)


def test_a_repaired_fault_names_its_workaround() -> None:
    page = "# Page\n\n## A fault\n\n**Workaround.** In `a.py`.\n\n```python\nbroken = 1 > 2\n```\n"
    [fault] = faults_of(page)
    with pytest.raises(AssertionError, match=r"Fixed upstream: A fault.*In `a\.py`\."):
        check(fault)
