"""A CLIP for notebooks: weights, tokenizer and preprocessing in one object."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from heirloom.common.data.pictures import Picture, decode
from heirloom.common.data.preprocess import Preprocess, eval_image
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.paths import place
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.parameters import load_params, save_params
from tinyclip_jax.inherit import DepthRule, manual
from tinyclip_jax.inputs import preprocess_of, tokenizer_of
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.zoo import FAMILY, open_clip_model


@dataclass(frozen=True)
class Pretrained:
    """A CLIP with its tokenizer and preprocessing. params: the flat tree for `model.apply`."""

    cfg: ClipConfig
    model: Functional
    params: dict[str, jax.Array]
    pre: Preprocess
    tokenizer: Tokenizer | None

    def encode_image(self, images: Picture | Iterable[Picture]) -> jax.Array:
        """Encode pictures (files, bytes, PIL images, uint8 [height, width, 3]; one or several) to unit-norm [n, joint].

        Raises InputError with the file, or the index in the list, for a picture that cannot be read.
        """
        one = isinstance(images, str | Path | bytes | bytearray | Image.Image)
        one = one or (isinstance(images, np.ndarray) and images.ndim <= 3)
        if not one and not isinstance(images, Iterable):
            kind = type(images).__name__
            raise InputError(f"images is of type {kind}: give files, bytes, PIL images or uint8 arrays")
        several: Iterable[Any] = [images] if one else images  # type: ignore[assignment]
        pixels = [self._pixels(image, None if one else i) for i, image in enumerate(several)]
        if not pixels:
            raise InputError("the list of pictures is empty: give one or more")
        return self._image(self.params, np.stack(pixels))

    def _pixels(self, image: Any, number: int | None) -> np.ndarray:
        try:
            return eval_image(decode(image, self.pre.background), self.pre)
        except InputError as error:
            where = "" if number is None else f"picture number {number}, counted from 0: "
            raise InputError(f"{where}{error}") from error

    def encode_text(self, texts: str | Iterable[str]) -> jax.Array:
        """Encode one or several captions to unit-norm features [n, joint] f32.

        Raises InputError when the checkpoint has no tokenizer, and for anything that is not a string.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: put its tokenizer.json next to the weights")
        tokens = self.tokenizer(texts, self.cfg.text.context)
        if not len(tokens):
            raise InputError("the list of captions is empty: give one or more")
        return self._text(self.params, tokens)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write a weights folder, which `load` and every command read."""

        def sidecars(staging: Path) -> None:
            self.pre.save(staging)
            if self.tokenizer is not None:
                self.tokenizer.save(staging)

        save_params(place(folder), FAMILY.name, self.cfg, self.params, sidecars, spec=self.model.spec, force=force)

    @cached_property
    def _image(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_image"))

    @cached_property
    def _text(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_text"))


def load(source: str, **overrides: Any) -> Pretrained:
    """Load a CLIP by SOURCE: `hf:org/name`, a folder or file of any format, `embedded:emoji`; f32, default devices.

    overrides: settings that a bare weights file does not contain (`activation="quick_gelu"`). Raises InputError when it
    is no CLIP.
    """
    donor = open_clip_model(str(source), **overrides)
    pre, tokenizer = preprocess_of(donor).announced(), tokenizer_of(donor)
    params = load_params(donor, start(MeshConfig()))
    return Pretrained(cfg=donor.cfg, model=donor.model, params=params, pre=pre, tokenizer=tokenizer)


def inherit_from(clip: Pretrained, cfg: ClipConfig, depth_rule: DepthRule = "interval", seed: int = 0) -> Pretrained:
    """Create a student with config `cfg` from the weights of `clip` (manual inheritance, `inherit.manual`).

    The similarity scale is not inherited, as in the released code.
    """
    student = functional(Clip, cfg)
    source = Source(clip.model.spec, clip.params)
    init = partial(student.init, jax.random.key(seed))
    params = graft(manual(clip.cfg, cfg, depth_rule), source, student.spec, None, init)
    return Pretrained(cfg=cfg, model=student, params=params, pre=clip.pre.at(cfg.image.size), tokenizer=clip.tokenizer)
