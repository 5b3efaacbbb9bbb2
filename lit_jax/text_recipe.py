"""Recipes of text-to-image students: what a LiT inherits from PixArt-Σ."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from heirloom.common.checkpoint.convert import Donor, Family, hashes, open_donor
from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.pipeline import is_pipeline, main_part
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
from lit_jax.pixart import INTERPOLATION, PixArt, PixArtConfig
from lit_jax.zoo import PIXART


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
        donor = finite(open_transformer(self.donor), "donor")
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


def open_transformer(source: str) -> Donor:
    """Opens a PixArt-Σ or a text-to-image LiT by SOURCE, or the transformer of its pipeline folder."""
    if not source:
        raise InputError("this recipe has no donor: give --donor, such as hf:PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
    path = locate(source)
    return open_donor(main_part(path) if is_pipeline(path) else path, [PIXART])


def lit_from_sigma(pixels: int) -> PixArtConfig:
    """Returns the config of LiT-0.6B for text to image (LiT §4.2): PixArt-Σ's with linear attention of four heads."""
    size = pixels // 8
    return PixArtConfig(size=size, interpolation=INTERPOLATION[size], attention="linear", heads=4)
