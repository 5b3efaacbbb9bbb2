"""A generator that is trained and kept in memory, for demos and benchmarks."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.typing import ArrayLike

from heirloom.common.nn.functional import Functional, functional
from heirloom.common.train import recipe
from heirloom.common.train.parameters import best
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.model import Generator
from weightgen.generator.sample import Draw, SampleConfig, drawer
from weightgen.generator.train import generator_parts
from weightgen.train import LoopConfig
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo


@dataclass(frozen=True)
class Trained:
    """A generator in memory, and how it is sampled."""

    model: Functional
    cfg: GeneratorConfig
    params: dict[str, jax.Array]
    how: SampleConfig = field(default_factory=SampleConfig)

    @cached_property
    def _draw(self) -> Draw:
        return drawer(self.model, self.cfg, self.how)

    def draw(
        self, support: ArrayLike, mask: ArrayLike, key: jax.Array, index: np.ndarray, start: ArrayLike | None = None
    ) -> np.ndarray:
        """Tokens [batch, token, length] f32; the arguments are those of `drawer`'s function."""
        return np.asarray(self._draw(self.params, support, mask, key, index, start))

    def apply(self, *args: ArrayLike, method: str) -> jax.Array:
        """A method of the model: expected, encode, decode."""
        return self.model.apply(self.params, *args, method=method)


def train_generator(
    cfg: GeneratorConfig, zoo: Zoo, bank: Bank, *, loop: LoopConfig, directory: Path, dropout: float = 0.1
) -> Trained:
    """Train a generator of a zoo's networks, kept in memory; `directory` holds the run and continues it."""
    parts = generator_parts(cfg, zoo, bank, loop=loop, dropout=dropout)
    session = recipe.begin(loop, directory, parts)
    assert session is not None  # without RUN/model a run is not finished
    state = recipe.train(session, parts, finish=lambda state: None)
    return Trained(model=functional(Generator, cfg), cfg=cfg, params=best(state))
