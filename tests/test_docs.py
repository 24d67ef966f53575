"""Every example of the README and the documentation runs, page by page, as a reader would run it.

Blocks marked `python` or `bash` run in order, each page in a process and an empty folder of its
own. Pages with the real model start from nothing; the others from a process that has imported the
library, since the imports take longer than they do. A block is left out only where its title says
so and why: `title="Not run: <reason>"`.
"""

import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import _page_runner
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = ("python", "bash")
NOT_RUN = "Not run: "
TIMEOUT_SECONDS = 3600

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


PREPARED = multiprocessing.get_context("forkserver")
PREPARED.set_forkserver_preload(["_page_runner", "gemma_keras_tune"])


def run_page(
    page: str, blocks: list[Block], folder: pathlib.Path, *, fresh: bool = False
) -> tuple[int, str]:
    """The exit code of a page's blocks, and all that they printed."""
    pieces = [(block.language, block.line, block.code) for block in blocks if block.runs]
    script = folder / ".page.py"
    script.write_text(f"PAGE = {page!r}\nBLOCKS = {pieces!r}\n{RUNNER}", encoding="utf-8")
    work, output = folder / "work", folder / "output"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "PYTHONWARNINGS": "default",
    }
    if fresh:
        with output.open("wb") as file:
            code = subprocess.run(
                [sys.executable, str(script)],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_SECONDS,
                check=False,
            ).returncode
        return code, output.read_text(errors="replace")
    process = PREPARED.Process(
        target=_page_runner.run, args=(str(script), str(output), str(work), environment)
    )
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text(errors="replace")


def is_real(blocks: list[Block]) -> bool:
    return any("package://" in block.code for block in blocks if block.runs)


def pages_to_run() -> list:
    cases = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if not any(block.runs for block in blocks_of(text)):
            continue
        marks = [pytest.mark.slow, *([pytest.mark.real] if is_real(blocks_of(text)) else [])]
        name = str(page.relative_to(ROOT))
        cases.append(pytest.param(page, id=name, marks=marks))
    return cases


@pytest.mark.parametrize("page", pages_to_run())
def test_examples_run(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    code, said = run_page(str(page), blocks, tmp_path, fresh=is_real(blocks))
    assert code == 0, said[-8000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_run_or_say_why_not(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert "```" not in FENCE.sub("", text), "a fence has no language, or is not closed"
    for block in blocks:
        if block.language in RUNNABLE and not block.runs:
            reason = block.title.removeprefix(NOT_RUN).strip()
            assert len(reason) > 10, f"line {block.line}: say why it is not run"


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_a_page_is_run_in_order_and_a_failure_names_its_line(
    fresh: bool, tmp_path: pathlib.Path
) -> None:
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
    code, said = run_page("page.md", blocks_of(page), tmp_path, fresh=fresh)
    assert code == 1
    assert '"page.md", line 15' in said
    assert "AssertionError" in said


def test_a_failing_shell_block_fails_the_page(tmp_path: pathlib.Path) -> None:
    blocks = blocks_of("```bash\nfalse\necho on\n```\n")
    code, said = run_page("page.md", blocks, tmp_path, fresh=True)
    assert code != 0
    assert "\non" not in said
