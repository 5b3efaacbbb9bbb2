"""A CLIP for notebooks: weights, tokenizer and preprocessing in one object; and the verbs load, inherit_from, train and
evaluate.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.convert import kept_provenance
from heirloom.common.checkpoint.family import Family
from heirloom.common.data.pictures import Picture
from heirloom.common.data.preprocess import Preprocess, eval_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.data.tokenizer_files import CaptionTokenizer
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.model import Loaded, inherited
from heirloom.common.notebook.run import Trained
from heirloom.common.notebook.run import train as train_recipe
from heirloom.common.train.parameters import load_params
from tinyclip_jax.evaluate import Setup, Words, score_on
from tinyclip_jax.inherit import DepthRule, manual
from tinyclip_jax.inputs import preprocess_of, tokenizer_of
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.zoo import FAMILY, open_clip_model, student

BATCH = 64  # pictures or captions that are encoded at a time, a power of two


@dataclass(frozen=True, repr=False)
class Pretrained(Loaded):
    """A CLIP with its tokenizer and preprocessing. params: the flat tree for `model.apply`."""

    cfg: ClipConfig
    pre: Preprocess
    tokenizer: CaptionTokenizer | None

    @property
    def family(self) -> Family:
        return FAMILY

    def encode_image(self, images: Picture | Iterable[Picture]) -> jax.Array:
        """Encode pictures (files, bytes, PIL images, uint8 [height, width, 3]; one or several) to unit-norm [n, joint].

        Raises InputError with the file, or the index in the list, for a picture that cannot be read.
        """
        return self._encode(self._image, eval_batches(images, self.pre, BATCH))

    def encode_text(self, texts: str | Iterable[str]) -> jax.Array:
        """Encode one or several captions to unit-norm features [n, joint] f32.

        Raises InputError when the checkpoint has no tokenizer, and for anything that is not a string.
        """
        tokens = self._tokenizer()(texts, self.cfg.text.context)
        if not len(tokens):
            raise InputError("the list of captions is empty: give one or more")
        return self._encode(self._text, (tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)))

    def _encode(self, tower: Any, batches: Iterable[np.ndarray]) -> jax.Array:
        """Encodes batches, each filled up to a power of two with its last row: few programs serve any number."""
        features = []
        for batch in batches:
            filled = np.arange(1 << (len(batch) - 1).bit_length()).clip(max=len(batch) - 1)
            features.append(tower(self.params, batch[filled])[: len(batch)])
        return jnp.concatenate(features)

    def similarity(self, images: Picture | Iterable[Picture], texts: str | Iterable[str]) -> np.ndarray:
        """Cosine similarity of every picture with every caption, [picture, caption] f32."""
        return np.asarray(self.encode_image(images) @ self.encode_text(texts).T)

    def _tokenizer(self) -> CaptionTokenizer:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: put its tokenizer.json next to the weights")
        return self.tokenizer

    def _sidecars(self, folder: Path) -> None:
        self.pre.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _about(self) -> dict[str, str]:
        image, text = self.cfg.image, self.cfg.text

        def of(tower: Any) -> str:
            return f"{tower.layers} layers of width {tower.width}"

        if isinstance(image, ResNetConfig):
            tower = f"ResNet of width {image.width}"
        else:
            tower = f"patch {image.patch}, {of(image)}"
        return {
            "image": f"{image.size} px, {tower}",
            "text": f"{text.context} tokens of {text.vocab:,}, {of(text)}; joint width {self.cfg.joint}",
        }

    @cached_property
    def _image(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_image"))

    @cached_property
    def _text(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_text"))


def load(source: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """Load a CLIP by SOURCE: `hf:org/name`, a folder or file of any format, `embedded:emoji`; f32, default devices.

    overrides: settings that a bare weights file does not contain (`activation="quick_gelu"`). Raises InputError when it
    is no CLIP.
    """
    donor = open_clip_model(str(source), **overrides)
    pre, tokenizer = preprocess_of(donor).announced(), tokenizer_of(donor)
    params = load_params(donor, start())
    about: dict[str, Any] = dict(source=str(source), loaded_from=kept_provenance(donor))
    return Pretrained(cfg=donor.cfg, model=donor.model, params=params, pre=pre, tokenizer=tokenizer, **about)


def inherit_from(
    clip: Pretrained | str, cfg: ClipConfig | str, depth_rule: DepthRule = "interval", seed: int = 0
) -> Pretrained:
    """Create a student from the weights of `clip` (manual inheritance, `inherit.manual`), without training.

    clip: a model, or its SOURCE. cfg: the student's config, or its name (`vit_39m_16`, as in `zoo.STUDENTS`), or that
    of a recipe (`tinyclip/emoji`). `provenance` of the result says where each parameter comes from. The similarity
    scale is not inherited, as in the released code.
    """
    clip = load(clip) if isinstance(clip, str) else clip
    cfg = student(cfg) if isinstance(cfg, str) else cfg
    model = functional(Clip, cfg)
    params, record = inherited(clip, manual(clip.cfg, cfg, depth_rule), model, seed)
    made: dict[str, Any] = dict(pre=clip.pre.at(cfg.image.size), tokenizer=clip.tokenizer, provenance=record)
    return Pretrained(cfg=cfg, model=model, params=params, **made)


def train(recipe: Any, run: str | os.PathLike[str] | None = None, **fields: Any) -> Trained[Pretrained]:
    """Train a recipe in a run folder, or resume it there: train("tinyclip/emoji", steps=50).

    recipe: its name, a Python file, or a config. run: the folder; None: a new one in `runs`. fields: of the config,
    nested ones as dictionaries: optim={"lr": 3e-4}; a student by its name: student="vit_39m_16". Returns the run, with
    `metrics`, `plot()` and `model`. Raises InputError for bad input.
    """
    if isinstance(fields.get("student"), str):
        fields["student"] = student(fields["student"])
    return train_recipe(recipe, run, fields, "tinyclip_jax", load)


def evaluate(
    model: Pretrained | str,
    data: str | os.PathLike[str] = "emoji",
    *,
    split: str = "",
    image: str = "image",
    text: str = "caption",
    label: str = "label",
    task: Literal["retrieval", "zeroshot"] = "retrieval",
    classes: Sequence[str] | Literal["imagenet"] | None = None,
    templates: Sequence[str] | Literal["imagenet"] | None = None,
) -> dict[str, float]:
    """Score a CLIP on held-out data: shares by name, as `heirloom eval`.

    retrieval: recall at 1, 5 and 10 in both directions, of pairs; `r1` is the mean of both. zeroshot: top1 and top5, of
    labelled pictures. data: as in own-data.md; image, text, label: its columns. classes: names of the classes, if the
    data has none. templates: captions with {}. Raises InputError for data that cannot be read, and what has no effect.
    """
    clip = load(model) if isinstance(model, str) else model
    setup = Setup(clip.model, clip.pre, clip._tokenizer(), clip.cfg, start())
    split = split or ("test" if str(data).split(":")[0] == "emoji" else "")
    source = SourceConfig(path=os.fspath(data), split=split, image=image, text=text)
    words = Words.of(classes, templates)
    return dict(score_on(source, task, setup, words, label)(clip.params).metrics)
