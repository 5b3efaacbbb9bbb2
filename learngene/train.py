"""Training of a teacher, gene or descendant: its recipe's parts (`heirloom.common.train.recipe`) and loss."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.class_names import Names
from heirloom.common.data.grid import save_grid
from heirloom.common.data.labelled import Labelled, open_labelled, write_labels
from heirloom.common.data.pipeline import training_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, remark
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.modules import make_callable
from heirloom.common.surgery.plan import Plan, Resolution
from heirloom.common.train.loop import Data
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params, cast
from learngene import ligo, relatives
from learngene.augment import augment
from learngene.config import ADAMW, CACHED, CONVNET_ADAMW, Config, TeacherConfig
from learngene.data import LOGITS, Evaluation, Example, columns, decoded, evaluation, resident
from learngene.evaluate import normalised, scorer
from learngene.inputs import IMAGENET, preprocess_of
from learngene.labels import carry_labels, labels_of
from learngene.losses import cross_entropy, distillation
from learngene.problem import carry_problem, check_one_class, problem_of
from learngene.zoo import FAMILY, open_classifier, outline

__all__ = ["ADAMW", "CONVNET_ADAMW", "Config", "TeacherConfig", "loss_fn", "parts"]

MEAN, CLASS_TOKEN = "the mean of the patches", "the class token"
# What a head reads, by pool.
READS = {"norm_mean": MEAN, "mean_norm": MEAN, "cls": CLASS_TOKEN, "cls+dist": CLASS_TOKEN}


def parts(cfg: Config) -> Parts:
    """Parts of the distillation of a gene and of the training of its descendants (SWS §3)."""
    model = functional(cfg.family.module, cfg.student)

    def prepare(params: dict[str, Any]) -> dict[str, Any]:
        values = relatives.mimetic(cfg.student, jax.random.key(cfg.seed)) if cfg.init == "mimetic" else {}
        return params | {path: jax.device_put(value, params[path].sharding) for path, value in values.items()}

    return Parts(
        family=cfg.family,
        student=cfg.student,
        model=model,
        loss=partial(loss_fn, cfg, model),
        batch_shapes=partial(batch_shapes, cfg),
        batches=partial(batches, cfg),
        examples=cfg.pictures,
        donor=cfg.donor,
        teacher=cfg.teacher if cfg.teacher != CACHED and cfg.distill.alpha > 0 else "",
        open=open_classifier,
        outline=outline,
        resolve=partial(resolve, cfg, model),
        prepare=prepare,
        look=partial(describe_first_batch, cfg),
        evaluator=partial(evaluator, cfg),
        sidecars=partial(sidecars, cfg),
        inherited_sidecars=partial(inherited_sidecars, cfg),
    )


def loss_fn(cfg: Config, student: Model, teacher: Teacher | None) -> LossFn:
    """The loss: (1 - alpha) cross-entropy with labels + alpha distillation; without teacher the cross-entropy."""
    alpha = cfg.distill.alpha if teacher or cfg.teacher == CACHED else 0.0
    classes = cfg.student.classes
    fits = teacher and (teacher.cfg.size == cfg.student.size or getattr(teacher.cfg, "any_size", False))
    if teacher and not (fits and teacher.cfg.classes == classes):
        inputs = f"{teacher.cfg.size} px and {teacher.cfg.classes} classes"
        given = f"{inputs}, the student {cfg.student.size} px and {classes}"
        raise InputError(f"the teacher has {given}: set student.size and student.classes")
    if isinstance(teacher, Donor):
        check_one_class(problem_of(teacher), str(teacher.path), "distillation needs")
    teacher_pre = preprocess_of(teacher).announced() if isinstance(teacher, Donor) else IMAGENET

    def target(batch: Batch, frozen: Any, pixels: jax.Array) -> jax.Array:
        if teacher is None:
            return batch[LOGITS]
        return teacher.model.apply(cast(frozen, cfg.step.compute), normalised(pixels, teacher_pre))

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        augment_key, drop_key = jax.random.split(key)
        images, labels = batch["image"], batch["label"]
        if cfg.augment.views > 1:
            images, labels = images.reshape(-1, *images.shape[2:]), jnp.repeat(labels, cfg.augment.views)
        seen = augment(cfg.augment, cfg.pre, images, labels, classes, augment_key)
        logits = student.apply(params, normalised(seen.pixels, cfg.pre), drop_key)
        parts = {}
        if alpha < 1:
            parts["labels"] = (1 - alpha, cross_entropy(logits, seen.targets))
        if alpha > 0:
            targets = jax.lax.stop_gradient(target(batch, frozen, seen.pixels))
            parts["teacher"] = (alpha, distillation(logits, targets, cfg.distill))
        total = sum(weight * value for weight, value in parts.values())
        right = (logits.argmax(-1) == seen.targets.argmax(-1)).mean()
        metrics = {name: (value, 1.0) for name, (_, value) in parts.items()}
        return jnp.asarray(total), metrics | {"accuracy": (right, 1.0)}

    return loss


def resolve(cfg: Config, student: Model, donor: Donor) -> Resolution:
    """Resolve the source of each tensor of the student. LiGO trains its maps here: call once, reuse the result.

    Raises InputError when donor, method and student do not fit together.
    """
    if donor.family is not FAMILY or cfg.family is not FAMILY:
        raise InputError(f"the student is a {cfg.family.name} and the donor a {donor.family.name}: both must be ViTs")
    if donor.cfg.heads != cfg.student.heads:
        regrouped = f"{donor.cfg.heads} heads become {cfg.student.heads}"
        print(f"note: {regrouped}: the projections are kept, but what attention computes with them changes")
    found = preprocess_of(donor)
    if not np.allclose((found.pre.mean, found.pre.std), (cfg.pre.mean, cfg.pre.std), atol=1e-2):
        own = f"mean {list(found.pre.mean)} and std {list(found.pre.std)}"
        set_them = "set preprocess.mean and preprocess.std to these if the student is to see pictures as the donor does"
        found.announced()  # where it is only assumed
        remark(f"the donor normalises pictures with {own}, the student otherwise: {set_them}")
    if donor.cfg.activation != cfg.student.activation:
        names = f"{donor.cfg.activation!r}, the student's {cfg.student.activation!r}"
        remark(f"the donor's activation is {names}: its weights were trained with it; set student.activation to it")
    if cfg.method == "ligo":
        plan = ligo_plan(cfg, student, donor)
    else:
        plan = relatives.plan(cfg.method, donor.cfg, cfg.student, cfg.layers, cfg.head)
    resolution = plan.resolve(donor.source, student.spec)
    reads = [READS.get(one.pool, f"pool {one.pool!r}") for one in (donor.cfg, cfg.student)]
    if reads[0] != reads[1] and any(line.source for line in resolution.lines if line.path == "head/kernel"):
        kept = "set student.tokens and student.pool to the donor's, or head to 'fresh'"
        remark(f"the inherited head read {reads[0]} in the donor, and reads {reads[1]} in the student: {kept}")
    return resolution


def ligo_plan(cfg: Config, student: Model, donor: Donor) -> Plan:
    """Plan of LiGO, with matrices that are learned from the labels of the recipe's data."""
    mesh = start(cfg.mesh)
    loss = loss_fn(replace(cfg, teacher=""), student, None)
    named = parts(cfg).teacher  # its class names number the labels here as they do in the run
    opened = Opened(mesh=mesh, donor=donor, teacher=open_classifier(named) if named else None)
    data = batches(replace(cfg, teacher=""), opened)

    def student_loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return loss(dict(params), batch, key, None)[0]

    return ligo.fit(donor.cfg, donor.source, cfg.student, student.spec, student_loss, data, cfg.seed)


def class_names(cfg: Config, opened: Opened) -> tuple[str, ...] | None:
    """Class names in the order of the teacher's logits, or else of the inherited head's; None where neither has any.

    The data is numbered in this order. Raises InputError where the two have the same names in another order.
    """
    teacher, donor, classes = opened.teacher, opened.donor, cfg.student.classes
    taught = labels_of(teacher) if teacher and teacher.cfg.classes == classes else None
    inherited = labels_of(donor) if donor and cfg.head == "inherit" and donor.cfg.classes == classes else None
    if taught and inherited and taught != inherited and set(taught) == set(inherited):
        first = next(i for i in range(classes) if taught[i] != inherited[i])
        both = f"class {first} is {taught[first]!r} for the teacher and {inherited[first]!r} for the donor"
        raise InputError(f"{both}, whose head is inherited: set head to 'fresh'")
    return taught or inherited


def labelled(cfg: Config, opened: Opened, data: SourceConfig) -> Labelled:
    """Open the training data. Raises InputError where some of its classes are in `class_names`, and others not."""
    return open_labelled(data, cfg.label, cfg.student.classes, class_names(cfg, opened))


def trained_names(cfg: Config, opened: Opened) -> tuple[str, ...] | None:
    """Class names in the order of the student's logits: those of the data, or `class_names`; None for unknown ones."""
    names = labelled(cfg, opened, cfg.data).classes or class_names(cfg, opened) or ()
    return names if len(names) == cfg.student.classes and all(name.strip() for name in names) else None


def batches(cfg: Config, opened: Opened) -> Data:
    """Training batches, from the source or from arrays on the devices."""
    data, example = columns(cfg.data, cfg.teacher == CACHED), Example(cfg.augment, cfg.pre, cfg.student.classes)
    if cfg.storage == "device":
        names = class_names(cfg, opened)
        arrays = decoded(data, cfg.label, cfg.student.classes, example, cfg.pipeline.bad, names)
        return resident(arrays, cfg.pipeline, opened.mesh)
    return training_batches(labelled(cfg, opened, data), cfg.pipeline, example, mesh=opened.mesh)


def batch_shapes(cfg: Config) -> Shapes:
    """Shapes and dtypes of a batch, for `heirloom compile`."""
    n, size, views = cfg.pipeline.batch, cfg.student.size, (cfg.augment.views,) if cfg.augment.views > 1 else ()
    shapes: dict[str, Any] = {"image": ((n, *views, size, size, 3), jnp.uint8), "label": ((n,), jnp.int32)}
    return shapes | ({LOGITS: ((n, cfg.student.classes), jnp.float32)} if cfg.teacher == CACHED else {})


def held_out(cfg: Config, pre: Preprocess | None = None, names: Names | None = None) -> Evaluation:
    """Held-out pictures with the preprocessing of the student, or `pre`. names: of the classes, in their order."""
    batch = min(cfg.pipeline.batch, 256)
    return evaluation(cfg.held_out, cfg.label, pre or cfg.pre, batch, cfg.student.classes, names)


def evaluator(cfg: Config, opened: Opened) -> Evaluator | None:
    """Accuracy on the held-out pictures; None without held-out data."""
    if not cfg.held_out.path:
        return None
    names = trained_names(cfg, opened)
    pictures = held_out(cfg, names=names)
    named = bool(getattr(pictures.source, "classes", ()))
    if class_names(cfg, opened) is None and named != bool(names):
        with_names, numbers = (cfg.held_out, cfg.data) if named else (cfg.data, cfg.held_out)
        pairs = f"the numbers of {numbers.path} are taken for its classes in their order"
        remark(f"{with_names.path} has names of classes: {pairs}")
    return Evaluator(score=scorer(cfg.family, cfg.student, pictures, cfg.pre, opened.mesh))


def describe_first_batch(cfg: Config, opened: Opened, batch: Batch, picture: Path | None) -> str:
    """Draw the first batch and return a line about the size of a step and the first labels."""
    images, labels = (np.asarray(batch[name].addressable_data(0)) for name in ("image", "label"))
    if picture:
        save_grid(images.reshape(-1, *images.shape[-3:])[:64], picture, least=0)
    shown = ", ".join(map(str, labels[:8]))
    return f"{cfg.pictures} pictures a step at a peak learning rate of {cfg.optim.lr:.2e}; first labels {shown}"


def sidecars(cfg: Config, opened: Opened, folder: Path) -> None:
    """Write the preprocessing, and the class names where they are known."""
    if (names := trained_names(cfg, opened)) is not None:
        write_labels(folder, names)
    cfg.pre.save(folder)


def inherited_sidecars(cfg: Config, opened: Opened, folder: Path, pre: Preprocess | None = None) -> None:
    """Write the preprocessing, `pre` or the config's, and what the donor's outputs are if its head is inherited."""
    assert opened.donor is not None
    same = cfg.head == "inherit" and cfg.student.classes == opened.donor.cfg.classes
    if same:
        carry_labels(opened.donor, folder, "heirloom")
        carry_problem(opened.donor, folder, "heirloom")
    (pre or cfg.pre).save(folder)


make_callable(__name__, "learngene.pretrained:train")
