"""Keeps what native code logs as it starts off the screen."""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

# Two threads would each take the other's place for the real one. Within one thread it may nest.
_lock = threading.RLock()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what is written to standard error; show it if there is an exception.

    TensorFlow 2.21 logs before its log level is read, and its SentencePiece logs at any level, so
    no setting silences them.

    Yields:
        Nothing.
    """
    with _lock, tempfile.TemporaryFile() as held:
        try:
            there = os.dup(2)
        except OSError:
            yield
            return
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(there, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(there, 2)
            os.close(there)
