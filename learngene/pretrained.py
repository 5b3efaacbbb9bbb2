"""A ViT, a gene or a convnet for notebooks, and the verbs load, expand, compare, train and evaluate."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from heirloom.common.checkpoint.convert import kept_provenance
from heirloom.common.checkpoint.family import Family
from heirloom.common.data.labelled import write_labels
from heirloom.common.data.pictures import Picture
from heirloom.common.data.preprocess import Preprocess, eval_images
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.model import Loaded, inherited
from heirloom.common.notebook.run import Trained, configured, new_folder
from heirloom.common.notebook.run import train as train_recipe
from heirloom.common.notebook.shown import Shown, picture_of
from heirloom.common.train.parameters import load_params
from heirloom.common.vit.model import VitConfig
from learngene import convnet
from learngene.compare import Comparison, report
from learngene.compare import compare as compare_runs
from learngene.config import Config
from learngene.convnet import ConvConfig
from learngene.data import evaluation, forget
from learngene.demo import figure_of
from learngene.descendant import descendant, preprocess_for
from learngene.evaluate import scorer
from learngene.expand import expansion
from learngene.inputs import preprocess_of
from learngene.labels import labels_of
from learngene.problem import check_one_class, problem_of, said_of, write_problem
from learngene.zoo import FAMILY, open_classifier


@dataclass(frozen=True, repr=False)
class Pretrained(Loaded):
    """A classifier with its preprocessing: a ViT, a gene (which computes as its auxiliary net), or a convnet.

    classes: the names of the classes, in the order of the logits; None where unknown. problem: what the outputs are,
    where a picture does not have one class of several (`problem_of`).
    """

    cfg: VitConfig | ConvConfig
    pre: Preprocess
    classes: tuple[str, ...] | None = None
    problem: str = ""

    @property
    def family(self) -> Family:
        return convnet.FAMILY if isinstance(self.cfg, ConvConfig) else FAMILY

    def predict(self, images: Picture | Iterable[Picture]) -> np.ndarray:
        """Probabilities [n, classes] f32 of pictures: files, bytes, PIL images, uint8 arrays; one or several.

        Raises InputError for a picture that cannot be read, for a model without a classifier, and for one that does not
        give a picture one class of several.
        """
        if not self.cfg.classes:
            raise InputError("this model has no classifier: expand it with classes=N and train it")
        check_one_class(self.problem, "this model", "probabilities need")
        return np.asarray(self._probabilities(self.params, eval_images(images, self.pre)))

    def _sidecars(self, folder: Path) -> None:
        self.pre.save(folder)
        if self.classes is not None:
            write_labels(folder, self.classes)
        write_problem(self.problem, folder, "heirloom")

    def _about(self) -> dict[str, str]:
        c = self.cfg
        if isinstance(c, ConvConfig):
            return {"input": f"{c.size} px", "classes": str(c.classes)}
        kind = "layers" if c.gene == "none" else f"blocks, a gene ({c.gene}) that stands for {c.depth} layers,"
        return {
            "blocks": f"{c.layers} {kind} of width {c.width}",
            "input": f"{c.size} px, patch {c.patch}",
            "classes": str(c.classes),
        }

    @cached_property
    def _probabilities(self) -> Any:
        return jax.jit(lambda params, x: jax.nn.softmax(jnp.asarray(self.model.apply(params, x))))


def load(source: str | os.PathLike[str], **overrides: Any) -> Pretrained:
    """Load a ViT, a gene or a convnet by SOURCE: `hf:org/name`, a folder or file of any format, a run's model; f32.

    overrides: settings that a bare weights file does not contain. Raises InputError when it is none of these.
    """
    donor = open_classifier(str(source), **overrides)
    about: dict[str, Any] = dict(pre=preprocess_of(donor).announced(), classes=labels_of(donor), source=str(source))
    remark(said_of(problem := problem_of(donor)))
    about |= dict(problem=problem, loaded_from=kept_provenance(donor))
    return Pretrained(cfg=donor.cfg, model=donor.model, params=load_params(donor, start()), **about)


def expand(
    gene: Pretrained | str,
    depth: int,
    *,
    size: int | None = None,
    classes: int | None = None,
    layers: Sequence[int] = (),
    seed: int = 0,
) -> Pretrained:
    """Create a ViT of `depth` layers from a gene, without training. An ordinary ViT keeps its depth.

    gene: a model, or its SOURCE. size: of the input, in pixels; classes: their number, with a fresh classifier if it is
    another. layers: the stage of each layer, instead of SWS's rule. Raises InputError when they do not fit together.
    """
    gene = load(gene) if isinstance(gene, str) else gene
    if not isinstance(gene.cfg, VitConfig):
        raise InputError("a convnet has no depth to expand: give a gene or a ViT")
    cfg = descendant(gene.cfg, depth, size=size, classes=classes, layers=tuple(layers))
    model = functional(FAMILY.module, cfg)
    params, record = inherited(gene, expansion(gene.cfg, cfg, tuple(layers)), model, seed)
    same = cfg.classes == gene.cfg.classes
    head = dict(classes=gene.classes if same else None, problem=gene.problem if same else "")
    about: dict[str, Any] = dict(pre=preprocess_for(gene.pre, cfg, size), provenance=record) | head
    return Pretrained(cfg=cfg, model=model, params=params, **about)


def train(recipe: Any, run: str | os.PathLike[str] | None = None, **fields: Any) -> Trained[Pretrained]:
    """Train a recipe in a run folder, or resume it there: train("learngene/smoke", steps=60).

    recipe: its name, a Python file, or a config. run: the folder; None: a new one in `runs`. fields: of the config,
    nested ones as dictionaries: optim={"lr": 3e-4}. Returns the run, with `metrics`, `plot()` and `model`. Raises
    InputError for bad input, and for a comparison, which `compare` runs.
    """
    if isinstance(configured(recipe, {}, "learngene"), Comparison):
        raise InputError(f"{recipe} compares several trainings: call learngene.compare({str(recipe)!r})")
    return train_recipe(recipe, run, fields, "learngene", load)


def evaluate(
    model: Pretrained | str,
    data: str | os.PathLike[str],
    *,
    split: str = "",
    label: str = "label",
    image: str = "image",
    batch: int = 256,
) -> dict[str, float]:
    """Score a classifier on labelled pictures, as `heirloom eval`: top1, top5 (shares) and loss (nats).

    data: as in own-data.md, such as a folder with one for each class; label, image: its columns. Raises InputError for
    data that cannot be read and for a model without a classifier.
    """
    vit = load(model) if isinstance(model, str) else model
    check_one_class(vit.problem, "this model", "accuracy needs")
    source = SourceConfig(path=os.fspath(data), split=split, image=image, text="")
    forget()
    held_out = evaluation(source, label, vit.pre, batch, vit.cfg.classes, vit.classes)
    return dict(scorer(vit.family, vit.cfg, held_out, vit.pre, start())(vit.params).metrics)


@dataclass(frozen=True, repr=False)
class Compared(Shown):
    """A comparison of methods at several depths. results: the content of comparison.json."""

    folder: Path
    cfg: Comparison
    results: Mapping[str, Any]

    def curve(self, method: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns steps [n] and held-out accuracies [n] (shares) of one model, from before its first step."""
        arm = self._arm(method, depth)
        return np.array(arm["steps"]), np.array(arm["top1"])

    def model(self, method: str, depth: int) -> Pretrained:
        """Loads the trained model of a method and a depth."""
        self._arm(method, depth)
        return load(self.folder / f"{method}-{depth}" / "model")

    @cached_property
    def gene(self) -> Pretrained:
        """The trained gene. Raises InputError for a comparison without one."""
        if "sws" not in self.results["genes"]:
            raise InputError(f"none of the methods {', '.join(self.cfg.methods)} has a gene: add sws")
        return load(self.folder / "gene-sws" / "model")

    def plot(self) -> Image.Image:
        """Draws accuracy by depth, before and after training, and by cost; returns a PIL image."""
        return picture_of(figure_of(self.cfg, dict(self.results)))

    def summary(self) -> None:
        """Prints the table of `heirloom compare`: accuracy after 0, 1 and n epochs, and costs."""
        report(self.cfg, dict(self.results))

    def _arm(self, method: str, depth: int) -> Mapping[str, Any]:
        arms = self.results["arms"]
        if (name := f"{method}-{depth}") not in arms:
            raise InputError(f"no model {name!r}{nearest(name, arms)} (there are {', '.join(arms)})")
        return arms[name]

    def _facts(self) -> tuple[str, dict[str, str]]:
        facts = {"teacher": f"{self.results['teacher']['top1']:.1%} right on held-out pictures"}
        for method in self.cfg.methods[:3]:
            arms = [(depth, self.results["arms"][f"{method}-{depth}"]["top1"]) for depth in self.cfg.depths]
            facts[method] = ", ".join(f"{depth} layers {top1[0]:.1%} -> {top1[-1]:.1%}" for depth, top1 in arms)
        return f"{self.folder}: {len(self.results['arms'])} models, before -> after {self.cfg.epochs} epochs", facts


def compare(recipe: Any, run: str | os.PathLike[str] | None = None, **fields: Any) -> Compared:
    """Train a gene and models of several depths by several methods: compare("learngene/emoji", depths=(4, 8)).

    recipe: the name of a comparison or of a gene's recipe, or a config. run: the folder; the same one again continues;
    None: a new one in `runs`. fields: of the comparison: depths, methods, epochs, gene={...}. Raises InputError.
    """
    cfg = configured(recipe, {}, "learngene")
    cfg = Comparison(gene=cfg) if isinstance(cfg, Config) else cfg
    if not isinstance(cfg, Comparison):
        raise InputError(f"{recipe} is not the recipe of a gene: give one of learngene, such as learngene/emoji")
    cfg = configured(cfg, fields, "learngene")
    folder = Path(run) if run is not None else new_folder(recipe if isinstance(recipe, str) else "learngene-compare")
    return Compared(folder, cfg, compare_runs(cfg, folder))
