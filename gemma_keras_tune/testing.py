"""Tiny Gemma models, tokenizers and pairs, for fast tests without downloads.

Every family's real KerasHub classes are used; only the sizes are small and the weights are
random. A tuned tiny model learns its pairs by heart, but says nothing sensible about anything else.
"""

import functools
import io
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.memory import compute_on_the_calling_thread, share_arena
from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma import building, families
from gemma_keras_tune.gemma.tools import TOOL_FORMATS

FAMILIES = tuple(families.FAMILIES)

_TEXT = """\
Tuning takes a few dozen pairs of a prompt and its answer, and a model that was trained before.
The part number for a brake caliper is listed under the order code in the catalogue.
Please send two boxes of bread, three cakes and one dozen rolls to the shop on Friday.
What is the capital of France? Paris. What is the capital of Italy? Rome.
{"type": "order", "items": [{"name": "bread", "quantity": 2}]}
def add(a, b):\n    return a + b
Grüße aus Köln, ça va bien, ¿qué tal?, 你好, мир, 😀 and more words to learn from.
0 1 2 3 4 5 6 7 8 9 user model system question answer input output yes no
"""

# Only <pad> 0, <eos> 1, <bos> 2 and <unk> 3 have the same ids in all real tokenizers.
_SPECIAL_PIECES = (
    "<mask>",
    "[multimodal]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|turn>",
    "<turn|>",
    "<img>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_audio>",
    "<end_of_audio>",
    "<audio_soft_token>",
    "<|image>",
    "<|image|>",
    "<image|>",
    "<|audio>",
    "<|audio|>",
    "<audio|>",
    "<|video>",
    "<|video|>",
    "<video|>",
    *("\n" * n for n in range(1, 4)),
    *("▁" * n for n in range(2, 6)),
)
_TOOL_MARKS = tuple(mark for form in TOOL_FORMATS.values() for mark in form.marks)


@functools.cache
def tiny_tokenizer_proto(more: tuple[str, ...] = ()) -> bytes:
    """Train a SentencePiece model of 600 pieces with the special tokens of every Gemma family.

    Built like Gemma's own: BPE with byte fallback, no normalisation, no dummy prefix, and
    `<pad>`, `<eos>`, `<bos>`, `<unk>` at ids 0 to 3.

    Args:
        more: Further special tokens, which are pieces beyond the 600.

    Returns:
        The serialized SentencePiece model.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        vocab_size=600 + len(more),
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=[*_SPECIAL_PIECES, *more],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_tokenizer(family: str = "gemma3") -> keras.layers.Layer:
    """Build a KerasHub tokenizer of a family over `tiny_tokenizer_proto()`.

    Args:
        family: One of `FAMILIES`.

    Returns:
        A `keras_hub.tokenizers` tokenizer layer.

    Raises:
        LoadError: There is no such family.
    """
    return building.tokenizer(_family(family), tiny_tokenizer_proto())


def tiny_model(
    family: str = "gemma3",
    *,
    seed: int = 0,
    moe: bool = False,
    tools: bool = False,
    sequence_length: int = 64,
    **overrides: Any,
) -> keras.Model:
    """Build a random KerasHub `CausalLM` of a Gemma family with a few thousand parameters.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the random weights. Norm scales are random too, so that a wrong norm
            convention shows.
        moe: With `family="gemma4"`, a mixture of experts in every block.
        tools: True for a tokenizer with the marks for tools of FunctionGemma and Gemma 4.
        sequence_length: The preprocessor's sequence length, in tokens.
        **overrides: Backbone arguments to change, for example `num_layers=7`.

    Returns:
        A `keras_hub.models.CausalLM` with its preprocessor and tokenizer.

    Raises:
        LoadError: There is no such family, or it has no mixture of experts.
    """
    share_arena()  # before JAX starts its threads
    compute_on_the_calling_thread()
    table = _family(family)
    if moe and not table.tiny_moe:
        known = ", ".join(repr(f.name) for f in families.FAMILIES.values() if f.tiny_moe)
        raise LoadError(f"`moe=True` needs `family={known}`. Received: {family!r}")
    proto = tiny_tokenizer_proto(_TOOL_MARKS if tools else ())
    vocabulary = building.tokenizer(table, proto).vocabulary_size()
    sizes = {**table.tiny, **dict.fromkeys(table.vocabulary_settings, vocabulary)}
    backbone = table.backbone_class(**sizes | (dict(table.tiny_moe) if moe else {}) | overrides)
    _randomize(backbone, seed)
    return building.causal_lm(table, backbone, proto, sequence_length=sequence_length)


def _family(name: str) -> families.Family:
    if name not in families.FAMILIES:
        raise LoadError(f"`family` must be one of {FAMILIES}. Received: {name!r}")
    return families.FAMILIES[name]


def tiny_pairs(count: int = 20) -> list[tuple[str, str]]:
    """Make distinct pairs that a tiny model can learn by heart.

    Args:
        count: Number of pairs.

    Returns:
        `(input, output)` tuples: a question for a part number and its answer.
    """
    parts = ("brake caliper", "roll", "box", "cake", "bread")
    return [
        (f"part number for {parts[i % len(parts)]} {i}", f"{(7 * i + 3) % 100:02d}-{i:02d}")
        for i in range(count)
    ]


def _randomize(backbone: keras.Model, seed: int) -> None:
    random = np.random.default_rng(seed)
    for variable in backbone.weights:
        if "float" not in str(variable.dtype) or variable.name == "layer_scalar":
            continue
        fan_in = max(1, int(np.prod(variable.shape[:-1])) if len(variable.shape) > 1 else 4)
        spread = 0.2 if len(variable.shape) < 2 else 1.0 / np.sqrt(min(fan_in, 16))
        value = random.normal(0.0, spread, variable.shape)
        if variable.name == "scale":
            value = np.asarray(variable) + value
        variable.assign(value.astype("float32"))
