"""Scripts that answer one request after the other, each in one process of its own.

They import torch, which may crash beside TensorFlow, and the imports take longer than the answers.
"""

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ANSWER = "answer: "


def ask(script: str, request: Any) -> Any:
    """Put a request, JSON data, to a script beside this one, and return what it answers."""
    process = _process(script)
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    _process.cache_clear()
    raise RuntimeError(f"{script} failed on {request}: exit code {process.wait()}")


@functools.cache
def _process(script: str) -> "subprocess.Popen[str]":
    """It ends when its input does, with this process."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name(script))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the requests of `ask`, in the script."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(json.loads(line))), flush=True)
