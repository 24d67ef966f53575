"""Sources of rows: any of them becomes `Rows`, with a bounded number of rows in memory."""

from gemma_keras_tune.pairs.sources.opening import open_source
from gemma_keras_tune.pairs.sources.rows import Broken, Keys, Rows, at_start

__all__ = ["Broken", "Keys", "Rows", "at_start", "open_source"]
