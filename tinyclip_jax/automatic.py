"""Automatic weight inheritance (TinyCLIP §3.2): learned masks, pruning, then distillation of the pruned model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import tinyclip_jax.train as manual
from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.nn.functional import functional
from heirloom.common.processes import gathered
from heirloom.common.surgery.axes import Spec, matches
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.report import provenance
from heirloom.common.train import recipe
from heirloom.common.train.optim import make_optimizer
from heirloom.common.train.parameters import best, load_params, save_params
from heirloom.common.train.parts import Evaluator, Opened, Parts, Place
from heirloom.common.train.recipe import Session
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params
from tinyclip_jax.config import Config
from tinyclip_jax.inherit import expand, prune
from tinyclip_jax.masks import (
    MULTIPLIERS,
    PATTERN,
    Masked,
    clip_log_alphas,
    constraint,
    deterministic_gates,
    initial_masks,
    sample_gates,
    sparsity,
    split,
)
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.zoo import FAMILY, open_clip_model


def train(cfg: Config, directory: Path) -> None:
    """Run both phases of a recipe with masks, from the last checkpoint if there is one."""
    if cfg.masks.round_to < 1:
        raise InputError(f"masks.round_to is {cfg.masks.round_to}: set it to 1 or more, what widths are a multiple of")
    if cfg.masks.prune_step >= cfg.steps:
        given = f"{cfg.masks.prune_step} of {cfg.steps} steps"
        raise InputError(f"masks.prune_step is {given}: set it lower, the pruned model is trained after it")
    if session := recipe.begin(cfg, directory, parts(cfg)):
        pruned = learn_masks(session, cfg)
        recipe.train(session, after_pruning(cfg, pruned), first=cfg.masks.prune_step)


def parts(cfg: Config) -> Parts:
    """Parts of the mask phase, which trains weights, masks and the multipliers of the constraint together."""
    manual_parts, student = manual.parts(cfg), functional(Clip, cfg.student)
    model = Masked(student, cfg.student)

    def start(opened: Opened, place: Place | None) -> dict[str, Any]:
        init, donor = partial(student.init, jax.random.key(cfg.seed)), opened.donor
        if donor:
            resolution = expand(donor.cfg, cfg.student).resolve(donor.source, student.spec)
            weights = graft(resolution, donor.source, student.spec, place, init)
        else:
            weights = init(place=place)
        return manual_parts.prepare(weights) | initial_masks(donor.cfg if donor else cfg.student, cfg.student)

    def project(params: dict[str, Any]) -> dict[str, Any]:
        return clip_log_alphas(manual.constrain_scale(cfg.loss, params))

    def evaluator(opened: Opened) -> Evaluator | None:
        unmasked = manual.evaluator(cfg, model, opened)
        score = unmasked and unmasked.score
        if not score:
            return None
        return Evaluator(score=lambda params: score(split(params)[0] | evaluation_gates(cfg, params)))

    return replace(
        manual_parts,
        model=model,
        loss=lambda teacher: masked_loss(cfg, manual.loss_fn(cfg, model, teacher)),
        resolve=None,
        start=start,
        optimizer=lambda spec, steps: mask_optimizer(cfg, spec),
        project=project,
        scheduled=cfg.masks.target_at,
        evaluator=evaluator,
    )


def masked_loss(cfg: Config, plain: LossFn) -> LossFn:
    """The loss `plain` of a model with sampled gates, plus the constraint on its expected size."""

    def loss(params: Params, batch: Batch, key: jax.Array, extra: Any) -> LossOutput:
        weights, masks = split(params)
        frozen, target = extra
        total, metrics = plain(weights | sample_gates(key, masks), batch, key, frozen)
        removed = sparsity(cfg.student, masks)
        penalty = constraint(removed, target, masks)
        masks = {"sparsity": (removed, 1.0), "wanted": (target, 1.0), "constraint": (penalty, 1.0)}
        return total + penalty, metrics | masks

    return loss


def evaluation_gates(cfg: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """Gates without noise, on the host."""
    return deterministic_gates({path: gathered(x) for path, x in split(params)[1].items()}, cfg.masks.round_to)


@dataclass(frozen=True)
class PrunedModel:
    """The model after pruning. params(mesh): its parameters."""

    cfg: ClipConfig
    params: Callable[[Mesh], dict[str, Any]]


def learn_masks(s: Session, cfg: Config) -> PrunedModel:
    """Run the mask phase up to `prune_step`, then prune; RUN/pruned tells a resume the shape of the model."""
    folder = s.run.directory / "pruned"
    if (s.run.checkpoints.latest() or 0) > cfg.masks.prune_step:
        found = open_clip_model(str(folder))
        return PrunedModel(found.cfg, partial(load_params, found))
    state = recipe.train(s, parts(cfg), last=cfg.masks.prune_step, finish=lambda state: None)
    weights = {path: gathered(x) for path, x in split(best(state))[0].items()}
    pruned = prune(cfg.student, weights, evaluation_gates(cfg, best(state)), cfg.masks)
    masks = f"the masks of {s.run.directory.name} at step {cfg.masks.prune_step}"
    record = {"source": masks} | provenance(pruned.resolution)

    def sidecars(folder: Path) -> None:
        s.opened.inputs.save(folder)
        write_json(folder / "provenance.json", record)

    spec = functional(Clip, pruned.cfg).spec
    save_params(folder, FAMILY.name, pruned.cfg, pruned.params, sidecars, spec=spec, force=True)
    return PrunedModel(pruned.cfg, lambda mesh: pruned.params)


def after_pruning(cfg: Config, pruned: PrunedModel) -> Parts:
    """Parts of the pruned model's distillation: a new optimizer, a cosine from the full rate, no warm-up."""
    optim = replace(cfg.optim, warmup=0)
    return replace(
        manual.parts(replace(cfg, student=pruned.cfg)),
        optimizer=lambda spec, steps: make_optimizer(optim, spec, steps),
        start=lambda opened, place: pruned.params(opened.mesh),
    )


def mask_optimizer(cfg: Config, spec: Spec) -> optax.GradientTransformation:
    """AdamW for weights, warmed up over the whole phase; Adam for masks; Adam's ascent for the multipliers.

    The gradient is clipped over all of them together.
    """
    optim, steps = cfg.optim, cfg.masks.prune_step
    rising = replace(optim, warmup=steps, clip=None, no_decay=(*optim.no_decay, PATTERN))
    groups = {
        "weights": make_optimizer(rising, spec, steps),
        "masks": optax.adam(cfg.masks.lr, b1=cfg.masks.momentum),
        "multipliers": optax.adam(-cfg.masks.lr, b1=cfg.masks.momentum),
    }
    masks = (path for path in spec if matches(PATTERN, path))
    kind = {path: "multipliers" if path.rpartition("/")[2] in MULTIPLIERS else "masks" for path in masks}
    clip = optax.identity() if optim.clip is None else optax.clip_by_global_norm(optim.clip)
    return optax.chain(clip, optax.partition(groups, {path: kind.get(path, "weights") for path in spec}))
