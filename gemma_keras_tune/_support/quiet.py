"""Hide the log lines that native code writes when it is imported, and nothing else."""

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

# Two threads would each take the other's descriptor for the real one. One thread may nest it.
_lock = threading.RLock()
# Lines of no interest: of level INFO, in TensorFlow's, absl's and SentencePiece's form, and what
# TensorFlow says where JAX has taken the GPU, or the CPU can do more than it was built for.
_NOISE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\)"
    rb"|I\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: I |\S+\.cc\(\d+\) LOG\(INFO\)"
    rb"|To enable the following instructions:"
    rb"|.*Unable to register cu\w+ factory|.*computation placer already registered"
    rb"|.*TF-TRT Warning: Could not find TensorRT"
)


_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Silence the log of TensorFlow while it is imported, but no warning of JAX or Keras.

    These two are imported first: JAX then warns of plugins that it will not use. TensorFlow reads
    its log level once, at its import; the environment is restored afterwards.

    Yields:
        Nothing.
    """
    chosen = _LEVEL in os.environ  # by the user: JAX's import sets it for itself
    import jax  # noqa: F401
    import keras  # noqa: F401

    before = os.environ.get(_LEVEL)
    if not chosen:
        os.environ[_LEVEL] = "3"
    try:
        with quiet_stderr():
            yield
    finally:
        os.environ.pop(_LEVEL, None)
        if before is not None:
            os.environ[_LEVEL] = before


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back the output of native code to standard error, and write it without the noise later.

    TensorFlow 2.21 logs before its log level is read, and its SentencePiece logs at any level, so
    no setting silences them. The output of Python, such as warnings, is written at once. After an
    exception the noise is written too.

    Yields:
        Nothing.
    """
    with _lock, tempfile.TemporaryFile() as held:
        try:
            there = os.dup(2)
        except OSError:
            yield
            return
        failed = True
        try:
            with _python_writes_to(there):
                os.dup2(held.fileno(), 2)
                yield
            failed = False
        finally:
            os.dup2(there, 2)
            os.close(there)
            held.seek(0)
            os.write(2, b"".join(line for line in held if failed or not _NOISE.match(line)))


@contextlib.contextmanager
def _python_writes_to(descriptor: int) -> Iterator[None]:
    """Let `sys.stderr` write to another descriptor, if it writes to descriptor 2."""
    before = sys.stderr
    try:
        native = before is not None and before.fileno() == 2
    except (AttributeError, OSError, ValueError):  # a notebook's, or closed
        native = False
    if not native:
        yield
        return
    before.flush()
    with (
        open(descriptor, "w", 1, before.encoding, "backslashreplace", closefd=False) as direct,
        contextlib.redirect_stderr(direct),
    ):
        yield
