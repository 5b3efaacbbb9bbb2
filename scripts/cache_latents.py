"""`heirloom cache` without a recipe: encodes labelled pictures and their mirror images once, to the moments that
`heirloom train lit/...` reads.

    python scripts/cache_latents.py imagenet/train data/imagenet_256 --size 256

SOURCE is anything data.path takes: a folder with a sub-folder per class, tar shards, tfds:imagenet2012. 10 GB for
ImageNet at 256 px.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.hub import locate
from heirloom.common.cli import script
from heirloom.common.data.labelled import LABELS, open_labelled
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from lit_jax import autoencoder_layouts
from lit_jax.latents import cache_latents
from lit_jax.origin import autoencoder_origin
from lit_jax.zoo import AUTOENCODER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures, pixels")
    parser.add_argument("--split", default="")
    parser.add_argument("--label", default="label", help="column of the class: numbers, or names")
    parser.add_argument("--classes", type=int, help="number of classes of the model, to compare with the source's")
    parser.add_argument("--autoencoder", default=AUTOENCODER, metavar="SOURCE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    source = open_labelled(SourceConfig(args.source, split=args.split), args.label, args.classes)
    donor, mesh = open_donor(locate(args.autoencoder), [autoencoder_layouts.FAMILY]), start()
    params = load_params(donor, mesh)
    if args.size < donor.cfg.factor or args.size % donor.cfg.factor:
        raise InputError(
            f"--size {args.size}: this autoencoder shrinks {donor.cfg.factor} times; choose a multiple of that"
        )
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: choose 1 or more")
    origin = autoencoder_origin(donor, args.autoencoder)
    how: Any = dict(size=args.size, batch=args.batch, force=args.force, origin=origin)
    cache_latents(donor.cfg, donor.model, params, source, args.destination, mesh, **how)
    print(f"{args.destination}: latents of {len(source):,} pictures by {origin}")
    if source.classes:
        print(f"class 0 is {source.classes[0]}, class {len(source.classes) - 1} is {source.classes[-1]} ({LABELS})")


if __name__ == "__main__":
    sys.exit(script("cache_latents", main))
