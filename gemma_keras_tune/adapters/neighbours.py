"""What a folder is that does not hold what was asked for, and which folder near it was meant."""

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT = re.compile(r"(?:checkpoint|global_step|epoch|step)[-_]?(\d+)")
# Files that trainers write beside the weights, to go on from there.
_TRAINER = ("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt")
# Files in which DeepSpeed and FSDP keep weights in parts.
_IN_PARTS = ("*.distcp", "*_model_states.pt", "zero_pp_rank_*", "zero_to_fp32.py")
_DEEPEST, _MOST = 3, 200


def what_was_meant(folder: pathlib.Path, wanted: str) -> str | None:
    """Say what a folder holds instead of a model or an adapter, or where one is.

    Args:
        folder: A folder that does not hold what is wanted.
        wanted: `"model"` or `"adapter"`.

    Returns:
        A sentence with the next step; `None` where nothing near is either.
    """
    other = "adapter" if wanted == "model" else "model"
    if _HOLDS[other](folder):
        return f"It is {_described(folder, other)}: {_use(folder, other)}"
    if any(next(folder.glob(pattern), None) for pattern in _IN_PARTS):
        return (
            "It is a checkpoint of DeepSpeed or FSDP, whose weights are in parts: put them "
            "together with its `zero_to_fp32.py` or `accelerate merge-weights`, and save them as "
            "safetensors."
        )
    for kind in (wanted, other):
        found = next((place for place in _below(folder) if _HOLDS[kind](place)), None)
        if found is not None:
            return f"{found} is {_described(found, kind)}: {_use(found, kind)}"
    above = folder.parent
    for kind in (wanted, other):
        if _HOLDS[kind](above):
            return f"The folder above is {_described(above, kind)}: {_use(above, kind)}"
    if _is_of_trainer(folder):
        return "It is the folder of a trainer, without weights: pass one of its checkpoints."
    return None


def named_base(folder: pathlib.Path) -> str | None:
    """Return the base that the adapter in a folder names, if it does."""
    try:
        config = read_json_object(folder / ADAPTER_CONFIG, AdapterError)
    except AdapterError:
        return None
    base = config.get("base_model_name_or_path") or config.get("model")
    return base if isinstance(base, str) and base else None


def _described(folder: pathlib.Path, kind: str) -> str:
    what = "an adapter" if kind == "adapter" else "a model"
    return f"{what}, the checkpoint of a trainer" if _is_of_trainer(folder) else what


def _use(folder: pathlib.Path, kind: str) -> str:
    if kind == "model":
        return f"pass it to `load`: {folder}"
    base = named_base(folder)
    named = f", {base}," if base else ""
    return f"load its base model{named} then `load_adapter(model, {str(folder)!r})`."


def _is_adapter(folder: pathlib.Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _is_model(folder: pathlib.Path) -> bool:
    weights = ("*.safetensors", "*.weights.h5", "*.weights.json", "*.bin")
    configured = (folder / "config.json").is_file() and not _is_adapter(folder)
    return configured and any(next(folder.glob(pattern), None) for pattern in weights)


_HOLDS: dict[str, Callable[[pathlib.Path], bool]] = {"adapter": _is_adapter, "model": _is_model}


def _is_of_trainer(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in _TRAINER)


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders in a folder, the nearest first, and of checkpoints the last one first."""
    level, seen = [folder], 0
    for _ in range(_DEEPEST):
        level = [inner for place in level for inner in _inner(place)][:_MOST]
        seen += len(level)
        yield from level
        if seen > _MOST:
            return


def _inner(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []
    return sorted(folders, key=_order)


def _order(folder: pathlib.Path) -> Any:
    found = _CHECKPOINT.fullmatch(folder.name)
    return (0, -int(found[1]), "") if found else (1, 0, folder.name)
