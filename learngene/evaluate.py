"""Evaluate a classifier on held-out pictures: top-1 and top-5 accuracy (shares) and loss (nats)."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common import config
from heirloom.common.arguments import EVAL_OF_CLIPS, refuse
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, between, positive
from heirloom.common.evaluate.scored import Score, Scored
from heirloom.common.mesh import replicated, split_rows, start
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.modules import make_callable
from heirloom.common.train.parameters import load_params
from heirloom.common.vit.model import VitConfig
from learngene.convnet import ConvConfig
from learngene.data import Evaluation, evaluation
from learngene.inputs import preprocess_of
from learngene.labels import labels_of
from learngene.problem import check_one_class, problem_of


@dataclass(frozen=True)
class EvalConfig:
    """Fields of `heirloom eval PATH --data DATA` for a classifier."""

    label: str = "label"
    """Column of the class: numbers from 0, or names, matched to the model's class names or numbered in alphabetical
    order.
    """
    crop: float | None = None
    """Share of the side in the centre crop: 0.875 for ImageNet, 1 for small pictures; none: from the checkpoint's
    preprocessing.
    """
    batch: int = 256

    def __post_init__(self) -> None:
        positive(self, "batch")
        between(self, "crop", least=0.01, most=1.0)


def normalised(pixels: jax.Array, pre: Preprocess) -> jax.Array:
    """Normalise pixels in 0..1 with the mean and standard deviation of `pre`."""
    return (pixels - jnp.asarray(pre.mean)) / jnp.asarray(pre.std)


def scorer(family: Family, cfg: VitConfig | ConvConfig, held_out: Evaluation, pre: Preprocess, mesh: Mesh) -> Score:
    """Returns `params -> Scored`: top1, top5 (shares) and loss (nats) on all held-out pictures; a tie counts as wrong.

    The function raises InputError when a logit is NaN or infinite.
    """
    count = counter(family.module, cfg, pre, mesh)

    def score(params: Mapping[str, Any]) -> Scored:
        with jax.set_mesh(mesh):
            split = ((split_rows(b["image"], mesh), split_rows(b["label"], mesh, fill=-1)) for b in held_out)
            counts = (count(params, image, label) for image, label in split)
            total = np.sum([np.asarray(part, np.float64) for part in counts], axis=0)
        *sums, damaged = total.tolist()
        if damaged:
            given = f"this model's logits are NaN or infinite for {damaged:.0f} of {len(held_out)} pictures"
            why = "its weights are damaged, or its activations overflow"
            raise InputError(f"{held_out.name}: {given}, and scores need finite ones: {why}")
        means = {name: value / len(held_out) for name, value in zip(("top1", "top5", "loss"), sums, strict=True)}
        return Scored(held_out.name, len(held_out), means)

    return score


@lru_cache(maxsize=16)  # models of one shape are compiled once, however many are compared
def counter(
    module: Callable[..., Any], cfg: VitConfig | ConvConfig, pre: Preprocess, mesh: Mesh
) -> Callable[..., jax.Array]:
    """Returns `(params, image, label) -> [top1, top5, loss, not finite]`, sums over pictures with labels >= 0."""
    model = functional(module, cfg)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def count(params: Mapping[str, Any], image: jax.Array, label: jax.Array) -> jax.Array:
        logits = model.apply(params, normalised(image.astype(jnp.float32) / 255, pre))
        known = label >= 0
        right = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=1)
        rank = (logits >= right).sum(1) - 1
        loss = jax.nn.logsumexp(logits, axis=1) - right[:, 0]
        damaged = ~jnp.isfinite(logits).all(1)
        return jnp.stack([(value * known).sum() for value in (rank < 1, rank < 5, loss, damaged)])

    return count


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH`; for a gene, of its auxiliary net. Raises InputError without data."""
    refuse(args, "eval", EVAL_OF_CLIPS, f"{donor.path} is a classifier, and", "is for other models")
    cfg = config.parse(EvalConfig(), args.flags, f"heirloom eval {donor.path}")
    if not donor.cfg.classes:
        raise InputError(f"{donor.path} has no head, and accuracy needs one: give a model with a classifier")
    check_one_class(problem_of(donor), str(donor.path), "accuracy needs")
    if not args.data:
        raise InputError("no data is named: give --data, labelled pictures, such as a folder with one for each class")
    found, mesh = preprocess_of(donor), start()
    pre = found.announced() if cfg.crop is None else found.pre.cropped(cfg.crop)
    data = SourceConfig(path=args.data, split=args.split, image=args.image, text="")
    held_out = evaluation(data, cfg.label, pre, cfg.batch, donor.cfg.classes, labels_of(donor))
    return scorer(donor.family, donor.cfg, held_out, pre, mesh)(load_params(donor, mesh)).rows()


make_callable(__name__, "learngene.pretrained:evaluate")
