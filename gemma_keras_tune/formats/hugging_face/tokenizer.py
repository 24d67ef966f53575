"""The tokenizer in Hugging Face's files.

`tokenizer.model` is the SentencePiece model as it is. `tokenizer.json` says the same to the
`tokenizers` library: byte-pair merges in the order of the pieces' scores, laid out like the file
Google publishes for Gemma 3. Format: https://huggingface.co/docs/tokenizers.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.gemma.templates import Template
from gemma_keras_tune.gemma.vocabularies import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_NO_LIMIT = 10**30


def write_tokenizer(
    tokenizer: Any, folder: pathlib.Path, template: Template | None, turn_tokens: tuple[str, ...]
) -> None:
    """Write `tokenizer.model`, `tokenizer.json`, their configuration and the chat template.

    Args:
        tokenizer: A KerasHub tokenizer of a Gemma.
        folder: An existing folder.
        template: The prompt format, or `None` for a pretrained model.
        turn_tokens: Tokens that mark turns: like `<eos>`, they are left out of decoded text.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    special = {*turn_tokens, *_NAMES.values()}
    (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    text = json.dumps(_tokenizer_json(proto.pieces, special), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        **_NAMES,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in _added_tokens(proto.pieces, special)
        },
    }
    jinja = template.chat_template() if template else None
    if jinja is not None:
        # Older versions of transformers read it here, newer ones from the file.
        config["chat_template"] = jinja
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", _NAMES)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as people read it."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _tokenizer_json(pieces: Any, special: set[str]) -> dict[str, Any]:
    start = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    second = [
        {"SpecialToken": {"id": "<bos>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces, special),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequence],
            "pair": [start, sequence, *second],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merge_rules(pieces),
        },
    }


def _added_tokens(pieces: Any, special: set[str]) -> list[dict[str, Any]]:
    """The pieces that are found in text before anything is merged."""
    return [
        {
            "id": number,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type in (UNKNOWN, CONTROL) or piece.piece in special,
        }
        for number, piece in enumerate(pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def merge_rules(pieces: Any) -> list[list[str]]:
    """Every way to put a piece together from two others, the best piece first.

    SentencePiece merges the neighbours whose union scores highest. It takes user-defined pieces
    before that, the longest first; runs of spaces are only spelled as in the vocabulary once the
    text has been normalized, so they are found by merging.
    """
    known = {p.piece for p in pieces if p.type in (NORMAL, USER_DEFINED)}
    runs = [p.piece for p in pieces if p.type == USER_DEFINED and not p.piece.strip(SPACE)]
    normal = [(p.score, p.piece) for p in pieces if p.type == NORMAL and len(p.piece) > 1]
    # Stable: pieces of one score stay in the order of their ids.
    ranked = sorted(runs, key=len, reverse=True)
    ranked += [piece for _, piece in sorted(normal, key=lambda item: -item[0])]
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
