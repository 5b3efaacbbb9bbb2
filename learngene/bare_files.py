"""Read ViTs in files without a config (DeiT, timm, SWS, TLEG); what shapes do not give becomes a guess."""

import re
from dataclasses import replace
from pathlib import Path

from heirloom.common.checkpoint.family import Found, Guess, Read
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.vit import timm_architectures
from heirloom.common.vit.model import VitConfig
from heirloom.common.vit.shapes import HEADS, check_square, depth, refuse_other_parts, shapes
from learngene.trainer_arguments import Trained, trained_as

_SWS_LAYOUTS = {5: (3, 3, 4, 3, 3)}  # released
_SWS_HEADS, _SWS_EPS = 12, 1e-5  # of both released auxiliary nets
_TLEG_DEPTH = 12
_NOT_STORED = "the weights do not contain it"
# Names of facebookresearch's deit and dinov2, as patterns, and timm's.
_ORIGINAL = {
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # in chunks, in which a block keeps its number
    r"\.gamma_([12])$": r".ls\1.gamma",
    r"^register_tokens$": "reg_token",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_LONGEST = 4  # largest aspect ratio of a picture that is considered possible
# For models with a class token, by pool: the other pool that has the same tensors.
_TWINS = {"cls": "the mean of the patches (norm_mean)", "mean_norm": "the class token with a separate norm (cls)"}


def read_deit(found: Found) -> Read | None:
    """Read a file in timm's names; settings come from a trainer's arguments in the file, or are guessed."""
    needed = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    if not needed <= found.tensors.keys() or (found.folder / "config.json").is_file():
        return None
    cfg = shapes(found.tensors, "blocks.0.{}.weight", depth(found.tensors, r"blocks\.(\d+)\."))
    refuse_other_parts(found.tensors)
    check_square(cfg, found.tensors)
    trained = trained_as(found.about)
    return _of_timm(cfg, trained) if trained.name in timm_architectures.table() else _of_another(cfg, trained)


def _of_timm(cfg: VitConfig, trained: Trained) -> Read:
    """Read the model that timm builds for a name and arguments."""
    args = timm_architectures.arguments(trained.name, trained.passed, trained.where)
    size = () if "img_size" in args or cfg.size == 224 else square(cfg, _NOT_STORED)
    cfg = timm_architectures.settings(args, cfg)
    heads = timm_architectures.settings(timm_architectures.described(cfg, trained.sizes, trained.where), cfg).heads
    why = f"timm's {trained.name} has as many, and num_heads is {heads} in {trained.where}"
    return Read(cfg, (*size, *([Guess("heads", cfg.heads, why)] if heads != cfg.heads else [])))


def _of_another(cfg: VitConfig, trained: Trained) -> Read:
    """Read a model whose name is not timm's, or missing, from its shapes and the arguments passed with it."""
    given = {**trained.sizes, **trained.passed}
    described = timm_architectures.settings(timm_architectures.described(cfg, given, trained.where), cfg)
    if not given.keys() & {"class_token", "global_pool", "fc_norm"}:
        described = replace(described, tokens=cfg.tokens, pool=cfg.pool)
    foreign = f"{_NOT_STORED}, and the name it was trained under, {trained.name!r}, is not timm's"
    why = foreign if trained.name else _NOT_STORED
    guesses = [] if "act_layer" in given else [Guess("activation", cfg.activation, why)]
    guesses.append(Guess("eps", f"{described.eps:g}", why))
    guesses += [] if "num_heads" in given else _heads(cfg, why)
    guesses += [] if "img_size" in given else square(cfg, why)
    if "global_pool" not in given and cfg.tokens != "none" and cfg.pool in _TWINS:
        guesses.append(Guess("pool", cfg.pool, f"{why}: {_TWINS[cfg.pool]} has the same tensors"))
    return Read(described, tuple(guesses))


def _heads(cfg: VitConfig, why: str) -> tuple[Guess, ...]:
    if not cfg.heads:
        why = f"the number of heads is unknown, because no published ViT has a width of {cfg.width}"
        return (Guess("heads", None, why),)
    return (Guess("heads", cfg.heads, f"{why}, and published ViTs of this width have as many"),)


def square(cfg: VitConfig, why: str) -> tuple[Guess, ...]:
    """The guess that pictures are square, if a rectangle of at most 1 : 4 has the same number of patches."""
    side = cfg.grid[0]
    count = side**2
    for rows in range(side - 1, 0, -1):
        if count % rows == 0 and rows * rows * _LONGEST >= count:
            other = f"{rows * cfg.patch} x {count // rows * cfg.patch}"
            also = f"{why}: pictures of {other} px have as many patches, and only squares are read"
            return (Guess("size", cfg.size, also),)
    return ()


def clean(key: str) -> str:
    """Rename a key of facebookresearch's DeiT III or DINOv2 to timm's name for it."""
    for theirs, ours in _ORIGINAL.items():
        key = re.sub(theirs, ours, key)
    return key


def timm_names(cfg: VitConfig, tensors: Tensors) -> Tensors:
    """Rename the norm to its name for this pool: timm may call the norm of a class token `fc_norm` too.

    The mask token of DINOv2's training is left out: no picture without a mask has one.
    """
    tensors = {key: value for key, value in tensors.items() if key != "mask_token"}
    if cfg.pool != "cls" or "norm.weight" in tensors:
        return tensors
    return {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in tensors.items()}


def write_deit(cfg: VitConfig, folder: Path) -> None:
    ordinary(cfg, "DeiT")
    plain(cfg, "a file without a config")
    if cfg.activation != "gelu":
        raise InputError(f"DeiT's files have exact GELU, this model {cfg.activation}; write --to timm or --to heirloom")
    _published_heads(cfg, cfg.heads == HEADS.get(cfg.width))
    if cfg.eps != 1e-6:
        eps = f"an eps of 1e-6, this model {cfg.eps:g}"
        raise InputError(f"DeiT's files have {eps}: convert with --set eps=1e-6 if its outputs may differ")
    if (cfg.tokens, cfg.pool) == ("cls", "norm_mean") or (cfg.tokens == "cls+dist" and cfg.pool != "cls+dist"):
        # timm's distilled ViT has two heads.
        instead = "write --to timm" if cfg.tokens == "cls" else "keep the heirloom format"
        pooled = f"tokens {cfg.tokens!r} are pooled as {cfg.pool!r}"
        raise InputError(f"a file without a config cannot store that {pooled}; {instead}")


def _published_heads(cfg: VitConfig, known: bool) -> None:
    if not known:
        heads = f"{cfg.heads} heads at a width of {cfg.width}"
        raise InputError(f"a file without a config cannot store {heads}; write --to timm, or keep the heirloom format")


def ordinary(cfg: VitConfig, format: str) -> None:
    """Raises InputError for a gene, which only its own format can hold."""
    if cfg.gene != "none":
        raise InputError(f"a gene is no {format} model: expand it first (heirloom expand GENE DEST --depth N)")


def plain(cfg: VitConfig, what: str) -> None:
    """Raises InputError for a model that is not DeiT's ViT: a rectangle, one with options, or one without a head."""
    others = {name: value for name in ("size_width", "any_size") if (value := getattr(cfg, name))} | cfg.options
    others |= {"pool": cfg.pool} if cfg.pool in ("map", "cls+mean") else {}
    others |= {"classes": 0} if not cfg.classes else {}
    if others:
        name, value = next(iter(others.items()))
        instead = "write --to timm, or keep the heirloom format"
        raise InputError(f"{name} is {value!r}, which {what} does not hold; {instead}")


def read_sws(found: Found) -> Read | None:
    if "blocks.block.attn.qkv.instances.0.weight" not in found.tensors:
        return None
    stages = depth(found.tensors, r"blocks\.block\.attn\.qkv\.instances\.(\d+)\.")
    layout = _SWS_LAYOUTS.get(stages, (1,) * stages)
    why = "nothing is released for as many stages, so one layer for each"
    if stages in _SWS_LAYOUTS:
        why = "the release's for as many stages"
    cfg = shapes(found.tensors, "blocks.block.{}.instances.0.weight", stages)
    cfg = replace(cfg, heads=_SWS_HEADS, eps=_SWS_EPS, gene="sws", layout=layout)
    return _gene_read(cfg, found, f"{_NOT_STORED}; {why}", f"{_NOT_STORED}, and both released nets have as many")


def read_tleg(found: Found) -> Read | None:
    if "blocks.block.attn.qkv.instances.0.weight_base" not in found.tensors:
        return None
    cfg = shapes(found.tensors, "blocks.block.{}.instances.0.weight_base", 2)
    cfg = replace(cfg, eps=_SWS_EPS, gene="tleg", layout=(_TLEG_DEPTH,))
    depth = f"{_NOT_STORED}; the release's depth"
    return _gene_read(cfg, found, depth, f"{_NOT_STORED}, and published ViTs of this width have as many")


def _gene_read(cfg: VitConfig, found: Found, layout: str, heads: str) -> Read:
    refuse_other_parts(found.tensors)
    plain(cfg, f"a file of {cfg.gene}")
    check_square(cfg, found.tensors)
    guesses = [Guess("layout", ",".join(map(str, cfg.layout)), layout)]
    guesses += [Guess("heads", cfg.heads, heads)] if cfg.heads else _heads(cfg, heads)
    guesses += square(cfg, _NOT_STORED)
    released = f"{_NOT_STORED}; the release's"
    guesses += [Guess("activation", cfg.activation, released), Guess("eps", f"{cfg.eps:g}", released)]
    return Read(cfg, tuple(guesses))


def write_sws(cfg: VitConfig, folder: Path) -> None:
    _gene(cfg, "sws", cfg.layout == _SWS_LAYOUTS.get(cfg.layers))
    _published_heads(cfg, cfg.heads == _SWS_HEADS)


def write_tleg(cfg: VitConfig, folder: Path) -> None:
    _gene(cfg, "tleg", cfg.layout == (_TLEG_DEPTH,))
    _published_heads(cfg, cfg.heads == HEADS.get(cfg.width))


def _gene(cfg: VitConfig, kind: str, released: bool) -> None:
    if cfg.gene != kind:
        raise InputError(f"--to {kind} needs a gene of {kind.upper()}, which this model is not")
    plain(cfg, f"a file of {kind}")
    if not released or cfg.eps != _SWS_EPS or cfg.activation != "gelu":
        other = f"layout {cfg.layout} and eps {cfg.eps:g}"
        raise InputError(f"a file without a config cannot store {other}, only released ones; keep the heirloom format")
