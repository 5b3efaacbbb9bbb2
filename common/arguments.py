"""The verbs of the `heirloom` command and their arguments."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from heirloom.common.argument import Argument, Verb, argument, destination, new_path, path, seed
from heirloom.common.errors import InputError
from heirloom.common.paths import place

RECIPE = "a recipe: a name from heirloom recipes, or a .py file"
FIELDS = "Every field of a recipe is a flag, such as --optim.lr 3e-4; heirloom {} RECIPE --help lists them."
SETTINGS = "The settings below are flags as well, such as {}."


def of_recipe(name: str, help: str, *arguments: Argument, **options: Any) -> Verb:
    """Returns a verb of recipes, whose fields are flags."""
    arguments = (argument("config", metavar="CONFIG", help=RECIPE), *arguments)
    return Verb(name, help, arguments, flags=True, more=FIELDS.format(name), **options)


VERBS = (
    Verb("doctor", "check versions, devices and a computation", json=True),
    Verb(
        "demo",
        "show what a method does, with data included here",
        (
            argument("method", nargs="?", default="tinyclip", help="default: tinyclip; the demo names the others"),
            argument("--seed", type=seed, default=0, help="random seed (default: 0)"),
            argument(
                "--out",
                type=new_path,
                default=Path("heirloom-demo"),
                metavar="DIR",
                help="where the picture goes (default: heirloom-demo)",
            ),
        ),
        json=True,
    ),
    Verb(
        "convert",
        "convert weights from and to other libraries",
        (
            argument(
                "source",
                metavar="SOURCE",
                help="hf:org/name[@revision], a folder, a .safetensors, .pt or .bin, or embedded:NAME",
                buckets=True,
            ),
            argument("destination", metavar="DEST", type=destination, help="the new folder", buckets=True),
            argument(
                "--to",
                default="heirloom",
                metavar="FORMAT",
                help="heirloom, nnx, orbax, hf, flax, open_clip, ... (default: heirloom)",
            ),
            argument(
                "--set",
                action="append",
                default=[],
                metavar="NAME=VALUE",
                help="what the checkpoint does not say: heads, activation",
            ),
            argument("--quantize", choices=("int8",), help="matmul kernels as int8 with a scale per output channel"),
            argument("--no-verify", dest="verify", action="store_false", help="skip the comparison with the reference"),
            argument("--force", action="store_true", help="replace DEST"),
        ),
        json=True,
    ),
    Verb(
        "inspect",
        "show a model's size, its parameters and their origin",
        (argument("what", metavar="PATH|CONFIG", help="weights (see convert), a run, or a recipe", buckets=True),),
        json=True,
    ),
    of_recipe(
        "inherit",
        "cut a recipe's student from its donor, untrained",
        argument("destination", metavar="DEST", type=destination, help="the new weights folder", buckets=True),
        argument("--force", action="store_true", help="replace DEST"),
        json=True,
    ),
    of_recipe(
        "cache",
        "encode a recipe's data once, to train on it faster",
        argument(
            "destination",
            metavar="DEST",
            type=new_path,
            help="the new folder: of a teacher's embeddings (then --teacher cache:DEST), or of latents and captions",
        ),
        json=True,
    ),
    Verb(
        "index",
        "find every sample of tar shards before a training",
        (argument("data", metavar="DATA", help="shards/{00000..00127}.tar, a glob, a folder, gs://...", buckets=True),),
        json=True,
    ),
    Verb(
        "recipes",
        "list the recipes that come with heirloom",
        (argument("start", nargs="?", default="", metavar="START", help="only names that start so, such as lit/"),),
        json=True,
    ),
    of_recipe(
        "train",
        "train a recipe; the same command again resumes",
        argument("--run", type=destination, required=True, metavar="DIR", help="the folder of the run", buckets=True),
    ),
    Verb(
        "supervise",
        "run a command again until it has finished",
        (
            argument("--tries", type=int, default=5, metavar="N", help="crashes without a new state until it gives up"),
            argument("--pause", type=float, default=10.0, metavar="S", help="seconds after the first crash; doubled"),
            argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as heirloom train ..."),
        ),
    ),
    of_recipe(
        "compile",
        "check whether a training fits a TPU pod, without one",
        argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x4, v6e:8x8, ..."),
        json=True,
    ),
    Verb(
        "eval",
        "score weights, or a recipe's untrained student",
        (
            argument("what", metavar="PATH|CONFIG", help="weights (see convert), a run, or a recipe", buckets=True),
            argument(
                "--data",
                buckets=True,
                help="emoji (default for a CLIP), a folder, .csv, .tar, .parquet, tfds:NAME; an .npz of the ADM suite",
            ),
            argument("--split", default="", help="train, test, ... where the data has splits (emoji: test)"),
            argument("--image", default="image", metavar="COLUMN", help="where the pictures are (default: image)"),
            argument("--text", default="caption", metavar="COLUMN", help="where the captions are (default: caption)"),
            argument(
                "--task",
                choices=("retrieval", "zeroshot"),
                default="retrieval",
                help="of a CLIP: find captions and pictures, or tell classes apart (default: retrieval)",
            ),
            argument(
                "--suite",
                type=path,
                metavar="DIR",
                help="every data set of a folder, next to published numbers (CLIPs)",
            ),
            argument(
                "--beside", metavar="SOURCE", help="another model on the same suite, such as the teacher", buckets=True
            ),
            argument(
                "--classes",
                type=path,
                metavar="FILE",
                help="class names, one a line, in label order, or imagenet (zeroshot)",
            ),
            argument(
                "--templates", type=path, metavar="FILE", help="templates with {}, one a line, or imagenet (zeroshot)"
            ),
        ),
        flags=True,
        more=FIELDS.format("eval") + " Weights have the settings below.",
        settings=(
            "tinyclip_jax.evaluate.EvalConfig",
            "learngene.evaluate.EvalConfig",
            "lit_jax.evaluate.EvalConfig",
            "weightgen.generator.sample.SampleConfig",
        ),
        json=True,
    ),
    Verb(
        "sample",
        "draw pictures of classes or prompts",
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
            argument("--prompt", metavar="TEXT", help="what to draw; empty: unconditional"),
            argument("--prompts", type=path, metavar="FILE", help="one prompt a line, or the file of --layout"),
            argument("--negative", default="", metavar="TEXT", help="what not to draw"),
            argument("--size", metavar="HEIGHTxWIDTH", help="pixels; becomes the nearest size of training"),
            argument("--exact", action="store_true", help="keep --size as it is"),
            argument("--count", "-n", type=int, metavar="N", help="pictures of each class (4) or prompt (1)"),
            argument("--batch", type=int, metavar="N", help="pictures drawn at a time (classes: 64, a prompt: 4)"),
            argument(
                "--out",
                type=new_path,
                metavar="FILE|DIR",
                help="PNG of classes (samples.png) or folder for prompts (samples)",
            ),
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
            argument("--cache", type=path, metavar="DIR", help="keep encoded prompts here"),
            argument("--dtype", choices=("float32", "bfloat16"), help="of the transformer (CPUs: float32)"),
            argument("--seed", type=seed, default=0, help="random seed (default: 0)"),
            argument("--offline", action="store_true", help="never download anything"),
            argument("--force", action="store_true", help="draw again what is in --out"),
        ),
        flags=True,
        more=SETTINGS.format("--steps 50 or --guidance 4"),
        settings=("lit_jax.sample.ClassConfig", "lit_jax.denoiser.PromptConfig"),
        json=True,
    ),
    Verb(
        "expand",
        "make a model of any depth from a gene",
        (
            argument("gene", metavar="GENE", help="a gene, or another ViT, by SOURCE", buckets=True),
            argument("destination", metavar="DEST", type=destination, help="the new folder", buckets=True),
            argument("--depth", type=int, required=True, metavar="N", help="layers of the result"),
            argument(
                "--map",
                default="",
                metavar="0,0,1,...",
                help="the gene's block for each layer (default: spread evenly, in order)",
            ),
            argument("--size", type=int, metavar="PIXELS", help="another resolution: positions are resampled"),
            argument("--classes", type=int, metavar="N", help="another number of classes: a fresh head"),
            argument("--seed", type=seed, default=0, help="seed of the fresh parameters"),
            argument("--force", action="store_true", help="replace DEST"),
        ),
        json=True,
    ),
    Verb(
        "compare",
        "compare ways to start models of several depths",
        (
            argument("what", nargs="?", metavar="CONFIG", help="a recipe such as learngene/emoji"),
            argument("--run", type=new_path, metavar="DIR", help="where the runs go; the same command again resumes"),
            argument(
                "--cost",
                metavar="6-15",
                help="only ratios of storage and training for these depths, by formula; no CONFIG",
            ),
        ),
        flags=True,
        more=FIELDS.format("compare"),
        json=True,
    ),
    Verb(
        "generate",
        "generate weights of classifiers for a data set",
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
                type=new_path,
                default=Path("generated"),
                metavar="DIR",
                help="for weights folders and report.json (default: generated)",
            ),
            argument("--seed", type=seed, default=0, help="random seed (default: 0)"),
            argument("--force", action="store_true", help="replace what DIR contains"),
        ),
        flags=True,
        more=SETTINGS.format("--steps 50"),
        settings=("weightgen.generator.sample.SampleConfig",),
        json=True,
    ),
    Verb(
        "rank",
        "rank a language model's matrices by signal-to-noise",
        (
            argument("what", metavar="PATH", help="hf:org/name, a folder, or a file of weights"),
            argument("--share", type=float, default=0.25, metavar="X", help="of each kind to list (default: 0.25)"),
            argument("--unfreeze", type=new_path, metavar="FILE", help="write these as a list of parameters to train"),
            argument("--force", action="store_true", help="replace FILE"),
        ),
        json=True,
    ),
    Verb(
        "explore",
        "search for better weights of a language model",
        (
            argument("what", metavar="PATH", help="hf:org/name or a folder of transformers, with its tokenizer"),
            argument(
                "--select", type=path, required=True, metavar="TASK", help="questions for selection, a JSON a line"
            ),
            argument(
                "--test", type=path, required=True, metavar="TASK", help="held-out questions for the final score"
            ),
            argument(
                "--out",
                type=new_path,
                default=Path("explored"),
                metavar="DIR",
                help="the new folder (default: explored)",
            ),
            argument("--force", action="store_true", help="replace DIR"),
        ),
        flags=True,
        more=SETTINGS.format("--step 0.05 or --candidates 8"),
        settings=("weightgen.explore.ExploreConfig",),
        json=True,
    ),
    Verb(
        "push",
        "upload a weights folder or a run to the Hugging Face hub",
        (
            argument("folder", metavar="FOLDER", type=path, help="a weights folder, or a run folder"),
            argument("destination", metavar="hf:org/name", help="the repository, created if it is not there"),
            argument("--private", action="store_true", help="only you, or your organisation, may see it"),
            argument("--license", default="", metavar="ID", help="for the card: mit, apache-2.0, ..."),
            argument("--dry-run", action="store_true", help="write the card and list the files, upload nothing"),
        ),
        json=True,
    ),
    Verb(
        "report",
        "make a web page of a run, or of several side by side",
        (
            argument("run", type=place, nargs="+", metavar="RUN", help="the folder of a run", buckets=True),
            argument(
                "--out",
                type=destination,
                metavar="FILE",
                help="the page (default: RUN/report.html; of several runs, comparison.html in the first)",
            ),
        ),
    ),
)


EVAL_OF_CLIPS = frozenset({"task", "text", "classes", "templates"})  # arguments of `heirloom eval` for CLIPs alone


def refuse(args: argparse.Namespace, verb: str, names: Collection[str], before: str, after: str) -> None:
    """Raises InputError for the first of these arguments that is given, though it would change nothing."""
    for one in arguments_of(verb):
        if one.name in names and getattr(args, one.name, one.default) != one.default:
            raise InputError(f"{before} {one.names[0]} {after}: leave it out")


def arguments_of(name: str) -> tuple[Argument, ...]:
    """Returns the arguments of the verb of this name."""
    return next(verb.arguments for verb in VERBS if verb.name == name)
