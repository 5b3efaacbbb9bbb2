"""Text to image: PixArt-Σ or LiT with its text encoder and its decoder, one stage after the other.

pipe = lit_jax.load("PixArt-Sigma-XL-2-512-MS")
pictures = pipe.draw("a red apple", size=(512, 512), steps=20, seed=0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from PIL import Image

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.text import strings
from heirloom.common.errors import InputError, check_seed, remark, with_settings
from heirloom.common.nn.functional import Functional
from heirloom.common.notebook.shown import Shown, short
from heirloom.common.train.parameters import load_params
from lit_jax import autoencoder_layouts
from lit_jax.aspect import nearest_size, trained_sizes
from lit_jax.components import Components, other_scale
from lit_jax.decode import PictureDecoder, check_finite, picture_decoder
from lit_jax.denoiser import Condition, Denoiser, PromptConfig, unconditional
from lit_jax.origin import Origin, autoencoder_origin, compare_latents
from lit_jax.pixart import PixArtConfig
from lit_jax.sample import check_whole, picture_keys
from lit_jax.stages import Stages
from lit_jax.text.encoder import TextEncoder, TextFeatures, TowerEncoder, open_text
from lit_jax.text_origin import read_empty_text, same_encoder

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Request:
    """Pictures to draw for one prompt; of its texts, halves of a character are joined or replaced.

    size: height and width in pixels, both multiples of the model's step. count: pictures. latents: the noise to begin
    with, [count, row, col, channel], instead of that of the seed.
    """

    prompt: str
    negative: str = ""
    size: tuple[int, int] = (512, 512)
    count: int = 1
    seed: int = 0
    latents: ArrayLike | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            object.__setattr__(self, name, strings(getattr(self, name))[0])


@dataclass(frozen=True, repr=False)
class TextToImage(Shown):
    """A text-to-image transformer with its text encoder and autoencoder; each is read when it is first needed.

    keep: the parameters of the transformer and the decoder stay in memory between calls; else each stage is freed
    before the next begins, which needs less memory. dtype: of the transformer; text encoder and decoder compute in
    float32, or as their files are. origin: the autoencoder that the model was trained with, if known. empty_text:
    features [token, width] of the empty text by the text encoder that it was trained with, if known.
    """

    donor: Donor
    components: Components
    mesh: Mesh
    text: TextEncoder | TowerEncoder
    autoencoder: Donor
    keep: bool = True
    dtype: DTypeLike = jnp.float32
    origin: Origin | None = None
    empty_text: np.ndarray | None = None
    stages: Stages = field(default_factory=lambda: Stages(quiet=True))
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def cfg(self) -> PixArtConfig:
        """The config of the transformer."""
        return self.donor.cfg

    @property
    def model(self) -> Functional:
        """The transformer as functions of its parameters."""
        return self.donor.model

    def _facts(self) -> tuple[str, dict[str, str]]:
        counts = self.donor.family.parameters(self.donor.model.spec)
        sides = " x ".join(map(str, self.default_size))
        return f"{self.donor.family.name}: {short(counts['total'])} parameters in the transformer", {
            "draws": f"prompts, {sides} pixels unless `size` says otherwise",
            "source": str(self.donor.path),
        }

    @property
    def step(self) -> int:
        """Heights and widths are multiples of so many pixels."""
        return self.autoencoder.cfg.factor * self.cfg.patch

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the square pictures that the model was trained on."""
        side = self.cfg.size * self.autoencoder.cfg.factor
        return side, side

    def encode_text(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Encode prompts: features [prompt, token, width] and the mask of the tokens that count [prompt, token]."""
        return self.text.encode([prompts] if isinstance(prompts, str) else list(prompts))

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str = "",
        size: tuple[int, int] | None = None,
        count: int = 1,
        seed: int = 0,
        batch: int = 4,
        exact: bool = False,
        latents: ArrayLike | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draw pictures, `count` of each prompt. An empty prompt draws without a condition.

        size: height and width in pixels (default: the model's square); unless `exact`, the trained size with the
        nearest ratio. batch: pictures drawn at a time. latents: noise [picture, row, col, channel] of all pictures,
        for comparisons; else it depends on seed, size and the number of the picture within its prompt. settings:
        fields of `PromptConfig` (steps=20). Raises InputError for an unknown setting, a size that the model cannot
        draw, and a stage whose result is not finite.
        """
        sampling = with_settings(PromptConfig(), settings)
        check_whole("count", count)
        check_whole("batch", batch)
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in (*texts, negative)):
            raise InputError("prompts must be a string or a list of strings; negative must be a string")
        size = self.fitting(self.default_size if size is None else size, exact)
        given = None if latents is None else np.asarray(latents, np.float32)
        if given is not None and given.shape != (shape := (len(texts) * count, *self.grid(size))):
            axes = f"{list(shape)} (picture, row, column, channel)"
            raise InputError(f"latents have the shape {list(given.shape)}: give {axes}")
        given = None if given is None else given.reshape(len(texts), count, *shape[1:])
        requests = [
            Request(text, negative, size, count, seed, None if given is None else given[i])
            for i, text in enumerate(texts)
        ]
        drawn = self.pictures(requests, sampling, batch)
        return [Image.fromarray(picture) for pictures in drawn for picture in pictures]

    def fitting(self, size: tuple[int, int], exact: bool) -> tuple[int, int]:
        """Returns the height and width to draw: the trained size with the nearest ratio, or the size itself if `exact`.

        Raises InputError for an exact size that is no multiple of the model's step.
        """
        given: Any = size  # from Python, anything
        whole = isinstance(given, tuple | list) and all(isinstance(side, int | np.integer) for side in given)
        if not whole or len(given) != 2:
            raise InputError(f"size is {size!r}: give height and width in pixels, such as (512, 768)")
        if min(size) < 1:
            raise InputError(f"size {size[0]} x {size[1]}: height and width are 1 pixel or more")
        if not exact:
            found = nearest_size(self.cfg.size, *size) if self._trained() else self._rounded(size)
            if found != tuple(size):
                why = "the nearest that this model was trained on" if self._trained() else "which it can draw"
                remark(f"{size[0]} x {size[1]} pixels become {found[0]} x {found[1]}, {why} (--exact keeps the size)")
            return found
        if wrong := [side for side in size if side % self.step]:
            raise InputError(
                f"size {size[0]} x {size[1]}: {wrong[0]} is no multiple of {self.step}; leave out --exact, or give"
                f" {' x '.join(map(str, self._rounded(size)))}"
            )
        if self._trained() and tuple(size) not in self._trained():
            remark(f"this model was not trained on pictures of {size[0]} x {size[1]} pixels")
        return size

    def _trained(self) -> list[tuple[int, int]]:
        """Returns PixArt's sizes, which are those of an autoencoder that shrinks eight times; else none is known."""
        return trained_sizes(self.cfg.size) if self.autoencoder.cfg.factor == 8 else []

    def _rounded(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (max(self.step, round(side / self.step) * self.step) for side in size)
        return height, width

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns the shape [row, col, channel] of the latents of a picture of this height and width."""
        height, width = (side // self.autoencoder.cfg.factor for side in size)
        return height, width, self.cfg.channels

    def pictures(self, requests: Sequence[Request], sampling: PromptConfig, batch: int = 4) -> list[np.ndarray]:
        """Draw the pictures of all requests, stage by stage: uint8 [count, height, width, 3] for each."""
        latents = self.latents(requests, sampling, batch)
        with self.stages("decoder", sum(map(len, latents))) as advance:
            decoder, drawn = self._decoder(), []
            for number, of_prompt in enumerate(latents):
                pictures = []
                for row in of_prompt:
                    pictures.append(decoder(jnp.asarray(row)[None], where=f"prompt {number}: ")[0])
                    advance()
                drawn.append(np.stack(pictures))
        return drawn

    def latents(self, requests: Sequence[Request], sampling: PromptConfig, batch: int = 4) -> list[np.ndarray]:
        """Draw the scaled latents of all requests, f32 [count, row, col, channel] for each; nothing is decoded."""
        for request in requests:
            check_seed(request.seed)
        if min([batch, *(request.count for request in requests)]) < 1:
            raise InputError(f"batch {batch} and counts {[request.count for request in requests]}: each is 1 or more")
        sampling.make()
        conditions, nulls = self._conditions(requests, sampling)
        drawn = []
        total = sum(-(-request.count // batch) for request in requests) * sampling.steps
        with self.stages("denoiser", total) as advance:
            params, denoiser = self._transformer(), self._denoiser
            for number, request in enumerate(requests):
                noise, keys = start_noise(request, self.grid(request.size))
                parts = []
                for first in range(0, request.count, batch):
                    rows = slice(first, min(first + batch, request.count))
                    text = conditions[number].repeated(rows.stop - rows.start)
                    null = nulls[number].repeated(rows.stop - rows.start) if nulls else None
                    found = denoiser(params, noise[rows], keys[rows], text, null, sampling, advance)
                    where = f"prompt {number}: "
                    parts.append(check_finite(found, "the denoiser's output", first, where).astype(np.float32))
                drawn.append(np.concatenate(parts))
        return drawn

    def _conditions(
        self, requests: Sequence[Request], sampling: PromptConfig
    ) -> tuple[list[Condition], list[Condition] | None]:
        """Encode all different texts of the requests once: what the guided and the unguided halves read."""
        guided = sampling.guidance != 1
        if not guided and any(request.negative for request in requests):
            remark("the negative prompt changes nothing: guidance is 1, which is none")
        prompts = [sampling.text(request.prompt) for request in requests]
        negatives = [sampling.text(request.negative) if guided else "" for request in requests]
        texts = list(dict.fromkeys([*prompts, *filter(None, negatives)]))
        empty = [""] if guided or self.empty_text is not None else []
        with self.stages("text encoder", self.text.layers) as advance:
            found = self.text.encode([*texts, *empty], lambda done, total: advance(), padding=empty)
        if self.empty_text is not None and not same_encoder(self.empty_text, found.features[-1][found.mask[-1]]):
            raise InputError(
                f"{self.components.text} is not the text encoder that this model was trained with: its features"
                " of the empty prompt differ; name the model's own with --text-encoder (in Python: text_encoder)"
            )
        rows = [Condition(found.features[i, None], found.mask[i, None]) for i in range(len(found.mask))]
        encoded = dict(zip(texts, rows, strict=False))
        conditions = [encoded[prompt] for prompt in prompts]
        if not guided:
            return conditions, None
        return conditions, [
            encoded[negative] if negative else unconditional(condition, rows[-1], sampling.null)
            for negative, condition in zip(negatives, conditions, strict=True)
        ]

    @cached_property
    def _denoiser(self) -> Denoiser:
        return Denoiser(self.cfg, self.model, self.mesh)

    def _transformer(self) -> dict[str, Any]:
        def load() -> dict[str, Any]:
            params = load_params(self.donor, self.mesh)
            # One leaf at a time, so that the wide and the narrow tree are never both in memory.
            return {path: params.pop(path).astype(self.dtype) for path in list(params)}

        return self._loaded("transformer", load)

    def _decoder(self) -> PictureDecoder:
        def load() -> PictureDecoder:
            params = load_params(self.autoencoder, self.mesh)
            return picture_decoder(self.autoencoder.cfg, self.autoencoder.model, params)

        return self._loaded("decoder", load)

    def _loaded(self, name: str, load: Callable[[], Any]) -> Any:
        if not self.keep:
            return load()
        if name not in self._kept:
            self._kept[name] = load()
        return self._kept[name]


def start_noise(request: Request, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns the noise of each picture, f32 [count, *shape], and the keys of its later steps, from the seed alone."""
    check_seed(request.seed)
    keys = picture_keys(jax.random.key(request.seed), np.arange(request.count))
    start, later = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if request.latents is not None:
        return jnp.asarray(request.latents, jnp.float32), later
    return jax.vmap(lambda key: jax.random.normal(key, shape))(start), later


def open_text_to_image(
    donor: Donor,
    components: Components,
    mesh: Mesh,
    *,
    resident: bool = False,
    cache: Path | None = None,
    keep: bool = True,
    dtype: Dtype | None = None,
    stages: Stages | None = None,
    origin: Origin | None = None,
) -> TextToImage:
    """Open the parts of a text-to-image model, lazily, and check that they fit together.

    resident: the text encoder stays in memory, instead of being read layer by layer for each call. cache: a folder of
    encoded texts. dtype: of the transformer; None: float32 on CPUs, which multiply it faster, else bfloat16. Raises
    InputError for an autoencoder or a text encoder that does not fit the transformer.
    """
    cfg: PixArtConfig = donor.cfg
    autoencoder = open_donor(components.autoencoder, [autoencoder_layouts.FAMILY])
    if autoencoder.cfg.latent != cfg.channels:
        raise InputError(
            f"{components.autoencoder} has latents of {autoencoder.cfg.latent} channels, the transformer"
            f" {cfg.channels}: name the model's autoencoder"
        )
    if origin is not None:
        found = autoencoder_origin(autoencoder, str(components.autoencoder))
        remark(compare_latents(origin, found, "the model", f"the autoencoder {components.autoencoder}"))
    else:
        remark(other_scale(donor, autoencoder.cfg.scaling_factor, str(components.autoencoder)))
    text = open_text(
        components.text, tokens=cfg.text_tokens, resident=resident, cache=cache, tokenizer=components.tokenizer
    )
    if text.width != cfg.text_width:
        raise InputError(
            f"{components.text} has features {text.width} wide, the transformer reads {cfg.text_width}: name the"
            " text encoder of this model (PixArt-Σ: t5-v1_1-xxl, 4096)"
        )
    return TextToImage(
        donor=donor,
        components=components,
        mesh=mesh,
        text=text,
        autoencoder=autoencoder,
        keep=keep,
        dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        origin=origin,
        empty_text=read_empty_text(donor.folder),
        stages=stages or Stages(quiet=True),
    )
