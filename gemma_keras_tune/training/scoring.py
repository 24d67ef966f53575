"""How probable a model finds given tokens, with the logits of no other position.

One compiled program serves the base and the tuned model: weights are arguments of it, and LoRA that
is switched off counts as zero, as in `family`.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras_tune.adapters.lora import lora_switched
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import backbone_inputs, family_of
from gemma_keras_tune.gemma.state import model_lock
from gemma_keras_tune.gemma.templates import Segment
from gemma_keras_tune.generation.answers import values_of
from gemma_keras_tune.training.losses import token_cross_entropy
from gemma_keras_tune.training.pipeline import Batcher, TokenizedPairs, choose_shapes

# So that few shapes are compiled, prompts are padded to one of these lengths, or a multiple of the
# last, and rows to score have so many shapes at most.
LENGTHS = (16, 32, 64)
MAX_SHAPES = 2


class Scorer:
    """Reads token probabilities from a model, a batch at a time.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor.

    Raises:
        EvaluationError: The model's embedding is quantized.
    """

    def __init__(self, model: keras.Model) -> None:
        import jax

        self.model = model
        self.encoder = RowTokenizer(model.preprocessor.tokenizer)
        self.programs = 0
        head = family_of(model).head(model)
        head.check_floating(EvaluationError)
        self._soft_cap = head.soft_cap
        self._losses = jax.jit(self._token_losses)
        self._logits = jax.jit(self._token_logits)

    def encode(self, rows: Sequence[Sequence[Segment]]) -> TokenizedPairs:
        """Token ids of rows of text pieces; those marked as trained are the ones to score.

        Args:
            rows: The segments of each row.

        Returns:
            `TokenizedPairs`.
        """
        ids, trained, counts = self.encoder.encode_rows(rows)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return TokenizedPairs(ids, trained, offsets, np.arange(1, len(rows) + 1))

    def losses(self, tokens: TokenizedPairs, *, batch_size: int = 8) -> list[np.ndarray]:
        """Negative log-likelihoods of the tokens to score, given all before them.

        Args:
            tokens: The rows, as from `encode` or `tokenize_pairs`.
            batch_size: Rows that run at once.

        Returns:
            For each row, in order, `[tokens]` float32, in nats.
        """
        shapes = choose_shapes(
            tokens.lengths, tokens.response_lengths, batch_size, max_shapes=MAX_SHAPES
        )
        batcher = Batcher(tokens, shapes, self.encoder.pad_id, shuffle=False)
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(tokens)
        for (_, rows), (x, y, _) in zip(batcher.epoch(0), batcher.arrays(0), strict=True):
            losses = self._run(self._losses, x, y)
            ends = np.cumsum(tokens.response_lengths[rows])
            for row, part in zip(rows, np.split(losses, ends), strict=False):
                found[row] = part
        return found

    def next_logits(
        self, rows: Sequence[np.ndarray], token_ids: Sequence[int], *, batch_size: int = 8
    ) -> np.ndarray:
        """Logits of a few tokens as the next one of each row.

        Args:
            rows: Token ids of each row, `<bos>` first.
            token_ids: The tokens asked about.
            batch_size: Rows that run at once.

        Returns:
            `[rows, token_ids]` float32.
        """
        found = np.zeros((len(rows), len(token_ids)), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            x = self._pad([rows[i] for i in batch], batch_size)
            found[batch] = self._run(self._logits, x, np.asarray(token_ids))[: len(batch)]
        return found

    def _pad(self, rows: Sequence[np.ndarray], size: int) -> dict[str, np.ndarray]:
        length = _round_up(max(map(len, rows)))
        ids = np.full((size, length), self.encoder.pad_id, np.int32)
        mask = np.zeros((size, length), np.int32)
        mask[:, 0] = 1
        positions = np.arange(size, dtype=np.int32) * length
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
            positions[place] += len(row) - 1
        return {"token_ids": ids, "padding_mask": mask, "positions": positions}

    def _run(self, program: Any, x: dict[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
        backbone = self.model.backbone
        with model_lock(self.model):
            trainable = values_of(self.model, backbone.trainable_variables)
            fixed = values_of(self.model, backbone.non_trainable_variables)
            embedding = family_of(self.model).head(self.model).embedding
            with lora_switched(self.model, on=True):
                return np.asarray(program(trainable, fixed, embedding.value, x, labels))

    def _hidden(self, trainable: Any, fixed: Any, x: Any) -> Any:
        self.programs += 1  # while it is traced, and so once for each program
        backbone = self.model.backbone
        inputs = backbone_inputs(backbone, x["token_ids"], x["padding_mask"])
        hidden, _ = backbone.stateless_call(trainable, fixed, inputs, training=False)
        return ops.take(ops.reshape(hidden, (-1, hidden.shape[-1])), x["positions"], axis=0)

    def _token_losses(self, trainable: Any, fixed: Any, embedding: Any, x: Any, labels: Any) -> Any:
        hidden = self._hidden(trainable, fixed, x)
        embedding = ops.cast(embedding, hidden.dtype)
        return token_cross_entropy(hidden, embedding, labels, soft_cap=self._soft_cap).losses

    def _token_logits(self, trainable: Any, fixed: Any, embedding: Any, x: Any, ids: Any) -> Any:
        hidden = ops.cast(self._hidden(trainable, fixed, x), "float32")
        rows = ops.cast(ops.take(embedding, ids, axis=0), "float32")
        logits = ops.matmul(hidden, ops.transpose(rows))
        if self._soft_cap is None:
            return logits
        return ops.tanh(logits / self._soft_cap) * self._soft_cap


def _round_up(tokens: int) -> int:
    last = LENGTHS[-1]
    return next((n for n in LENGTHS if tokens <= n), math.ceil(tokens / last) * last)
