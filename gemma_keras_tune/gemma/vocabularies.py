"""SentencePiece models, put together from the tokenizers of other formats.

Every Gemma's tokenizer is byte-pair encoding by SentencePiece. GGUF keeps its pieces, `tokenizers`
its pieces and merges; from either the model is put together again that gives the same ids.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import GemmaTuneError, LoadError

# SentencePiece's piece types, which llama.cpp's token types repeat.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNK_ID, CONTROL_IDS = 3, (0, 1, 2)
SPACE = "▁"
TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
_ADDED, _CONFIG = "added_tokens.json", "tokenizer_config.json"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Google's tokenizer.json files name it for models, too, that see no images and have no row for it.
_WITHOUT_A_ROW = ("<image_soft_token>",)
_AGAIN = "Copy or download the folder again."


def sentencepiece_messages() -> Any:
    """Return the module of SentencePiece's protobuf messages.

    Raises:
        GemmaTuneError: The installed protobuf is older than the one they are made for.
    """
    from google.protobuf.runtime_version import VersionError

    try:
        from sentencepiece import sentencepiece_model_pb2
    except VersionError as error:
        raise GemmaTuneError(
            f"The installed sentencepiece needs a newer protobuf: {error}",
            next_step='Type: pip install "sentencepiece<0.2.3", and start again.',
        ) from error
    return sentencepiece_model_pb2


def sentencepiece_model(
    pieces: Sequence[str], scores: Iterable[float], types: Iterable[int]
) -> bytes:
    """Build a SentencePiece model like Gemma's: byte-pair encoding with byte fallback.

    Args:
        pieces: The pieces in the order of their ids, `<pad>`, `<eos>`, `<bos>`, `<unk>` first.
        scores: Their scores: the higher, the sooner merged.
        types: Their types, as SentencePiece numbers them.

    Returns:
        The serialized model.
    """
    sp = sentencepiece_messages()
    model = sp.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sp.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = *CONTROL_IDS, UNK_ID
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = pieces[:4]
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def scores_of_merges(pieces: Iterable[str], merges: Iterable[tuple[str, str]]) -> list[float]:
    """Compute scores that merge pieces in the order of the merges.

    Args:
        pieces: The pieces.
        merges: Pairs of pieces, the first to be merged first.

    Returns:
        A score for each piece; those no merge makes score lowest.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(piece, len(ranks))) for piece in pieces]


def folder_vocabulary(folder: pathlib.Path, rows: int) -> bytes:
    """Read the SentencePiece model of a Hugging Face folder, with the tokens added to it.

    Args:
        folder: A folder with `tokenizer.model`, `tokenizer.json` or both.
        rows: Rows of the embedding.

    Returns:
        The serialized model: `tokenizer.model` as it is where nothing was added.

    Raises:
        LoadError: A file is damaged, or a token has no place; all of them are named.
    """
    file = folder / TOKENIZER_MODEL
    proto = file.read_bytes() if file.is_file() else _from_json(folder, rows)
    return _with_added(folder, proto, rows)


def _from_json(folder: pathlib.Path, rows: int) -> bytes:
    """The model that a `tokenizer.json` alone describes, as transformers 5 saves it."""
    data = _read(folder / TOKENIZER_JSON)
    try:
        vocabulary: dict[str, int] = {
            piece: number
            for piece, number in data["model"]["vocab"].items()
            if number < rows or piece not in _WITHOUT_A_ROW
        }
        if data["model"].get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {data['model']['type']!r}, not BPE")
        added = {content: number for number, content in _added(folder).items() if number < rows}
        vocabulary |= added
        merges = [_pair(merge) for merge in data["model"]["merges"]]
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
            raise ValueError("its ids leave numbers out, or give one twice")
        if not UNK_ID < len(pieces) <= rows:
            raise ValueError(f"it has {len(pieces)} tokens, and the embedding {rows} rows")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(
            f"{folder / TOKENIZER_JSON} is no tokenizer of a Gemma.",
            [f"{type(error).__name__}: {error}"],
            _AGAIN,
        ) from error
    types = [_type(number, piece, added) for number, piece in enumerate(pieces)]
    return sentencepiece_model(pieces, scores_of_merges(pieces, merges), types)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _type(number: int, piece: str, added: Mapping[str, int]) -> int:
    if number == UNK_ID:
        return UNKNOWN
    if number in CONTROL_IDS:
        return CONTROL
    if piece in added:
        return USER_DEFINED
    return BYTE if _BYTE.fullmatch(piece) else NORMAL


def _with_added(folder: pathlib.Path, proto: bytes, rows: int) -> bytes:
    """The model with the tokens that were added after it was made, or took an unused one's place.

    SentencePiece would spell them out.
    """
    sp = sentencepiece_messages()
    model = sp.ModelProto.FromString(proto)
    known = {piece.piece: number for number, piece in enumerate(model.pieces)}
    problems = []
    changed = False
    for number, content in sorted(_added(folder).items()):
        piece = content.replace(" ", SPACE)
        if known.get(piece, known.get(content)) == number:
            continue
        if number >= rows and content in _WITHOUT_A_ROW:
            continue
        if content in known:
            problems.append(f"{content!r} is token {number} there, and {known[content]} in it")
        elif not UNK_ID < number < rows or number > len(model.pieces):
            problems.append(
                f"{content!r} is token {number}, and the embedding has {rows} rows, "
                f"{len(model.pieces)} of them for tokens that are known"
            )
        else:
            if number == len(model.pieces):
                model.pieces.add(score=0.0)
            model.pieces[number].piece = content
            model.pieces[number].type = USER_DEFINED
            known[content] = number
            changed = True
    if problems:
        raise LoadError(
            f"The tokenizer files in {folder} do not fit {TOKENIZER_MODEL} or the weights.",
            problems,
            "Save the tokenizer and the model again, together.",
        )
    if not changed:
        return proto
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def _added(folder: pathlib.Path) -> dict[int, str]:
    """The tokens found in text before anything is merged, by id, as transformers notes them."""
    found: dict[int, str] = {}
    try:
        if (folder / _CONFIG).is_file():
            decoder = _read(folder / _CONFIG).get("added_tokens_decoder") or {}
            found |= {int(number): str(token["content"]) for number, token in decoder.items()}
        if (folder / _ADDED).is_file():
            found |= {int(number): str(text) for text, number in _read(folder / _ADDED).items()}
        if (folder / TOKENIZER_JSON).is_file():
            tokens = _read(folder / TOKENIZER_JSON).get("added_tokens") or []
            found |= {int(token["id"]): str(token["content"]) for token in tokens}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(
            f"The added tokens in {folder} cannot be read: {type(error).__name__}: {error}",
            next_step=_AGAIN,
        ) from error
    return found


def _read(file: pathlib.Path) -> dict[str, Any]:
    return read_json_object(file, LoadError, _AGAIN)
