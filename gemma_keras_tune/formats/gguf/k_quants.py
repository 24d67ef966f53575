"""K-quants, made by llama.cpp's program `llama-quantize`.

Rows that are no multiple of 256 values, as most of Gemma 3 270M are, it writes in a kind for rows
of 32.
"""

import pathlib
import shutil
import subprocess

from gemma_keras_tune.errors import ExportError

K_QUANTS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip

_PROGRAM = "llama-quantize"
# Seconds: far more than the largest Gemma takes.
_TIMEOUT = 6 * 3600
_LAST_LINES = 8


def find_quantizer() -> str:
    """Find llama.cpp's quantizer.

    Returns:
        Path of the program.

    Raises:
        ExportError: It is not on the PATH.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise ExportError(
            f"K-quants are made by llama.cpp's program {_PROGRAM}, which is not on the PATH.",
            next_step="Install llama.cpp: `brew install llama.cpp`, `conda install -c conda-forge "
            "llama.cpp`, `winget install llama.cpp`, or a release of "
            "https://github.com/ggml-org/llama.cpp. Without it there are 'Q8_0' and 'Q4_0'.",
        )
    return program


def quantize(program: str, source: pathlib.Path, target: pathlib.Path, quantization: str) -> None:
    """Write a GGUF file in a K-quant.

    Args:
        program: From `find_quantizer`.
        source: A GGUF file in floats.
        target: The file to make.
        quantization: One of `K_QUANTS`.

    Raises:
        ExportError: The quantizer fails.
    """
    command = [program, str(source), str(target), quantization]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{_PROGRAM} took more than {_TIMEOUT:,} seconds.") from error
    except OSError as error:
        raise ExportError(f"{program} cannot be run: {error}") from error
    if done.returncode or not target.is_file():
        text = (done.stdout + done.stderr).decode(errors="replace")
        code = f"it ended with exit code {done.returncode}"
        raise ExportError(
            f"{_PROGRAM} could not write {quantization}.",
            text.strip().splitlines()[-_LAST_LINES:] or [code],
            "Export 'Q8_0' or 'Q4_0', which need no quantizer.",
        )
