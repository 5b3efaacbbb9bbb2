"""Scoring a trained model by the pictures it draws (ADM suite)."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import track

from common import config
from common.checkpoint.convert import Donor
from common.data.pictures import decode_record
from common.data.sources import SourceConfig, open_source
from common.errors import InputError
from common.evaluate.extractor import open_extractor
from common.evaluate.generated import evaluate
from common.train.mesh import MeshConfig, start
from common.train.parameters import load_params
from lit_jax.data import adm_crop
from lit_jax.decode import Pictures, open_pictures
from lit_jax.sample import Draw, SampleConfig, drawer


@dataclass(frozen=True)
class EvalConfig:
    """How `heirloom eval PATH --data REFERENCE` scores a DiT or LiT."""

    features: str = ""
    """The Inception network: pytorch-fid's weights for the numbers of papers, or a folder of scripts/convert_inception.py."""
    samples: int = 50_000
    """Pictures to draw; published numbers have 50,000."""
    batch: int = 64
    """Pictures drawn at a time."""
    labels: Literal["uniform", "balanced"] = "uniform"
    """Classes drawn independently, as DiT's script does, or each equally often."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    autoencoder: str = ""
    """SOURCE of the decoder of a latent model."""
    seed: int = 0
    save: str = ""
    """Keep the pictures as an .npz (arr_0, uint8), which other implementations of the suite read."""


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH`: FID, sFID, IS, precision, recall and KID against an .npz, or against any pictures.

    Raises InputError without features or reference, and for what they cannot be compared with.
    """
    cfg = config.parse(EvalConfig(), args.flags, f"heirloom eval {donor.path}")
    if not cfg.features:
        raise InputError("give --features: the Inception weights that make the scores (README: Evaluate)")
    if not args.data:
        raise InputError("give --data: a reference batch (.npz of the ADM suite), or pictures to compare with")
    extractor, mesh = open_extractor(Path(cfg.features)), start(MeshConfig())
    pictures = open_pictures(donor.cfg, cfg.autoencoder, mesh)
    if pictures is None:
        raise InputError("this model draws latents: give --autoencoder, the decoder that turns them into pictures")
    draw, params = drawer(donor.model, donor.cfg, cfg.sample, mesh), load_params(donor, mesh)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(cfg.save) if cfg.save else Path(folder) / "samples.npz"
        drawn = np.concatenate(list(batches(cfg, draw, params, pictures)))
        np.savez(samples, arr_0=drawn)
        reference = Path(args.data)
        if reference.suffix != ".npz":
            reference = Path(folder) / "reference.npz"
            np.savez(reference, arr_0=_pictures(SourceConfig(args.data, args.split, args.image, text=""), drawn.shape[1]))
        rows = evaluate((drawn[i : i + cfg.batch] for i in range(0, len(drawn), cfg.batch)), reference, extractor, mesh, cfg.batch)
    how = f"{cfg.sample.sampler} {cfg.sample.steps} steps, guidance {cfg.sample.guidance:g} on {cfg.sample.guided}, {cfg.labels} labels"
    return [row | {"dataset": args.data, "published": None, "protocol": f"{row['protocol']}; {how}"} for row in rows]


def batches(cfg: EvalConfig, draw: Draw, params: dict[str, jax.Array], pictures: Pictures) -> Iterator[np.ndarray]:
    """The pictures, uint8 [batch, side, side, 3]; the last batch is cut to their number."""
    rng, classes = np.random.default_rng(cfg.seed), draw.cfg.classes
    labels = np.arange(cfg.samples) % classes if cfg.labels == "balanced" else rng.integers(classes, size=cfg.samples)
    labels = rng.permutation(labels)  # an order without meaning: the Inception score splits it
    starts = range(0, cfg.samples, cfg.batch)
    for i in track(starts, description="drawing", total=len(starts)):
        part = np.resize(labels[i : i + cfg.batch], cfg.batch)
        yield pictures(draw(params, part, jax.random.fold_in(jax.random.key(cfg.seed), i)))[: cfg.samples - i]


def _pictures(data: SourceConfig, size: int) -> np.ndarray:
    """All pictures of a source, cropped as in training: uint8 [n, size, size, 3]."""
    source = open_source(data)
    return np.stack([adm_crop(decode_record(source[i]), size) for i in range(len(source))])
