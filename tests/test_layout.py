"""The modules stand on the floors that the contributing guide gives them."""

import ast
import graphlib
import pathlib
import re

import gemma_keras_tune

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(gemma_keras_tune.__file__).parent
GUIDE = ROOT / "docs" / "contributing.md"
ON_NO_FLOOR = {"__init__", "testing"}


def floors() -> dict[str, int]:
    """Module to floor, as the guide says."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}


def modules() -> dict[str, pathlib.Path]:
    """Files by dotted name, without that of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


def imports(path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """Modules of ours that a module needs before it can be imported itself."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            module = (node.module or "").removeprefix(PACKAGE.name).removeprefix(".")
            names = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name if name in known else module or "__init__" for name in names}
    return found


def test_the_guide_names_every_module_once() -> None:
    top = {name.partition(".")[0] for name in modules()}
    assert {name for name in top if not name.startswith("_")} - ON_NO_FLOOR <= floors().keys()
    assert floors().keys() <= top


def test_no_module_imports_from_a_floor_above() -> None:
    known, floor = modules(), floors()
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(path, known)
        if floor.get(name.partition(".")[0], 5) < floor.get(other.partition(".")[0], 0)
    ]
    assert wrong == []


def test_no_imports_in_circles() -> None:
    known = modules()
    graph = {name: imports(path, known) - {"__init__"} for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()
