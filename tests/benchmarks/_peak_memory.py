"""How much memory something takes, on Linux."""

import ctypes
import gc
import os
import pathlib
import threading
import time


class PeakMemory:
    """The largest resident memory of this process while something runs, beyond what it had.

    Args:
        own: Leave out pages of files, which the system can take back.
    """

    def __init__(self, *, own: bool = False) -> None:
        self._own = own

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
        self._done = threading.Event()
        self._before = self.peak = _resident(self._own)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._begin = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _resident(self._own))

    def __exit__(self, *args: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self._done.set()
        self._thread.join()
        self.grown = self.peak - self._before


def _resident(own: bool) -> int:
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    pages = int(fields[1]) - own * int(fields[2])
    return pages * os.sysconf("SC_PAGE_SIZE")
