"""Every example of the README and the documentation runs, page by page, as a reader would run it.

Blocks marked `python` or `bash` run in order, each page in a process and an empty folder of its
own. A block is left out only where its title says so and why: `title="Not run: <reason>"`.
"""

import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = ("python", "bash")
NOT_RUN = "Not run: "
TIMEOUT_SECONDS = 900

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w+)(?P<info>[^`\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'title="([^"]*)"')

# Runs in the page's own process: `BLOCKS` is put in front of it.
RUNNER = """
import linecache, subprocess, sys
namespace = {"__name__": "__main__"}
for language, line, code in BLOCKS:
    print(f"--- {PAGE}, line {line}", flush=True)
    if language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    else:
        # Line feeds in front, so that a traceback names the line of the page.
        exec(compile("\\n" * line + code, PAGE, "exec"), namespace)
"""


class Block(NamedTuple):
    """A fenced piece of code."""

    language: str
    title: str
    line: int
    code: str

    @property
    def runs(self) -> bool:
        return self.language in RUNNABLE and not self.title.startswith(NOT_RUN)


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match["info"])
        found.append(
            Block(
                match["language"],
                title[1] if title else "",
                text.count("\n", 0, match.start()) + 1,
                textwrap.dedent(match["code"]),
            )
        )
    return found


def run_page(page: str, blocks: list[Block], folder: pathlib.Path) -> subprocess.CompletedProcess:
    pieces = [(block.language, block.line, block.code) for block in blocks if block.runs]
    script = folder / ".page.py"
    script.write_text(f"PAGE = {page!r}\nBLOCKS = {pieces!r}\n{RUNNER}", encoding="utf-8")
    work = folder / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "PYTHONWARNINGS": "default",
    }
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def pages_to_run() -> list:
    cases = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if not any(block.runs for block in blocks_of(text)):
            continue
        real = any("package://" in block.code for block in blocks_of(text) if block.runs)
        marks = [pytest.mark.slow, *([pytest.mark.real] if real else [])]
        name = str(page.relative_to(ROOT))
        cases.append(pytest.param(page, id=name, marks=marks))
    return cases


@pytest.mark.parametrize("page", pages_to_run())
def test_examples_run(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    done = run_page(str(page), blocks, tmp_path)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_run_or_say_why_not(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert "```" not in FENCE.sub("", text), "a fence has no language, or is not closed"
    for block in blocks:
        if block.language in RUNNABLE and not block.runs:
            reason = block.title.removeprefix(NOT_RUN).strip()
            assert len(reason) > 10, f"line {block.line}: say why it is not run"


def test_a_page_is_run_in_order_and_a_failure_names_its_line(tmp_path: pathlib.Path) -> None:
    page = textwrap.dedent(
        """\
        ```python
        word = "hello"
        ```
        ```bash
        echo from bash > file.txt
        ```
        ```python title="Not run: it would end the test"
        raise SystemExit(3)
        ```
        ```text
        not code
        ```
        ```python
        assert open("file.txt").read() == "from bash\\n"
        assert word == "other"
        ```
        """
    )
    done = run_page("page.md", blocks_of(page), tmp_path)
    assert done.returncode == 1
    assert '"page.md", line 15' in done.stdout
    assert "AssertionError" in done.stdout


def test_a_failing_shell_block_fails_the_page(tmp_path: pathlib.Path) -> None:
    done = run_page("page.md", blocks_of("```bash\nfalse\necho on\n```\n"), tmp_path)
    assert done.returncode != 0
    assert "\non" not in done.stdout
