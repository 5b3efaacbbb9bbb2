"""Augmentation of DeiT's recipe: crops and RandAugment on the host, flips, erasing, mixup and CutMix on devices."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError, between, positive
from learngene.randaugment import RandAugment

ERASED, ERASED_RATIO = (0.02, 1 / 3), 0.3  # area and narrowest aspect ratio of an erased box
TRIES = 10  # draws before giving up


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training pictures; the default changes nothing."""

    crop: Literal["none", "resized", "shift"] = "none"
    """none: the whole square. resized: a random part, resized. shift: the square moved by up to `shift` pixels, for
    small pictures.
    """
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area in a resized crop."""
    shift: int = 4
    flips: float = 0.0
    """Probability of a horizontal flip."""
    randaugment: str = ""
    """timm's notation, such as rand-m9-mstd0.5-inc1; empty: none."""
    views: int = 1
    """Augmented views of each record in a batch, which then has that many times more pictures (repeated augmentation).
    """
    erase: float = 0.0
    """Probability that a box of the picture is replaced by noise."""
    mixup: float = 0.0
    """Beta concentration of mixup's weight; 0: no mixup."""
    cutmix: float = 0.0
    """Beta concentration of the area that CutMix keeps; 0: no CutMix. With mixup too, one of both is drawn for each
    batch.
    """
    smoothing: float = 0.0
    """Label smoothing: probability mass that is spread evenly over the classes."""

    def __post_init__(self) -> None:
        positive(self, "views", most=1000)
        between(self, "shift", "mixup", "cutmix")
        between(self, "flips", "erase", most=1.0)
        between(self, "smoothing", below=1.0)
        if self.randaugment:
            RandAugment.parse(self.randaugment)
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise InputError(f"scale is {self.scale}: choose the smallest and the largest share of the area, up to 1")

    def idle(self) -> dict[str, str]:
        """Fields that have no effect, and why."""
        crops = {"scale": "resized", "shift": "shift"}
        others = {name: crop for name, crop in crops.items() if crop != self.crop}
        return {name: f"augment.crop is {self.crop}; set it to {crop}" for name, crop in others.items()}

    @property
    def changes(self) -> bool:
        """Whether a picture differs between epochs, so that a teacher's logits cannot be cached."""
        picture = self.crop != "none" or self.randaugment or self.views > 1
        return bool(picture or self.flips or self.erase or self.mixup or self.cutmix)


def augment(
    cfg: AugmentConfig, pre: Preprocess, images: jax.Array, labels: jax.Array, classes: int, key: jax.Array
) -> "Augmented":
    """Augment a batch on devices. images: [batch, size, size, 3] uint8. labels: [batch] int."""
    shift, flip, erase_key, mix_key = jax.random.split(key, 4)
    if cfg.crop == "shift":
        images = shifted(images, cfg.shift, shift)
    pixels = images.astype(jnp.float32) / 255
    if cfg.flips:
        mirrored = jax.random.bernoulli(flip, cfg.flips, (len(pixels), 1, 1, 1))
        pixels = jnp.where(mirrored, pixels[:, :, ::-1], pixels)
    if cfg.erase:
        pixels = erased(pixels, cfg.erase, pre, erase_key)
    off = cfg.smoothing / classes
    targets = jax.nn.one_hot(labels, classes) * (1 - cfg.smoothing) + off
    return mixed(cfg, pixels, targets, mix_key) if cfg.mixup or cfg.cutmix else Augmented(pixels, targets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Augmented:
    """Augmented pixels [batch, size, size, 3] f32 in 0..1, and targets [batch, classes], distributions over classes."""

    pixels: jax.Array
    targets: jax.Array


def shifted(images: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Shift each picture by up to `most` pixels both ways, and fill with black (torchvision RandomCrop, padded)."""
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:]))
    return cut(padded, starts)


def erased(pixels: jax.Array, probability: float, pre: Preprocess, key: jax.Array) -> jax.Array:
    """Replace a box by normal noise in some normalised pictures (timm RandomErasing, mode pixel, one box)."""
    batch, height, width, _ = pixels.shape
    chosen, area_key, ratio_key, row_key, col_key, noise_key = jax.random.split(key, 6)
    area = jax.random.uniform(area_key, (batch, TRIES), minval=ERASED[0], maxval=ERASED[1]) * height * width
    most = -jnp.log(ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (batch, TRIES), minval=-most, maxval=most))
    rows, cols = jnp.round(jnp.sqrt(area * ratio)).astype(int), jnp.round(jnp.sqrt(area / ratio)).astype(int)
    fits = (rows < height) & (cols < width)
    try_ = fits.argmax(1)[:, None]
    rows, cols = (jnp.take_along_axis(sizes, try_, axis=1)[:, 0] for sizes in (rows, cols))
    top = jax.random.randint(row_key, (batch,), 0, height - rows + 1)
    left = jax.random.randint(col_key, (batch,), 0, width - cols + 1)
    hit = jax.random.bernoulli(chosen, probability, (batch,)) & fits.any(1)
    inside = _inside(top, rows, height)[:, :, None] & _inside(left, cols, width)[:, None, :] & hit[:, None, None]
    noise = jax.random.normal(noise_key, pixels.shape) * jnp.asarray(pre.std) + jnp.asarray(pre.mean)
    return jnp.where(inside[..., None], noise, pixels)


def _inside(first: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Mask [batch, size] of the positions in [first, first + length)."""
    position = jnp.arange(size)[None]
    return (position >= first[:, None]) & (position < (first + length)[:, None])


def mixed(cfg: AugmentConfig, pixels: jax.Array, targets: jax.Array, key: jax.Array) -> Augmented:
    """Apply mixup or CutMix to the batch and its reverse, with one weight for all pictures (timm Mixup, mode batch)."""
    switch, weight_key, box_key = jax.random.split(key, 3)
    by_mixup = jax.random.beta(weight_key, cfg.mixup, cfg.mixup) if cfg.mixup else jnp.float32(1)
    area = jax.random.beta(weight_key, cfg.cutmix, cfg.cutmix) if cfg.cutmix else jnp.float32(1)
    cuts = jax.random.bernoulli(switch, 0.5) if cfg.mixup and cfg.cutmix else jnp.asarray(bool(cfg.cutmix))
    other = pixels[::-1]
    _, height, width, _ = pixels.shape
    box = cut_box(area, height, width, box_key)
    blended = by_mixup * pixels + (1 - by_mixup) * other
    pasted = jnp.where(box[None, :, :, None], other, pixels)
    weight = jnp.where(cuts, 1 - box.mean(), by_mixup)
    return Augmented(jnp.where(cuts, pasted, blended), weight * targets + (1 - weight) * targets[::-1])


def cut_box(kept: jax.Array, height: int, width: int, key: jax.Array) -> jax.Array:
    """Draw the box of CutMix, [height, width] bool: area 1 - kept, with a uniform centre, clipped at the edges."""
    rows, cols = (jnp.floor(size * jnp.sqrt(1 - kept)).astype(int) for size in (height, width))
    row_key, col_key = jax.random.split(key)
    row, col = jax.random.randint(row_key, (), 0, height), jax.random.randint(col_key, (), 0, width)
    at_row, at_col = jnp.arange(height), jnp.arange(width)
    in_rows = (at_row >= row - rows // 2) & (at_row < row + rows // 2)
    in_cols = (at_col >= col - cols // 2) & (at_col < col + cols // 2)
    return in_rows[:, None] & in_cols[None]
