"""An Orbax checkpoint written array by array, so that few of them are in memory at once.

Orbax takes a tree whose arrays are all there, but leaves the writing to a handler for the type of
its leaves. Here the leaves are names, and their handler takes the arrays from an iterator, gives
Orbax's own handler some of them, and asks for more when these are on the disk.
"""

import asyncio
import concurrent.futures
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from orbax import checkpoint
from orbax.checkpoint import type_handlers

# Bytes gathered for one write, and bytes of one file. A larger array is cut into chunks: each is
# compressed as a whole, and what is compressed waits in memory until a file is full.
_AT_ONCE = 2**26


def save(
    folder: pathlib.Path, tree: dict[str, Any], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write a tree of arrays that `orbax.checkpoint.StandardCheckpointer` reads.

    Args:
        folder: The folder to make.
        tree: Dictionaries in dictionaries, with names as leaves.
        arrays: Every name with its array, in any order. An array is let go once it is written.

    Raises:
        ValueError: A name has no array.
    """
    registry = type_handlers.create_type_handler_registry(
        (str, _InTurn(arrays)),
        # None is written, but Orbax warns where there is no handler for them.
        (jax.Array, type_handlers.get_type_handler(jax.Array)),
    )
    handler = checkpoint.PyTreeCheckpointHandler(type_handler_registry=registry)
    with checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            folder.absolute(),
            args=checkpoint.args.PyTreeSave(tree, ocdbt_target_data_file_size=_AT_ONCE),
        )


class _InTurn(type_handlers.TypeHandler):
    """Takes names for NumPy arrays."""

    def __init__(self, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        self._arrays = arrays
        self._numpy = _numpy_handler()

    def typestr(self) -> str:
        """Type of the leaves that the checkpoint records."""
        return self._numpy.typestr()

    async def serialize(
        self, values: Sequence[str], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Write the arrays of these names; when this returns, all are on the disk."""
        args = args or [checkpoint.SaveArgs()] * len(values)
        places = {name: place for name, *place in zip(values, infos, args, strict=True)}
        for batch in _batches(self._arrays):
            where, how = zip(*(places.pop(name) for name in batch), strict=True)
            for writing in await self._numpy.serialize(list(batch.values()), where, how):
                _finish(writing)
            await asyncio.sleep(0)  # here Orbax stops its loop when a notebook is interrupted
        if places:
            raise ValueError(f"There are no arrays for {sorted(places)}.")
        return []

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """The arrays, as Orbax reads them."""
        return await self._numpy.deserialize(infos, args)

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Their shapes, as Orbax tells them."""
        return await self._numpy.metadata(infos)


def _numpy_handler() -> Any:
    try:
        # Nobody changes the arrays while they are written: no need for copies.
        return type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    except TypeError:  # Orbax before 0.12.5 has no such choice
        return type_handlers.NumpyHandler()


def _batches(arrays: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Some arrays at a time; they are let go when the next are asked for."""
    batch: dict[str, np.ndarray] = {}
    for name, array in arrays:
        batch[name] = array
        del array
        if sum(array.nbytes for array in batch.values()) >= _AT_ONCE:
            yield batch
            batch.clear()
    if batch:
        yield batch


def _finish(writing: Any) -> None:
    """Wait to the end, also when interrupted: nobody may write while the folder is removed."""
    # Orbax joins a thread. Before Python 3.13, one whose join was interrupted counts as ended: so
    # a thread that nothing interrupts does the waiting, and the block ends when it does.
    with concurrent.futures.ThreadPoolExecutor(1) as waiting:
        waiting.submit(writing.result).result()
