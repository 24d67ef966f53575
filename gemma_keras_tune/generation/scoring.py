"""Logits and log-likelihoods of given tokens, at the positions that are asked for and no others.

One compiled program serves the base and the tuned model: weights are arguments of it, and LoRA that
is switched off counts as zero, as in `generation`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras_tune.adapters.lora import lora_switched
from gemma_keras_tune.gemma.attention import keep_soft_cap
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import backbone_inputs, family_of
from gemma_keras_tune.gemma.head import soft_capped
from gemma_keras_tune.gemma.state import model_lock
from gemma_keras_tune.gemma.templates import Segment
from gemma_keras_tune.generation.answers import values_of

# Rows are padded to a multiple of the first, and the positions of a row to one of the second, so
# that few programs are compiled.
LENGTH_STEP = 32
POSITION_STEP = 16
# Positions whose logits are in memory at once: 16 times 262,144 float32 are 16 MB.
BLOCK = 16

Batch = dict[str, np.ndarray]
Readout = Callable[[Any, Any], Any]


class Scorer:
    """Reads logits and log-likelihoods from a model, a batch at a time.

    Attributes:
        programs: Number of programs compiled so far.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor.
    """

    def __init__(self, model: keras.Model) -> None:
        keep_soft_cap(model.backbone)
        self.model = model
        self.encoder = RowTokenizer(model.preprocessor.tokenizer)
        self.programs = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenize rows of text pieces; pieces marked as trained are the ones to score.

        Args:
            rows: The segments of each row.

        Returns:
            For each row `ids` int32 and `scored` bool, both `[tokens]`.
        """
        return [self.encoder.encode(row) for row in rows]

    def losses(
        self, rows: Sequence[tuple[np.ndarray, np.ndarray]], *, batch_size: int = 8
    ) -> list[np.ndarray]:
        """Compute the negative log-likelihood of tokens, given all tokens before them.

        Args:
            rows: `ids` and `scored` of each row, as `encode` gives them.
            batch_size: Rows that run at once.

        Returns:
            For each row `[scored tokens]` float32, in nats.
        """
        ids = [row for row, _ in rows]
        positions = [np.flatnonzero(scored) - 1 for _, scored in rows]
        labels = [row[at + 1] for row, at in zip(ids, positions, strict=True)]
        batch_size = min(batch_size, max(len(rows), 1))
        found = self._read("losses", _losses, ids, positions, batch_size, labels)
        return [np.asarray(losses) for losses in found]

    def next_logits(
        self, rows: Sequence[np.ndarray], token_ids: Sequence[int], *, batch_size: int = 8
    ) -> np.ndarray:
        """Compute the logits of a few tokens as the next one of each row.

        Args:
            rows: Token ids of each row, `<bos>` first.
            token_ids: The tokens whose logits are wanted.
            batch_size: Rows that run at once.

        Returns:
            `[rows, token_ids]` float32.
        """
        last = [np.array([len(row) - 1]) for row in rows]
        wanted = [np.broadcast_to(np.asarray(token_ids), (1, len(token_ids)))] * len(rows)
        found = self._read("next", _chosen, rows, last, batch_size, wanted)
        return np.reshape(found, (len(rows), len(token_ids)))

    def top_logits(
        self,
        rows: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        count: int,
        *,
        batch_size: int = 8,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Find the largest next-token logits at some positions of each row.

        Args:
            rows: Token ids of each row, `<bos>` first.
            positions: Positions of each row, `[positions]` integers; the logits at a position are
                those of the token after it.
            count: Logits to find at each position.
            batch_size: Rows that run at once.

        Returns:
            For each row token ids int32 and logits float32, both `[positions, count]`, the largest
            logit first.
        """

        def largest(logits: Any, _: Any) -> Any:
            values, tokens = ops.top_k(logits, count)
            return ops.cast(tokens, "int32"), values

        return self._read(("top", count), largest, rows, positions, batch_size, positions)

    def _read(
        self,
        name: Any,
        readout: Readout,
        rows: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        batch_size: int,
        wanted: Sequence[np.ndarray],
    ) -> list[Any]:
        """Read something from the logits at some positions of each row."""
        import jax

        program = self._compiled.setdefault(name, jax.jit(self._program(readout)))
        backbone = self.model.backbone
        found: list[Any] = [None] * len(rows)
        for batch, x in self._batches(rows, positions, wanted, batch_size):
            with model_lock(self.model):
                trainable = values_of(self.model, backbone.trainable_variables)
                fixed = values_of(self.model, backbone.non_trainable_variables)
                with lora_switched(self.model, on=True):
                    out = jax.tree.map(np.asarray, program(trainable, fixed, x))
            for place, row in enumerate(batch):
                count = len(positions[row])
                found[row] = jax.tree.map(lambda a, i=place, n=count: a[i, :n], out)
        return found

    def _batches(
        self,
        rows: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        size: int,
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield the indices of rows of similar length and their padded arrays."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            length = _round_up(max(len(rows[i]) for i in batch), LENGTH_STEP)
            width = _round_up(max(len(positions[i]) for i in batch), POSITION_STEP)
            x = {
                "token_ids": np.full((size, length), self.encoder.pad_id, np.int32),
                "padding_mask": np.zeros((size, length), np.int32),
                "positions": np.zeros((size, width), np.int32),
                "wanted": np.zeros((size, width, *wanted[batch[0]].shape[1:]), np.int32),
            }
            x["padding_mask"][:, 0] = 1
            for place, i in enumerate(batch):
                x["token_ids"][place, : len(rows[i])] = rows[i]
                x["padding_mask"][place, : len(rows[i])] = 1
                x["positions"][place, : len(positions[i])] = positions[i]
                x["wanted"][place, : len(positions[i])] = wanted[i]
            yield batch, x

    def _program(self, readout: Readout) -> Callable[..., Any]:
        import jax

        backbone = self.model.backbone
        variables = [*backbone.trainable_variables, *backbone.non_trainable_variables]

        def program(trainable: Any, fixed: Any, x: Any) -> Any:
            self.programs += 1  # while it is traced, and so once for each program
            inputs = backbone_inputs(backbone, x["token_ids"], x["padding_mask"])
            hidden, _ = backbone.stateless_call(trainable, fixed, inputs, training=False)
            hidden = ops.take_along_axis(hidden, x["positions"][..., None], axis=1)
            values = list(zip(variables, [*trainable, *fixed], strict=True))

            def at(position: Any) -> Any:
                with keras.StatelessScope(state_mapping=values):
                    return readout(self._logits(position[0]), position[1])

            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (hidden, x["wanted"]))
            found = jax.lax.map(at, flat, batch_size=BLOCK)
            shape = x["positions"].shape
            return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)

        return program

    def _logits(self, hidden: Any) -> Any:
        """Compute the capped logits `[vocabulary]` float32 of one hidden state `[width]`."""
        import jax.numpy as jnp

        head = family_of(self.model).head(self.model)
        if not head.is_floating:
            return ops.cast(head.logits(hidden[None, None])[0, 0], "float32")
        embedding = ops.cast(head.embedding, hidden.dtype)
        logits = jnp.einsum("d,vd->v", hidden, embedding, preferred_element_type="float32")
        return soft_capped(logits, head.soft_cap)


def _losses(logits: Any, label: Any) -> Any:
    return ops.logsumexp(logits) - ops.take(logits, label)


def _chosen(logits: Any, token_ids: Any) -> Any:
    return ops.take(logits, token_ids)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
