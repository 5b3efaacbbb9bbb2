"""From the recipe to the folder of generated weights, by commands."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.train.parameters import save_params
from weightgen.codec import TokenCodec, TokenVaeConfig
from weightgen.d2nwg.model import D2nwgConfig
from weightgen.formats import CODEC, ENCODER
from weightgen.generator.conditions import SetConfig, SetOfSets
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.model import Generator
from weightgen.generator.train import GeneratorRecipe, check_features
from weightgen.report import knows_order
from weightgen.tasks import read_dataset
from weightgen.zoo.data import Bank, Projection, draw_tasks
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.zoo import Zoo, head_tokens, open_zoo

SETS = SetConfig(9, hidden=8, inducing=2, out=8, latent=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six classes of coloured noise, ten pictures each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for c in range(6):
        (folder / f"class{c}").mkdir()
        colour = rng.integers(40, 215, 3)
        for i in range(10):
            picture = np.clip(colour + rng.integers(-30, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"class{c}" / f"{i}.png")
    return folder


@pytest.fixture
def heirloom(capsys, one_device):
    def run(*argv):
        assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


LOOP = ["--steps", "4", "--batch", "8", "--optim.warmup", "1"]


TINY = ["--denoiser.width", "16", "--denoiser.layers", "1", "--denoiser.heads", "2", "--denoiser.hidden", "16"]


def test_a_learned_codec_and_an_aligned_encoder_become_parts(pictures, tmp_path, heirloom):
    zoo, model = tmp_path / "zoo" / "zoo", tmp_path / "generator" / "model"
    net = ["--net.kind", "mlp", "--net.features", "6", "--net.hidden", "4", "--net.classes", "6", "--fit.lr", "0.05"]
    heirloom(
        "train", "weightgen/smoke", "--run", tmp_path / "zoo", "--data", pictures, *net, "--members", "20",
        "--chunk", "20",
    )
    codec = ["--latent", "7", "--width", "16", "--layers", "1"]
    heirloom("train", "weightgen/codec", "--run", tmp_path / "codec", "--zoo", zoo, *codec, *LOOP)
    by = ["--codec", tmp_path / "codec" / "model", "--prior", "none", "--gate.force"]
    heirloom("train", "weightgen/generator", "--run", tmp_path / "generator", "--zoo", zoo, *by, *LOOP, *TINY)
    made, codec = (load_file(path / "model.safetensors") for path in (model, tmp_path / "codec" / "model"))
    assert len(codec) > 30
    for path, x in codec.items():  # frozen; the average of equal weights rounds
        np.testing.assert_allclose(made[f"codec/{path}"], x, rtol=1e-5, atol=1e-8, err_msg=path)
    # An encoder's folder is taken apart in the same way; training one takes long to compile.
    cfg = SetConfig(6, hidden=8, inducing=4, out=8, latent=7)
    aligned = functional(SetOfSets, cfg).init(jax.random.key(1))
    save_params(tmp_path / "encoder", ENCODER.name, cfg, aligned, lambda folder: None)
    recipe = GeneratorRecipe(zoo=str(zoo), condition="set", latent=7, encoder=str(tmp_path / "encoder"))
    stored, bank = open_zoo(zoo), Bank.load(zoo)
    config = recipe.config(stored, bank)
    fitted = recipe.fitted(config, stored, bank)
    spec = functional(Generator, config).spec
    assert all(x.shape == spec[path].shape for path, x in fitted.items())
    taken = {path.removeprefix("condition/") for path in fitted if path.startswith("condition/")}
    assert taken == {path for path in aligned if path.startswith(("intra/", "inter/"))} and len(taken) > 40
    heirloom(
        "generate", model, "--dataset", pictures, "-n", "2", "--out", tmp_path / "made", "--steps", "2",
        "--reduce", "mean",
    )
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["parameters"] == 7 * 4 + 5 * 6 and 0 < report["accuracy"]["gradient descent on the pictures"] <= 1
    assert report["disagreement"] is not None and (tmp_path / "made" / "mean" / "model.safetensors").is_file()


def test_the_released_recipe_runs_from_a_zoo_to_weights(pictures, tmp_path, heirloom, capsys):
    zoo, model = tmp_path / "zoo", tmp_path / "d2nwg" / "model"  # of a run, its zoo is taken
    net = ["--net.features", "6", "--net.classes", "6"]
    heirloom(
        "train", "weightgen/smoke", "--run", tmp_path / "zoo", "--data", pictures, *net, "--members", "20",
        "--chunk", "20",
    )
    sizes = dict(fdim=64, resolution=8, channels=8, multiples=1, blocks=1, latent=1)
    vae = [word for name, size in sizes.items() for word in (f"--vae.{name}", str(size))]
    unet = [
        "--unet.size",
        "8",
        "--unet.channels",
        "8",
        "--unet.multiples",
        "1",
        "--unet.attention",
        "8",
        "--unet.groups",
        "4",
    ]
    loops = [f"--{stage}{name}" for stage in ("stage1.", "") for name in ("steps 3", "batch 4", "optim.warmup 1")]
    flags = [*vae, *unet, "--chain", "3", "--gate.force", *" ".join(loops).split()]
    heirloom("train", "weightgen/d2nwg", "--run", tmp_path / "d2nwg", "--zoo", zoo, *flags)
    weights = load_file(model / "model.safetensors")
    assert weights["k"] > 0 and weights["k"] != 1  # of the latents of the first batch
    made = ["generate", str(model), "--dataset", str(pictures), "-n", "2", "--out", str(tmp_path / "made")]
    assert main([*made, "--guidance", "2"]) == 2
    assert "without guidance: leave out the settings of the sampler" in capsys.readouterr().err
    heirloom(*made)
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["sample"] == {"sampler": "ddpm", "steps": 3, "guidance": 1.0, "strength": 1.0}
    assert "nearest zoo network" in report["accuracy"] and "ridge" not in report["accuracy"]
    assert load_file(tmp_path / "made" / "sample-001" / "model.safetensors")["out/kernel"].shape == (6, 6)


def test_cnns_are_trained_on_pictures_and_told_by_features(pictures, tmp_path, heirloom):
    cnn = [
        "--net.kind",
        "cnn",
        "--net.features",
        "3",
        "--net.classes",
        "3",
        "--told",
        "6",
        "--fit.at_once",
        "1",
        "--fit.lr",
        "0.02",
    ]
    size = ["--members", "2", "--chunk", "2", "--fit.steps", "8"]
    heirloom("train", "weightgen/smoke", "--run", tmp_path, "--data", pictures, *cnn, *size)
    zoo = open_zoo(tmp_path / "zoo")
    assert (
        zoo.net == NetConfig("cnn", 3, classes=3)
        and zoo.weights.shape == (2, 2864 - 7 * 21)
        and zoo.quality.min() > 1 / 3
    )
    seen, told = Bank.load(tmp_path / "zoo", "pictures"), Bank.load(tmp_path / "zoo")
    assert seen.features.shape == (len(told.features), 28 * 28 * 3) and told.features.shape[1] == 6


@pytest.mark.parametrize(
    ("recipe", "flags", "wrong"),
    [
        ("zoo", "--chunk 0", "chunk is 0"),
        ("zoo", "--members 0", "members is 0"),
        ("zoo", "--fit.steps 0", "steps is 0"),
        ("zoo", "--net.classes 0", "classes is 0"),
        ("zoo", "--net.features 0", "features is 0"),
        ("zoo", "--pictures 0", "pictures is 0"),
        ("generator", "--shots 0", "shots is 0"),
        ("generator", "--latent 0", "latent is 0"),
        ("generator", "--batch 0", "batch is 0"),
        ("generator", "--codec OTHER --prior none", "codes 5 tokens of 7 weights, the zoo's networks have 2 of 5"),
        ("generator", "--encoder SETS --condition set", "looks at 9 features"),
        ("encoder", "--codec OTHER", "codes 5 tokens of 7 weights"),
        ("checkpoints", "--select ( --folder FILES", "no regular expression"),
        ("checkpoints", "--folder RATED", "quality.json must give a number for each file"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(recipe, flags, wrong, unfit, tmp_path, capsys):
    zoo = [] if recipe in ("zoo", "checkpoints") else ["--zoo", str(unfit / "zoo")]
    given = [str(unfit / word) if word.isupper() else word for word in flags.split()]
    assert main(["train", f"weightgen/{recipe}", "--run", str(tmp_path / "run"), *zoo, *given]) == 2
    said = capsys.readouterr().err
    assert wrong in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def unfit(tmp_path_factory):
    """A zoo of heads, a codec and an encoder of others, and a checkpoint whose quality is a word."""
    folder, rng, cfg = tmp_path_factory.mktemp("unfit"), np.random.default_rng(0), NetConfig(features=4, classes=2)
    bank, spec = (
        Bank.of(rng.standard_normal((12, 4)).astype(np.float32), np.repeat(np.arange(3), 4), list("abc")),
        head_tokens(cfg),
    )
    weights = rng.standard_normal((10, spec.count)).astype(np.float32)
    Zoo(weights, np.ones(10, np.float32), draw_tasks(3, 10, 2, rng), cfg, spec).save(folder / "zoo", sidecars=bank.save)
    parts = {
        "OTHER": (CODEC, TokenCodec, TokenVaeConfig(5, 7, latent=2, width=8, layers=1)),
        "SETS": (ENCODER, SetOfSets, SETS),
    }
    for name, (family, module, part) in parts.items():
        zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in functional(module, part).spec.items()}
        save_params(folder / name, family.name, part, zeros, lambda folder: None)
    for name in ("FILES", "RATED"):
        (folder / name).mkdir()
        save_file({"w": np.zeros((2, 2), np.float32)}, folder / name / "0.safetensors")
    (folder / "RATED" / "quality.json").write_text('{"0.safetensors": "good"}')
    return folder


def test_an_encoder_is_trained_and_saved_without_its_temperature(unfit, tmp_path, heirloom):
    sizes = [
        "--encoder.hidden",
        "4",
        "--encoder.heads",
        "1",
        "--encoder.inducing",
        "1",
        "--encoder.out",
        "4",
        "--latent",
        "3",
    ]
    heirloom(
        "train", "weightgen/encoder", "--run", tmp_path / "run", "--zoo", unfit / "zoo", "--loss", "siglip", *sizes,
        *LOOP
    )
    model = functional(SetOfSets, SetConfig(4, hidden=4, heads=1, inducing=1, out=4, latent=3))
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {path: x.shape for path, x in trained.items()} == {path: leaf.shape for path, leaf in model.spec.items()}
    assert all(np.isfinite(x).all() for x in trained.values())


def test_an_encoder_of_other_features_is_refused(tmp_path, remarks):
    rng = np.random.default_rng(0)
    for name in ("encoder", "zoo", "other"):
        (tmp_path / name).mkdir()
    check_features(tmp_path / "encoder", tmp_path / "zoo")
    assert "does not say which features it reads" in remarks()[0]
    raw = rng.standard_normal((20, 6)).astype(np.float32)
    for name, pictures in (("encoder", raw), ("zoo", raw), ("other", raw[:10])):
        Projection.fit("random", pictures, 4).save(tmp_path / name)
    check_features(tmp_path / "encoder", tmp_path / "zoo")
    assert remarks() == []
    with pytest.raises(InputError, match="was trained on features of other pictures"):
        check_features(tmp_path / "encoder", tmp_path / "other")


def test_a_condition_without_order_is_not_judged_by_turning_it():
    told = {condition: GeneratorConfig(condition=condition, prior="none") for condition in ("set", "mlp", "per_class")}
    assert [knows_order(cfg) for cfg in told.values()] == [False, True, True]
    assert knows_order(GeneratorConfig(condition="set")), "a linear prior knows it"
    assert not knows_order(D2nwgConfig(encoder="set")) and knows_order(D2nwgConfig())


def test_adapters_for_a_task_in_words(tmp_path, heirloom, capsys):
    folder, rng, words = tmp_path / "adapters", np.random.default_rng(0), ["a red fruit", "a fast car", "a sad face"]
    folder.mkdir()
    names = [f"layers.{i}.query.lora_{side}.weight" for i in range(2) for side in "AB"]
    shapes = [(2, 6), (5, 2)] * 2
    for i in range(6):
        tensors = {n: (rng.standard_normal(s) + i // 2).astype(np.float32) for n, s in zip(names, shapes, strict=True)}
        save_file(tensors, folder / f"{i}.safetensors")
    (folder / "tasks.json").write_text(json.dumps({f"{i}.safetensors": words[i // 2] for i in range(6)}))
    made = tmp_path / "made"

    def generate(name, *told, condition, chunk=0, members="checkpoints"):
        by = ["--folder", folder, "--backend", "embedded:emoji", "--chunk", chunk, "--members", members]
        heirloom("train", "weightgen/checkpoints", "--run", tmp_path / f"{name}-zoo", *by)
        zoo = ["--zoo", tmp_path / f"{name}-zoo" / "zoo", "--condition", condition, "--prior", "none", "--latent", "5"]
        heirloom("train", "weightgen/generator", "--run", tmp_path / name, *zoo, *LOOP, *TINY)
        ask = [tmp_path / name / "model", *told, "-n", "2", "--out", made, "--force", "--steps", "2"]
        heirloom("generate", *ask)
        tensors = load_file(made / "sample-001" / "model.safetensors")
        assert {n: t.shape for n, t in tensors.items()} == dict(zip(names, shapes, strict=True))
        return json.loads((made / "report.json").read_text())

    generate("label", "--task", "a fast car", condition="label")
    model = tmp_path / "label" / "model"
    refused = {
        ("--task", "a fast cat"): "no task 'a fast cat' in the zoo; did you mean 'a fast car'",
        ("--task", "a fast car", "--dataset", folder): "both say what to make",
        ("--dataset", folder): "give --task",
        ("--task", "a fast car", "--out", made): "exists; give another --out",
        ("--task", "a fast car", "--out", model.parent, "--force"): "holds",
        ("--task", "a fast car", "--out", tmp_path / "x", "--guidance", "1e38"): "2 of 2 samples",
        ("--task", "a fast car", "--out", tmp_path / "x", "--guidance", "1e300"): "that float32 holds",
    }
    for given, wrong in refused.items():
        flags = ["--out", tmp_path / "x"] if "--out" not in given else []
        assert main([str(a) for a in ["generate", model, "-n", 2, "--steps", 2, *given, *flags]]) == 2
        said = capsys.readouterr().err
        assert wrong in said and said.count("\n") == 1 and not (tmp_path / "x").exists()
    zoo = ["--zoo", str(tmp_path / "label-zoo" / "zoo")]
    lossy = [
        *zoo,
        "--run",
        str(tmp_path / "lossy"),
        "--condition",
        "label",
        "--prior",
        "none",
        "--latent",
        "1",
        "--gate.error",
        "0.3",
    ]
    assert (
        main(["train", "weightgen/generator", *lossy, *LOOP, *TINY]) == 2
        and "loses the weights" in capsys.readouterr().err
    )
    assert main(["train", "weightgen/d2nwg", *zoo, "--run", str(tmp_path / "d2nwg")]) == 2
    assert "without pictures" in capsys.readouterr().err
    report = generate("text", "--task", "a sad face", condition="text")
    assert report["accuracy"] is None and report["novelty"]["of"] == 6
    assert report["distance to the task's own networks"].keys() == {"told it", "told another"}
    # What was stored is in one gauge: both sides of a pair are balanced.
    zoo = open_zoo(tmp_path / "text-zoo" / "zoo")
    down, up = list(zoo.spec.unflatten(zoo.tokens(3), zoo.spec.like).values())[:2]
    np.testing.assert_allclose(down @ down.T, up.T @ up, rtol=1e-4, atol=1e-4)
    assert generate("chunk", condition="chunk", chunk=8, members="chunks")["novelty"]["of"] == 6 * 8


def test_from_pictures_to_weights_by_commands(pictures, tmp_path, heirloom, capsys):
    net = ["--net.features", "6", "--net.classes", "3"]
    zoo = [
        "train",
        "weightgen/smoke",
        "--run",
        tmp_path / "zoo",
        "--data",
        pictures,
        *net,
        "--members",
        "40",
        "--chunk",
        "20",
    ]
    heirloom(*zoo)
    stored = open_zoo(tmp_path / "zoo" / "zoo")
    assert len(stored) == 40 and stored.weights.shape == (40, 21) and stored.quality.mean() > 0.8
    assert "finished" in heirloom(*zoo)
    assert (Bank.load(tmp_path / "zoo" / "zoo", "held").counts == 2).all() and len(stored.first(32)) == 32
    small = ["--latent", "7", *TINY]
    train = ["train", "weightgen/generator", "--zoo", tmp_path / "zoo" / "zoo", *LOOP]
    assert "of 8 networks it was not fitted on" in heirloom(*train, "--run", tmp_path / "generator", *small)
    # The gate: two numbers a row do not carry six features.
    small[1] = "1"
    assert main([str(a) for a in [*train, "--run", tmp_path / "lossy", *small, "--prior", "none"]]) == 2
    assert "the codec loses accuracy" in capsys.readouterr().err and not (tmp_path / "lossy" / "model").exists()

    three = tmp_path / "three"
    three.mkdir()
    for c in range(3):
        (three / f"class{c}").symlink_to(pictures / f"class{c}")
    model, made = tmp_path / "generator" / "model", tmp_path / "made"
    heirloom(
        "generate", model, "--dataset", three, "-n", "3", "--out", made, "--steps", "4", "--json", tmp_path / "g.json"
    )
    assert sorted(p.name for p in made.iterdir()) == [
        "features.safetensors",
        "report.json",
        "sample-000",
        "sample-001",
        "sample-002",
    ]
    report = json.loads((made / "report.json").read_text())
    assert report["classes"] == ["class0", "class1", "class2"] and report["condition"] == "5-shot, 0 gradient steps"
    assert {"single sample", "best by test (oracle)", "prototype", "pictures of the wrong classes", "ridge"} < report[
        "accuracy"
    ].keys()
    zoo = {
        name: report["accuracy"][name]
        for name in ("nearest zoo network", "zoo mean", "zoo networks + 0.04 noise", "ridge")
    }
    assert zoo["nearest zoo network"] > 0.6 > zoo["zoo networks + 0.04 noise"] and zoo["ridge"] > 0.4
    novelty = report["novelty"]
    assert novelty["of"] == 40 and novelty["noise"] < novelty["zoo"] and 0 <= report["error IoU"] <= 1
    assert report["accuracy"]["prototype"] > 0.8
    listed = json.loads((tmp_path / "g.json").read_text())["weights"]
    assert listed == ["sample-000", "sample-001", "sample-002"]
    assert "21 parameters" in heirloom("inspect", made / "sample-000").replace("total ", "")
    assert "weights averaged" in heirloom("eval", model, "--data", three, "--steps", "4")
    heirloom("eval", made / "sample-000", "--data", three, "--json", tmp_path / "e.json")
    (row,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    (three / next(three.iterdir()).name / "0.txt").write_text("one caption of many is not read: classes need none")
    _, seen = read_dataset(str(three), Projection.load(made), NetConfig(features=6, classes=3))
    head = load_file(made / "sample-000" / "model.safetensors")
    right = (seen.x @ head["out/kernel"] + head["out/bias"]).argmax(1) == seen.y
    assert row["n"] == 30 and row["value"] == pytest.approx(100 * right.mean(), abs=1e-4)
    assert main(["generate", str(model), "--dataset", str(three), "--out", str(made)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["generate", str(model), "--dataset", str(pictures), "--out", str(tmp_path / "x")]) == 2
    assert "6 classes, these are 3-way networks" in capsys.readouterr().err
