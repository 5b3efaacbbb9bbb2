"""Training of text-to-image models: caches, batches of one size, dropped texts, the loss, inheritance, resume."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train.step import StepConfig
from lit_jax.aspect import bucket_sizes
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.data import cover_crop
from lit_jax.denoiser import PromptConfig
from lit_jax.losses import DistillConfig
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.text.encoder import open_text
from lit_jax.text_cache import EmptyText, Encoding, TextCache, TextExample, _columns
from lit_jax.text_inputs import open_caches
from lit_jax.text_origin import read_empty_text, write_empty_text
from lit_jax.text_progress import held_out_error
from lit_jax.text_recipe import PIXART_OPTIMIZER, Config, Stage, drop_text, loss_fn
from lit_jax.zoo import PIXART
from tinyclip_jax.zoo import EMBEDDED as CLIPS

AUTOENCODER = AutoencoderConfig(channels=(4, 4), resnets=1, latent=2, groups=2, scaling_factor=0.5, size=16)
STUDENT = PixArtConfig(
    size=8,
    channels=2,
    width=24,
    layers=2,
    heads=3,
    cross_heads=3,
    hidden=32,
    text_width=192,
    text_tokens=8,
    interpolation=0.125,
)
LIT = replace(STUDENT, attention="linear", heads=2)
TEXT = str(CLIPS["emoji"])  # the embedded CLIP, 192 wide


@pytest.fixture(scope="module")
def folder(tmp_path_factory, draw):
    """A table of 30 pictures of three ratios with two columns of captions, an autoencoder, a donor and a LiT."""
    root = tmp_path_factory.mktemp("t2i")
    rng, lines = np.random.default_rng(0), []
    for i in range(30):
        height, width = ((16, 16), (12, 28), (30, 20))[i % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{i}.png")
        lines.append(f"{i}.png,{('a red apple', 'a green pear')[i // 15]},{'two blue cars' if i % 2 else ''}")
    (root / "pairs.csv").write_text("image,caption,long\n" + "\n".join(lines) + "\n")
    for name, module, method, cfg in (
        ("autoencoder", Autoencoder, "autoencoder", AUTOENCODER),
        ("donor", PixArt, "pixart", STUDENT),
        ("lit", PixArt, "pixart", LIT),
    ):
        (root / name).mkdir()
        weights.write_params(root / name, draw(functional(module, cfg).spec))
        weights.write_config(root / name, method, cfg)
    return root


@pytest.fixture(scope="module")
def recipe(folder, one_device):
    return Config(
        student=LIT,
        donor=str(folder / "donor"),
        teacher=str(folder / "donor"),
        data=SourceConfig(path=str(folder / "pairs.csv")),
        ratios="ten",
        pipeline=PipelineConfig(batch=8),
        autoencoder=str(folder / "autoencoder"),
        text_encoder=TEXT,
        optim=replace(PIXART_OPTIMIZER, warmup=2, lr=1e-3, clip=1.0),
        step=StepConfig(),
        steps=6,
        log_every=2,
        eval_every=3,
        save_every=3,
    )


@pytest.fixture(scope="module")
def cache(recipe, folder):
    cfg = replace(recipe, data=replace(recipe.data, columns=("long",)), held_out=recipe.data)
    cfg.cache(folder / "cache")
    return TextCache(folder / "cache" / "train")


def test_sizes_of_a_model_are_those_of_pixart_scaled():
    assert bucket_sizes("forty", 1024, 16)[0] == (512, 2048)
    assert len(bucket_sizes("forty", 512, 16)) == 40 and len(bucket_sizes("ten", 512, 16)) == 10
    assert bucket_sizes("square", 64, 8) == [(64, 64)]
    assert all(height % 8 == width % 8 == 0 for height, width in bucket_sizes("forty", 64, 8))


def test_a_picture_is_resized_to_cover_and_cut_in_the_centre():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 200
    cut = cover_crop(Image.fromarray(wide), 20, 20)  # twice as large: 20 x 80, of which columns 30 to 50 are white
    assert cut.shape == (20, 20, 3)
    assert cut[:, 5:15].min() >= 200 and cut[:, 0].max() > 100  # bicubic: over and under at the edges alone
    np.testing.assert_array_equal(cover_crop(Image.fromarray(wide), 10, 40), wide)


def test_the_cache_holds_moments_by_size_and_captions_of_both_columns(cache, folder):
    assert len(cache) == 30 and cache.columns == ["caption", "long"]
    sizes = {cache.sizes[group] for group in cache.groups}
    assert len(cache.sizes) == 3 and sizes == set(cache.sizes) and (16, 16) in sizes
    source = open_donor(folder / "autoencoder", [AUTOENCODERS])
    params = {path: np.asarray(value) for path, value in source.source.values.items()}
    for index in (0, 1, 2, 29):
        size = cache.sizes[cache.groups[index]]
        pixels = cover_crop(Image.open(folder / f"{index}.png"), *size) / np.float32(127.5) - 1
        mean, logvar = source.model.apply(params, pixels[None], method="encode")
        expected = np.concatenate([mean, logvar], -1)[0]
        np.testing.assert_allclose(cache[index]["moments"], expected, atol=2e-2, rtol=2e-3)
    features, mask = open_text(TEXT, tokens=8).encode(["a red apple", "two blue cars"])
    for index in (0, 1):
        (first,), long = cache[index]["text"]
        np.testing.assert_allclose(first, features[0][mask[0]], atol=2e-3)
        assert len(long) == index
    np.testing.assert_allclose(cache[1]["text"][1][0], features[1][mask[1]], atol=2e-3)


def test_lists_of_captions_as_text_are_captions_in_every_column():
    record = {"key": "row 1", "text": ["a"], "long": "['b', 'c']"}
    assert _columns(record, SourceConfig(columns=("long",))) == [["a"], ["b", "c"]]


def test_captions_are_mixed_by_their_shares(cache):
    record = cache[1]  # has both
    lengths = [len(column[0]) for column in record["text"]]
    examples = [TextExample(8, (3.0, 1.0))(record, np.random.default_rng(i)) for i in range(400)]
    first = np.array([np.array_equal(x["text"][: lengths[0]], record["text"][0][0]) for x in examples])
    assert 0.68 < first.mean() < 0.82
    assert {x["length"] for x in examples} == set(lengths)
    assert not any(x["text"][x["length"] :].any() for x in examples)
    only = TextExample(8, (0.0, 1.0))
    with pytest.raises(InputError, match="record 0 has no caption in the columns that are used: change mix"):
        only(cache[0], np.random.default_rng(0))
    alone = TextExample(8, (1.0, 1.0))(cache[0], np.random.default_rng(0))  # lacks the second column
    np.testing.assert_array_equal(alone["text"][: alone["length"]], cache[0]["text"][0][0])


def test_each_size_is_compiled_once(cache, recipe):
    data = training_batches(cache, PipelineConfig(batch=4), TextExample(8, (1.0, 1.0)), groups=cache.groups)
    traced = []

    @jax.jit
    def shapes(moments):
        traced.append(moments.shape)
        return moments.sum()

    for _, batch in zip(range(40), data, strict=False):
        shapes(batch["moments"])
    assert sorted(set(traced)) == sorted(traced) and len(traced) == len(cache.sizes)


def test_a_dropped_text_becomes_the_empty_one():
    text, mask = jnp.arange(24.0).reshape(2, 4, 3), jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    null = EmptyText(-np.ones((4, 3), np.float32), np.array([1, 0, 0, 0], bool))
    dropped = jnp.array([False, True])
    seen, left = drop_text(text, mask, dropped, null, "prompt mask")
    np.testing.assert_array_equal(seen[0], text[0])
    np.testing.assert_array_equal(seen[1], null.features)
    np.testing.assert_array_equal(left, mask)
    np.testing.assert_array_equal(drop_text(text, mask, dropped, null, "own mask")[1], [mask[0], null.mask])


class Fixed:
    """A network whose output is a multiple of the noisy latents, and depends on whether it reads the text."""

    def __init__(self, scale):
        self.scale = scale

    def apply(self, params, noisy, step, text, mask):
        seen = 1 + 0.1 * text.mean((1, 2))[:, None, None, None]
        return jnp.concatenate([self.scale * noisy * seen, jnp.full(noisy.shape, 0.25 * self.scale) * seen], -1)


class FixedTeacher:
    model = Fixed(0.5)


@pytest.mark.parametrize("dropped, limit", [("shared", 1.0), ("student", 1.0), ("shared", 10.0)])
def test_the_loss_by_hand(dropped, limit):
    """In f64: PixArt's loss plus 1.0 and 0.05 times the squared differences of noise and variance (LiT §4.2)."""
    distill = DistillConfig(noise=1.0, variance=0.05, dropped=dropped)
    cfg = Config(student=STUDENT, text_drop=0.5, noisy_weight=limit, distill=distill)
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.standard_normal((4, 3, 5, 2)), np.full((4, 3, 5, 2), -40.0)], -1).astype(np.float16)
    text = rng.standard_normal((4, 6, 3)).astype(np.float16)
    null = EmptyText(np.full((6, 3), 2.0, np.float32), np.ones(6, bool))
    batch = {"moments": moments, "text": text, "length": np.array([1, 6, 3, 2])}
    key = jax.random.key(5)
    loss = loss_fn(cfg, Fixed(0.8), FixedTeacher, Encoding(AUTOENCODER, null))
    total, parts = loss({}, batch, key, {})

    keys = jax.random.split(key, 4)
    drop = np.asarray(jax.random.uniform(keys[2], (4,))) < 0.5
    assert drop.any() and not drop.all()
    step = np.asarray(jax.random.randint(keys[0], (4,), 0, 1000))
    clean = 0.5 * moments[..., :2].astype(np.float64)  # the variance is e^-40: nothing
    noise = np.asarray(jax.random.normal(keys[1], clean.shape), np.float64)
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[step][:, None, None, None]
    noisy = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise
    student_text = np.where(drop[:, None, None], 2.0, text.astype(np.float64))
    teacher_text = student_text if dropped == "shared" else text.astype(np.float64)
    seen, known = (1 + 0.1 * t.mean((1, 2))[:, None, None, None] for t in (student_text, teacher_text))
    mse = np.square(0.8 * noisy * seen - noise).mean((1, 2, 3))
    kd_noise = np.square(0.8 * noisy * seen - 0.5 * noisy * known).mean((1, 2, 3))
    kd_variance = np.square(0.2 * seen - 0.125 * known).mean((1, 2, 3))
    for name, expected in (("mse", mse), ("kd_noise", kd_noise), ("kd_variance", kd_variance)):
        np.testing.assert_allclose(parts[name][0], expected.sum(), rtol=2e-4)
    bound = float(parts["bound"][0]) / 4
    weight = np.minimum(1 / alpha[:, 0, 0, 0], limit)
    expected = (weight * (mse + kd_noise)).mean() + bound + 0.05 * kd_variance.mean()
    np.testing.assert_allclose(total, expected, rtol=2e-4)


@pytest.mark.parametrize("keep, fresh", [("o", {"query", "key", "value"}), ("none", {"query", "key", "value", "out"})])
def test_what_is_inherited(recipe, folder, tmp_path, keep, fresh):
    replace(recipe, keep=keep).inherit(tmp_path / "student")
    student, donor = (open_donor(path, [PIXART]) for path in (tmp_path / "student", folder / "donor"))
    changed = {
        path.split("/")[2]
        for path, value in student.source.values.items()
        if path not in donor.source.values
        or not np.array_equal(np.ravel(np.asarray(value)), np.ravel(np.asarray(donor.source.values[path])))
    }
    assert changed == fresh | {"depthwise"}


def test_the_features_of_the_empty_text_are_inherited_and_not_trained(recipe, tmp_path, draw):
    donor = replace(STUDENT, null_text=True)
    weights.write_params(tmp_path, draw(functional(PixArt, donor).spec))
    weights.write_config(tmp_path, "pixart", donor)
    cfg = replace(recipe, donor=str(tmp_path), teacher="", steps=1, optim=replace(recipe.optim, warmup=1))
    cfg.train(tmp_path / "run")
    student = open_donor(tmp_path / "run" / "model", [PIXART])
    had = open_donor(tmp_path, [PIXART]).source.values
    np.testing.assert_array_equal(student.source.values["null_text"], had["null_text"])
    assert not np.array_equal(student.source.values["table"], had["table"])


def metrics(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def test_a_run_on_pictures_resumes_and_says_what_it_was_trained_with(recipe, cache, folder, tmp_path, capsys):
    cfg = replace(
        recipe,
        held_out=SourceConfig(path=str(folder / "cache" / "held_out")),
        prompts=("a red apple", ""),
        sample=PromptConfig(steps=2),
    )
    cfg.train(tmp_path / "whole")
    replace(cfg, steps=3).train(tmp_path / "half")
    config = read_json(tmp_path / "half" / "config.json")
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"steps": 6}))
    cfg.train(tmp_path / "half")
    expected = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "half")[-1] == expected[-1] and expected[-1]["step"] == 6
    assert {"mse", "bound", "kd_noise", "kd_variance", "eval/mse"} <= expected[-1].keys()
    assert Image.open(tmp_path / "whole" / "samples" / "0000006.png").width >= 32
    told = read_json(tmp_path / "whole" / "model" / "pipeline.json")
    assert told == {"text_encoder": TEXT, "autoencoder": str(folder / "autoencoder")}
    flags = ["--prompt", "a red apple", "--steps", "2", "--out", str(tmp_path / "s")]
    assert main(["sample", str(tmp_path / "whole"), *flags]) == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 1
    known = tmp_path / "whole" / "model" / "empty_text.json"
    write_empty_text(known.parent, read_empty_text(known.parent)[:, ::-1])  # of another encoder
    flags[-1] = str(tmp_path / "other")
    assert main(["sample", str(tmp_path / "whole"), *flags, "--guidance", "1"]) == 2
    assert "is not the text encoder that this model was trained with" in capsys.readouterr().err
    with pytest.raises(InputError, match="was trained with another text encoder: make the cache with that one"):
        replace(cfg, teacher=str(known.parent), steps=1).train(tmp_path / "taught")


def test_stages_follow_one_another(recipe, cache, folder, tmp_path):
    later = Stage(size=12, teacher=str(folder / "donor"), data=str(folder / "pairs.csv"), steps=1, batch=8)
    cfg = replace(recipe, steps=1, stages=(later,), optim=replace(recipe.optim, warmup=1))
    cfg.train(tmp_path / "run")
    second = open_donor(tmp_path / "run" / "stage_2" / "model", [PIXART])
    assert second.cfg.size == 12 and second.cfg.interpolation == 12 / 64
    config = read_json(tmp_path / "run" / "stage_2" / "config.json")
    assert config["donor"] == str(tmp_path / "run" / "stage_1" / "model")


def test_the_held_out_error_is_that_of_the_noise(cache):
    class Silent:
        def apply(self, params, noisy, step, text, mask):
            return jnp.zeros((*noisy.shape[:-1], 2 * noisy.shape[-1]))

    class Reading:
        def apply(self, params, noisy, step, text, mask):
            said = text.mean((1, 2))[:, None, None, None]
            return jnp.broadcast_to(said, (*noisy.shape[:-1], 2 * noisy.shape[-1]))

    found = held_out_error(Silent(), cache, start())({})
    assert found.n == 30
    assert abs(found.metrics["mse"] - 1) < 0.05  # of unit noise
    assert found.metrics["mse_swapped"] == found.metrics["mse"]  # it does not read
    read = held_out_error(Reading(), cache, start())({}).metrics
    assert abs(read["mse_swapped"] / read["mse"] - 1) > 1e-6

    class Three:
        """A picture of each size, of which one has another caption."""

        groups = cache.groups[[0, 1, 17]]

        def __getattr__(self, name):
            return getattr(cache, name)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return cache[(0, 1, 17)[index]]

    read = held_out_error(Reading(), Three(), start())({}).metrics
    assert abs(read["mse_swapped"] / read["mse"] - 1) > 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(autoencoder=""), "give --autoencoder SOURCE"),
        (dict(text_encoder=""), "give --text-encoder SOURCE"),
        (dict(student=replace(LIT, text_width=64)), "text_width 192, the student 64: set student.text_width"),
        (dict(student=replace(LIT, channels=4)), "channels 2, the student 4: set student.channels"),
        (dict(student=replace(LIT, text_tokens=20)), "takes at most 16 tokens, the model asks for 20"),
    ],
)
def test_data_that_does_not_fit_is_refused(recipe, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        open_caches(replace(recipe, **changes), tmp_path)


def test_caches_of_two_text_encoders_are_not_mixed(recipe, cache, folder, tmp_path):
    cfg = replace(recipe, data=replace(recipe.data, path=str(folder / "cache" / "train")), held_out=recipe.data)
    caches = open_caches(cfg, tmp_path)
    assert set(caches) == {"train", "held_out"}
    null = tmp_path / "cache" / "held_out" / "null.npy"
    features = np.load(null)
    np.save(null, features * np.float16(1.02))  # the same weights on another device
    open_caches(cfg, tmp_path)
    np.save(null, features[:, ::-1])
    with pytest.raises(InputError, match=r"was made with the text encoder .*: make both with the same"):
        open_caches(cfg, tmp_path)


def test_a_cache_of_another_size_is_refused(recipe, cache):
    cfg = replace(recipe, student=replace(LIT, size=16), data=SourceConfig(path=str(cache.folder)))
    with pytest.raises(InputError, match=r"which is no size of a student for 32 pixels: set student.size"):
        open_caches(cfg, None)


def test_the_columns_of_a_cache_are_not_chosen_again(recipe, cache):
    cfg = replace(recipe, data=SourceConfig(path=str(cache.folder), columns=("other",)))
    with pytest.raises(InputError, match=r"has the captions caption, long, not caption, other: leave out data.columns"):
        open_caches(cfg, None)


def test_what_a_run_has_encoded_is_not_read_for_other_data(recipe, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data, ignore=lambda root, names: [name for name in names if not name.endswith(("g", "v"))])
    recipe = replace(recipe, data=SourceConfig(path=str(data / "pairs.csv")))
    open_caches(recipe, tmp_path)
    open_caches(recipe, tmp_path)
    other = replace(recipe, data=replace(recipe.data, text="long"))
    with pytest.raises(InputError, match=r"was made with text 'caption', the recipe has 'long': remove it"):
        open_caches(other, tmp_path)
    with pytest.raises(InputError, match=r"was made with ratios 'ten', the recipe has 'square': remove it"):
        open_caches(replace(recipe, ratios="square"), tmp_path)
    before = (data / "0.png").read_bytes()
    shutil.copy(data / "3.png", data / "0.png")
    with pytest.raises(InputError, match=r"was made with pictures '\w+', the recipe has '\w+': remove it"):
        open_caches(recipe, tmp_path)
    (data / "0.png").write_bytes(before)
    lines = (data / "pairs.csv").read_text()
    (data / "pairs.csv").write_text(f"{lines}0.png,a plum,\n")
    with pytest.raises(InputError, match=r"was made with records 30, the recipe has 31: remove it"):
        open_caches(recipe, tmp_path)
    shutil.rmtree(data)
    open_caches(recipe, tmp_path)


def test_latents_of_two_autoencoders_are_not_mixed(recipe, cache, folder, tmp_path):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    file = tmp_path / "cache" / "held_out" / "autoencoder.json"
    origin = read_json(file)
    file.write_text(json.dumps(origin | {"model": origin["model"] | {"scaling_factor": 0.25}}))
    paths = {name: SourceConfig(path=str(tmp_path / "cache" / name)) for name in ("train", "held_out")}
    with pytest.raises(InputError, match="use the same autoencoder for both"):
        open_caches(replace(recipe, data=paths["train"], held_out=paths["held_out"]), None)


@pytest.mark.parametrize("name", ["features.f16", "starts.npy", "16x16/moments.npy", "16x16/records.npy", "null.npy"])
@pytest.mark.parametrize("keep", [0, 0.7])
def test_a_damaged_cache_is_refused(cache, tmp_path, name, keep):
    shutil.copytree(cache.folder, tmp_path / "cache")
    file = tmp_path / "cache" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError, match=r"cache is damaged .*: make the cache again"):
        TextCache(tmp_path / "cache")


@pytest.mark.parametrize("field, value", [("text_drop", 1.5), ("mix", (-1.0, 2.0)), ("mix", (0.0, 0.0))])
def test_shares_are_checked(field, value):
    with pytest.raises(InputError, match=f"{field} is"):
        Config(**{field: value})


def test_a_kernel_of_another_device_is_refused_before_pictures_are_encoded(recipe, tmp_path):
    cfg = replace(recipe, student=replace(LIT, implementation="mosaic_gpu"))
    with pytest.raises(InputError, match="mosaic_gpu is a kernel for gpu, this is cpu: set it to xla"):
        cfg.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
