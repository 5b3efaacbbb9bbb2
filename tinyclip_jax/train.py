"""TinyCLIP training: the parts of its recipe for the runner (`heirloom.common.train.recipe`), and its loss."""

from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.bad import first_good
from heirloom.common.data.pipeline import Augment, check_first_batch, training_batches
from heirloom.common.data.sources import open_source
from heirloom.common.data.sources.record import Record
from heirloom.common.errors import InputError, remark
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.nn.norm import unit
from heirloom.common.notebook.modules import make_callable
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train import recipe
from heirloom.common.train.loop import Data
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.step import STATISTICS, Batch, LossFn, LossOutput, Params, cast
from tinyclip_jax import cache
from tinyclip_jax.cache import TARGETS
from tinyclip_jax.config import Config, LossConfig, Stage
from tinyclip_jax.evaluate import Setup, Words, score_on
from tinyclip_jax.inherit import manual
from tinyclip_jax.inputs import CACHE, Inputs, read_inputs, teacher_inputs
from tinyclip_jax.losses import affinity_mimicking, contrastive
from tinyclip_jax.model import Clip
from tinyclip_jax.zoo import FAMILY, open_clip_model, outline

__all__ = ["Config", "LossConfig", "Stage", "constrain_scale", "loss_fn", "parts"]

EMBEDDINGS = "embeddings"
LARGEST_SCALE = 100.0


def parts(cfg: Config) -> Parts:
    """Parts of manual inheritance and distillation (TinyCLIP §3.1, §3.3)."""
    model = functional(Clip, cfg.student)

    def resolve(donor: Donor) -> Resolution:
        return manual(donor.cfg, cfg.student, cfg.depth_rule).resolve(donor.source, model.spec)

    def prepare(params: dict[str, Any]) -> dict[str, Any]:
        fixed = cfg.loss.scale == "fixed" and cfg.loss.first_scale == "fixed"
        return constrain_scale(cfg.loss, params) if fixed else params

    return Parts(
        family=FAMILY,
        student=cfg.student,
        model=model,
        loss=partial(loss_fn, cfg, model),
        batch_shapes=partial(batch_shapes, cfg),
        batches=partial(batches, cfg),
        examples=cfg.pipeline.batch,
        donor=cfg.donor,
        teacher="" if _stored(cfg.teacher) else cfg.teacher,
        open=open_clip_model,
        outline=outline,
        inputs=partial(read_inputs, cfg),
        resolve=resolve,
        prepare=prepare,
        project=partial(constrain_scale, cfg.loss),
        look=partial(describe_first_batch, cfg),
        evaluator=partial(evaluator, cfg, model),
        sidecars=lambda opened, folder: opened.inputs.save(folder),
    )


def loss_fn(cfg: Config, student: Model, teacher: Teacher | None) -> LossFn:
    """Affinity mimicking of a live teacher or of embeddings in the batch, plus the contrastive loss, weighted by alpha.

    Raises InputError for a config that contradicts itself or the teacher.
    """

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        # A bias would add the same to every logit of a softmax, the teacher's too: it changes neither loss.
        (image, text, scale, _), statistics = student.train(params, batch["image"], batch["text"])
        parts = {}
        if cfg.loss.alpha > 0:
            if teacher:
                cast_teacher = cast(frozen, cfg.step.compute)
                targets = jax.lax.stop_gradient(teacher.model.apply(cast_teacher, batch["image"], batch["text"]))
                target_image, target_text, stored_scale, _ = targets
            else:
                # Columns of the data may be as a model gave them; what `heirloom cache` stored has unit norm.
                targets = [jnp.asarray(batch[name], jnp.float32) for name in TARGETS]
                target_image, target_text = map(unit, targets) if cfg.teacher == EMBEDDINGS else targets
                stored_scale = None
            target_scale = stored_scale if cfg.loss.teacher_scale is None else cfg.loss.teacher_scale
            affinity = affinity_mimicking(image, text, target_image, target_text, scale, target_scale)
            parts["affinity"] = (cfg.loss.alpha, affinity)
        if cfg.loss.alpha < 1:
            parts["contrastive"] = (1 - cfg.loss.alpha, contrastive(image, text, scale, batch.get("group")))
        total = sum(weight * value for weight, value in parts.values())
        metrics = {name: (value, 1.0) for name, (_, value) in parts.items()} | {"scale": (scale, 1.0)}
        return jnp.asarray(total), metrics | {STATISTICS: statistics}

    if cfg.step.accumulate > 1:
        given = f"step.accumulate is {cfg.step.accumulate}"
        raise InputError(f"{given}, and TinyCLIP's loss compares all pairs of a batch: set it to 1")
    if not 0 <= cfg.loss.alpha <= 1:
        raise InputError(f"loss.alpha is {cfg.loss.alpha}: choose a weight of affinity mimicking between 0 and 1")
    if cfg.loss.teacher_scale is not None and cfg.loss.teacher_scale <= 0:
        raise InputError(f"loss.teacher_scale is {cfg.loss.teacher_scale}: set it above 0 (the release has 50)")
    if cfg.loss.alpha > 0 and not cfg.teacher:
        setting = 'set teacher to a SOURCE or "embeddings", or loss.alpha to 0'
        raise InputError(f"loss.alpha is {cfg.loss.alpha} and teacher is empty: {setting}")
    if cfg.loss.alpha == 0 and cfg.teacher:
        remark(f"the teacher {cfg.teacher} teaches nothing, because loss.alpha is 0")
    image, text = cfg.student.image, cfg.student.text
    if teacher and (teacher.cfg.image.size, teacher.cfg.text.context) != (image.size, text.context):
        inputs = f"{teacher.cfg.image.size} px and {teacher.cfg.text.context} tokens"
        setting = "set student.image.size and student.text.context to these"
        raise InputError(f"the teacher takes {inputs}, the student other inputs: {setting}")
    if cfg.loss.teacher_scale is None and teacher is None and cfg.loss.alpha > 0:
        raise InputError("loss.teacher_scale is None, and stored embeddings have no scale: set it to a number")
    if cfg.loss.scale == "fixed" and cfg.loss.teacher_scale is None:
        raise InputError('loss.scale is "fixed" and loss.teacher_scale None: set loss.teacher_scale to a number')
    return loss


def constrain_scale(cfg: LossConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Fix the similarity scale, or clip a learned one to 1..100, after each update (train.py of the release)."""
    if cfg.scale == "fixed":
        assert cfg.teacher_scale is not None
        return params | {"logit_scale": jnp.full_like(params["logit_scale"], log(cfg.teacher_scale))}
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, log(LARGEST_SCALE))}


def batches(cfg: Config, opened: Opened) -> Data:
    """Training batches of pictures and captions, with the teacher's embeddings where they are stored."""
    source, inputs = open_source(cfg.data), opened.inputs
    if cfg.teacher.startswith(CACHE):
        if cfg.augment != "none":
            what = 'stored embeddings belong to centre crops: set augment to "none", or teacher to a SOURCE'
            raise InputError(f'augment is "{cfg.augment}", and {what}')
        folder = Path(cfg.teacher.removeprefix(CACHE)).expanduser()
        source = cache.Cached(source, folder, cfg.data, inputs.pre, inputs.tokenizer)
    if cfg.teacher == EMBEDDINGS and (missing := set(TARGETS) - first_good(source, set)):
        add = "add this column of teacher embeddings, and name it in data.columns"
        raise InputError(f"{cfg.data.path} has no {min(missing)}: {add}")
    if cfg.teacher == EMBEDDINGS and (wrong := first_good(source, _no_vector)):
        raise InputError(f"{cfg.data.path}: {wrong}; a teacher embedding is a list of numbers, in .parquet or .npy")
    if cfg.teacher == EMBEDDINGS and cfg.augment == "random" and not isinstance(first_good(source, _text), str):
        belongs = f"{cfg.data.path} has several captions of a picture, and teacher_text belongs to one"
        raise InputError(f'{belongs}: set augment to "none", which uses the first caption')
    context = cfg.student.text.context
    text = dict(tokenizer=inputs.tokenizer, context=context, tags=cfg.pipeline.tags)
    augment = Augment(pre=inputs.pre, **text, augment=cfg.augment)
    first_good(source, augment.check)
    return training_batches(source, cfg.pipeline, augment, mesh=opened.mesh)


def _no_vector(record: Record) -> str:
    """Returns which embedding of a record is no vector of floats; "" where both are."""
    columns = {name: record[name] for name in TARGETS}
    wrong = (n for n, x in columns.items() if not isinstance(x, np.ndarray) or x.ndim != 1 or not _floats(x.dtype))
    return next((f"{name} is {str(columns[name])[:30]!r}" for name in wrong), "")


def _floats(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)  # numpy's own does not know bfloat16


def _text(record: Record) -> Any:
    return record.get("text")


def batch_shapes(cfg: Config) -> Shapes:
    """Shapes and dtypes of a batch, for `heirloom compile`."""
    n, size = cfg.pipeline.batch, cfg.student.image.size
    shapes: dict[str, Any] = {"image": ((n, size, size, 3), jnp.float32)}
    shapes |= {"text": ((n, cfg.student.text.context), jnp.int32)}
    stored = {name: ((n, cfg.student.joint), jnp.float32) for name in TARGETS} if _stored(cfg.teacher) else {}
    return shapes | stored


def evaluator(cfg: Config, model: Model, opened: Opened) -> Evaluator | None:
    """Retrieval on the held-out pairs; None without held-out data."""
    if not cfg.held_out.path:
        return None
    setup = Setup(model, opened.inputs.pre, opened.inputs.tokenizer, cfg.student, opened.mesh)
    return Evaluator(score=score_on(cfg.held_out, "retrieval", setup, Words()))


def describe_first_batch(cfg: Config, opened: Opened, batch: Batch, picture: Path | None) -> str:
    """Draw the first batch and return its first caption.

    Raises InputError when all pictures or all captions are the same: training on such data would end at chance without
    an error.
    """
    for name, what in (("image", "pictures"), ("text", "captions")):
        rows = np.asarray(batch[name].addressable_data(0))
        if len(rows) > 1 and (rows == rows[0]).all():
            needed = f"training needs different ones: check data.path, {cfg.data.path}"
            raise InputError(f"all {what} of the first batch are the same, and {needed}")
    return f'first caption: "{check_first_batch(batch, opened.inputs.tokenizer, picture, opened.inputs.pre)}"'


def cache_teacher(cfg: Config, destination: Path) -> dict[str, Any]:
    """Store the embeddings of the recipe's teacher on its data; returns the content of `cache.json`."""
    known, mesh = parts(cfg), start(cfg.mesh)
    if not known.teacher:
        store = "whose embeddings `heirloom cache` would store: give --teacher SOURCE"
        raise InputError(f"this recipe has no live teacher, {store}")
    alone = replace(known, donor="", inputs=partial(teacher_inputs, cfg))
    opened = recipe.open_sources(alone, mesh)
    assert opened.teacher is not None
    inputs: Inputs = opened.inputs
    return cache.write(destination, open_source(cfg.data), cfg.data, opened.teacher, inputs.pre, inputs.tokenizer, mesh)


def _stored(teacher: str) -> bool:
    """Whether the teacher's embeddings are part of the batch."""
    return teacher == EMBEDDINGS or teacher.startswith(CACHE)


make_callable(__name__, "tinyclip_jax.pretrained:train")
