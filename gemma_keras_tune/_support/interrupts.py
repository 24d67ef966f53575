"""Ctrl-C: held back while something must not be left half done, and certain to end a program.

Python raises `KeyboardInterrupt` between two instructions of the main thread. So it may come
between two assignments that belong together; it does not come while native code runs, such as a
compilation of minutes; and code that ignores exceptions, as in some imports, may lose it.
"""

import contextlib
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gemma_keras_tune._support.files import remove_unfinished

# The exit code of a program that SIGINT ended, as a shell has it.
EXIT_CODE = 130
# Seconds from the signal to the end of a program that does not end by itself.
GRACE = 0.7


def _nothing() -> None:
    pass


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the block ends; a second one is raised at once.

    Does nothing in other threads, within another such block, and where the program has its own
    handler of the signal.

    Yields:
        A function that raises the interrupt, if there was one.

    Raises:
        KeyboardInterrupt: At the end, if there was an interrupt and no other exception.
    """
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            signal.default_int_handler(number, frame)
        held.append(number)

    def raise_held() -> None:
        if held:
            held.clear()
            raise KeyboardInterrupt

    if not _is_default():
        yield _nothing
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield raise_held
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_held()


def _is_default() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Ending:
    """The end of a program by Ctrl-C.

    Within `unwinding` an interrupt is a `KeyboardInterrupt`, so that what is half done is undone;
    outside, and where that takes longer than `GRACE`, the process ends at once. For programs: a
    library must not end the process that it is used in.
    """

    def __init__(self) -> None:
        self._unwinds = False
        self._telling = threading.Lock()
        self._told = False
        self._installed = False
        self._stderr = 2
        self._words: Callable[[], str] | None = None

    def install(self) -> None:
        """Take over SIGINT for the rest of the process; where it is ignored, it stays ignored."""
        if not _is_default():
            return
        self._installed = True
        self._stderr = os.dup(2)  # which imports of native code redirect
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        # Python writes the number of each signal there at once, whatever the main thread does.
        signal.set_wakeup_fd(pythons.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._on_signal)
        threading.Thread(target=self._watch, args=(ours,), daemon=True).start()

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """Raise `KeyboardInterrupt` in the block, which must let it through."""
        self._unwinds, self._words, self._told = True, None, False
        try:
            yield
        finally:
            self._unwinds = False

    def say(self, words: Callable[[], str]) -> None:
        """Set the message of an interrupt from now on."""
        self._words = words

    def end(self) -> int:
        """End the process, once what was half done is undone.

        Returns:
            The exit code, where SIGINT was not taken over.
        """
        self._tell()
        if self._installed:  # else Python would first tidy up, for seconds
            sys.stdout.flush()
            os._exit(EXIT_CODE)
        return EXIT_CODE

    def _tell(self) -> None:
        """Write the message to standard error, once, past the locks of `sys.stderr`."""
        with self._telling:
            if not self._told:
                self._told = True
                words = "interrupted" if self._words is None else self._words()
                os.write(self._stderr, f"\n{words}\n".encode())

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._unwinds:
            raise KeyboardInterrupt

    def _watch(self, signals: socket.socket) -> None:
        while signal.SIGINT not in signals.recv(64):
            pass
        if self._unwinds:
            time.sleep(GRACE)
        try:
            self._tell()
            remove_unfinished()
        finally:
            os._exit(EXIT_CODE)


ENDING = Ending()


def runs_as_program(name: str) -> bool:
    """Tell whether the process runs a package as a program, by its arguments.

    Args:
        name: The package, whose script has dashes in place of underlines.
    """
    # While Python looks for the module to run, it is called "-m".
    first = sys.argv[0] if sys.argv else ""
    if first == "-m":
        return f"-m {name}" in " ".join(sys.orig_argv)
    return pathlib.PurePath(first).name == name.replace("_", "-")
