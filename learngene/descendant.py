"""`heirloom expand`: initialise a descendant from a gene, without training."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from heirloom.common.checkpoint.family import Donor
from heirloom.common.errors import InputError
from heirloom.common.train import recipe
from learngene.config import Config
from learngene.expand import layer_map
from learngene.inputs import preprocess_of
from learngene.vit import counts
from learngene.zoo import FAMILY


def expand_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Run `heirloom expand`: a descendant of another depth, and optionally another resolution or number of classes.

    An ordinary ViT of the same depth is only resized. Raises InputError for an ordinary ViT of another depth.
    """
    for name, value in (("--depth", args.depth), ("--size", args.size), ("--classes", args.classes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: choose 1 or more")
    if donor.family is not FAMILY:
        raise InputError(f"{donor.path} is a {donor.family.name}: give a gene or a ViT")
    size, classes = args.size or donor.cfg.size, args.classes or donor.cfg.classes
    student = replace(donor.cfg.of_depth(args.depth), size=size, classes=classes)
    if args.size:
        student = replace(student, size_width=None)
        student.filled()
    layers = counts(args.map, "--map") if args.map else ()
    if donor.cfg.gene == "sws" and args.depth < donor.cfg.layers and not layers:
        kept = layer_map(args.depth, donor.cfg.layers)
        rule = f"no rule is published for {args.depth} layers from {donor.cfg.layers} stages"
        print(f"note: {rule}; using {', '.join(map(str, kept))}")
    cfg = Config(student=student, layers=layers, preprocess=preprocess_of(donor).announced(), seed=args.seed)
    return recipe.inherit(cfg, cfg.parts(), args.destination, donor=donor, force=args.force)
