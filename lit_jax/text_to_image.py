"""Text-to-image LiT: its config, and its start with the weights of PixArt-Sigma."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from heirloom.common.checkpoint.convert import Family, hashes
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.report import provenance
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.parameters import finite, save_params
from lit_jax.inherit import Keep, graft_attention
from lit_jax.origin import copy_origin
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.zoo import PIXART, open_pixart


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig:
    """A text-to-image LiT that inherits from PixArt-Sigma."""

    student: PixArtConfig
    donor: str = ""
    """SOURCE of the weights to inherit: a PixArt-Sigma, or a LiT of another resolution (--keep all). A pipeline folder
    stands for its transformer.
    """
    keep: Keep = "o"
    """Projections of self-attention that are also inherited: o, as in the released code; none, as in the paper; v, ...;
    all, if the donor has the same attention.
    """
    seed: int = 0
    """Seed of freshly initialised parameters."""

    def describe(self) -> tuple[Family, PixArtConfig]:
        return PIXART, self.student.kept

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        """Write the student as a weights folder; returns its provenance."""
        if not self.donor:
            raise InputError("this recipe has no donor to inherit from: give --donor SOURCE")
        donor = finite(open_pixart(self.donor), "donor")
        model = functional(PixArt, self.student)
        made = graft_attention(donor.cfg, self.student, self.keep).resolve(donor.source, model.spec)
        record = {"source": self.donor, "hashes": hashes(donor.file)} | provenance(made)

        def sidecars(folder: Path) -> None:
            write_json(folder / "provenance.json", record)
            copy_origin(donor.folder, folder)

        start(MeshConfig())
        params = graft(made, donor.source, model.spec, None, partial(model.init, jax.random.key(self.seed)))
        save_params(destination, PIXART.name, self.student.kept, params, sidecars, force=force)
        return record
