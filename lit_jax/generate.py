"""`heirloom sample PATH`: pictures of the classes one asks for, as a grid."""

import time
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from common import config
from common.checkpoint.convert import Donor
from common.errors import InputError
from common.train.mesh import MeshConfig, start
from common.train.parameters import load_params
from lit_jax.decode import open_pictures
from lit_jax.dit import DitConfig
from lit_jax.sample import SampleConfig, drawer, save_grid

LOOKS = SampleConfig("ddpm", steps=250, guidance=4.0, guided="all")


def sample_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw `args.count` pictures of each class in `args.classes` (all, or the first eight, unless given) and write `args.out`.

    The flags left over are fields of `SampleConfig`. Raises InputError for a class or flag that is none, and for latents without
    an autoencoder.
    """
    how = config.parse(LOOKS, args.flags, f"heirloom sample {donor.path}")
    if not isinstance(donor.cfg, DitConfig):
        raise InputError(f"{donor.path} is an autoencoder, which draws nothing by itself: name a DiT or LiT, and this with --autoencoder")
    mesh = start(MeshConfig())
    pictures = open_pictures(donor.cfg, args.autoencoder or "", mesh)
    if pictures is None:
        raise InputError("this model draws latents: give --autoencoder, such as hf:stabilityai/sd-vae-ft-ema")
    classes = args.classes or list(range(min(donor.cfg.classes, 8)))
    labels = np.repeat(classes, args.count)
    draw, params = drawer(donor.model, donor.cfg, how, mesh), load_params(donor, mesh)
    begun = time.perf_counter()
    drawn = pictures(draw(params, labels, jax.random.key(args.seed)))
    seconds = time.perf_counter() - begun
    save_grid(drawn, args.out, columns=args.count if len(classes) > 1 else None)
    return {"picture": str(args.out), "labels": labels.tolist(), "seconds": round(seconds, 2), "seed": args.seed, "sample": asdict(how)}
