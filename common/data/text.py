"""Captions to token ids: CLIP's byte-pair encoding, read from files or fitted to one's own captions."""

import gzip
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.errors import InputError

SUFFIX = "</w>"  # closes a word: "cat</w>" is the word, "cat" the beginning of a longer one
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
NAMES = ((SOT, EOT), ("<start_of_text>", "<end_of_text>"))  # OpenAI's and Hugging Face's; open_clip's
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MERGES = Path(__file__).with_name("clip_merges.txt.gz")
Merges = list[tuple[str, str]]


def clean(text: str) -> str:
    """Mojibake mended, HTML entities resolved twice, white space collapsed, lower case (OpenAI CLIP, `simple_tokenizer.py`)."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class Tokenizer:
    """Strings to ids as CLIP does it: SOT, the tokens of the cleaned text, EOT, then zeros.

    EOT is the largest id of all, so a text tower finds the end of a caption with `argmax`.
    Deviation: the text "<|endoftext|>" in a caption is spelled out like any other, so no caption can end itself early.
    """

    def __init__(self, bpe: tokenizers.Tokenizer):
        """Raises InputError when start and end tokens are missing or the end token is not the largest id."""
        vocab = bpe.get_vocab()
        names = next((pair for pair in NAMES if vocab.keys() >= set(pair)), None)
        if names is None:
            raise InputError(f"this tokenizer has no start and end token; a CLIP tokenizer has {SOT} and {EOT}")
        self.sot, self.eot = (vocab[name] for name in names)
        self.vocab_size = len(vocab)
        if self.eot != self.vocab_size - 1:
            raise InputError(f"this tokenizer's end token is {self.eot}, of {self.vocab_size} ids; a CLIP needs it to be the last")
        bpe.no_padding()
        bpe.no_truncation()
        bpe.encode_special_tokens = True
        self._bpe = bpe

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer]]:
        return Tokenizer, (self._bpe,)  # by way of __init__: `encode_special_tokens` does not survive pickling

    @classmethod
    def clip(cls) -> "Tokenizer":
        """OpenAI's, 49,408 entries, from the merges that come with this package."""
        lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
        return cls(_clip_style([(left, right) for left, right in map(str.split, lines)]))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder with one, or with the vocab.json and merges.txt of a Hugging Face CLIP.

        Raises InputError when neither is there or the file is not a tokenizer.
        """
        path = Path(path)
        file = path if path.is_file() else path / "tokenizer.json"
        vocab, merges = path / "vocab.json", path / "merges.txt"
        try:
            if file.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            if vocab.is_file() and merges.is_file():
                lines = [line for line in merges.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#version")]
                pairs = [(left, right) for left, right in map(str.split, lines)]
                return cls(_around(json.loads(vocab.read_text(encoding="utf-8")), pairs))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise InputError(f"{path} is not readable as a tokenizer: {error}") from error
        raise InputError(f"{path} is no tokenizer: it needs a tokenizer.json, or a vocab.json and a merges.txt")

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Fit CLIP's scheme to `captions`: the 512 byte tokens, the most frequent merges, SOT and EOT.

        Smaller than `vocab_size` when the captions run out of pairs. Raises InputError below 514, the size without a merge.
        """
        if vocab_size < 2 * 256 + 2:
            raise InputError(f"vocab_size {vocab_size} is too small: the bytes, start and end alone are 514")
        bpe = _around({}, [])
        # The word-end bytes go in as given tokens: left to the trainer they are numbered by the order of a hash table, ties between
        # pairs are broken by number, and so two processes would fit two vocabularies.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=[c + SUFFIX for c in _bytes()],
            initial_alphabet=_bytes(),
            end_of_word_suffix=SUFFIX,
            show_progress=False,
        )
        bpe.train_from_iterator(map(clean, captions), trainer)
        learned = json.loads(bpe.to_str())["model"]["merges"]
        return cls(_clip_style([(left, right) for left, right in learned]))

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/tokenizer.json, which `load` and `transformers.CLIPTokenizerFast` read. Returns the file."""
        file = Path(folder) / "tokenizer.json"
        self._bpe.save(str(file))
        return file

    def __call__(self, texts: str | Sequence[str], context: int) -> np.ndarray:
        """int32 [n, context] (n = 1 for a single string): cut to `context` with the last token EOT, padded with 0."""
        if context < 2:
            raise InputError(f"context {context} has no room for the start and end tokens")
        texts = [texts] if isinstance(texts, str) else texts
        out = np.zeros((len(texts), context), np.int32)
        for row, encoding in zip(out, self._bpe.encode_batch([clean(t) for t in texts], add_special_tokens=False), strict=True):
            ids = [self.sot, *encoding.ids[: context - 2], self.eot]
            row[: len(ids)] = ids
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row, from behind SOT up to EOT: lower-cased, words and punctuation set apart by blanks."""
        ids = [int(i) for i in ids]
        end = ids.index(self.eot) if self.eot in ids else len(ids)
        return self._bpe.decode([i for i in ids[:end] if i != self.sot]).strip()


def _bytes() -> list[str]:
    """The 256 byte values as printable characters, in CLIP's order: those that are printable as they are, then the rest."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _clip_style(merges: Merges) -> tokenizers.Tokenizer:
    """CLIP numbers its tokens so: bytes, bytes that end a word, merges by rank, start, end."""
    alphabet = _bytes()
    tokens = [*alphabet, *(c + SUFFIX for c in alphabet), *(left + right for left, right in merges), SOT, EOT]
    return _around({token: i for i, token in enumerate(tokens)}, merges)


def _around(vocab: dict[str, int], merges: Merges) -> tokenizers.Tokenizer:
    """Vocabulary and merges with CLIP's way of splitting words, complete enough that the saved file works by itself."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix=SUFFIX))
    bpe.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(SUFFIX, " ")])
    if EOT in vocab:
        bpe.add_special_tokens([SOT, EOT])
        bpe.post_processor = processors.TemplateProcessing(single=f"{SOT} $A {EOT}", special_tokens=[(SOT, vocab[SOT]), (EOT, vocab[EOT])])
    return bpe
