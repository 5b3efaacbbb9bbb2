"""Samples a text-to-image transformer step by step, so that a caller sees the progress and memory stays small.

As diffusers' PixArtSigmaPipeline: `PromptConfig(times="integer", null="own mask", letters="lower")`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from heirloom.common.diffusion import Prediction, Sampler, Schedule, Times, dpm_solver
from heirloom.common.errors import InputError
from heirloom.common.mesh import batch_sharding, filled_rows
from heirloom.common.train.parts import Model
from lit_jax.losses import split
from lit_jax.pixart import PixArtConfig, Text
from lit_jax.sample import Guided, Name, SampleConfig, check_choices, guide, is_number

Null = Literal["prompt mask", "own mask"]
Letters = Literal["as given", "lower"]
TEXT_STEP = 32  # texts are cut to a multiple of so many tokens: few lengths, few compilations


@dataclass(frozen=True)
class PromptConfig(SampleConfig):
    """Settings of the sampler of text-to-image models; the defaults are PixArt-Σ's."""

    sampler: Name = "dpm"
    """DPM-Solver++(2M) as PixArt runs it, ancestral DDPM with the learned variance, or DDIM."""
    steps: int = 20
    guidance: float = 4.5
    """Classifier-free guidance scale: 1 is none."""
    guided: Guided = "all"
    """Channels of the noise that are guided: all four, as PixArt and diffusers do."""
    times: Times = "fractional"
    """Times of DPM-Solver++: PixArt's own, or "integer" as diffusers rounds them, for pictures to compare."""
    guided_steps: tuple[float, float] = (0.0, 1.0)
    """Guidance only between these shares of the steps (Kynkäänniemi et al. 2024): the other steps cost half."""
    null: Null = "prompt mask"
    """Mask of the unconditional input, which is the empty text: the prompt's mask (PixArt), or that of the empty text
    itself (diffusers). A negative prompt always has its own mask.
    """
    letters: Letters = "as given"
    """Prompts as given, as PixArt reads them, or in lower case, as diffusers does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, times=Times, null=Null, letters=Letters)
        given: Any = self.guided_steps  # from Python, of any type
        shares = given.tolist() if isinstance(given, np.ndarray) else given
        two = isinstance(shares, list | tuple) and len(shares) == 2 and all(map(is_number, shares))
        if not two or not 0 <= shares[0] <= shares[1] <= 1:
            raise InputError(f"guided_steps are {given!r}: give two shares of the steps, such as 0.1 0.8")
        object.__setattr__(self, "guided_steps", (float(shares[0]), float(shares[1])))
        if self.times == "integer" and self.sampler != "dpm":
            raise InputError(f"times integer are a setting of the sampler dpm, and this is {self.sampler}")

    def _dpm(self, chain: Schedule) -> Sampler:
        return dpm_solver(chain, self.steps, self.times)

    def text(self, prompt: str) -> str:
        """Returns a prompt as the text encoder reads it."""
        return prompt.strip() if self.letters == "as given" else prompt.strip().lower()

    def guides(self, step: int) -> bool:
        """Returns whether a step is guided."""
        first, last = self.guided_steps
        return self.guidance != 1 and first <= step / self.steps < last


@dataclass(frozen=True)
class Condition:
    """Features of a text for each picture, [picture, token, text] of any float dtype, and which tokens count."""

    features: Float[np.ndarray, "picture token text"]
    mask: Bool[np.ndarray, "picture token"]

    def cut(self, tokens: int) -> "Condition":
        """Returns the first tokens alone."""
        return Condition(self.features[:, :tokens], self.mask[:, :tokens])

    def rows(self, rows: np.ndarray) -> "Condition":
        """Returns the conditions of these pictures."""
        return Condition(self.features[rows], self.mask[rows])

    def repeated(self, count: int) -> "Condition":
        """Returns the condition of one picture for `count` of them."""
        return Condition(np.repeat(self.features, count, axis=0), np.repeat(self.mask, count, axis=0))


def unconditional(prompt: Condition, empty: Condition, rule: Null) -> Condition:
    """Returns what the unguided half reads. empty: features of the empty text, [1, token, text], with padding."""
    mask = prompt.mask if rule == "prompt mask" else np.broadcast_to(empty.mask, prompt.mask.shape)
    return Condition(np.broadcast_to(empty.features, prompt.features.shape), mask)


@dataclass(frozen=True)
class Denoiser:
    """Draws latents: `denoiser(params, latents, keys, text, null, sampling)`. A picture depends on its own row only."""

    cfg: PixArtConfig
    model: Model
    mesh: Mesh
    _steps: dict[PromptConfig, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        params: Mapping[str, Any],
        latents: Float[Array, "picture row col channel"],
        keys: Key[Array, " picture"],
        text: Condition,
        null: Condition | None,
        sampling: PromptConfig,
        advance: Callable[[], None] = lambda: None,
    ) -> Float[Array, "picture row col channel"]:
        """Turns N(0, 1) noise into scaled latents.

        keys: of the noise of each picture's steps. null: what the unguided half reads; None without guidance. advance:
        called after each step.
        """
        sampler, rows = sampling.make(), len(latents)
        order = filled_rows(rows, self.mesh)
        tokens = _longest(text, null if sampling.guidance != 1 else None)
        with jax.set_mesh(self.mesh):
            place = partial(jax.device_put, device=batch_sharding(self.mesh))
            modulations = self._modulations(params, jnp.asarray(sampler.time, jnp.float32))
            read = [self._read(params, c.cut(tokens), order, place) for c in (text, null) if c is not None]
            x, keys = place(latents[order]), place(keys[order])
            previous = jnp.zeros_like(x)
            step = self._steps.setdefault(sampling, self._step(sampler, sampling))
            for i in range(len(sampler)):
                texts = read if sampling.guides(i) else read[:1]
                x, previous = step(params, x, previous, np.int32(i), modulations, texts, keys)
                x.block_until_ready()  # so that the progress is that of the device, and no step waits in memory
                advance()
        return x[:rows]

    @cached_property
    def _modulations(self) -> Any:
        return jax.jit(partial(self.model.apply, method="modulations"))

    @cached_property
    def _condition(self) -> Any:
        return jax.jit(partial(self.model.apply, method="condition"))

    def _read(self, params: Mapping[str, Any], text: Condition, order: np.ndarray, place: Any) -> Text:
        return self._condition(params, place(text.features[order].astype(np.float32)), place(text.mask[order]))

    def _step(self, sampler: Sampler, sampling: PromptConfig) -> Any:
        def step(
            params: Mapping[str, Any],
            x: jax.Array,
            previous: jax.Array,
            i: jax.Array,
            modulations: Any,
            texts: list[Text],
            keys: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            both = texts[0] if len(texts) == 1 else jax.tree.map(_joined, texts[0], texts[1])
            count = len(x)

            def denoise(x: jax.Array, i: jax.Array) -> Prediction:
                modulation = jax.tree.map(lambda m: m[..., i, None, :], modulations)
                inputs = jnp.concatenate([x] * len(texts))
                output = self.model.apply(params, inputs, modulation, both, method="denoise")
                parts = [split(output[k * count : (k + 1) * count]) for k in range(len(texts))]
                return parts[0] if len(parts) == 1 else guide(parts[0], parts[1], sampling)

            return sampler.step(denoise, x, previous, i, keys)

        return jax.jit(step, donate_argnums=(1, 2))


def _longest(*conditions: Condition | None) -> int:
    """Returns how many tokens any picture reads, rounded up: masked tokens behind them change nothing."""
    used = [np.flatnonzero(c.mask.any(0)).max(initial=0) + 1 for c in conditions if c is not None]
    available = next(c.mask.shape[1] for c in conditions if c is not None)
    return min(available, -(-int(max(used)) // TEXT_STEP) * TEXT_STEP)


def _joined(one: jax.Array, other: jax.Array) -> jax.Array:
    """Puts two batches one after the other: the keys and values of all layers are [layer, batch, ...], masks [batch,
    ...].
    """
    return jnp.concatenate([one, other], axis=1 if one.ndim == 5 else 0)
