"""The public names are what `__init__` says, sorted, documented and typed."""

import ast
import inspect
import pathlib
import re
import textwrap
import types

import pytest

import gemma_keras_tune as gkt

ROOT = pathlib.Path(__file__).parent.parent
EXPORTED = tuple(gkt.__all__)
NAMESPACES = {name: getattr(gkt, name) for name in EXPORTED if inspect.ismodule(getattr(gkt, name))}
OBJECTS = {name: getattr(gkt, name) for name in EXPORTED if name not in NAMESPACES}
OBJECTS |= {
    f"{place}.{name}": getattr(module, name)
    for place, module in NAMESPACES.items()
    for name in module.__all__
    if name not in EXPORTED
}
FUNCTIONS = {n: o for n, o in OBJECTS.items() if inspect.isfunction(o)}
CLASSES = {n: o for n, o in OBJECTS.items() if inspect.isclass(o)}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples|Attributes|Source):$", re.M)


def sections(function: object) -> dict[str, str]:
    """The sections of a Google docstring by name, `""` for what stands before them."""
    text = inspect.getdoc(function) or ""
    parts = SECTION.split(text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def raises_itself(function: object) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def test_all_is_sorted_and_without_doubles() -> None:
    assert list(EXPORTED) == sorted(set(EXPORTED))


def test_exported_names_are_exactly_the_public_ones() -> None:
    public = {
        name
        for name, value in vars(gkt).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(EXPORTED), f"public but not in __all__: {public - set(EXPORTED)}"


def test_public_objects_are_our_own() -> None:
    foreign = [
        name
        for name, value in {**FUNCTIONS, **CLASSES}.items()
        if not value.__module__.startswith("gemma_keras_tune")
    ]
    assert foreign == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = FUNCTIONS[name]
    found = sections(function)
    signature = inspect.signature(function)
    assert found[""].strip(), "no docstring"
    listed = re.findall(r"^    \*{0,2}(\w+):", found.get("Args", ""), re.MULTILINE)
    assert listed == list(signature.parameters), "Args must list every argument, in order"
    if signature.return_annotation not in (None, "None"):
        assert "Returns" in found or "Yields" in found, "no Returns section"
    if raises_itself(function):
        assert "Raises" in found, "no Raises section"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_fully_annotated(name: str) -> None:
    signature = inspect.signature(FUNCTIONS[name])
    bare = [
        p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty
    ]
    assert bare == []
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name: str) -> None:
    optional = [
        p.name
        for p in inspect.signature(FUNCTIONS[name]).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
    ]
    assert len(optional) <= 1, f"these should be keyword-only: {optional[1:]}"


@pytest.mark.parametrize("name", CLASSES)
def test_class_and_its_methods_have_docstrings(name: str) -> None:
    cls = CLASSES[name]
    assert cls.__doc__, "no docstring"
    bare = [
        key
        for key, value in vars(cls).items()
        if not key.startswith("_") and inspect.isfunction(value) and not inspect.getdoc(value)
    ]
    assert bare == []


def test_reference_page_lists_every_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: gemma_keras_tune\.((?!testing)(?:\w+\.)?\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(listed)), "a name is listed twice"
    missing = {name for name in {**FUNCTIONS, **CLASSES} if name not in listed}
    assert missing == set(), "missing from docs/api.md"
    unknown = {name for name in listed if name not in OBJECTS}
    assert unknown == set(), "in docs/api.md but not public"
