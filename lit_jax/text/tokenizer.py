"""T5's tokenizer, from the `tokenizer.json` or the `spiece.model` of a folder: the same ids from either."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.data.sentencepiece import BYTE, CONTROL, USER_DEFINED, read_sentencepiece
from heirloom.common.data.text import readable, strings
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json

WHOLE, PIECES = "tokenizer.json", "spiece.model"  # either is enough
ADDED, CONFIG, SPECIAL = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
FILES = (WHOLE, PIECES, ADDED, CONFIG, SPECIAL)
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2 of every T5
EXTRA_IDS = 100  # <extra_id_0> and so on, which T5's tokenizers append to the SentencePiece vocabulary, last one first
SPACE = "\u2581"  # a word begins with it
# Parts of a tokenizer.json that do what `_build` does, as transformers' T5Tokenizer does for every file.
_KNOWN = {
    "normalizer": ("Precompiled", "Strip", "Replace"),
    "pre_tokenizer": ("WhitespaceSplit", "Metaspace"),
}
Pieces = list[tuple[str, float]]


class Tokens(NamedTuple):
    """ids: [n, tokens] int32, 0 for padding. mask: [n, tokens] bool, false for padding."""

    ids: np.ndarray
    mask: np.ndarray


def find_tokenizer(folder: Path) -> Path | None:
    """Returns the folder of the tokenizer of a text encoder: its own folder, or that next to it in a pipeline."""
    next_to = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return next((f for f in (folder, next_to) if any((f / name).is_file() for name in (WHOLE, PIECES))), None)


class T5Tokenizer:
    """Converts prompts to ids: the pieces of the prompt, then `</s>`, then padding."""

    def __init__(self, unigram: tokenizers.Tokenizer):
        self._unigram = unigram
        self.vocabulary = unigram.get_vocab_size()
        """Number of ids."""

    @classmethod
    def load(cls, folder: str | Path) -> "T5Tokenizer":
        """Reads the tokenizer in a folder. Raises InputError when its files are missing, damaged or disagree."""
        folder = Path(folder)
        with readable(folder):
            about, saved = _read_about(folder), (folder / WHOLE).is_file()
            pieces, charsmap, added = _read_json(folder) if saved else _read_spiece(folder, about)
            added |= about["added"]
            known = {token.content for token in added.values()}
            if without := [text for text in about["special"] if text not in known]:
                needed = f"give it an id in added_tokens_decoder of {CONFIG}, or remove it"
                raise InputError(f"additional_special_tokens has {without[0]!r}, which has no id: {needed}")
            return cls(_build(pieces, charsmap, added))

    def __call__(self, prompts: Sequence[str], tokens: int) -> Tokens:
        """Returns ids and mask, [n, tokens] each. Prompts that are too long are cut before their last token, which is
        `</s>`, and one remark says so.

        Raises InputError for prompts that are not strings, and for `tokens` below 1.
        """
        if tokens < 1:
            raise InputError(f"tokens {tokens} leaves no room for the end token: choose 1 or more")
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("prompts must be a list of strings")
        prompts = strings(prompts)
        out = Tokens(np.zeros((len(prompts), tokens), np.int32), np.zeros((len(prompts), tokens), bool))
        encoded = self._unigram.encode_batch(prompts)
        if long := [i for i, encoding in enumerate(encoded) if len(encoding.ids) + 1 > tokens]:
            count = len(encoded[long[0]].ids) + 1
            others = f"; {len(long) - 1} more of these {len(prompts)} texts are cut, too" if len(long) > 1 else ""
            remark(
                f"the prompt {_shown(prompts[long[0]])} has {count} tokens, and the model takes {tokens}: the last"
                f" {count - tokens} are cut off{others}"
            )
        for i, encoding in enumerate(encoded):
            ids = [*encoding.ids[: tokens - 1], 1]
            out.ids[i, : len(ids)] = ids
            out.mask[i, : len(ids)] = True
        return out

    def save(self, folder: str | Path) -> Path:
        """Writes `folder`/tokenizer.json, which `load` and transformers read. Returns the file."""
        file = Path(folder) / WHOLE
        self._unigram.save(str(file))
        return file

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of one row up to `</s>`."""
        row = [int(i) for i in ids]
        pieces = [self._unigram.id_to_token(i) or "" for i in row[: row.index(1) if 1 in row else len(row)]]
        return "".join(pieces).replace(SPACE, " ").strip()


def _build(pieces: Pieces, charsmap: bytes, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """Makes the unigram tokenizer: NFKC and the like by `charsmap`, split at white space, a space before every word."""
    for i, name in enumerate((PAD, END, UNKNOWN)):
        if len(pieces) <= i or pieces[i][0] != name:
            found = repr(pieces[i][0]) if len(pieces) > i else "missing"
            raise InputError(f"the token {i} is {found}, and T5's is {name!r}: take the tokenizer of the text encoder")
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap:
        unigram.normalizer = normalizers.Precompiled(charsmap)
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    for i, token in sorted(added.items()):
        if i > unigram.get_vocab_size() or (i < len(pieces) and pieces[i][0] != token.content):
            size = unigram.get_vocab_size()
            other = f"already taken by {pieces[i][0]!r}" if i < len(pieces) else f"but the next free id is {size}"
            raise InputError(f"the added token {token.content!r} has id {i}, {other}")
        unigram.add_special_tokens([token]) if token.special else unigram.add_tokens([token])
    return unigram


def _special(content: str) -> AddedToken:
    return AddedToken(content, normalized=False, special=True)


def _read_json(folder: Path) -> tuple[Pieces, bytes, dict[int, AddedToken]]:
    """Reads a tokenizer.json. Raises InputError for one that is no unigram, or does what T5's does not."""
    whole = read_json(folder / WHOLE)
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
        raise InputError(f"{WHOLE} is not T5's kind, which is Unigram without byte fallback")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list) or not all(_is_piece(entry) for entry in vocabulary):
        raise InputError(f"{WHOLE} has no vocabulary of pieces with their scores; fetch it again")
    for name in ("padding", "truncation"):
        if whole.get(name) is not None:
            Fields(whole[name], f"{WHOLE}: {name}").fixed("direction", "Right")
    charsmap = b""
    for part, known in _KNOWN.items():
        for step in _steps(whole.get(part)):
            if step.get("type") not in known:
                raise InputError(f"{WHOLE}: its {part} has the step {step.get('type')!r}, which T5's does not have")
            if step.get("type") == "Precompiled":
                charsmap = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
    added = whole.get("added_tokens") or []
    return [(piece, float(score)) for piece, score in vocabulary], charsmap, _added((t.get("id"), t) for t in added)


def _is_piece(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    return isinstance(entry[0], str) and isinstance(entry[1], int | float)


def _steps(part: Any) -> list[Mapping[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer; of a sequence, each."""
    if part is None:
        return []
    if not isinstance(part, dict):
        raise InputError(f"{WHOLE} is damaged; fetch it again")
    inner = part.get("normalizers", part.get("pretokenizers")) if part.get("type") == "Sequence" else [part]
    return [step for one in inner or [] for step in (_steps(one) if one.get("type") == "Sequence" else [one])]


def _read_spiece(folder: Path, about: Mapping[str, Any]) -> tuple[Pieces, bytes, dict[int, AddedToken]]:
    file = folder / PIECES
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer: it needs a {WHOLE} or a {PIECES}")
    found = read_sentencepiece(file)
    if BYTE in found.kinds:
        raise InputError(f"{file}: has byte pieces, which T5's tokenizer does not have")
    pieces = found.pieces + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(about["extra_ids"]))]
    added = {
        i: AddedToken(found.pieces[i][0], normalized=False, special=kind == CONTROL)
        for i, kind in enumerate(found.kinds)
        if kind in (CONTROL, USER_DEFINED)
    }
    extra = {i: _special(pieces[i][0]) for i in range(len(found.pieces), len(pieces))}
    return pieces, found.charsmap, added | extra | {2: _special(UNKNOWN)}


def _read_about(folder: Path) -> dict[str, Any]:
    """Reads transformers' files next to a tokenizer: `extra_ids`, `added`, the AddedToken of each id, and `special`,
    further special tokens, of which transformers numbers those without an id.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    _check_settings(folder, config)
    kind = config.get("tokenizer_class") or "T5Tokenizer"
    if kind == "ByT5Tokenizer":
        raise InputError(f"{folder}: the tokenizer of a ByT5, which reads bytes; only T5's and mT5's can be read")
    extra_ids = config.get("extra_ids", EXTRA_IDS)
    if not isinstance(extra_ids, int) or not 0 <= extra_ids <= 10_000:
        raise InputError(f"{CONFIG}: extra_ids is {extra_ids!r}, and must be a whole number up to 10000")
    tokens = read_json(folder / ADDED) if (folder / ADDED).is_file() else {}
    added = _added((i, {"content": content}) for content, i in tokens.items())
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{CONFIG}: added_tokens_decoder is no object; fetch it again")
    pairs = ((int(i) if str(i).isdecimal() else i, token) for i, token in decoder.items())
    named = read_json(folder / SPECIAL) if (folder / SPECIAL).is_file() else {}
    listed = [t for about in (config, named) for t in about.get("additional_special_tokens") or []]
    texts = [str(token.get("content") if isinstance(token, dict) else token) for token in listed]
    special = [text for text in texts if not text.startswith("<extra_id_")]
    return {"extra_ids": extra_ids, "added": added | _added(pairs), "special": special}


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses settings with which transformers would make other ids."""
    fields = Fields(config, CONFIG)
    for name in ("add_bos_token", "split_special_tokens"):
        fields.fixed(name, False, None)
    fields.fixed("add_eos_token", True, None)
    for side in ("padding_side", "truncation_side"):
        fields.fixed(side, "right", None)
    named = read_json(folder / SPECIAL) if (folder / SPECIAL).is_file() else {}
    for file, values in ((CONFIG, config), (SPECIAL, named)):
        for name, usual in (("pad_token", PAD), ("eos_token", END), ("unk_token", UNKNOWN)):
            token = values.get(name, usual)
            if (token.get("content") if isinstance(token, dict) else token) not in (usual, None):
                raise InputError(f"{file}: {name} is {token!r}, and T5's is {usual!r}: take the encoder's tokenizer")


def _added(entries: Any) -> dict[int, AddedToken]:
    """Returns the AddedToken of each id. entries: (id, fields of the token)."""
    out = {}
    for i, token in entries:
        if not isinstance(i, int) or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise InputError(f"an added token is {token!r} with the id {i!r}; it needs a text and a whole number")
        content = token["content"]
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        special = bool(token.get("special", content.startswith("<extra_id_") or content in (PAD, END, UNKNOWN)))
        out[i] = AddedToken(content, special=special, **flags)
    return out


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:37]}...")
