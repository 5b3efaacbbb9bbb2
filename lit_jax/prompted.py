"""`heirloom sample PATH --prompt TEXT`: draws pictures of prompts, stage by stage, and writes a folder of PNGs."""

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from heirloom.common import config
from heirloom.common.checkpoint.convert import parts
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.grid import is_picture
from heirloom.common.errors import InputError, check_seed
from heirloom.common.mesh import start
from lit_jax.aspect import parse_size
from lit_jax.components import find_components
from lit_jax.denoiser import PromptConfig
from lit_jax.origin import read_origin
from lit_jax.prompts import Album, Prompt, read_prompts
from lit_jax.stages import Stages
from lit_jax.text_to_image import Request, TextToImage, open_text_to_image

BATCH = 4  # pictures of a prompt drawn at a time
AT_A_TIME = 16  # prompts of a file that are encoded, drawn and decoded before the next ones


def sample_prompts(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw `args.count` pictures of each prompt into the folder `args.out`; the same command again draws what is
    missing.

    The remaining flags are fields of `PromptConfig`. Raises InputError before anything is drawn for prompts, sizes,
    settings and parts that do not fit, and for a stage whose result is not finite.
    """
    if args.classes:
        raise InputError(f"{donor.path} draws from text: give --prompt, not --class")
    how = config.parse(PromptConfig(), args.flags, f"heirloom sample {donor.path}")
    how.make()
    prompts = _prompts(args)
    count = (1 if args.layout == "plain" else 4) if args.count is None else args.count
    batch = BATCH if args.batch is None else args.batch
    if count < 1 or batch < 1:
        raise InputError(f"--count {count} and --batch {batch}: each is 1 or more")
    check_seed(args.seed)
    album = Album(_folder(args.out), args.layout, count, args.seed)
    components = find_components(donor, pipeline=args.pipeline, text=args.text_encoder, autoencoder=args.autoencoder)
    pipe = open_text_to_image(
        donor,
        components,
        start(),
        resident=args.text == "resident",
        cache=args.cache,
        keep=len(prompts) > AT_A_TIME,
        dtype=args.dtype,
        stages=Stages(),
        origin=read_origin(donor.folder),
    )
    size = pipe.fitting(parse_size(args.size) if args.size else pipe.default_size, args.exact)
    return _draw(pipe, prompts, album, how, size, batch, args)


def _draw(
    pipe: TextToImage,
    prompts: Sequence[Prompt],
    album: Album,
    how: PromptConfig,
    size: tuple[int, int],
    batch: int,
    args: Namespace,
) -> dict[str, Any]:
    begun = time.perf_counter()
    requests = [Request(prompt.text, args.negative, size, album.count, args.seed) for prompt in prompts]
    about = [[_about(pipe, request, how, k) for k in range(album.count)] for request in requests]
    missing = [i for i in range(len(prompts)) if args.force or not album.has(i, prompts[i], about[i])]
    if len(missing) < len(prompts):
        print(f"{album.folder}: {len(prompts) - len(missing)} of {len(prompts)} prompts are drawn (--force redraws)")
    for first in range(0, len(missing), AT_A_TIME):
        numbers = missing[first : first + AT_A_TIME]
        drawn = pipe.pictures([requests[i] for i in numbers], how, batch)
        for i, pictures in zip(numbers, drawn, strict=True):
            album.write(i, prompts[i], pictures, about[i])
    files = [file for i, prompt in enumerate(prompts) for file in album.files(i, prompt)]
    return {
        "picture": str(album.folder),
        "pictures": [str(file) for file in files],
        "count": len(missing) * album.count,
        "seconds": round(time.perf_counter() - begun, 2),
        "seed": args.seed,
        "size": list(size),
        "sample": asdict(how),
        "stages": pipe.stages.to_json(),
    }


def _about(pipe: TextToImage, request: Request, how: PromptConfig, number: int) -> dict[str, Any]:
    """Returns what a picture depends on, for its metadata."""
    about = {"prompt": request.prompt, "negative": request.negative, "seed": request.seed, "number": number}
    height, width = request.size
    files = {"model": pipe.donor, "autoencoder": pipe.autoencoder}
    weights = {name: f"{donor.path} {_version(donor)}" for name, donor in files.items()}
    text = pipe.components.text
    weights |= {"text_encoder": f"{text} {_stamp([text] if text.is_file() else text.iterdir())}"}
    weights["dtype"] = jnp.dtype(pipe.dtype).name
    return about | {"height": height, "width": width} | weights | asdict(how)


def _version(donor: Donor) -> str:
    """Returns what changes when weights are written again."""
    return _stamp(donor.file.parent / name for name in parts(donor.file))


def _stamp(files: Iterable[Path]) -> str:
    """Returns the size of all files together, and when the newest was written."""
    stats = [file.stat() for file in files if file.is_file()]
    return f"{sum(s.st_size for s in stats)} {max((s.st_mtime_ns for s in stats), default=0)}"


def _prompts(args: Namespace) -> list[Prompt]:
    if args.prompts is not None:
        if args.prompt is not None:
            raise InputError("--prompt and --prompts: give one of them")
        return read_prompts(args.prompts, args.layout)
    if args.prompt is None:
        raise InputError('give --prompt "TEXT", or --prompts FILE with one prompt a line')
    if args.layout != "plain":
        raise InputError(f"--layout {args.layout} needs --prompts")
    return [Prompt(args.prompt)]


def _folder(out: Path | None) -> Path:
    """Returns the folder of the pictures. Raises InputError for the name of a file, and where it cannot be written."""
    folder = out or Path("samples")
    if folder.is_file() or (is_picture(folder) and not folder.is_dir()):
        raise InputError(f"--out {folder}: pictures of prompts go into a folder; give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write pictures here ({error.strerror})") from error
    return folder
