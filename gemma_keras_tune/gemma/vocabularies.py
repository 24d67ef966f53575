"""SentencePiece models, put together from the tokenizers of other formats.

Every Gemma's tokenizer is byte-pair encoding by SentencePiece. GGUF keeps its pieces, `tokenizers`
its pieces and merges; from either the model is put together again that gives the same ids.
"""

import pathlib
import re
import warnings
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
# Tokenizers of models that see or hear come with text models that have no rows for these.
MEDIA = re.compile(r"<[^<>]*(image|audio|video)[^<>]*>")
_MARK = re.compile(r"<[^<>\s]+>|\[multimodal\]")
_NAMED = 8  # the most tokens that a message names
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


def byte_type(piece: str, kind: int) -> int:
    """Return the type of a piece: that of a byte if it is spelled like one."""
    return BYTE if _BYTE.fullmatch(piece) else kind


def repair_marks(proto: bytes, source: str) -> bytes:
    """Make every special and every added token of a tokenizer one that is found in text.

    Some exporters call marks such as `<start_of_turn>` plain pieces, which nothing merges to, or
    control pieces, which SentencePiece never finds in text: both would be spelled letter by letter.

    Args:
        proto: The serialized SentencePiece model.
        source: Where it comes from, for messages.

    Returns:
        The model, the same object where nothing was wrong. A warning names what was repaired.

    Raises:
        LoadError: A token is not encoded to its own id all the same; all of them are named.
    """
    model = sentencepiece_messages().ModelProto.FromString(proto)
    marks = [
        number
        for number, piece in enumerate(model.pieces)
        if piece.type in (USER_DEFINED, CONTROL, NORMAL)
        and number not in CONTROL_IDS
        and (piece.type != NORMAL or _MARK.fullmatch(piece.piece))
    ]
    spelled = _spelled_out(proto, [(number, model.pieces[number].piece) for number in marks])
    repaired = [number for number in spelled if model.pieces[number].type != USER_DEFINED]
    if repaired:
        for number in repaired:
            model.pieces[number].type = USER_DEFINED
        proto = model.SerializeToString()
        spelled = _spelled_out(proto, [(number, model.pieces[number].piece) for number in marks])
    if spelled:
        raise LoadError(
            f"The tokenizer in {source} does not read these tokens as one.",
            [
                f"{model.pieces[number].piece!r} is token {number}, and is read as {ids}"
                for number, ids in spelled.items()
            ],
            "Save or convert the tokenizer again, from the original files.",
        )
    if repaired:
        warnings.warn(
            f"{source}: {_some([model.pieces[number].piece for number in repaired])} had a type "
            "that text is never read as, and would have been spelled out letter by letter. They "
            "are read as one token each.",
            UserWarning,
            stacklevel=4,
        )
    return proto


def _spelled_out(proto: bytes, tokens: Sequence[tuple[int, str]]) -> dict[int, list[int]]:
    """The ids that tokens are read as, of those that are not read as their own."""
    from sentencepiece import SentencePieceProcessor

    texts = [piece.replace(SPACE, " ") for _, piece in tokens]
    read = SentencePieceProcessor(model_proto=proto).encode(texts)
    return {number: ids for (number, _), ids in zip(tokens, read, strict=True) if ids != [number]}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


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
            if number < rows or not MEDIA.fullmatch(piece)
        }
        if data["model"].get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {data['model']['type']!r}, not BPE")
        added = {content: number for number, content in _added(folder).items() if number < rows}
        vocabulary |= added
        merges = [_pair(merge) for merge in data["model"]["merges"]]
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("it gives one id twice")
        last = max(vocabulary.values(), default=0)
        if not UNK_ID < last < rows:
            raise ValueError(f"it has {last + 1} tokens, and the embedding {rows} rows")
        names = {number: piece for piece, number in vocabulary.items()}
        pieces = [names.get(number, _unused(number)) for number in range(last + 1)]
        if any(number not in names for number in (*CONTROL_IDS, UNK_ID)):
            raise ValueError("it has no token for one of the ids 0 to 3")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(
            f"{folder / TOKENIZER_JSON} is no tokenizer of a Gemma.",
            [f"{type(error).__name__}: {error}"],
            _AGAIN,
        ) from error
    types = [
        _type(number, piece, added) if number in names else UNUSED
        for number, piece in enumerate(pieces)
    ]
    return sentencepiece_model(pieces, scores_of_merges(pieces, merges), types)


def _unused(number: int) -> str:
    """Return the piece of an id that no token has, as in Gemma 3n's; decoding never writes it."""
    return f"[PAD{number}]"


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _type(number: int, piece: str, added: Mapping[str, int]) -> int:
    if number == UNK_ID:
        return UNKNOWN
    if number in CONTROL_IDS:
        return CONTROL
    return USER_DEFINED if piece in added else byte_type(piece, NORMAL)


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
            if number not in (*CONTROL_IDS, UNK_ID) and _is_misplaced(model.pieces[number].type):
                model.pieces[number].type = USER_DEFINED
                changed = True
            continue
        if number >= rows and MEDIA.fullmatch(content):
            continue
        if content in known:
            problems.append(f"{content!r} is token {number} there, and {known[content]} in it")
        elif not UNK_ID < number < rows:
            problems.append(f"{content!r} is token {number}, and the embedding has {rows} rows")
        elif number < len(model.pieces) and _is_text(model.pieces[number]):
            problems.append(f"{content!r} is token {number}, {model.pieces[number].piece!r} in it")
        else:
            for empty in range(len(model.pieces), number + 1):
                model.pieces.add(piece=_unused(empty), score=0.0, type=UNUSED)
            model.pieces[number].piece = piece
            model.pieces[number].type = USER_DEFINED
            known[piece] = number
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


def _is_text(piece: Any) -> bool:
    """Tell if a piece stands for text, so that no other token may take its place."""
    return piece.type == BYTE or (piece.type == NORMAL and not _MARK.fullmatch(piece.piece))


def _is_misplaced(kind: int) -> bool:
    """Tell if text is never read as pieces of this type, or only by merging."""
    return kind in (NORMAL, CONTROL, UNUSED)


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
