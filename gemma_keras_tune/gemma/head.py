"""The output head of a Gemma: logits of hidden states, by the tied and soft-capped embedding.

Whatever needs logits, of all tokens or of a few, asks `Head`: losses, decoding, scoring, receipts.
"""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from gemma_keras_tune.errors import GemmaTuneError


def soft_capped(logits: Any, cap: float | None) -> Any:
    """Bend logits to `cap * tanh(logits / cap)`, as in Gemma 2 (arXiv:2408.00118, section 2).

    Args:
        logits: Logits of any shape.
        cap: The cap, or `None` to leave them as they are.

    Returns:
        The logits, in their dtype.
    """
    return soft_capped_and_slope(logits, cap)[0]


def soft_capped_and_slope(logits: Any, cap: float | None) -> tuple[Any, Any | None]:
    """Bend logits as `soft_capped` does, and give the derivative too.

    Args:
        logits: Logits of any shape.
        cap: The cap, or `None`.

    Returns:
        The logits, and the slope of the cap at each; `None` without a cap.
    """
    if cap is None:
        return logits, None
    bent = ops.tanh(logits / cap)
    return bent * cap, 1.0 - bent * bent


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head.

    Attributes:
        embedding: `[vocabulary, width]` variable, tied with the input embedding.
        soft_cap: Soft cap on the logits, or `None`.
        layer: The Keras layer of the embedding.
    """

    embedding: keras.Variable
    soft_cap: float | None
    layer: Any

    @property
    def is_floating(self) -> bool:
        """Tell whether the embedding is of floating point: one that Keras quantized is not."""
        return bool(keras.backend.is_float_dtype(str(self.embedding.dtype)))

    def check_floating(self, error: type[GemmaTuneError]) -> None:
        """Refuse an embedding that Keras has quantized: a loss of its integers would be wrong.

        Args:
            error: The class of the error to raise.
        """
        if not self.is_floating:
            raise error(
                "The output embedding must be of floating point, or all logits would be wrong. "
                f"Received: one that is quantized ({self.embedding.dtype})",
                next_step="Load the base anew and quantize it without its embedding, such as "
                "`model.backbone.quantize('int8', filters=lambda layer: 'embedding' not in "
                "layer.name)`.",
            )

    def logits(self, hidden: Any) -> Any:
        """Compute the logits of the whole vocabulary as the model itself does.

        The layer multiplies, so that an embedding that Keras has quantized is used as it is.

        Args:
            hidden: `[..., width]` hidden states after the final norm.

        Returns:
            `[..., vocabulary]` capped logits in the layer's compute dtype.
        """
        if not hasattr(self.layer, "logit_soft_cap"):  # a plain embedding, as in Gemma 3n
            weights = ops.cast(self.embedding, hidden.dtype)
            return soft_capped(ops.matmul(hidden, ops.transpose(weights)), self.soft_cap)
        logits = self.layer(hidden, reverse=True)
        return logits if self.layer.logit_soft_cap else soft_capped(logits, self.soft_cap)

    def token_logits(self, hidden: Any, token_ids: Any, embedding: Any = None) -> Any:
        """Compute the logits of a few tokens, in float32.

        Args:
            hidden: `[positions, width]` hidden states after the final norm.
            token_ids: `[tokens]` integer ids.
            embedding: Values of the embedding in a traced program; by default the variable's.

        Returns:
            `[positions, tokens]` float32.
        """
        rows = ops.take(self.embedding if embedding is None else embedding, token_ids, axis=0)
        rows = ops.cast(rows, "float32")
        logits = ops.matmul(ops.cast(hidden, "float32"), ops.transpose(rows))
        return soft_capped(logits, self.soft_cap)

    def largest(self, hidden: Any, known: Any = None) -> Any:
        """Find the first token of the largest logit, faster than through `logits` on a CPU.

        There this takes the largest part of a decoding step. The embedding times the hidden states,
        in this order, takes two thirds of the time of the other order; and finding the largest
        block of the vocabulary before the place in it takes a tenth of XLA's own argmax over a long
        axis.

        Args:
            hidden: `[positions, width]` hidden states after the final norm.
            known: `[vocabulary]` bool, the tokens that may be found; `None`: all.

        Returns:
            `[positions]` int32 token ids.
        """
        weights = ops.cast(self.embedding, hidden.dtype)
        logits = soft_capped(ops.matmul(weights, ops.transpose(hidden)), self.soft_cap)
        if known is not None:
            logits = ops.where(known[:, None], logits, -math.inf)
        vocabulary, rows = logits.shape
        width = math.gcd(vocabulary, 4096)
        blocks = ops.reshape(logits, (vocabulary // width, width, rows))
        block = ops.argmax(ops.max(blocks, axis=1), axis=0)
        best = blocks[block, :, ops.arange(rows)]
        return ops.cast(block * width + ops.argmax(best, axis=-1), "int32")
