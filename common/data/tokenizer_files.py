"""Reads the tokenizer in a folder, of whatever kind: ours, of transformers, or of open_clip.

A tokenizer.json says nearly all. What transformers' classes and open_clip do besides is added to it as normalizers, so
that what is written is complete.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.data.pieces import REPAIR, PieceTokenizer
from heirloom.common.data.sentencepiece import CONTROL, NORMAL, UNKNOWN, read_sentencepiece
from heirloom.common.data.text import FILES, Tokenizer, check_ids, completed, read_about, readable
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json

JSON, SPIECE, CONFIG, NAMES = "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"
OPEN_CLIP = "open_clip_config.json"
SPACE = "\u2581"  # SentencePiece's
Kind = Literal["clip", "pieces", "siglip", "none"]

# What SiglipTokenizer and open_clip do to a text, as normalizers of the library. Python's str.lower writes a sigma that
# ends a word as ς; the library's does not. Python's white space includes four separators that the library's does not.
_LOWER = [normalizers.Replace(Regex(r"(?<=\p{L})\u03a3(?!\p{L})"), "\u03c2"), normalizers.Lowercase()]
_PUNCTUATION = normalizers.Replace(Regex("[" + "".join(f"\\x{ord(c):02x}" for c in string.punctuation) + "]"), "")
_ONE_SPACE = normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " ")
_CANONICAL = [*_LOWER, _PUNCTUATION, _ONE_SPACE]
_OPEN_CLIP = {
    "whitespace": [_ONE_SPACE, normalizers.Strip()],
    "lower": [_ONE_SPACE, normalizers.Strip(), *_LOWER],
    "canonicalize": [normalizers.Replace("_", " "), _PUNCTUATION, *_LOWER, _ONE_SPACE, normalizers.Strip()],
}
# Classes of transformers that are read, and the token with which each pads unless its files say another.
_PADDING = {"SiglipTokenizer": "</s>", "Siglip2Tokenizer": "<pad>", "GemmaTokenizer": "<pad>"}
_PADDING |= {"XLMRobertaTokenizer": "<pad>", "T5Tokenizer": "<pad>"}
_AS_WRITTEN = (None, "PreTrainedTokenizer", "TokenizersBackend")
# Steps of a tokenizer.json that do what transformers' classes do, which build their own and ignore these.
_STEPS = {
    "normalizer": ("Precompiled", "Strip", "Replace", "Lowercase"),
    "pre_tokenizer": ("WhitespaceSplit", "Metaspace", "Split"),
}


class CaptionTokenizer(Protocol):
    """Converts captions to the ids that a text tower takes."""

    eot: int
    """Id of the token that ends a caption."""
    pad: int
    """Id of padding."""
    vocab_size: int
    """One more than the largest id."""
    largest_word: int
    """Largest id among the tokens that were not added."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of each token."""

    def __call__(self, texts: Any, context: int) -> np.ndarray:
        """Returns ids, int32 [n, context] (n = 1 for a string), the end token last in captions that are too long."""

    def save(self, folder: str | Path) -> Path:
        """Writes what `load_tokenizer` reads."""

    def decode(self, ids: Any) -> str:
        """Returns the text of one row."""


def load_tokenizer(path: str | Path, assumed: str = "") -> CaptionTokenizer:
    """Reads a tokenizer.json, or the tokenizer of a folder: of CLIP's kind, SigLIP, SigLIP 2, or with XLM-R's pieces.

    assumed: transformers' class for a spiece.model in a folder that names none. Raises InputError when files are
    missing, damaged or disagree, and for what transformers or open_clip would do to a text that is not known here.
    """
    path = Path(path)
    kind = kind_of(path, assumed)
    file, folder = _places(path)
    if kind in ("clip", "none"):
        return _clip(path, folder)
    with readable(path):
        return _from_spiece(folder) if kind == "siglip" else _from_json(file, folder)


def kind_of(path: str | Path, assumed: str = "") -> Kind:
    """Returns which reader a file or folder needs.

    siglip: a spiece.model with what SiglipTokenizer does. pieces: a tokenizer.json with SentencePiece's pieces, Unigram
    or BPE that falls back to bytes. clip: any other, and a damaged one. none: there is no tokenizer.
    """
    file, folder = _places(Path(path))
    if Path(path).is_dir() and (folder / SPIECE).is_file() and (_class(folder) or assumed) == "SiglipTokenizer":
        return "siglip"
    if not file.is_file():
        return "clip" if any((folder / name).is_file() for name in FILES) else "none"
    try:
        model = read_json(file).get("model")
    except InputError:
        return "clip"
    pieces = isinstance(model, dict) and (isinstance(model.get("vocab"), list) or model.get("byte_fallback"))
    return "pieces" if pieces else "clip"


def same_ids(a: CaptionTokenizer, b: CaptionTokenizer) -> bool:
    """Returns whether two tokenizers give every caption the same ids, as far as vocabulary, ends and cleaning show."""
    probes = ["", "A photo of TWO cats, 3 dogs!", "it's caf\u00e9  au lait &amp; more_more", "\u4e2d\u6587"]
    return a.vocabulary == b.vocabulary and bool((a(probes, 77) == b(probes, 77)).all())


def _places(path: Path) -> tuple[Path, Path]:
    """Returns the tokenizer.json and the folder."""
    return (path, path.parent) if path.is_file() else (path / JSON, path)


def _class(folder: Path) -> str | None:
    """Returns the class of transformers that reads a folder, without "Fast"."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    name = config.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{folder / CONFIG}: tokenizer_class is {name!r}; it must be a name")
    return name.removesuffix("Fast") if name else None


def _from_json(file: Path, folder: Path) -> PieceTokenizer:
    config = _settings(folder)
    check_ids(file)
    pipeline = completed(tokenizers.Tokenizer.from_file(str(file)), {"added": read_about(folder)["added"]})
    kind = _class(folder)
    if kind not in (*_AS_WRITTEN, *_PADDING):
        raise InputError(f"{CONFIG}: tokenizer_class is {kind!r}; only {', '.join(_PADDING)} are known to be read here")
    if kind not in _AS_WRITTEN:
        _check_steps(read_json(file), str(kind))
    repair, first = config.boolean(REPAIR, False), _of_class(kind, config, folder)
    if (folder / OPEN_CLIP).is_file():
        repair, first = True, _of_open_clip(folder)
    if first:
        steps = [*first, *([pipeline.normalizer] if pipeline.normalizer else [])]
        pipeline.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    pad = _padding(pipeline, folder, _PADDING.get(str(kind)))
    tokenizer = PieceTokenizer(pipeline, pad, bool(repair))
    for name, there in (("add_bos_token", bool(tokenizer.starts)), ("add_eos_token", True)):
        if config.boolean(name, there) not in (there, None):
            raise InputError(f"{CONFIG}: {name} is {not there}, and {file.name} does otherwise; use files of one model")
    return tokenizer


def _settings(folder: Path) -> Fields:
    """Reads tokenizer_config.json. Raises InputError for settings with which transformers would make other ids."""
    fields = Fields(read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}, CONFIG)
    fields.fixed("truncation_side", "right", None)
    left = _class(folder) == "Siglip2Tokenizer" and "padding_side" not in fields
    if left or fields.text("padding_side", "right") != "right":
        raise InputError(f"{CONFIG}: padding_side is left, and text towers are trained with right: set it to right")
    return fields


def _of_class(kind: str | None, config: Fields, folder: Path) -> list[Any]:
    """Returns the normalizers that a class of transformers has besides those of its file."""
    lower = config.boolean("do_lower_case", True)
    if kind == "SiglipTokenizer":
        return [*(_CANONICAL if lower else _CANONICAL[len(_LOWER) :]), normalizers.Strip()]
    if kind == "Siglip2Tokenizer":
        return [normalizers.Lowercase()]
    if kind == "GemmaTokenizer" and lower and not (folder / OPEN_CLIP).is_file():
        why = "as SigLIP 2 was trained; transformers' GemmaTokenizer, which the folder names, keeps capitals"
        remark(f"tokenizer: captions of {folder} are lower-cased, {why}")
        return [normalizers.Lowercase()]
    return []


def _of_open_clip(folder: Path) -> list[Any]:
    """Returns what open_clip does to a text, except for the repair that `PieceTokenizer` does."""
    text = Fields(read_json(folder / OPEN_CLIP), OPEN_CLIP).object("model_cfg").object("text_cfg")
    text.fixed("tokenizer_mode", None, "")
    options = text.object("tokenizer_kwargs")
    cleaning = options.choice("clean", _OPEN_CLIP, "whitespace")
    options.fixed("strip_sep_token", False)
    options.done("the tokens of a caption")
    return cleaning


def _clip(path: Path, folder: Path) -> Tokenizer:
    """Reads a tokenizer of CLIP's kind. Raises InputError for what open_clip's HFTokenizer would do to a text besides.

    Its padding is that of the files, which only a text tower without causal mask sees.
    """
    whole = Fields(read_json(folder / OPEN_CLIP) if (folder / OPEN_CLIP).is_file() else {}, OPEN_CLIP)
    text = whole.object("model_cfg").object("text_cfg")
    if not text.value("hf_tokenizer_name"):
        return Tokenizer.load(path)
    tokenizer = Tokenizer.load(path, pads=text.boolean("no_causal_mask", False))
    text.fixed("tokenizer_mode", None, "")
    options = text.object("tokenizer_kwargs")
    options.fixed("clean", "whitespace", *["lower"] * bool((tokenizer("A", 3) == tokenizer("a", 3)).all()))
    options.fixed("strip_sep_token", False)
    options.done("the tokens of a caption")
    return tokenizer


def _check_steps(whole: Mapping[str, Any], kind: str) -> None:
    """Refuses steps of a tokenizer.json that the class, which builds its own, does not have."""
    for part, known in _STEPS.items():
        top = whole.get(part) or {}
        for step in top.get("normalizers", top.get("pretokenizers", [top])) if top else []:
            if step.get("type") not in known or str(step.get("content", "")).strip(f" {SPACE}"):
                raise InputError(f"{JSON}: its {part} has the step {step.get('type')!r}, which {kind} does not have")


def _padding(pipeline: tokenizers.Tokenizer, folder: Path, usual: str | None) -> int:
    """Returns the id of padding: of the config, else of tokenizer.json, else of the class."""
    named: Any = None
    for name in (CONFIG, NAMES):
        if named is None and (folder / name).is_file():
            named = read_json(folder / name).get("pad_token")
    token = named.get("content") if isinstance(named, dict) else named
    written = pipeline.padding
    if token is None and written is not None:
        if written["direction"] != "right" or pipeline.id_to_token(written["pad_id"]) != written["pad_token"]:
            raise InputError(f"{JSON}: its padding is {written}; only the id of pad_token, on the right, can be read")
        return int(written["pad_id"])
    token = usual if token is None else token
    if token is None:
        raise InputError(f"nothing says with which token captions are padded: give {CONFIG} its pad_token")
    found = pipeline.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise InputError(f"the padding token {token!r} is not in the vocabulary; use files of one model")
    return int(found)


def _from_spiece(folder: Path) -> PieceTokenizer:
    """Builds what SiglipTokenizer does with a spiece.model."""
    config = _settings(folder)
    found = read_sentencepiece(folder / SPIECE)
    if others := set(found.kinds) - {NORMAL, UNKNOWN, CONTROL}:
        raise InputError(f"{SPIECE} has pieces of the type {min(others)}, which SigLIP's does not have")
    if found.kinds.count(UNKNOWN) != 1:
        raise InputError(f"{SPIECE} has {found.kinds.count(UNKNOWN)} tokens for unknown text, and needs one")
    pipeline = tokenizers.Tokenizer(models.Unigram(found.pieces, unk_id=found.kinds.index(UNKNOWN)))
    canonical = _CANONICAL if config.boolean("do_lower_case", True) else _CANONICAL[len(_LOWER) :]
    # The class puts SentencePiece's space before the text; a charsmap with this rule makes it a plain one.
    steps: list[Any] = [normalizers.Replace(SPACE, " "), *canonical, normalizers.Prepend(SPACE)]
    steps += [normalizers.Precompiled(found.charsmap)] if found.charsmap else []
    steps += [normalizers.Replace(Regex(" +"), SPACE), normalizers.Replace(Regex(f"{SPACE}+$"), "")]
    pipeline.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    pipeline.decoder = decoders.Metaspace(replacement=SPACE)  # type: ignore[assignment]
    for i, kind in enumerate(found.kinds):
        if kind in (UNKNOWN, CONTROL):
            pipeline.add_special_tokens([AddedToken(found.pieces[i][0], special=True, normalized=False)])
    completed(pipeline, {"added": read_about(folder)["added"]})
    if pipeline.get_vocab_size() > len(found.pieces):
        none = "SigLIP's tokenizer has none: use files of one model"
        raise InputError(f"{CONFIG} adds tokens to those of {SPIECE}; {none}")
    end = _named(config, "eos_token", "</s>")
    if (end_id := pipeline.token_to_id(end)) is None:
        raise InputError(f"the end token {end!r} is not in the vocabulary; use files of one model")
    ending = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, end_id)])
    pipeline.post_processor = ending  # type: ignore[assignment]
    return PieceTokenizer(pipeline, _padding(pipeline, folder, _PADDING["SiglipTokenizer"]))


def _named(config: Fields, name: str, usual: str) -> str:
    token = config.value(name, usual)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise InputError(f"{CONFIG}: {name} is {token!r}; it must be a token")
    return token
