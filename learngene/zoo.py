"""Models by name: the published sizes of auxiliary nets and descendants."""

from dataclasses import replace
from functools import partial
from typing import Any

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family, Outline
from heirloom.common.checkpoint.hub import locate
from heirloom.common.nn.functional import functional
from heirloom.common.typed import from_json
from heirloom.common.vit.model import Vit, VitConfig, macs, parameters
from learngene import convnet
from learngene.formats import FORMATS, LOOKALIKES
from learngene.inputs import sidecars
from learngene.verify import logits, verify

FAMILY = Family(
    "learngene",
    Vit,
    partial(from_json, VitConfig),
    FORMATS,
    sidecars,
    verify,
    parameters,
    macs,
    lookalikes=LOOKALIKES,
    outputs=logits,
)
FAMILIES = (FAMILY, convnet.FAMILY)

STAGES = (3, 3, 4, 3, 3)  # SWS's released layout
WIDTHS = {"ti": 192, "s": 384, "b": 768}

# Replaces LeViT-384, the teacher of SWS, whose checkpoint only an old timm can read.
TEACHER = "hf:facebook/deit-base-distilled-patch16-224"
PUBLISHED = {
    TEACHER: VitConfig(width=768, heads=12, hidden=3072, layers=12, tokens="cls+dist", pool="cls+dist", eps=1e-12)
}


def vit(size: str, depth: int = 12) -> VitConfig:
    """Config of the descendant ti, s or b with `depth` layers: DeiT's widths, heads of 64 channels, no class token."""
    width = WIDTHS[size]
    return VitConfig(width=width, heads=width // 64, hidden=4 * width, layers=depth, drop_path=0.1)


def auxiliary(size: str, layout: tuple[int, ...] = STAGES) -> VitConfig:
    """Config of the auxiliary net that trains a gene: Aux-S and Aux-B of SWS, and the same for Ti."""
    return replace(vit(size), layers=len(layout), gene="sws", layout=layout)


def paper_auxiliary(size: str) -> VitConfig:
    """Config of the released auxiliary net: 12 heads at every width and an eps of 1e-5 (traps T1, T3)."""
    return replace(auxiliary(size), heads=12, eps=1e-5)


def paper_vit(size: str, depth: int = 12) -> VitConfig:
    """Config of the released descendant: it normalises the mean, not the tokens (T2); timm's heads and eps."""
    return replace(vit(size, depth), pool="mean_norm")


def outline(source: str) -> Donor | Outline:
    """Open a teacher for `heirloom compile`; the shapes of the published one are known, so it is not downloaded."""
    cfg = PUBLISHED.get(source)
    return Outline(FAMILY, cfg, functional(Vit, cfg)) if cfg else open_classifier(source)


def open_classifier(source: str, **overrides: Any) -> Donor:
    """Open a ViT, a gene or a convnet by SOURCE, lazily. Raises InputError when it is missing or none of them."""
    return open_donor(locate(source), FAMILIES, **overrides)
