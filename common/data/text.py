"""CLIP's tokenizer: byte-pair encoding read from files or fitted to captions."""

import gzip
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from heirloom.common.errors import InputError
from heirloom.common.files import read_json

SUFFIX = "</w>"  # end of a word: "cat</w>" is a word, "cat" the beginning of a longer one
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
NAMES = ((SOT, EOT), ("<start_of_text>", "<end_of_text>"))  # OpenAI's and Hugging Face's; open_clip's
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MOST_IDS = 2**24
MERGES = Path(__file__).with_name("clip_merges.txt.gz")
PARTS = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")  # of a tokenizer's config
EXTRAS = ("additional_special_tokens", "extra_special_tokens")  # lists there, or tokens by name
FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # a folder with one of these has a tokenizer
Merges = list[tuple[str, str]]


def clean(text: str, *, lower: bool = True) -> str:
    """Fixes mojibake, resolves HTML entities twice, collapses white space, lower-cases, like OpenAI's CLIP."""
    cleaned = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    return cleaned.lower() if lower else cleaned


def strings(texts: str | Iterable[str]) -> list[str]:
    """Returns captions as a list, one for a string, without lone surrogates, which `tokenizers` does not take.

    Raises InputError for anything that is not a string.
    """
    if not isinstance(texts, str | Iterable):
        raise InputError(f"captions must be strings, not {type(texts).__name__}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"captions must be strings; caption {i}, counted from 0, is {type(text).__name__}")
    return [text if text.isascii() else _unicode(text) for text in texts]


def _unicode(text: str) -> str:
    """Joins halves of a character and replaces single ones: JSON and names of files may have them, UTF-8 has not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a tokenizer is read into InputError with its path."""
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    except BaseException as error:  # tokenizers raises bare Exception for files it cannot read, and panics for some
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path} is not readable as a tokenizer: {' '.join(str(error).split())}") from error


class Tokenizer:
    """Converts strings to ids like CLIP: SOT, the tokens of the cleaned text, EOT, then `pad`, which is usually 0.

    Tokens added to a vocabulary, such as those of textual inversion, are found in captions like in transformers.
    Deviation: the text "<|endoftext|>" in a caption is tokenised like any other text, so no caption can end early.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, pad: int = 0):
        """Takes the start and end token that `bpe` adds, or known ones by name. Raises InputError if it has none.

        pad: id of padding.
        """
        bpe.no_padding()
        bpe.no_truncation()
        self.pad = pad
        """Id of padding."""
        vocab = bpe.get_vocab()
        around = bpe.encode("").ids
        names = next((pair for pair in NAMES if vocab.keys() >= set(pair)), None)
        if len(around) != 2 and names is None:
            raise InputError(f"this tokenizer has no start and end token; a CLIP tokenizer has {SOT} and {EOT}")
        self.sot, self.eot = around if len(around) == 2 else (vocab[name] for name in names or ())
        self.vocab_size = max(vocab.values()) + 1
        added = bpe.get_added_tokens_decoder()
        self.largest_word = max((i for i in vocab.values() if i not in added), default=-1)
        """Largest id among the tokens that were not added."""
        self._bpe = self._encoder = bpe
        if any(token.special != (i in (self.sot, self.eot)) for i, token in added.items()):
            self._encoder = _specials(bpe, {self.sot, self.eot})
        self._encoder.encode_special_tokens = True  # special tokens in a text are tokenised like any other text
        early = (token for i, token in added.items() if not (token.normalized or i in (self.sot, self.eot)))
        raw = [re.escape(token.content) for token in early]
        # Tokens that are found before the text is cleaned.
        self._raw = re.compile(f"({'|'.join(raw)})") if raw else None
        self._lower = bpe.normalizer is not None and bpe.normalizer.normalize_str("A") == "a"

    @property
    def names(self) -> tuple[str, str]:
        """The start and the end token as strings."""
        sot, eot = (str(self._bpe.id_to_token(i)) for i in (self.sot, self.eot))
        return sot, eot

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        return self._bpe.get_vocab()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer, int]]:
        return Tokenizer, (self._bpe, self.pad)  # calls __init__ again: pickling loses `encode_special_tokens`

    @classmethod
    def clip(cls) -> "Tokenizer":
        """Returns OpenAI's tokenizer, 49,408 entries, from the merges in this package."""
        lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
        return cls(_clip_style([(left, right) for left, right in map(str.split, lines)]))

    @classmethod
    def load(cls, path: str | Path, *, pads: bool = False) -> "Tokenizer":
        """Reads a tokenizer.json, or a folder with one, or with the vocab.json and merges.txt of a Hugging Face CLIP.

        Added tokens and the start and end token come from tokenizer_config.json, special_tokens_map.json and
        added_tokens.json. pads: pad with the pad_token of these files, as transformers does; else with 0, or as `save`
        wrote. Raises InputError when the files are missing, damaged or disagree.
        """
        path = Path(path)
        file, folder = (path, path.parent) if path.is_file() else (path / "tokenizer.json", path)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if not file.is_file() and not (vocab.is_file() and merges.is_file()):
            raise InputError(f"{path} has no tokenizer: it needs a tokenizer.json, or a vocab.json and a merges.txt")
        with readable(path):
            about = read_about(folder)
            check_ids(file if file.is_file() else vocab)
            bpe = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else _from_tables(vocab, merges)
            pad = (bpe.padding or {}).get("pad_id", 0) if not (folder / "tokenizer_config.json").is_file() else 0
            bpe = completed(bpe, about)
            if pads and (pad := bpe.token_to_id(token := about["pad"] or EOT)) is None:
                raise InputError(f"the padding token {token!r} is not in the vocabulary; use files of one model")
            return cls(bpe, pad)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Fits CLIP's scheme to `captions`: the 512 byte tokens, the most frequent merges, SOT and EOT.

        The vocabulary is smaller than `vocab_size` when the captions have too few pairs. Raises InputError below 514,
        the size without merges.
        """
        if vocab_size < 2 * 256 + 2:
            raise InputError(f"vocab_size {vocab_size} is too small: choose 514 or more (bytes, start and end)")
        bpe = _around({}, [])
        # The bytes that end words are given as special tokens: the trainer would number them in the order of a hash
        # table and break ties between pairs by number, so two processes would fit different vocabularies.
        special: dict[str, Any] = dict(special_tokens=[c + SUFFIX for c in _bytes()], initial_alphabet=_bytes())
        special |= dict(end_of_word_suffix=SUFFIX, show_progress=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, **special)
        bpe.train_from_iterator(map(clean, captions), trainer)
        learned = json.loads(bpe.to_str())["model"]["merges"]
        return cls(_clip_style([(left, right) for left, right in learned]))

    def save(self, folder: str | Path) -> Path:
        """Writes `folder`/tokenizer.json, which `load` and `transformers.CLIPTokenizerFast` read. Returns the file."""
        file = Path(folder) / "tokenizer.json"
        if self.pad:
            self._bpe.enable_padding(pad_id=self.pad, pad_token=str(self._bpe.id_to_token(self.pad)))
        self._bpe.save(str(file))
        self._bpe.no_padding()
        return file

    def __call__(self, texts: str | Iterable[str], context: int) -> np.ndarray:
        """Returns ids, int32 [n, context] (n = 1 for a string): cut to `context` with EOT last, padded with `pad`."""
        if context < 2:
            raise InputError(f"context {context} is too small for the start and end tokens: choose 2 or more")
        texts = strings(texts)
        out = np.full((len(texts), context), self.pad, np.int32)
        found = self._encoder.encode_batch([self._clean(t) for t in texts], add_special_tokens=False)
        for row, encoding in zip(out, found, strict=True):
            ids = [self.sot, *encoding.ids[: context - 2], self.eot]
            row[: len(ids)] = ids
        return out

    def _clean(self, text: str) -> str:
        if self._raw is None:
            return clean(text, lower=self._lower)
        parts = self._raw.split(text)  # text, token, text, ...
        return "".join(part if i % 2 else _padded(part, clean(part, lower=self._lower)) for i, part in enumerate(parts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of one row between SOT and EOT: lower-case, with spaces between words and punctuation."""
        ids = [int(i) for i in ids]
        end = ids.index(self.eot) if self.eot in ids else len(ids)
        return self._bpe.decode([i for i in ids[:end] if i != self.sot]).strip()


def _bytes() -> list[str]:
    """Returns the 256 byte values as printable characters, in CLIP's order: printable bytes first, then the rest."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _padded(text: str, cleaned: str) -> str:
    """Returns the cleaned text with a space at each end where the text had white space."""
    return " " * text[:1].isspace() + cleaned + " " * (text[-1:].isspace() and bool(cleaned))


def read_about(folder: Path) -> dict[str, Any]:
    """Reads transformers' files about a tokenizer: `bos_token` and `eos_token`, `added`, the AddedToken of each id,
    `special`, the tokens with another part, `pad`, that of padding or None, and `extra`, further special ones.

    As in transformers, the `added_tokens_decoder` of tokenizer_config.json replaces added_tokens.json and
    special_tokens_map.json; without it, what the map says stands for what the config says.
    """
    found: dict[str, Any] = {"added": {}, "extra": []}
    parts, decoded = dict[str, Any](), False
    if (file := folder / "added_tokens.json").is_file():
        for content, i in read_json(file).items():
            if not isinstance(i, int):
                raise InputError(f"{file.name}: {content!r} has id {i!r}; it must be a whole number")
            found["added"][i] = tokenizers.AddedToken(content, normalized=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "special_tokens_map.json" and decoded:
            break
        theirs = read_json(folder / name) if (folder / name).is_file() else {}
        for end in ("bos_token", "eos_token"):
            if (token := theirs.get(end)) is not None:
                token = token.get("content") if isinstance(token, dict) else token
                if not isinstance(token, str):
                    raise InputError(f"{name}: {end} is {theirs[end]!r}; it must be a token")
                found[end] = token
        parts |= {part: _content(theirs[part]) for part in PARTS if theirs.get(part)}
        for part in EXTRAS:
            given = theirs.get(part) or []
            found["extra"] += map(_content, given.values() if isinstance(given, dict) else given)
        if decoder := theirs.get("added_tokens_decoder"):
            fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            try:
                known = {int(i): {f: token[f] for f in fields if f in token} for i, token in decoder.items()}
                found["added"] = {i: tokenizers.AddedToken(token.pop("content"), **token) for i, token in known.items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                shown = str(decoder)[:80]
                raise InputError(f"{name}: added_tokens_decoder is {shown}; it must hold a token by id") from error
            decoded = True
    return found | {"special": list(parts.values()), "pad": parts.get("pad_token")}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def completed(bpe: tokenizers.Tokenizer, about: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Adds the added tokens and the start and end token of the folder. Raises InputError where they do not fit."""
    for i, token in sorted(about["added"].items()):
        if bpe.token_to_id(token.content) is None:
            (bpe.add_special_tokens if token.special else bpe.add_tokens)([token])
        if (actual := bpe.token_to_id(token.content)) != i:
            what = f"id {i} in one file and would get {actual}"
            raise InputError(f"the added token {token.content!r} has {what}; use files of one model")
    for content in about.get("special", ()):  # transformers finds them in captions too, such as "!" that pads
        if isinstance(content, str) and content not in NAMES[0] + NAMES[1] and bpe.token_to_id(content) is not None:
            bpe.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
    for content in about.get("extra", ()):
        if isinstance(content, str) and content not in NAMES[0] + NAMES[1]:  # with a new id where it has none
            bpe.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
    if "bos_token" in about and "eos_token" in about:
        for end in (about["bos_token"], about["eos_token"]):
            if bpe.token_to_id(end) is None:
                raise InputError(f"the vocabulary has no {end!r}, the start or end in the tokenizer's config")
        _enclose(bpe, about["bos_token"], about["eos_token"])
    return bpe


def _enclose(bpe: tokenizers.Tokenizer, sot: str, eot: str) -> None:
    """Makes `bpe` add the start and end token to every text."""
    bpe.add_special_tokens([sot, eot])
    pairs = [(token, bpe.token_to_id(token)) for token in (sot, eot)]
    bpe.post_processor = processors.TemplateProcessing(single=f"{sot}:0 $A:0 {eot}:0", special_tokens=pairs)


def _specials(bpe: tokenizers.Tokenizer, ids: set[int]) -> tokenizers.Tokenizer:
    """Returns a copy in which only these added tokens are special."""
    whole = json.loads(bpe.to_str())
    for token in whole["added_tokens"]:
        token["special"] = token["id"] in ids
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def _from_tables(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Reads a CLIP tokenizer from vocab.json and merges.txt."""
    ids = read_json(vocab)
    if not all(isinstance(i, int) and i >= 0 for i in ids.values()) or len(set(ids.values())) != len(ids):
        raise InputError("vocab.json must give each token another id, a whole number from 0")
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#version"):
            if len(pair := line.split()) != 2:
                raise InputError(f"merges.txt, line {number}: {line[:40]!r} is not a pair of tokens")
            pairs.append((pair[0], pair[1]))
    return _around(ids, pairs)


def _clip_style(merges: Merges) -> tokenizers.Tokenizer:
    """Builds a tokenizer with CLIP's order of ids: bytes, bytes that end a word, merges by rank, start, end."""
    alphabet = _bytes()
    tokens = [*alphabet, *(c + SUFFIX for c in alphabet), *(left + right for left, right in merges), SOT, EOT]
    return _around({token: i for i, token in enumerate(tokens)}, merges)


def _around(vocab: dict[str, int], merges: Merges) -> tokenizers.Tokenizer:
    """Builds a tokenizer with CLIP's word splitting; the saved file is complete."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix=SUFFIX))
    bpe.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(SUFFIX, " ")])
    if EOT in vocab:
        _enclose(bpe, SOT, EOT)
    return bpe


def check_ids(file: Path) -> None:
    """Raises InputError for a huge id: the library allocates a table as long as the largest id."""
    try:
        saved = json.loads(file.read_text())
    except ValueError:
        return  # opening the file reports the error
    model = saved.get("model") if isinstance(saved, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else saved
    ids = [i for i in vocab.values() if isinstance(i, int)] if isinstance(vocab, dict) else []
    if (largest := max(ids, default=0)) >= MOST_IDS:
        raise InputError(f"{file.name} gives a token the id {largest}: ids must be below {MOST_IDS:,}")
