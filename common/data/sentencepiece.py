"""Reads the vocabulary of a SentencePiece file (`spiece.model`), a message of protocol buffers."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from heirloom.common.errors import InputError

_FIELD = descriptor_pb2.FieldDescriptorProto
# The fields that are read of sentencepiece_model.proto: {message: {name: (number, type, default)}}. The others are kept
# unread, as protocol buffers do with unknown fields.
_SCHEMA: dict[str, dict[str, tuple[int, int, str]]] = {
    "Piece": {
        "piece": (1, _FIELD.TYPE_STRING, ""),
        "score": (2, _FIELD.TYPE_FLOAT, "0"),
        "type": (3, _FIELD.TYPE_INT32, "1"),
    },
    "Trainer": {"model_type": (3, _FIELD.TYPE_INT32, "1"), "byte_fallback": (35, _FIELD.TYPE_BOOL, "false")},
    "Normalizer": {
        "charsmap": (2, _FIELD.TYPE_BYTES, ""),
        "add_dummy_prefix": (3, _FIELD.TYPE_BOOL, "true"),
        "remove_extra_whitespaces": (4, _FIELD.TYPE_BOOL, "true"),
        "escape_whitespaces": (5, _FIELD.TYPE_BOOL, "true"),
    },
}
UNIGRAM = 1  # `model_type`
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # `type` of a piece


@dataclass(frozen=True)
class SentencePiece:
    """A unigram vocabulary. pieces: (piece, log-probability). kinds: `type` of each. charsmap: of the normalizer."""

    pieces: list[tuple[str, float]]
    kinds: list[int]
    charsmap: bytes


def read_sentencepiece(file: Path) -> SentencePiece:
    """Reads a SentencePiece file. Raises InputError for a damaged one, or one that is tokenised in another way."""
    model = _model_type()()
    try:
        model.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{file}: not a SentencePiece file ({why}); fetch it again") from error
    if not model.pieces:
        raise InputError(f"{file}: a SentencePiece file without a vocabulary; fetch it again")
    trainer, normalizer = model.trainer, model.normalizer
    if trainer.model_type != UNIGRAM or trainer.byte_fallback:
        raise InputError(f"{file}: not T5's kind of SentencePiece file (unigram without byte fallback)")
    if not (normalizer.add_dummy_prefix and normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces):
        raise InputError(f"{file}: handles spaces differently from T5's tokenizer, so its tokens would be wrong here")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    return SentencePiece(pieces, [piece.type for piece in model.pieces], normalizer.charsmap)


@cache
def _model_type() -> Any:
    """Returns the class of the message `ModelProto` with the fields of `_SCHEMA`."""
    file = descriptor_pb2.FileDescriptorProto(name="heirloom_sentencepiece.proto", package="heirloom", syntax="proto2")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, default) in fields.items():
            added = message.field.add(name=field, number=number, label=_FIELD.LABEL_OPTIONAL, default_value=default)
            added.type = kind  # type: ignore[assignment]
    model = file.message_type.add(name="Model")
    repeated, optional = _FIELD.LABEL_REPEATED, _FIELD.LABEL_OPTIONAL
    for number, (field, name, label) in enumerate(
        (("pieces", "Piece", repeated), ("trainer", "Trainer", optional), ("normalizer", "Normalizer", optional)), 1
    ):
        model.field.add(name=field, number=number, type=_FIELD.TYPE_MESSAGE, type_name=f"heirloom.{name}", label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("heirloom.Model"))
