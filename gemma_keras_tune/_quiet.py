"""Keeps TensorFlow's start-up lines off the screen."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Hold back what native code writes to standard error; show it if the import fails.

    TensorFlow 2.21 logs before its log level is read, so no setting silences it.

    Yields:
        Nothing.
    """
    try:
        there = os.dup(2)
    except OSError:
        yield
        return
    with tempfile.TemporaryFile() as held:
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
