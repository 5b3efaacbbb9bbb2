"""The arguments that trainers of DiTs save next to the tensors, as settings with a name, a value and groups around."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from heirloom.common.checkpoint.family import Found
from heirloom.common.checkpoint.unwrap import TRAINING
from heirloom.common.errors import remark

_PLACES = ("args", "hyper_parameters", "hparams", "config", "cfg")  # of train.py, Lightning, and configs
_ALSO = re.compile(r"arg|param|conf|cfg|option|setting", re.IGNORECASE)  # in the names of other places
# Names of groups whose settings are the denoiser's: `model`, `dit_config`, `train_args`, and the places above.
_DENOISER = re.compile(
    r"(model|[dl]it|pixart|net(work)?|unet|denoiser|backbone|transformer|train(ing|er)?|hyper|init|h?param(eter)?s?"
    r"|(kw)?arg(ument)?s?|conf(ig)?s?|cfg|opt(ion)?s?|settings?|[_. -])+"
)


class Setting(NamedTuple):
    """One of a trainer's arguments. groups: the groups of the config around it; the first is the place in the file."""

    groups: tuple[str, ...]
    name: str
    value: Any

    @property
    def plain(self) -> str:
        """Its name in snake case; of a `type` or a `name` in a group, that of the group."""
        of_group = self.name in ("type", "name") and len(self.groups) > 1
        return snake(self.groups[-1] if of_group else self.name)

    @property
    def around(self) -> str:
        """The names of its groups in snake case."""
        return "_".join(map(snake, self.groups))

    @property
    def said(self) -> Any:
        """Its value to compare: text in lower case, without DiT's `ModelMeanType.`, numpy's numbers as Python's, and
        objects as text.
        """
        value = self.value.item() if isinstance(self.value, np.generic) else self.value
        if isinstance(value, bool | int | float | None):
            return value
        return value.lower().removeprefix("modelmeantype.") if isinstance(value, str) else str(value)

    @property
    def number(self) -> float | None:
        """Its value as a number, or that of a list of equal numbers; None for anything else."""
        if isinstance(self.value, bool | str | None):
            return None
        try:
            numbers = np.unique(np.asarray(self.value, np.float64))
        except (TypeError, ValueError):
            return None
        return float(numbers[0]) if len(numbers) == 1 else None

    @property
    def by_name(self) -> bool:
        """Whether it is the denoiser's by the names of its groups."""
        return all(_DENOISER.fullmatch(group.lower()) for group in self.groups)

    def __str__(self) -> str:
        value = str(self.value)
        return f"{'.'.join((*self.groups[1:], self.name))} {value if len(value) <= 60 else f'{value[:57]}...'}"


def settings_of(found: Found) -> list[Setting]:
    """Return all settings of a checkpoint and of huggingface_hub's config.json. Remarks a place that has no names."""
    settings: list[Setting] = []
    others = [name for name in found.about if _ALSO.search(name) and not TRAINING.search(name)]
    for place in dict.fromkeys((*_PLACES, *others)):
        given = found.about.get(place)
        inside = list(_inside(given, (place,)))
        if given and not inside and place in _PLACES:
            kind = f"the saved {place!r} are a {type(given).__name__} without field names"
            remark(f"{kind}, so heirloom could not check that the model predicts noise with DiT's schedule")
        settings += inside
    file = found.json("config.json")  # of huggingface_hub's mixin: what the model was made with
    if file is not None and "_class_name" not in file and "format" not in file:
        settings += _inside({name: file.value(name) for name in file}, ("config",))
    return settings


def of_denoiser(settings: Sequence[Setting], width: int, layers: int) -> list[Setting]:
    """Return the settings of the denoiser: those that are so by the names of their groups, then those of groups that
    say its width; none of a group that says another width or depth.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for setting in settings:
        groups.setdefault(setting.groups, {})[setting.name] = setting.value
    sizes = {"hidden_size": width, "depth": layers}
    fit = [s for s in settings if all(groups[s.groups].get(name) in (None, size) for name, size in sizes.items())]
    own = [s for s in fit if s.by_name or groups[s.groups].get("hidden_size") == width]
    return sorted(own, key=lambda setting: not setting.by_name)


def snake(name: str) -> str:
    """Return a name in snake case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower()


def _inside(given: Any, groups: tuple[str, ...]) -> Iterator[Setting]:
    """Yields the settings in a dictionary and in those inside it, which groups of a config are."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inside = isinstance(value, Mapping)
            yield from _inside(value, (*groups, str(name))) if inside else [Setting(groups, str(name), value)]
