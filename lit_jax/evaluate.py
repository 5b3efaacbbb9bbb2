"""Scores a trained model by the pictures it draws (ADM suite)."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import track

from heirloom.common import config
from heirloom.common.arguments import EVAL_OF_CLIPS, refuse
from heirloom.common.checkpoint.convert import hashes
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.sources import Source, SourceConfig, open_source
from heirloom.common.errors import InputError, check_seed, positive, remark
from heirloom.common.evaluate.extractor import open_extractor
from heirloom.common.evaluate.generated import LEAST, Reference, check_reference, evaluate, read_reference
from heirloom.common.fetch import fetch
from heirloom.common.mesh import start
from heirloom.common.paths import Address, place
from heirloom.common.train.parameters import load_params
from lit_jax.data import cropped
from lit_jax.decode import PictureDecoder, no_pictures, pictures_of
from lit_jax.drawn import Drawn
from lit_jax.generate import draw_batches
from lit_jax.sample import SampleConfig, drawer, picture_keys
from lit_jax.zoo import check_draws_classes

OF_COLUMNS = {"split", "image"}


@dataclass(frozen=True)
class EvalConfig:
    """How `heirloom eval PATH --data REFERENCE` scores a DiT or LiT."""

    features: str = ""
    """The Inception network: pytorch-fid's weights for the numbers of papers, or a folder of
    scripts/convert_inception.py.
    """
    samples: int = 50_000
    """Pictures to draw; published numbers have 50,000."""
    batch: int = 64
    """Pictures drawn at a time."""
    labels: Literal["uniform", "balanced"] = "uniform"
    """Classes are drawn independently, as in DiT's script (uniform), or each equally often (balanced)."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    autoencoder: str = ""
    """SOURCE of the decoder of a latent model."""
    seed: int = 0
    save: str = ""
    """Save the pictures as this .npz (arr_0, uint8), which other implementations of the suite read; the same command
    continues it.
    """

    def __post_init__(self) -> None:
        positive(self, "samples", "batch")
        check_seed(self.seed)


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Compute the rows of `heirloom eval PATH`: FID, sFID, IS, precision, recall and KID against an .npz, or against
    any pictures.

    The reference is read and measured before anything is drawn. Raises InputError without features or reference, and
    for a model or a reference that cannot be compared.
    """
    check_draws_classes(donor)
    refuse(args, "eval", EVAL_OF_CLIPS, f"{donor.path} draws pictures of classes, and", "is for other models")
    cfg = config.parse(EvalConfig(), args.flags, f"heirloom eval {donor.path}")
    if not cfg.features:
        raise InputError("give --features: the Inception weights that make the scores (docs/evaluate.md)")
    if not args.data:
        raise InputError("give --data: a reference batch (.npz of the ADM suite), or pictures to compare with")
    if cfg.samples < LEAST:
        raise InputError(f"--samples {cfg.samples}: a score needs at least {LEAST}; published numbers use 50,000")
    source = None if Path(args.data).suffix in (".npz", ".npy") else _open_pictures(args)
    if source is None:
        refuse(args, "eval", OF_COLUMNS, f"{args.data} has neither splits nor columns, and", "chooses one")
        file = place(args.data)
        reference = read_reference(fetch(file) if isinstance(file, Address) else file)
    else:
        reference = Reference(where=args.data, pool=None, spatial=None, images=len(source), read=lambda rows: iter(()))
    extractor, mesh = open_extractor(Path(cfg.features).expanduser()), start()
    check_reference(reference, extractor)
    draw = drawer(donor.model, donor.cfg, cfg.sample, mesh)
    pictures = pictures_of(donor, cfg.autoencoder, mesh)
    if pictures is None:
        raise no_pictures(donor)
    side = donor.cfg.size * pictures.factor
    if reference.size not in ((), (side, side)):
        height, width = reference.size
        remark(
            f"{reference.where}: its pictures are {height} x {width}, and the model draws {side} x {side}; published"
            " scores compare pictures of one size"
        )
    if source is not None:
        reference = replace(reference, read=lambda rows: _cropped(source, side, rows))
    shape = (cfg.samples, side, side, 3)
    saved = Drawn(Path(cfg.save).expanduser(), shape, sampling_settings(donor, pictures, cfg)) if cfg.save else None
    if saved and (count := saved.count()):
        print(f"{cfg.save}: {count:,} of {cfg.samples:,} pictures are already drawn")

    def drawn(first: int) -> Iterator[np.ndarray]:
        params, labels, keys = load_params(donor, mesh), sample_labels(cfg, donor.cfg.classes), jax.random.key(cfg.seed)
        parts = draw_batches(
            draw, params, pictures, labels, picture_keys(keys, np.arange(cfg.samples)), cfg.batch, first
        )
        yield from track(parts, description="drawing", total=-(-(cfg.samples - first) // cfg.batch))

    batches = saved.batches(drawn, cfg.batch) if saved else drawn(0)
    rows = evaluate(batches, reference, extractor, mesh, cfg.batch)
    how = (
        f"{cfg.sample.sampler} {cfg.sample.steps} steps, guidance {cfg.sample.guidance:g} on {cfg.sample.guided},"
        f" {cfg.labels} labels"
    )
    return [row | {"dataset": args.data, "published": None, "protocol": f"{row['protocol']}; {how}"} for row in rows]


def sample_labels(cfg: EvalConfig, classes: int) -> np.ndarray:
    """Draw the class of each picture, int [samples], shuffled because the Inception score splits them."""
    rng = np.random.default_rng(cfg.seed)
    labels = np.arange(cfg.samples) % classes if cfg.labels == "balanced" else rng.integers(classes, size=cfg.samples)
    return rng.permutation(labels)


def sampling_settings(donor: Donor, pictures: PictureDecoder, cfg: EvalConfig) -> dict[str, Any]:
    """Return the settings that determine the pictures: model, decoder, sampler, labels and seed, but not the batch
    size.
    """
    model = {"weights": hashes(donor.file), "config": asdict(donor.cfg)}
    how = {name: getattr(cfg, name) for name in ("samples", "labels", "autoencoder", "seed")}
    decoder = {"decoder": hashes(pictures.file)} if pictures.file else {}
    return {"model": model, "sample": asdict(cfg.sample)} | how | decoder


def _open_pictures(args: Namespace) -> Source:
    """Open the reference pictures. Raises InputError if there are none."""
    source = open_source(SourceConfig(path=args.data, split=args.split, image=args.image, text=""))
    if not len(source) or "image" not in source[0]:
        raise InputError(f"{args.data} has no pictures to compare with: name their column with --image")
    return source


def _cropped(source: Source, side: int, rows: int) -> Iterator[np.ndarray]:
    """Yield the pictures of a source, cropped as in training: uint8 [up to rows, side, side, 3]."""
    for first in range(0, len(source), rows):
        yield np.stack([cropped(source[i], side) for i in range(first, min(first + rows, len(source)))])
