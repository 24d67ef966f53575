"""Reading JSON files of others."""

import json
import pathlib
from typing import Any

from gemma_keras_tune.errors import GemmaTuneError


def read_json_object(
    path: pathlib.Path, error: type[GemmaTuneError], next_step: str = ""
) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Args:
        path: The file.
        error: The class of the error to raise.
        next_step: What its message tells the reader to do.

    Returns:
        The object.

    Raises:
        GemmaTuneError: As `error`: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
        problem = f"it must hold a JSON object. Received: {type(data).__name__}"
    except OSError as cause:
        problem = str(cause)
    except (ValueError, RecursionError) as cause:
        problem = f"it is not valid JSON: {cause}"
    raise error(f"{path} cannot be read: {problem}", next_step=next_step)
