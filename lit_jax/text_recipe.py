"""Recipes of text-to-image students: what a LiT inherits from PixArt-Σ."""

from dataclasses import dataclass, field, replace
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
from heirloom.common.train.mesh import MeshConfig, shardings, start
from heirloom.common.train.parameters import finite, save_params
from lit_jax.components import pipeline_of, write_pipeline_of
from lit_jax.inherit import Keep, graft_attention
from lit_jax.origin import copy_origin
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.zoo import PIXART, open_pixart


@dataclass(frozen=True, kw_only=True)
class TextStudentConfig:
    """A text-to-image student and its donor."""

    student: PixArtConfig = field(default_factory=PixArtConfig)
    donor: str = ""
    """SOURCE of the PixArt-Σ (a pipeline folder, or its transformer), or of a LiT to inherit from."""
    keep: Keep = "o"
    """Projections of self-attention that are inherited as well: "o" as the released text-to-image code, "none" as the
    paper says, "all" from a LiT of another resolution.
    """
    seed: int = 0
    """Seed of freshly initialised parameters."""

    def describe(self) -> tuple[Family, Any]:
        return PIXART, self.student

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        """Writes the student, inherited from the donor, as a weights folder; returns its provenance.

        The folder notes which pipeline the donor belongs to, so that `heirloom sample` finds text encoder and decoder.
        """
        if not self.donor:
            raise InputError("this recipe has no donor: give --donor SOURCE, such as a PixArt-Σ pipeline folder")
        donor = finite(open_pixart(self.donor), "donor")
        # Files of diffusers lack the features of the empty text, others have them: the student is as its donor.
        student = replace(self.student, null_text=donor.cfg.null_text)
        model = functional(PixArt, student)
        made = graft_attention(donor.cfg, student, self.keep).resolve(donor.source, model.spec)
        record = {"source": self.donor, "hashes": hashes(donor.file)} | provenance(made)

        def sidecars(folder: Path) -> None:
            write_json(folder / "provenance.json", record)
            copy_origin(donor.folder, folder)
            write_pipeline_of(folder, pipeline_of(donor))

        init = partial(model.init, jax.random.key(self.seed))
        params = graft(made, donor.source, model.spec, shardings(model.spec, start(MeshConfig())), init)
        save_params(destination, PIXART.name, student.kept, params, sidecars, force=force)
        return record
