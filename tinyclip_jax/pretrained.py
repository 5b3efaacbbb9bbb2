"""A CLIP to hold in a notebook: weights, tokenizer and preprocessing together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from common.checkpoint import weights
from common.data.images import Preprocess, decode, eval_image
from common.data.text import Tokenizer
from common.errors import InputError
from common.nn.functional import Functional, functional
from common.surgery.graft import graft
from common.surgery.plan import Source
from common.train.mesh import MeshConfig, start
from common.train.parameters import load_params
from tinyclip_jax.formats import read_preprocess, read_tokenizer
from tinyclip_jax.inherit import DepthRule, manual
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.zoo import FAMILY, open_clip_model

Picture = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Pretrained:
    """A CLIP with what stands before it. `params` is the flat tree that `model.apply` takes."""

    cfg: ClipConfig
    model: Functional
    params: dict[str, jax.Array]
    pre: Preprocess
    tokenizer: Tokenizer | None

    def encode_image(self, images: Picture | Sequence[Picture]) -> jax.Array:
        """Unit-norm features [n, joint] f32 of pictures: files, PIL images or uint8 arrays [height, width, 3], one or several."""
        several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        return self._image(self.params, np.stack([eval_image(_picture(x), self.pre) for x in several]))

    def encode_text(self, texts: str | Sequence[str]) -> jax.Array:
        """Unit-norm features [n, joint] f32 of captions. Raises InputError when the checkpoint came without a tokenizer."""
        if self.tokenizer is None:
            raise InputError("this model came without its tokenizer; put its tokenizer.json beside the weights")
        return self._text(self.params, self.tokenizer(texts, self.cfg.text.context))

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write a weights folder, which every command and `load` take."""
        with weights.staged(Path(folder), force=force) as staging:
            staging.mkdir()
            weights.write_params(staging, self.params, spec=self.model.spec)
            weights.write_config(staging, FAMILY.name, self.cfg)
            self.pre.save(staging)
            if self.tokenizer is not None:
                self.tokenizer.save(staging)

    @cached_property
    def _image(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_image"))

    @cached_property
    def _text(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode_text"))


def load(source: str, **overrides: Any) -> Pretrained:
    """Any CLIP by SOURCE: `hf:org/name`, a folder or file of any format, `embedded:emoji`; f32 on the default devices.

    overrides: what a bare weights file cannot tell (`activation="quick_gelu"`). Raises InputError when it is no CLIP.
    """
    donor = open_clip_model(str(source), **overrides)
    params = load_params(donor, start(MeshConfig()))
    return Pretrained(
        donor.cfg, donor.model, params, read_preprocess(donor.folder, donor.cfg.image.size), read_tokenizer(donor.folder, donor.cfg)
    )


def inherit_from(clip: Pretrained, cfg: ClipConfig, depth_rule: DepthRule = "interval", seed: int = 0) -> Pretrained:
    """A student of shape `cfg` cut from `clip` (manual inheritance); the similarity scale is fresh, as in the released code."""
    student = functional(Clip, cfg)
    source = Source(clip.model.spec, clip.params)
    params = graft(manual(clip.cfg, cfg, depth_rule), source, student.spec, None, partial(student.init, jax.random.key(seed)))
    pre = Preprocess(cfg.image.size, clip.pre.mean, clip.pre.std, clip.pre.interpolation, clip.pre.scale)
    return Pretrained(cfg, student, params, pre, clip.tokenizer)


def _picture(x: Picture) -> Image.Image:
    if isinstance(x, Image.Image):
        return x.convert("RGB")
    return decode(Path(x).read_bytes() if isinstance(x, str | Path) else x)
