"""Preprocessing and tokenizer of a CLIP, and the defaults for a checkpoint that has none."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.bad import BadMode
from heirloom.common.data.pictures import Background
from heirloom.common.data.pieces import PieceTokenizer
from heirloom.common.data.pipeline import check_record
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import Found, find, write
from heirloom.common.data.sources import Source, open_source
from heirloom.common.data.sources.record import tags_of
from heirloom.common.data.text import Tokenizer
from heirloom.common.data.tokenizer_files import CaptionTokenizer, kind_of, load_tokenizer, same_ids
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json, write_json
from tinyclip_jax.model import TextConfig
from tinyclip_jax.open_clip_folder import CLIP_VOCAB
from tinyclip_jax.vit import VitImageConfig

if TYPE_CHECKING:
    from tinyclip_jax.config import Config

CACHE = "cache:"  # prefix of `teacher`: embeddings that `heirloom cache` stored
HALF = (0.5, 0.5, 0.5)
_FOREIGN = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")  # tokenizers of other kinds: BERT, SentencePiece


def preprocess_of(donor: Donor) -> Found:
    """Read the preprocessing of a CLIP's folder; without one, CLIP's default, or SigLIP's for a SigLIP.

    open_clip's default is CLIP's whatever the loss, so a bias makes no SigLIP: its image tower is timm's ViT.
    """
    size = donor.cfg.image.size
    background: Background = "last" if donor.format in ("open_clip", "original") else "none"
    assumed, whose = Preprocess(size, background=background), "CLIP's own"
    if donor.cfg.logit_bias and isinstance(donor.cfg.image, VitImageConfig):
        assumed, whose = Preprocess(size, mean=HALF, std=HALF, mode="squash"), "SigLIP's own"
    return find(donor.folder, donor.format, size, assumed, whose)


def tokenizer_of(donor: Donor) -> CaptionTokenizer | None:
    """Read a CLIP folder's tokenizer; else CLIP's own, with a remark, if the vocabulary has its size, else None.

    Also None, with a remark, for a tower that pools another token than the end of the text, and has a tokenizer that
    pads like CLIP's or none. Raises InputError for a tokenizer that is damaged or does not fit the model.
    """
    if (found := own_tokenizer(donor)) is not None:
        return found
    if donor.format != "heirloom" and donor.cfg.text.pool != "eot":
        depends = f"this text tower, which pools the {donor.cfg.text.pool} position, depends on it"
        remark(f"tokenizer: that of {donor.folder} is ignored: no file says how captions are padded, and {depends}")
        return None
    if any((donor.folder / name).is_file() for name in _FOREIGN):
        return None
    if donor.cfg.text.vocab != CLIP_VOCAB:
        return None
    remark(f"tokenizer: {donor.folder} has none; CLIP's is assumed, because the vocabulary has its size")
    return Tokenizer.clip()


def own_tokenizer(donor: Donor) -> CaptionTokenizer | None:
    """Read the tokenizer in a CLIP's folder; None where it has none that is read. Raises InputError as above."""
    siglip = donor.format == "hf" and donor.cfg.logit_bias
    assumed, text = "SiglipTokenizer" if siglip else "", donor.cfg.text
    kind = kind_of(donor.folder, assumed)
    if kind == "none" or (kind == "clip" and donor.format != "heirloom" and text.pool != "eot"):
        return None
    tokenizer = load_tokenizer(donor.folder, assumed)
    check_tokenizer(tokenizer, text, str(donor.folder))
    return tokenizer


def check_tokenizer(tokenizer: CaptionTokenizer, text: TextConfig, name: str) -> None:
    """Check that the text tower has every id of the tokenizer and pools at its end token. Raises InputError."""
    if tokenizer.vocab_size > text.vocab:
        ids = f"{tokenizer.vocab_size} ids, text.vocab is {text.vocab}"
        raise InputError(f"{name}: the tokenizer has {ids}: give the tokenizer of this model")
    if text.pool == "eot" and text.eot is not None and text.eot != tokenizer.eot:
        ends = f"ends captions with id {tokenizer.eot}, text.eot is {text.eot}"
        raise InputError(f"{name}: the tokenizer {ends}: give the tokenizer of this model")
    if text.pool == "eot" and text.eot is None and tokenizer.largest_word > tokenizer.eot:
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
    if format in ("hf", "flax"):
        write_json(destination / "tokenizer_config.json", _for_transformers(tokenizer, donor.cfg.text.context))
    if format == "open_clip" and isinstance(tokenizer, PieceTokenizer):
        about = tokenizer.for_transformers(donor.cfg.text.context)
        write_json(destination / "tokenizer_config.json", about)
        _name_in_open_clip(destination / "open_clip_config.json")
    elif format == "open_clip" and not same_ids(tokenizer, Tokenizer.clip()):
        other = "open_clip will load CLIP's tokenizer for this folder, but the model uses another one"
        remark(f"{other}: tokenize captions yourself and pass the ids")


def _for_transformers(tokenizer: CaptionTokenizer, context: int) -> dict[str, Any]:
    """Return the tokenizer_config.json with which transformers makes the same ids."""
    if isinstance(tokenizer, PieceTokenizer):
        return tokenizer.for_transformers(context)
    assert isinstance(tokenizer, Tokenizer)
    about = dict(tokenizer_class="CLIPTokenizer", model_max_length=context, do_lower_case=True)
    sot, eot = tokenizer.names  # without them transformers adds its default tokens to the vocabulary
    return about | dict(bos_token=sot, eos_token=eot, unk_token=eot, pad_token=eot)


def _name_in_open_clip(file: Path) -> None:
    """Let open_clip take the tokenizer of the folder, and not its own, which is CLIP's."""
    config = read_json(file)
    named = dict(hf_tokenizer_name="tokenizer.json", tokenizer_kwargs={"clean": "whitespace"})
    config["model_cfg"]["text_cfg"] |= named
    write_json(file, config)


@dataclass(frozen=True)
class Inputs:
    """Preprocessing and tokenizer of a model in training."""

    pre: Preprocess
    tokenizer: CaptionTokenizer

    def save(self, folder: Path) -> None:
        """Write both next to the weights."""
        self.pre.save(folder)
        self.tokenizer.save(folder)


def read_inputs(cfg: "Config", donor: Donor | None, teacher: Donor | None) -> Inputs:
    """Preprocessing and tokenizer of the config, else of the donor, else of the teacher, else of CLIP."""
    origin = donor or teacher
    stored = Path(cfg.teacher.removeprefix(CACHE)).expanduser() if cfg.teacher.startswith(CACHE) else None
    pre = Preprocess(size=cfg.student.image.size)
    if origin or stored:
        inherited = preprocess_of(origin).announced() if origin else Preprocess.load(stored or "")
        pre = inherited.at(cfg.student.image.size)
    tokenizer = _named_tokenizer(cfg)
    if tokenizer is None:
        tokenizer = tokenizer_of(origin) if origin else load_tokenizer(stored) if stored else Tokenizer.clip()
    if tokenizer is None:
        raise InputError(f"{origin and origin.path} has no tokenizer: name one with --tokenizer")
    check_tokenizer(tokenizer, cfg.student.text, "student.text")
    if teacher and (cfg.tokenizer or donor):
        _check_teacher(teacher, tokenizer, pre)
    return Inputs(pre, tokenizer)


def teacher_inputs(cfg: "Config", donor: Donor | None, teacher: Donor | None) -> Inputs:
    """Preprocessing and tokenizer of the teacher, for stored embeddings; the config's tokenizer where it has none."""
    assert teacher is not None
    pre, tokenizer = preprocess_of(teacher).announced(), own_tokenizer(teacher)
    if tokenizer is None:
        tokenizer = _named_tokenizer(cfg) or tokenizer_of(teacher)
    if tokenizer is None:
        raise InputError(f"{teacher.path} has no tokenizer: name one with --tokenizer")
    check_tokenizer(tokenizer, teacher.cfg.text, "teacher.text")
    return Inputs(pre, tokenizer)


def _named_tokenizer(cfg: "Config") -> CaptionTokenizer | None:
    if cfg.tokenizer == "fit":
        return Tokenizer.train(captions(open_source(cfg.data), cfg.pipeline.bad), cfg.student.text.vocab)
    return load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None


def _check_teacher(teacher: Donor, tokenizer: CaptionTokenizer, pre: Preprocess) -> None:
    """Raises InputError when the teacher's own tokenizer makes other ids, or its own preprocessing other pixels: it
    would see the student's.
    """
    own, theirs = own_tokenizer(teacher), preprocess_of(teacher)
    store = "store its embeddings with heirloom cache RECIPE DIR, and train with --teacher cache:DIR"
    if own is not None and not same_ids(own, tokenizer):
        raise InputError(f"the teacher {teacher.path} has a different tokenizer from the student's: {store}")
    if own is None:
        check_tokenizer(tokenizer, teacher.cfg.text, str(teacher.path))
        remark(f"the teacher {teacher.path} has no tokenizer that heirloom can use; the student's is used")
    if not theirs.origin:
        remark(f"the teacher {teacher.path} does not say how it normalises pictures; the student's way is used")
    elif not np.allclose((theirs.pre.mean, theirs.pre.std), (pre.mean, pre.std), atol=1e-2):
        statistics = f"(mean {theirs.pre.mean}, the student's {pre.mean})"
        raise InputError(f"the teacher {teacher.path} normalises pictures otherwise {statistics}: {store}")


def captions(source: Source, bad: BadMode = "stop") -> list[str]:
    """All distinct captions and tags, sorted. bad: "replace": those of records that can be read."""
    found: set[str] = set()
    for i in range(len(source)):
        try:
            record = source[i]
            check_record(record)
        except InputError:
            if bad == "stop":
                raise
            continue  # counted when training reaches it
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        found.update([*texts, *(tags_of(record) if "tags" in record else ())])
    if not found:
        check_record(source[0])
    return sorted(found)
