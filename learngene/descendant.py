"""`heirloom expand`: initialise a descendant from a gene, without training."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError, remark
from heirloom.common.train import recipe
from heirloom.common.vit.model import VitConfig, counts
from learngene.config import Config
from learngene.expand import layer_map
from learngene.inputs import preprocess_of
from learngene.train import inherited_sidecars
from learngene.zoo import FAMILY, WIDTHS


def expand_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Run `heirloom expand`: a descendant of another depth, and optionally another resolution or number of classes.

    An ordinary ViT of the same depth is only resized. Raises InputError for an ordinary ViT of another depth.
    """
    if donor.family is not FAMILY:
        raise InputError(f"{donor.path} is a {donor.family.name}: give a gene or a ViT")
    layers = counts(args.map, "--map") if args.map else ()
    student = descendant(donor.cfg, args.depth, size=args.size, classes=args.classes, layers=layers)
    pre = preprocess_of(donor).announced()
    cfg = Config(student=student, layers=layers, preprocess=pre, seed=args.seed)
    sidecars = partial(inherited_sidecars, cfg, pre=preprocess_for(pre, student, args.size))
    parts = replace(cfg.parts(), inherited_sidecars=sidecars)
    return recipe.inherit(cfg, parts, args.destination, donor=donor, force=args.force)


def preprocess_for(pre: Preprocess, student: VitConfig, size: int | None) -> Preprocess:
    """The gene's preprocessing for a descendant. size: that was asked for, or None.

    A model of any size keeps its gene's: DINOv2 has positions for 518 pixels and reads 224.
    """
    return pre if student.any_size and size is None else pre.at(student.size)


def descendant(
    gene: VitConfig, depth: int, *, size: int | None = None, classes: int | None = None, layers: Sequence[int] = ()
) -> VitConfig:
    """Config of a descendant. size, classes: None for those of the gene. layers: the map that will be used, if given.

    Remarks a choice of stages that no paper gives, and a projection that makes way for a classifier. Raises InputError
    for a number below 1, and for an ordinary ViT of another depth.
    """
    for name, value in (("depth", depth), ("size", size), ("classes", classes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: choose 1 or more")
    if gene.gene == "none" and (depth != gene.layers or layers):
        recipe = f"learngene/vit_{next((name for name, width in WIDTHS.items() if width == gene.width), 's')}"
        how = f"heirloom inherit {recipe} DEST --method stack --donor SOURCE --student.layers {depth}"
        ordinary = f"this is an ordinary ViT of {gene.layers} layers"
        raise InputError(f"expand changes the depth of genes only, and {ordinary}: {how}")
    if classes and gene.joint:
        remark(f"the new classifier reads the pooled features; their projection to {gene.joint} is left out")
        gene = replace(gene, joint=0)
    student = replace(gene.of_depth(depth), size=size or gene.size, classes=classes or gene.classes)
    if size:
        student = replace(student, size_width=None)
        student.filled()
    if gene.gene == "sws" and depth < gene.layers and not layers:
        kept = layer_map(depth, gene.layers)
        remark(f"no rule is published for {depth} layers from {gene.layers} stages; using {', '.join(map(str, kept))}")
    return student
