"""A generator of weights for notebooks, the networks it draws, and the verbs load and train."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.data.pictures import Picture, several
from heirloom.common.errors import InputError, check_seed, with_settings
from heirloom.common.mesh import start
from heirloom.common.methods import open_any
from heirloom.common.notebook.model import Loaded
from heirloom.common.notebook.run import Trained
from heirloom.common.notebook.run import train as train_recipe
from heirloom.common.notebook.shown import Shown
from heirloom.common.train.parameters import load_params
from weightgen.formats import sidecars
from weightgen.generate import check_finite, check_generates
from weightgen.generator.sample import SampleConfig
from weightgen.report import labels_of, report
from weightgen.tasks import Task, draw_weights, examples, read_pictures, read_words
from weightgen.zoo.data import Encode, Projection, encoder


@dataclass(frozen=True, repr=False)
class Pretrained(Loaded):
    """A generator of weights. donor: its open folder, with the files next to the weights."""

    donor: Donor

    @property
    def family(self) -> Family:
        return self.donor.family

    def generate(
        self,
        pictures: str | os.PathLike[str] | Mapping[str, Sequence[Picture]] | None = None,
        *,
        task: str = "",
        n: int = 8,
        seed: int = 0,
        **settings: Any,
    ) -> "Networks":
        """Draw the weights of `n` networks for classes that pictures show, without a gradient step.

        pictures: a folder with a sub-folder for each class, or {class: pictures}. Up to `cfg.shots` pictures of a class
        are the condition; the others measure the result. task: words, for a generator that takes these. settings:
        fields of `SampleConfig` (steps=50). Raises InputError for data that does not fit.
        """
        check_seed(seed)
        how = with_settings(SampleConfig(), settings)
        if (pictures is None) == (not task):
            raise InputError("give pictures, or a task in words, and not both")
        if pictures is None:
            wanted = read_words(self.donor, task)
        else:
            given = pictures if isinstance(pictures, Mapping) else os.fspath(pictures)
            wanted = read_pictures(self.donor, given, seed, self._encode if self.cfg.net else None)
        tokens = draw_weights(self.donor, wanted, how, n=n, seed=seed)
        check_finite(tokens, self.donor)
        return Networks(self, wanted, tokens, how, seed)

    def _sidecars(self, folder: Any) -> None:
        sidecars(self.donor, folder, "heirloom")

    def _about(self) -> dict[str, str]:
        c = self.cfg
        what = f"{c.net.classes}-way networks ({c.net.kind})" if c.net else "checkpoints"
        condition = "pictures of each class" if c.net else c.condition
        return {"draws": f"{what} of {c.whole.count:,} weights", "condition": condition}

    @cached_property
    def projection(self) -> Projection:
        """How pictures become features."""
        return Projection.load(self.donor.folder)

    @cached_property
    def _encode(self) -> Encode:
        return encoder(self.projection.backend)


@dataclass(frozen=True, repr=False)
class Networks(Shown):
    """Networks that a generator drew for one task. tokens: their weights, [network, token, length] f32."""

    generator: Pretrained
    task: Task
    tokens: np.ndarray
    how: SampleConfig
    seed: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return self.task.names

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights as a tree, {path: array [network, ...]}."""
        whole = self.generator.cfg.whole
        return dict(whole.unflatten(jnp.asarray(self.tokens), whole.like))

    def average(self) -> "Networks":
        """Returns one network, whose weights are the mean of these."""
        return replace(self, tokens=self.tokens.mean(0, keepdims=True))

    def predict(self, pictures: Picture | Iterable[Picture]) -> np.ndarray:
        """Classify pictures with every network: [network, picture] int, indices of `names`."""
        cfg = self.generator.cfg
        if cfg.net is None:
            raise InputError("these are weights of checkpoints, which do not classify pictures")
        records = [{"key": f"picture number {i}, counted from 0", "image": x} for i, x in enumerate(several(pictures))]
        read = (self.generator.projection, cfg.net, self.generator._encode)
        made = examples(records, np.zeros(len(records), np.int64), *read)
        return np.asarray(labels_of(cfg, self.tokens, made.x))

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json: accuracies next to those of baselines, novelty, diversity."""
        return report(self.generator.donor, self.task, self.tokens, how=self.how, seed=self.seed)

    @property
    def scores(self) -> dict[str, float]:
        """Accuracies on pictures that were left over, next to baselines; empty where none were."""
        return {name: value for name, value in (self.report["accuracy"] or {}).items() if value is not None}

    def _facts(self) -> tuple[str, dict[str, str]]:
        shots = f"{self.task.shots} pictures of each class, no gradient step" if self.task.support else "words"
        title = f"{len(self)} networks of {self.generator.cfg.whole.count:,} weights"
        return title, {"classes": ", ".join(self.names), "condition": shots}


def load(source: str | os.PathLike[str]) -> Pretrained:
    """Load a generator of weights by SOURCE: a folder, or a run of its recipe. Raises InputError for anything else."""
    donor = open_any(str(source))
    check_generates(donor)
    params = load_params(donor, start())
    return Pretrained(cfg=donor.cfg, model=donor.model, params=params, donor=donor, source=str(source))


def train(recipe: Any, run: str | os.PathLike[str] | None = None, **fields: Any) -> Trained[Pretrained]:
    """Train a recipe in a run folder, or resume it there: train("weightgen/zoo", members=1000).

    recipe: its name, a Python file, or a config. run: the folder; None: a new one in `runs`. fields: of the config,
    nested ones as dictionaries. A zoo is written to `run.folder / "zoo"`, which the recipe of a generator takes:
    train("weightgen/generator", zoo=run.folder / "zoo"). Raises InputError for bad input.
    """
    return train_recipe(recipe, run, fields, "weightgen", load)
