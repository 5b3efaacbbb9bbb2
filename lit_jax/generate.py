"""`heirloom sample PATH`: draws pictures of the requested classes and writes them as a grid."""

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from heirloom.common import config
from heirloom.common.arguments import refuse
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.grid import is_picture, save_grid
from heirloom.common.errors import InputError, check_seed
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from lit_jax.decode import PictureDecoder, no_pictures, pictures_of
from lit_jax.dit import DitConfig
from lit_jax.pixart import PixArtConfig
from lit_jax.prompted import sample_prompts
from lit_jax.sample import ClassConfig, Draw, drawer, picture_keys
from lit_jax.zoo import check_draws_classes

BATCH = 64  # pictures drawn at a time
OF_PROMPTS = {"negative", "size", "exact", "layout", "pipeline", "text_encoder", "text", "cache", "dtype"}


def sample_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw pictures of each class in `args.classes` (all, or the first eight, unless given) and write `args.out`.

    A text-to-image model draws prompts. The remaining flags are fields of `ClassConfig`. Raises InputError for an
    unknown class or flag, and for latents without an autoencoder.
    """
    if isinstance(donor.cfg, PixArtConfig):
        return sample_prompts(donor, args)
    check_draws_classes(donor)
    if args.prompt is not None or args.prompts is not None:
        raise InputError(f"{donor.path} draws classes, not prompts: give --class N")
    refuse(args, "sample", OF_PROMPTS, f"{donor.path} draws classes, and", "is for models that draw from text")
    how = config.parse(default_sampling(donor.cfg), args.flags, f"heirloom sample {donor.path}")
    count, out = 4 if args.count is None else args.count, args.out or Path("samples.png")
    batch = BATCH if args.batch is None else args.batch
    if count < 1:
        raise InputError(f"--count {count}: draw 1 picture of each class, or more")
    if batch < 1:
        raise InputError(f"--batch {batch}: draw 1 picture at a time, or more")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file in it, such as {out / 'samples.png'}")
    if is_picture(out) and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the grid is a PNG; name it {out.with_suffix('.png')}")
    mesh, classes = start(), args.classes or list(range(min(donor.cfg.classes, 8)))
    draw, keys = drawer(donor.model, donor.cfg, how, mesh), class_keys(args.seed, classes, count)
    draw.check(classes)
    pictures = pictures_of(donor, args.autoencoder, mesh)
    if pictures is None:
        raise no_pictures(donor)
    labels, params = np.repeat(classes, count), load_params(donor, mesh)
    begun = time.perf_counter()
    drawn = np.concatenate(list(draw_batches(draw, params, pictures, labels, keys, batch)))
    seconds = time.perf_counter() - begun
    save_grid(drawn, out, columns=count if len(classes) > 1 else None)
    return {
        "picture": str(out),
        "count": len(labels),
        "labels": labels.tolist(),
        "seconds": round(seconds, 2),
        "seed": args.seed,
        "sample": asdict(how),
    }


def default_sampling(cfg: DitConfig) -> ClassConfig:
    """Return the sampler settings for pictures to look at: strong guidance, if the model has a null class."""
    return ClassConfig() if cfg.null_class else ClassConfig(guidance=1.0)


def class_keys(seed: int, classes: list[int], count: int) -> jax.Array:
    """Derive a key for each picture, [classes x count], from the seed, the class and the picture's number within the
    class alone. A class that is listed again goes on counting.
    """
    check_seed(seed)
    keys = picture_keys(jax.random.key(seed), np.asarray(classes))
    before = np.array([count * classes[:i].count(label) for i, label in enumerate(classes)])
    return jax.vmap(picture_keys)(keys, before[:, None] + np.arange(count)).reshape(-1)


def draw_batches(
    draw: Draw,
    params: Mapping[str, Any],
    pictures: PictureDecoder,
    labels: np.ndarray,
    keys: jax.Array,
    batch: int,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Draw and decode pictures, uint8 [up to batch, height, width, 3], of labels and keys [n], from number `first` on.

    A short last batch is drawn at full size and cut, so that nothing is compiled twice.
    Raises InputError for a picture that is not finite.
    """
    batch = min(batch, len(labels))
    for i in range(first, len(labels), batch):
        rows = np.resize(np.arange(i, min(i + batch, len(labels))), batch)
        yield pictures(draw(params, labels[rows], keys[rows])[: len(labels) - i], first=i)
