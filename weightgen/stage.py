"""What the recipes share: verbs they lack, the gate a codec has to pass, and what a zoo says of its networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.weights import read_json
from heirloom.common.errors import InputError
from weightgen.autoencoder import TokenVaeConfig
from weightgen.codec import gate
from weightgen.data import Bank, shown
from weightgen.evaluate import accuracy
from weightgen.nets import predict
from weightgen.zoo import Zoo, flat


class Stage:
    """What the four recipes cannot do, said in one line each."""

    def inherit(self, destination: Path, *, force: bool = False) -> Mapping[str, Any]:
        raise InputError("this recipe inherits from no donor: heirloom train runs it")

    def evaluate(self) -> list[dict[str, Any]]:
        raise InputError("this recipe has nothing to score before it is trained: heirloom train, then heirloom eval RUN/model --data DIR")


@dataclass(frozen=True)
class GateConfig:
    """The codec must keep the weights it codes and the accuracy of their networks, or training stops before it starts."""

    tolerance: float = 0.02
    """Accuracy that may be lost, on pictures no network of the zoo was trained on; they must have more than that above chance."""
    error: float = 0.5
    """Relative squared error that what is coded may have (with a linear prior, what it leaves): more is hardly a codec, and 0.42 has
    been seen to cost heads 5 points of accuracy, 0.23 none."""
    force: bool = False
    members: int = 200
    """Networks of the zoo it is measured on: the last ones, at most a fifth, on which no codec is fitted before. Checkpoints of others
    may all be unlike, so with them it is measured on what it was fitted on, and only the error, as they have no pictures."""


def left_out(cfg: GateConfig, zoo: Zoo) -> int:
    """How many of the zoo's last networks are for the gate alone."""
    return min(cfg.members, len(zoo) // 5) if zoo.net else 0


def measure(cfg: GateConfig, zoo: Zoo, bank: Bank, code: Any, seed: int) -> None:
    """The gate. code(tokens, rows) -> what the codec is given of these tokens, and what it gives back.

    Raises InputError when it is not passed.
    """
    held = left_out(cfg, zoo)
    rows = np.arange(len(zoo))[-held:] if held else np.random.default_rng(seed).permutation(len(zoo))[: cfg.members]
    rows, before, after, chance = np.sort(rows), np.nan, np.nan, 0.0
    tokens = zoo.tokens(rows)
    given, back = (np.asarray(x) for x in code(tokens, rows))
    if zoo.net:
        x, y = shown(zoo.net, *bank.all(np.asarray(zoo.classes[rows]), 20))
        nets = [zoo.spec.unflatten(jnp.asarray(t), zoo.spec.like) for t in (tokens, tokens - given + back)]
        before, after = (accuracy(predict(zoo.net, params, x, at_once=20), y, zoo.net.classes).mean() for params in nets)
        chance = 1 / zoo.net.classes
    found = gate(before, after, flat(zoo.spec, given), flat(zoo.spec, back), cfg.tolerance, chance, cfg.error)
    known = f"{100 * found.before:.1f} % before, {100 * found.after:.1f} % after a round trip" if zoo.net else "accuracy is not known"
    print(f"codec: {known}, relative error {found.error:.4f}, of {len(rows)} networks{' it was not fitted on' if held else ''}")
    found.check(cfg.force)


def check_codec(cfg: TokenVaeConfig, zoo: Zoo, path: str) -> None:
    """Raises InputError for a codec of other networks than the zoo's."""
    own, ours = (cfg.tokens, cfg.length), (zoo.spec.rows, zoo.spec.length)
    if own != ours:
        raise InputError("{} codes {} tokens of {} weights, the zoo's networks have {} of {}: train another".format(path, *own, *ours))


def pictures_of(zoo: str) -> Bank:
    """What the networks of a zoo take, pictures or features: such as they were not trained on where these are stored."""
    return Bank.load(Path(zoo), next((name for name in ("held", "pictures") if (Path(zoo) / f"{name}.npz").is_file()), "bank"))


def zoo_words(folder: Path) -> str:
    """How an imported zoo's members are told apart: text, label or chunk."""
    return str(read_json(folder / "tasks.json")["told"])
