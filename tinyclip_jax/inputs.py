"""Preprocessing and tokenizer of a CLIP, and the defaults for a checkpoint that has none."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.data.bad import BadMode
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import Found, find, write
from heirloom.common.data.sources import Source, open_source
from heirloom.common.data.text import FILES, Tokenizer
from heirloom.common.errors import InputError, remark
from tinyclip_jax.model import TextConfig

if TYPE_CHECKING:
    from tinyclip_jax.config import Config

CACHE = "cache:"  # prefix of `teacher`: embeddings that `heirloom cache` stored

CLIP_VOCAB = 49408
_FOREIGN = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")  # tokenizers of other kinds: BERT, SentencePiece


def preprocess_of(donor: Donor) -> Found:
    """Read the preprocessing of a CLIP's folder; without one, CLIP's default."""
    return find(donor.folder, donor.format, donor.cfg.image.size, Preprocess(donor.cfg.image.size), "CLIP's own")


def tokenizer_of(donor: Donor) -> Tokenizer | None:
    """Read a CLIP folder's tokenizer; else CLIP's own, with a remark, if the vocabulary has its size, else None.

    Also None for a folder with a tokenizer of another kind. Raises InputError for a tokenizer that is damaged or does
    not fit the model.
    """
    if any((donor.folder / name).is_file() for name in FILES):
        tokenizer = Tokenizer.load(donor.folder)
        check_tokenizer(tokenizer, donor.cfg.text, str(donor.folder))
        return tokenizer
    if any((donor.folder / name).is_file() for name in _FOREIGN):
        return None
    if donor.cfg.text.vocab != CLIP_VOCAB:
        return None
    remark(f"tokenizer: {donor.folder} has none; CLIP's is assumed, because the vocabulary has its size")
    return Tokenizer.clip()


def check_tokenizer(tokenizer: Tokenizer, text: TextConfig, name: str) -> None:
    """Check that the text tower has every id of the tokenizer and pools at its end token. Raises InputError."""
    if tokenizer.vocab_size > text.vocab:
        ids = f"{tokenizer.vocab_size} ids, text.vocab is {text.vocab}"
        raise InputError(f"{name}: the tokenizer has {ids}: give the tokenizer of this model")
    if text.eot is not None and text.eot != tokenizer.eot:
        ends = f"ends captions with id {tokenizer.eot}, text.eot is {text.eot}"
        raise InputError(f"{name}: the tokenizer {ends}: give the tokenizer of this model")
    if text.eot is None and tokenizer.largest_word > tokenizer.eot:
        end = f"the tokenizer's end token is {tokenizer.eot}, and ids of words go up to {tokenizer.largest_word}"
        needed = f"set text.eot to {tokenizer.eot}, or give a tokenizer whose end token has the largest id"
        raise InputError(f"{name}: {end}; this text tower pools at the largest id: {needed}")


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Write the tokenizer and preprocessing of a checkpoint into another folder, as files of `format`."""
    write(preprocess_of(donor).announced(), destination, format)
    tokenizer = tokenizer_of(donor)
    if tokenizer is None:
        return
    tokenizer.save(destination)
    if format == "hf":
        about = dict(tokenizer_class="CLIPTokenizer", model_max_length=donor.cfg.text.context, do_lower_case=True)
        sot, eot = tokenizer.names  # without them transformers adds its default tokens to the vocabulary
        ends = dict(bos_token=sot, eos_token=eot, unk_token=eot, pad_token=eot)
        write_json(destination / "tokenizer_config.json", about | ends)


@dataclass(frozen=True)
class Inputs:
    """Preprocessing and tokenizer of a model in training."""

    pre: Preprocess
    tokenizer: Tokenizer

    def save(self, folder: Path) -> None:
        """Write both next to the weights."""
        self.pre.save(folder)
        self.tokenizer.save(folder)


def read_inputs(cfg: "Config", donor: Donor | None, teacher: Donor | None) -> Inputs:
    """Preprocessing and tokenizer of the config, else of the donor, else of the teacher, else of CLIP."""
    origin = donor or teacher
    stored = Path(cfg.teacher.removeprefix(CACHE)) if cfg.teacher.startswith(CACHE) else None
    pre = Preprocess(size=cfg.student.image.size)
    if origin or stored:
        inherited = preprocess_of(origin).announced() if origin else Preprocess.load(stored or "")
        pre = inherited.at(cfg.student.image.size)
    if cfg.tokenizer == "fit":
        tokenizer = Tokenizer.train(captions(open_source(cfg.data), cfg.pipeline.bad), cfg.student.text.vocab)
    elif cfg.tokenizer:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    else:
        found = tokenizer_of(origin) if origin else Tokenizer.load(stored) if stored else Tokenizer.clip()
        if found is None:
            raise InputError(f"{origin and origin.path} has no tokenizer: name one with --tokenizer")
        tokenizer = found
    check_tokenizer(tokenizer, cfg.student.text, "student.text")
    return Inputs(pre, tokenizer)


def captions(source: Source, bad: BadMode = "stop") -> list[str]:
    """All distinct captions and tags, sorted. bad: "replace": those of records that can be read."""
    found: set[str] = set()
    for i in range(len(source)):
        try:
            record = source[i]
        except InputError:
            if bad == "stop":
                raise
            continue  # counted when training reaches it
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        found.update([*texts, *record.get("tags", ())])
    return sorted(found)
