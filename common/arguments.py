"""The verbs of the `heirloom` command and their arguments."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heirloom.common.paths import place


@dataclass(frozen=True)
class Argument:
    """The arguments of one call of `ArgumentParser.add_argument`. buckets: takes addresses in buckets, too."""

    names: tuple[str, ...]
    options: dict[str, Any]
    buckets: bool = False


def argument(*names: str, buckets: bool = False, **options: Any) -> Argument:
    """Returns the `Argument` of a call `add_argument(*names, **options)`."""
    return Argument(names, options, buckets)


@dataclass(frozen=True)
class Verb:
    """One verb; the function of the same name in `verbs` runs it.

    flags: accepts flags for the fields of a recipe, or of the method's settings. json: accepts `--json FILE`.
    """

    name: str
    help: str
    arguments: tuple[Argument, ...] = ()
    flags: bool = False
    json: bool = False


VERBS = (
    Verb("doctor", "versions, backend, devices, a matmul; what to type to fix what is wrong", json=True),
    Verb(
        "demo",
        "the main job of a method on embedded real data, in minutes on a CPU",
        (
            argument("method", nargs="?", default="tinyclip"),
            argument("--seed", type=int, default=0),
            argument("--out", type=Path, default=Path("heirloom-demo"), metavar="DIR", help="where the picture goes"),
        ),
        json=True,
    ),
    Verb(
        "convert",
        "between our weights folders and the formats of others, verified",
        (
            argument(
                "source",
                metavar="SOURCE",
                help="hf:org/name[@revision], a folder, a .safetensors, .pt or .bin, or embedded:NAME",
                buckets=True,
            ),
            argument("destination", metavar="DEST", type=place, buckets=True),
            argument(
                "--to",
                default="heirloom",
                metavar="FORMAT",
                help="heirloom, hf, open_clip, original, ... (default: heirloom)",
            ),
            argument(
                "--set",
                action="append",
                default=[],
                metavar="NAME=VALUE",
                help="what bare weights lack: heads, activation",
            ),
            argument("--quantize", choices=("int8",), help="matmul kernels as int8 with a scale per output channel"),
            argument("--no-verify", dest="verify", action="store_false", help="skip the comparison with the reference"),
            argument("--force", action="store_true", help="replace DEST"),
        ),
        json=True,
    ),
    Verb(
        "inspect",
        "config, parameter and MAC counts, axes with sizes, provenance",
        (argument("what", metavar="PATH|CONFIG", buckets=True),),
        json=True,
    ),
    Verb(
        "inherit",
        "the student of a recipe cut from its donor, without training; every field is a flag (--donor SOURCE)",
        (
            argument("config", metavar="CONFIG"),
            argument("destination", metavar="DEST", type=place, buckets=True),
            argument("--force", action="store_true", help="replace DEST"),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "cache",
        "encode a recipe's data once: a teacher's embeddings (then --teacher cache:DEST), or latents and captions",
        (
            argument("config", metavar="CONFIG"),
            argument("destination", metavar="DEST", type=Path),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "train",
        "run a recipe; the same command again resumes; every field is a flag (--optim.lr 3e-4)",
        (
            argument("config", metavar="CONFIG"),
            argument("--run", type=Path, required=True, metavar="DIR", help="the folder of the run"),
        ),
        flags=True,
    ),
    Verb(
        "supervise",
        "run a command again until it is finished: after graceful stops, and after crashes with growing pauses",
        (
            argument("--tries", type=int, default=5, metavar="N", help="crashes without a new state until it gives up"),
            argument("--pause", type=float, default=10.0, metavar="S", help="seconds after the first crash; doubled"),
            argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as heirloom train ..."),
        ),
    ),
    Verb(
        "compile",
        "the train step of a recipe for a TPU pod, on any machine: memory, collectives, limits",
        (
            argument("config", metavar="CONFIG"),
            argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x4, v6e:8x8, ..."),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "eval",
        "score weights, or the student of a recipe as it starts",
        (
            argument("what", metavar="PATH|CONFIG", buckets=True),
            argument(
                "--data",
                buckets=True,
                help="emoji (default for a CLIP), a folder, .csv, .tar, .parquet, tfds:NAME; an .npz of the ADM suite",
            ),
            argument("--split", default="", help="train, test, ... where the data has splits (emoji: test)"),
            argument("--image", default="image", metavar="COLUMN", help="where the pictures are (default: image)"),
            argument("--text", default="caption", metavar="COLUMN", help="where the captions are (default: caption)"),
            argument("--task", choices=("retrieval", "zeroshot"), default="retrieval"),
            argument(
                "--suite",
                type=Path,
                metavar="DIR",
                help="every data set of a folder, next to published numbers (CLIPs)",
            ),
            argument(
                "--beside", metavar="SOURCE", help="another model on the same suite, such as the teacher", buckets=True
            ),
            argument(
                "--classes",
                type=Path,
                metavar="FILE",
                help="class names, one a line, in label order, or imagenet (zeroshot)",
            ),
            argument(
                "--templates", type=Path, metavar="FILE", help="templates with {}, one a line, or imagenet (zeroshot)"
            ),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "sample",
        "draw pictures of classes or prompts; sampler settings are flags (--steps 50, --guidance 4)",
        (
            argument(
                "what", metavar="PATH", help="a DiT, LiT or PixArt-Σ by SOURCE, or a pipeline folder", buckets=True
            ),
            argument(
                "--class",
                dest="classes",
                type=int,
                nargs="+",
                metavar="N",
                help="classes to draw (default: the first eight)",
            ),
            argument("--prompt", metavar="TEXT", help="what to draw; empty: anything"),
            argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, or the file of --layout"),
            argument("--negative", default="", metavar="TEXT", help="what not to draw"),
            argument("--size", metavar="HEIGHTxWIDTH", help="pixels; becomes the nearest size of training"),
            argument("--exact", action="store_true", help="keep --size as it is"),
            argument("--count", "-n", type=int, metavar="N", help="pictures of each class (4) or prompt (1)"),
            argument("--batch", type=int, default=4, metavar="N", help="pictures of a prompt drawn at a time"),
            argument("--out", type=Path, metavar="FILE|DIR", help="a PNG of classes, a folder for prompts"),
            argument("--layout", default="plain", metavar="NAME", help="of the folder: plain, geneval, dpg"),
            argument("--autoencoder", default="", metavar="SOURCE", help="the decoder of a latent model", buckets=True),
            argument(
                "--pipeline",
                default="",
                metavar="SOURCE",
                help="text encoder and decoder of a transformer alone",
                buckets=True,
            ),
            argument(
                "--text-encoder",
                default="",
                metavar="SOURCE",
                help="a T5 encoder, instead of the pipeline's",
                buckets=True,
            ),
            argument(
                "--text",
                choices=("streamed", "resident"),
                default="streamed",
                help="read the text encoder layer by layer, or keep it in memory",
            ),
            argument("--cache", type=Path, metavar="DIR", help="keep encoded prompts here"),
            argument("--dtype", choices=("float32", "bfloat16"), help="of the transformer (CPUs: float32)"),
            argument("--seed", type=int, default=0),
            argument("--offline", action="store_true", help="never download anything"),
            argument("--force", action="store_true", help="draw again what is in --out"),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "expand",
        "a model of any depth from a gene",
        (
            argument("gene", metavar="GENE", help="a gene, or another ViT, by SOURCE", buckets=True),
            argument("destination", metavar="DEST", type=place, buckets=True),
            argument("--depth", type=int, required=True, metavar="N", help="layers of the result"),
            argument(
                "--map",
                default="",
                metavar="0,0,1,...",
                help="the gene's block for each layer (default: spread evenly, in order)",
            ),
            argument("--size", type=int, metavar="PIXELS", help="another resolution: positions are resampled"),
            argument("--classes", type=int, metavar="N", help="another number of classes: a fresh head"),
            argument("--seed", type=int, default=0, help="seed of the fresh parameters"),
            argument("--force", action="store_true", help="replace DEST"),
        ),
        json=True,
    ),
    Verb(
        "compare",
        "ways to start models of several depths: accuracy against cost, in one table",
        (
            argument("what", nargs="?", metavar="CONFIG"),
            argument("--run", type=Path, metavar="DIR", help="where the runs go; the same command again resumes"),
            argument(
                "--cost",
                metavar="6-15",
                help="only ratios of storage and training for these depths, by formula; no CONFIG",
            ),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "generate",
        "weights for the classes of a data set or a task in words; sampler settings are flags (--steps 50)",
        (
            argument(
                "what", metavar="PATH", help="a generator by SOURCE: RUN/model of a generator recipe", buckets=True
            ),
            argument("--dataset", metavar="DIR", help="a folder with a sub-folder of pictures for each class"),
            argument("--task", default="", metavar="WORDS", help="the task in words, instead of pictures"),
            argument("-n", type=int, default=8, metavar="N", help="how many to draw (default: 8)"),
            argument(
                "--reduce",
                choices=("none", "mean"),
                default="none",
                help="mean: write the average of all instead of each",
            ),
            argument(
                "--out",
                type=Path,
                default=Path("generated"),
                metavar="DIR",
                help="where the weights folders and report.json go",
            ),
            argument("--seed", type=int, default=0),
            argument("--force", action="store_true", help="replace what DIR contains"),
        ),
        flags=True,
        json=True,
    ),
    Verb(
        "report",
        "the curves and pictures of a run as one HTML page",
        (argument("run", type=place, metavar="RUN", buckets=True),),
    ),
)
