"""Numbers of configs: one out of range is refused where the config is made, or means something."""

import inspect
import pkgutil
import re
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import import_module
from typing import get_args, get_type_hints

import pytest

from heirloom.common import config
from heirloom.common.errors import InputError, check_seed
from learngene.augment import AugmentConfig

PACKAGES = ("heirloom.common", "learngene", "lit_jax", "tinyclip_jax", "weightgen")
PUBLIC = re.compile(r"(Config|Recipe|Preprocess|Comparison)$")
# Where -1 means something, or is refused when the model is built or the run begins.
MEANS = {
    "MeshConfig": {"data", "fsdp", "tensor"},  # the rest of the devices
    "Preprocess": {"mean"},
    "SampleConfig": {"guidance", "steps"},
    "PromptConfig": {"guidance", "steps"},
    "ClassConfig": {"guidance", "steps"},
    "Config": {"layers", "stage"},
    "TeacherConfig": {"layers"},
    "PixArtConfig": {"heads", "cross_heads", "interpolation"},
    "DitConfig": {"heads"},
    "VitConfig": {"heads"},
    "VitImageConfig": {"heads"},
    "DenoiserConfig": {"heads"},
}
SHARES = {
    "flips", "erase", "smoothing", "drop_path", "dropout", "label_drop", "text_drop", "tags", "crop", "alpha", "start",
    "target", "momentum", "ema", "b1", "b2", "b3", "strength",
}  # fmt: skip


def configs():
    """All public dataclasses of configs that have defaults."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
            if ".kernels" in module.name:
                continue  # of chips
            for name, one in inspect.getmembers(import_module(module.name), inspect.isclass):
                made_here = is_dataclass(one) and one.__module__ == module.name and PUBLIC.search(name)
                if made_here and all({f.default, f.default_factory} != {MISSING} for f in fields(one)):
                    yield one


def numbers(config):
    """Names of the fields that are a number or several, and whether they are whole."""
    for name, hint in get_type_hints(config).items():
        kinds = {hint} | {kind for part in get_args(hint) for kind in (part, *get_args(part))}
        if kinds & {int, float} and bool not in kinds and name in {f.name for f in fields(config)}:
            yield name


def taken(config, name, value):
    """Whether a config is made with this number in a field."""
    before = getattr(config, name)
    try:
        replace(config, **{name: (value,) * max(len(before), 1) if isinstance(before, tuple) else value})
    except InputError:
        return False
    return True


def test_a_number_out_of_range_is_refused():
    found = {f"{one.__module__}.{one.__name__}": one for one in configs()}
    assert len(found) > 40
    wrong = []
    for path, one in found.items():
        made, listed = one(), MEANS.get(one.__name__, set())
        wrong += [f"{path}.{name} -1" for name in numbers(one) if name not in listed and taken(made, name, -1)]
        wrong += [f"{path}.{name} 1e9" for name in numbers(one) if name in SHARES and taken(made, name, 1e9)]
    assert wrong == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(flips=50.0), "flips is 50.0: choose a number from 0 to 1"),
        (dict(smoothing=1.5), "smoothing is 1.5: choose a number from 0 to below 1"),
        (dict(views=0), "views is 0: choose 1 or more"),
        (dict(scale=(0.5, 0.1)), r"scale is \(0.5, 0.1\): choose the smallest and the largest share of the area"),
    ],
)
def test_the_message_says_the_range(fields, said):
    with pytest.raises(InputError, match=f"^{said}"):
        AugmentConfig(**fields)
    assert AugmentConfig(flips=1.0, erase=1.0, views=2)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, None])
def test_a_seed_is_a_whole_number_of_32_bits(seed):
    with pytest.raises(InputError, match=f"seed {seed}: choose a whole number from 0 to 4294967295"):
        check_seed(seed)


@pytest.mark.parametrize("flags", [["--optim.lr", "1e39"], ["--mix", "1", "1e300"]])
def test_a_flag_that_is_infinite_in_float32_is_refused(flags):
    """1e300 is finite in Python; computed with, it is infinity."""
    with pytest.raises(InputError, match=r"(optim\.lr|mix) is 1e\+\d+: choose a number that float32 holds"):
        config.load("lit/t2i", flags)


def test_a_field_of_another_optimizer_is_refused():
    with pytest.raises(InputError, match=r"^--optim\.b3 has no effect in this recipe: only CAME has it"):
        config.load("lit/b_2_256", ["--optim.b3", "0.99"])
    came = ["--optim.algorithm", "came"]
    assert config.load("lit/b_2_256", ["--optim.b3", "0.99", *came]).optim.b3 == 0.99
    with pytest.raises(InputError, match=r"^--optim\.eps has no effect in this recipe: CAME has its own"):
        config.load("lit/b_2_256", [*came, "--optim.eps=1e-7"])
    with pytest.raises(InputError, match="--oops"):  # b3 has an effect here, and is not what is wrong
        config.load("lit/b_2_256", [*came, "--optim.b3", "0.99", "--oops"])


@pytest.mark.parametrize(
    ("recipe", "flags", "why"),
    [
        ("lit/digits_dit", ["--distill.noise", "1"], "it has no teacher; set --teacher, too"),
        ("lit/digits", ["--teacher=x", "--distill.noise=0", "--distill.variance=0"], "both weights of distill"),
        ("lit/t2i_512", ["--sample.steps", "9"], "it has no prompts; set --prompts, too"),
        ("tinyclip/emoji", ["--donor=", "--depth-rule", "even"], "it has no donor; set --donor, too"),
        ("learngene/smoke", ["--layers", "0,1"], "it has no donor; set --donor, too"),
        ("learngene/smoke", ["--distill.kind", "hard"], "it has no teacher; set --teacher, too"),
        ("learngene/vit_s", ["--teacher=x", "--distill.kind=hard", "--distill.temperature=2"], "distill.kind is hard"),
        ("learngene/vit_s", ["--augment.shift", "2"], "augment.crop is resized; set it to shift"),
        ("learngene/vit_s", ["--teacher=x", "--distill.alpha=0"], "distill.alpha is 0; set it above 0"),
        ("learngene/vit_s", ["--teacher=x", "--augment.smoothing=0.2"], "distill.alpha is 1, which uses no labels"),
        ("learngene/vit_s", ["--preprocess.scale", "0.5", "1"], "those of augment; set --augment.scale"),
        ("learngene/vit_s", ["--crop=0.9", "--preprocess.resize=256"], "preprocess.resize sets the margin"),
        ("learngene/vit_s", ["--pipeline.tags=0.5"], "it reads no captions"),
        ("learngene/vit_s", ["--data.text=title"], "it reads no captions"),
        ("lit/digits", ["--pipeline.tags=0.5"], "it reads no captions"),
        ("lit/digits", ["--held-out.text=title"], "it reads no captions"),
        ("lit/digits", ["--samples=0", "--sample.steps=5"], "it has no samples; set --samples, too"),
        ("lit/t2i", ["--pipeline.tags=0.5"], "its captions are encoded before, without tags"),
        ("tinyclip/smoke", ["--stage=2"], "it has no stages"),
        ("tinyclip/progressive_32", ["--stage=2", "--donor=x"], "stage 2 inherits from the model of stage 1"),
        ("tinyclip/smoke", ["--loss.scale=learned", "--loss.first-scale=initial"], "loss.scale is learned"),
        (
            "tinyclip/smoke",
            ["--loss.alpha=0", "--loss.scale=learned", "--loss.teacher-scale=20"],
            "loss.alpha is 0 and loss.scale learned",
        ),
    ],
)
def test_a_field_that_needs_another_one_is_refused(recipe, flags, why):
    with pytest.raises(InputError, match=f"has no effect in this recipe: .*{why}"):
        config.load(recipe, flags)
    assert config.load("learngene/emoji", ["--gene.distill.alpha", "0.5"])  # its teacher comes first
