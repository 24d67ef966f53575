"""How much memory something takes, on Linux."""

import ctypes
import gc
import os
import pathlib
import threading
import time


class PeakMemory:
    """The largest resident memory of this process while something runs, beyond what it had."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
        self._done = threading.Event()
        self._before = self.peak = _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._begin = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *args: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self._done.set()
        self._thread.join()
        self.grown = self.peak - self._before


def _resident() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
