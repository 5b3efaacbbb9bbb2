"""Opens what a text-to-image training reads: caches, which are made first where there are pictures, and a drawer."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.hub import absolute
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError, remark
from heirloom.common.mesh import start
from heirloom.common.methods import locate_any
from heirloom.common.paths import Address, place
from heirloom.common.train.parts import Model
from lit_jax import autoencoder_layouts
from lit_jax.aspect import Ratios, bucket_sizes
from lit_jax.decode import open_pictures
from lit_jax.denoiser import Denoiser
from lit_jax.latents import cache_origin
from lit_jax.origin import compare_latents, read_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.text.encoder import open_text
from lit_jax.text_cache import TextCache, content_of, is_text_cache, write_text_cache
from lit_jax.text_origin import same_encoder
from lit_jax.text_progress import Drawer, prompt_drawer

if TYPE_CHECKING:
    from lit_jax.text_recipe import Config

Caches = dict[str, TextCache]
"""The caches of a run: "train", and "held_out" if there is one."""


def named_data(cfg: "Config") -> dict[str, SourceConfig]:
    """Return the data of a run by the names of its caches."""
    return {"train": cfg.data} | ({"held_out": cfg.held_out} if cfg.held_out.path else {})


def write_cache(cfg: "Config", data: SourceConfig, folder: Path) -> dict[str, Any]:
    """Encode pictures and captions. Raises InputError without an autoencoder and a text encoder."""
    for name in ("autoencoder", "text_encoder"):
        if not getattr(cfg, name):
            raise InputError(f"give --{name.replace('_', '-')} SOURCE: the data is encoded with it")
    autoencoder = open_donor(locate_any(cfg.autoencoder), [autoencoder_layouts.FAMILY])
    text = open_text(locate_any(cfg.text_encoder), tokens=cfg.student.text_tokens)
    factor = autoencoder.cfg.factor
    sizes = bucket_sizes(cfg.ratios, cfg.student.size * factor, cfg.student.patch * factor)
    sources = autoencoder, cfg.autoencoder, text, cfg.text_encoder
    return write_text_cache(folder, data, sizes, *sources, start(), ratios=cfg.ratios)


def open_caches(cfg: "Config", directory: Path | None) -> Caches:
    """Open the caches that the config names; pictures are encoded into `directory`/cache first.

    Raises InputError for pictures without a directory, and for caches that do not fit the student or one another.
    """
    caches: Caches = {}
    if not cfg.data.path:
        raise InputError("give --data.path: pictures with captions, or a cache of them (heirloom cache RECIPE DIR)")
    for name, data in named_data(cfg).items():
        path = place(data.path)
        if isinstance(path, Address):
            raise InputError(f"{path}: pictures with captions are encoded, and caches read, from local folders")
        if is_text_cache(path):
            caches[name] = TextCache(path)
            if data.columns and [data.text, *data.columns] != caches[name].columns:
                has = f"{path} has the captions {', '.join(caches[name].columns)}"
                raise InputError(f"{has}, not {', '.join((data.text, *data.columns))}: leave out data.columns, set mix")
        elif directory is None:
            raise InputError(f"{data.path} is no cache of latents: make one with heirloom cache RECIPE DIR")
        else:
            path = directory / "cache" / name
            if not is_text_cache(path):
                print(f"{data.path}: encoding pictures and captions into {path}")
                write_cache(cfg, data, path)
            caches[name] = TextCache(path)
            check_made_of(cfg, data, caches[name])
        check_cache(cfg.student, caches[name])
    origin = cache_origin(caches["train"].folder)
    for other in caches.values():
        remark(compare_latents(origin, cache_origin(other.folder), str(caches["train"].folder), str(other.folder)))
        if not same_encoder(caches["train"].encoding.null.seen, other.encoding.null.seen):
            given = f"{other.about['text_encoder']}, the training data with {caches['train'].about['text_encoder']}"
            raise InputError(f"{other.folder} was made with the text encoder {given}: make both with the same")
    return caches


def check_made_of(cfg: "Config", data: SourceConfig, cache: TextCache) -> None:
    """Raise InputError if the cache in a run folder was made of other data, or with other models, than the recipe's."""
    wanted = json.loads(json.dumps(asdict(data)))
    models = ("autoencoder", "text_encoder")
    now = wanted | {name: absolute(getattr(cfg, name)) for name in models}
    then = cache.about["data"] | {name: absolute(cache.about[name]) for name in models}
    made = {"ratios": cfg.ratios}
    if then | now == then:
        try:
            made |= content_of(open_source(data), data)
        except InputError as error:  # the pictures may be gone: the cache has what the training reads
            remark(f"{cache.folder} is used without comparing it with its data ({error})")
    now |= {name: value for name, value in made.items() if name in cache.about}  # older caches have fewer
    then |= {name: cache.about[name] for name in made.keys() & cache.about}
    for name, value in now.items():
        if then.get(name) != value:
            given = f"{cache.folder} was made with {name} {then.get(name)!r}, the recipe has {value!r}"
            raise InputError(f"{given}: remove it to encode the data again, or set it back")


def check_cache(student: PixArtConfig, cache: TextCache) -> None:
    """Raise InputError if the student takes other latents, sizes or texts than the cache has."""
    channels = cache[0]["moments"].shape[-1] // 2
    found = dict(channels=channels, text_width=cache.about["width"], text_tokens=cache.about["tokens"])
    for name, value in found.items():
        if getattr(student, name) != value:
            takes = f"the student {getattr(student, name)}: set student.{name}"
            raise InputError(f"{cache.folder} has {name} {value}, {takes}")
    factor = cache.encoding.autoencoder.factor
    side, step = student.size * factor, student.patch * factor
    known = {size for ratios in get_args(Ratios) for size in bucket_sizes(ratios, side, step)}
    if wrong := [size for size in cache.sizes if size not in known]:
        height, width = wrong[0]
        sizes = f"pictures of {height} x {width}, which is no size of a student for {side} pixels"
        raise InputError(f"{cache.folder} has {sizes}: set student.size and student.interpolation, or cache it again")


def check_teacher(student: PixArtConfig, teacher: Donor) -> None:
    """Raise InputError if the teacher takes other latents or texts than the student."""
    for name in ("channels", "text_width"):
        if getattr(teacher.cfg, name) != getattr(student, name):
            sizes = f"{getattr(teacher.cfg, name)}, the student's {getattr(student, name)}"
            raise InputError(f"the teacher's {name} is {sizes}: both must see the same latents and texts")


def open_drawer(cfg: "Config", model: Model, data: TextCache, mesh: Mesh, prompts: Sequence[str]) -> Drawer:
    """Open text encoder and autoencoder to draw prompts with the parameters of a training.

    Raises InputError without an autoencoder and a text encoder.
    """
    text_encoder, autoencoder = (getattr(cfg, name) or data.about[name] for name in ("text_encoder", "autoencoder"))
    pictures = open_pictures(cfg.student, autoencoder, mesh, read_origin(data.folder))
    assert pictures  # a latent model has an autoencoder
    text = open_text(locate_any(text_encoder), tokens=cfg.student.text_tokens)
    return prompt_drawer(Denoiser(cfg.student, model, mesh), text, pictures, cfg.sample, prompts, cfg.seed)
