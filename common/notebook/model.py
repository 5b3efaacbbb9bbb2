"""A model in memory: the base of what `load` returns in each package."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from heirloom.common.checkpoint.family import Family
from heirloom.common.errors import check_seed
from heirloom.common.files import write_json
from heirloom.common.nn.functional import Functional
from heirloom.common.notebook.shown import Shown, short
from heirloom.common.paths import place
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Plan, Source
from heirloom.common.surgery.report import print_model, provenance
from heirloom.common.train.parameters import save_params


@dataclass(frozen=True, repr=False)
class Loaded(Shown):
    """A model with its parameters.

    params: the flat tree {path: array} that `model.apply` takes. source: where it was loaded from. provenance: of a
    student, where each parameter comes from, as in provenance.json. loaded_from: the provenance of loaded weights.
    """

    cfg: Any
    model: Functional
    params: dict[str, jax.Array]
    source: str = field(default="", kw_only=True)
    provenance: Mapping[str, Any] | None = field(default=None, kw_only=True)
    loaded_from: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @property
    def family(self) -> Family:
        """The model's family: its name, its formats, its counts."""
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, int]:
        """Counts of parameters by part, and their `total`."""
        return self.family.parameters(self.model.spec)

    def summary(self) -> None:
        """Prints every parameter with its named axes, and, of a student, where it comes from."""
        spec = self.model.spec
        print_model(spec, self.family.parameters(spec), self.family.macs(self.cfg, spec), self.provenance)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a weights folder, which `load` and every command read. Raises InputError when it exists already."""
        to = dict(spec=self.model.spec, force=force)
        save_params(place(folder), self.family.name, self.cfg, self.params, self._write_sidecars, **to)  # type: ignore[arg-type]

    def _write_sidecars(self, folder: Path) -> None:
        self._sidecars(folder)
        if (record := self.provenance or self.loaded_from) is not None:
            write_json(folder / "provenance.json", record)

    def _sidecars(self, folder: Path) -> None:
        """Writes the method's files next to the weights."""

    def _about(self) -> dict[str, str]:
        """Returns the method's facts for the repr."""
        return {}

    def _facts(self) -> tuple[str, dict[str, str]]:
        parts = self.parameters
        macs = self.family.macs(self.cfg, self.model.spec)
        title = f"{self.family.name}: {short(parts['total'])} parameters, {short(macs)} multiply-adds"
        split = {name.replace("_", " "): n for name, n in parts.items() if name != "total"}
        facts = {"parameters": ", ".join(f"{name} {short(n)}" for name, n in split.items())} if split else {}
        if self.provenance is not None:
            share, donor = self.provenance["fraction"], self.provenance["source"]
            facts["inherited"] = f"{share:.1%} of the parameters, from {donor}"
        elif self.source:
            facts["source"] = self.source
        return title, facts | self._about()


def inherited(
    donor: Loaded, plan: Plan, student: Functional, seed: int
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns the parameters of a student that a plan takes from a donor, and their provenance."""
    check_seed(seed)
    source = Source(donor.model.spec, donor.params)
    resolution = plan.resolve(source, student.spec)
    params = graft(resolution, source, student.spec, None, partial(student.init, jax.random.key(seed)))
    return params, {"source": donor.source or "a model in memory"} | provenance(resolution)
