"""Teacher, gene and descendant from the command line at toy size: train, stop, resume, expand, score, compare."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from heirloom.common import config
from heirloom.common.checkpoint.family import Outline
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.data.bad import BAD
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, Stopped
from heirloom.common.files import read_json
from heirloom.common.mesh import MeshConfig, batch_sharding, shardings, start
from heirloom.common.nn.functional import functional
from heirloom.common.train import recipe as runner
from heirloom.common.train.loop import Run
from heirloom.common.train.parts import Opened
from heirloom.common.vit.model import Vit, VitConfig
from learngene import ligo, train
from learngene.augment import AugmentConfig
from learngene.compare import ARMS, Comparison, compare, curve, descendant
from learngene.convnet import ConvConfig, macs
from learngene.data import LOGITS, Example, decoded
from learngene.inputs import IMAGENET
from learngene.losses import DistillConfig
from learngene.train import ADAMW, CONVNET_ADAMW, Config, TeacherConfig, loss_fn
from learngene.zoo import FAMILY, open_classifier

ROWS = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Coloured squares on grey, one colour a class: three classes that a few steps can tell apart."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        label = np.arange(ROWS, dtype=np.int32) % 3
        image = rng.integers(90, 120, (ROWS, 8, 8, 3)).astype(np.uint8)
        image[np.arange(ROWS), 2:6, 2:6, label] = 255
        folder = tmp_path_factory.getbasetemp() / "squares" / split
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "image.npy", image)
        np.save(folder / "label.npy", label)
        np.save(folder / f"{LOGITS}.npy", 4 * np.eye(3, dtype=np.float32)[label])
    return tmp_path_factory.getbasetemp() / "squares"


@pytest.fixture(scope="module")
def gene_config(data):
    student = VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=3, gene="sws", layout=(2, 2))
    return Config(
        student=student,
        distill=DistillConfig(),
        data=SourceConfig(str(data / "train"), text=""),
        storage="device",
        pipeline=PipelineConfig(batch=16),
        held_out=SourceConfig(str(data / "test"), text=""),
        crop=1.0,
        optim=replace(ADAMW, lr=1e-2, warmup=2),
        steps=48,
        log_every=12,
        eval_every=24,
        save_every=24,
    )


@pytest.fixture(scope="module")
def comparison(gene_config):
    shared = {
        name: getattr(gene_config, name)
        for name in ("data", "storage", "pipeline", "held_out", "crop", "log_every", "eval_every")
    }
    conv = ConvConfig(size=8, widths=(16,), blocks=1, classes=3)
    teacher = TeacherConfig(
        student=conv, optim=replace(CONVNET_ADAMW, lr=2e-2, warmup=2), steps=72, save_every=72, **shared
    )
    rates = {name: replace(ADAMW, lr=1e-3, warmup=0) for name in ("tune", "scratch")}
    return Comparison(gene=gene_config, teacher=teacher, depths=(4,), methods=("sws", "kd"), epochs=1, **rates)


@pytest.fixture(scope="module")
def compared(one_device, comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "run"
    return folder, compare(comparison, folder)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_teacher_and_gene_learn(compared):
    folder, results = compared
    assert results["teacher"]["top1"] > 0.9 and results["genes"]["sws"]["top1"] > 0.9
    gene = lines_of(folder / "gene-sws")
    assert gene[-1]["teacher"] < 0.5 * gene[0]["teacher"] and "labels" not in gene[-1]  # alpha 1 looks at no label
    assert open_classifier(str(folder / "gene-sws" / "model")).cfg.layout == (2, 2)


def test_before_its_first_step_a_descendant_of_the_same_layout_is_the_auxiliary_net(compared, comparison):
    folder, results = compared
    assert results["arms"]["sws-4"]["top1"][0] == results["genes"]["sws"]["top1"]
    recipe = descendant(comparison, "shuffled", 4, str(folder / "gene-sws" / "model"), "")
    loss = runner.evaluate(recipe, recipe.parts()).metrics["loss"]
    # these colours survive any order of two stages, but less surely
    assert loss > 1.02 * results["arms"]["sws-4"]["loss"][0]
    assert results["arms"]["kd-4"]["top1"][0] < 0.7


def test_costs_are_pictures_times_operations(compared, comparison):
    folder, results = compared
    arms, kd = results["arms"], results["arms"]["kd-4"]
    assert kd["steps"] == [0, 3] and kd["pictures"] == 48
    teacher = open_classifier(str(folder / "teacher" / "model"))
    assert kd["flops"] - arms["sws-4"]["flops"] == 48 * 2 * macs(teacher.cfg, teacher.model.spec)
    assert arms["sws-4"]["flops"] == 48 * 6 * arms["sws-4"]["macs"]
    assert results["genes"]["sws"]["parameters"] < arms["sws-4"]["parameters"]


def test_what_is_finished_is_not_run_again(compared, comparison, monkeypatch):
    folder, results = compared
    monkeypatch.setattr(Run, "fit", None)
    assert compare(comparison, folder) == results == read_json(folder / "comparison.json")
    changed = replace(comparison, tune=replace(comparison.tune, lr=1e-4))
    with pytest.raises(InputError, match=r"optim\.lr: 0\.001 before, 0\.0001 now"):
        compare(changed, folder)


def test_an_arm_of_another_gene_is_not_kept(compared, comparison, monkeypatch):
    folder, results = compared
    monkeypatch.setattr(Run, "fit", None)
    gene = folder / "gene-sws" / "model" / "model.safetensors"
    before = gene.read_bytes()
    gene.write_bytes(before[:-4] + bytes(4))
    with pytest.raises(InputError, match=r"gene-sws/model has other weights than the donor that .*/sws-4 began with"):
        compare(comparison, folder)
    gene.write_bytes(before)
    assert compare(comparison, folder) == results


def test_every_method_of_a_comparison_can_start(gene_config, compared):
    """Each arm's first parameters, out of drawn donors: fresh where it inherits nothing, elsewhere not."""
    folder, _ = compared
    cfg = Comparison(gene=gene_config)
    source = str(folder / "gene-sws" / "model")
    for name, arm in ARMS.items():
        if arm.gene in ("", "sws"):
            recipe = descendant(cfg, name, 3, source, "")
            assert recipe.student.layers == 3 and bool(recipe.donor) == bool(arm.gene)
            assert recipe.optim == (cfg.tune if arm.gene else cfg.scratch)


def test_ligo_trains_its_maps_once_for_score_run_and_record(comparison, compared, tmp_path, monkeypatch, one_device):
    folder, _ = compared
    gene, fits = open_classifier(str(folder / "gene-sws" / "model")), []
    shallow = Config(student=comparison.gene.student.of_depth(2))
    runner.inherit(shallow, shallow.parts(), tmp_path / "shallow", donor=gene)

    def fit(donor, source, student, *_):
        fits.append(student.layers)
        return ligo.plan(donor, student, ligo.first_matrices(donor, student, seed=len(fits)))

    monkeypatch.setattr(ligo, "fit", fit)
    recipe = descendant(comparison, "ligo", 4, str(tmp_path / "shallow"), "")
    curve(recipe, tmp_path / "run")
    assert fits == [4], "what is scored before the first step is what is trained"
    recipe.inherit(tmp_path / "made")
    assert fits == [4, 4]


def test_the_command_compares_a_gene_and_prints_one_table(compared, comparison, tmp_path, capsys, monkeypatch):
    folder, _ = compared
    monkeypatch.setattr(config, "load", lambda name, flags=(): comparison)
    command = [
        "compare",
        "mine",
        "--run",
        str(folder),
        "--depths",
        "4",
        "--methods",
        "sws,kd",
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[:3] in ("tea", "sws", "kd ")] == [
        "teacher",
        "sws",
        "kd",
    ]
    assert set(read_json(tmp_path / "c.json")["arms"]) == {"sws-4", "kd-4"}


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["compare"], "name a recipe to compare with"),
        (["compare", "learngene/emoji"], "give --run DIR"),
        (["compare", "learngene/emoji", "--cost", "6-15"], "leave CONFIG and its flags out"),
        (["compare", "learngene/smoke", "--run", "x"], "names no teacher, and none to train"),
        (["compare", "--cost", "six"], "write 6-15, or 4,6,8"),
        (
            ["compare", "learngene/emoji", "--run", "x", "--methods", "sws,tlg"],
            "unknown method 'tlg'; did you mean 'tleg'?",
        ),
        (
            ["compare", "learngene/emoji", "--run", "x", "--methods", "interlace", "--depths", "7"],
            "and interlacing 3 gives at most 6",
        ),
        (
            ["train", "learngene/smoke", "--run", "x", "--distill.alpha", "1"],
            "set --distill.alpha 0 to learn from labels alone",
        ),
        (
            ["train", "learngene/smoke", "--run", "x", "--teacher", "logits", "--distill.alpha", "1"],
            "belong to unchanged pictures",
        ),
        (
            ["train", "learngene/smoke", "--run", "x", "--augment.crop", "resized"],
            "resized crops and RandAugment need 'stream'",
        ),
        (
            ["train", "learngene/smoke", "--run", "x", "--student.channels", "1"],
            "student.channels is 1, and pictures have 3",
        ),
        (["inherit", "learngene/smoke", "x"], "has no donor to inherit from"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, command, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and not (tmp_path / "x" / "model").exists()


def test_the_published_ratios_from_the_command_line(tmp_path, capsys):
    assert main(["compare", "--cost", "6-15", "--json", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    for words in (["storage", "20.1x", "20.5x"], ["training", "10.00x", "10.00x"], ["training", "6.67x", "6.67x"]):
        assert any(all(word in line.split() for word in words) for line in out.splitlines()), words
    assert read_json(tmp_path / "c.json")["depths"] == list(range(6, 16))


def test_expand_writes_a_descendant_and_where_it_is_from(compared, tmp_path, capsys):
    gene = str(compared[0] / "gene-sws")
    command = [
        "expand",
        gene,
        str(tmp_path / "d3"),
        "--depth",
        "3",
        "--map",
        "0,1,1",
        "--json",
        str(tmp_path / "record.json"),
    ]
    assert main(command) == 0
    record = read_json(tmp_path / "record.json")
    assert record["fraction"] == 1 and record["parameters"]["blocks/mlp/up/kernel"]["maps"] == "layer: rows 0 1 1"
    theirs = open_safetensors(compared[0] / "gene-sws" / "model" / "model.safetensors")["blocks/mlp/up/kernel"]
    np.testing.assert_array_equal(
        open_safetensors(tmp_path / "d3" / "model.safetensors")["blocks/mlp/up/kernel"], theirs[[0, 1, 1]]
    )
    assert main(["expand", gene, str(tmp_path / "d1"), "--depth", "1", "--classes", "7", "--size", "16"]) == 0
    assert "no rule is published for 1 layers from 2 stages" in capsys.readouterr().out
    other = open_classifier(str(tmp_path / "d1")).cfg
    assert (other.layers, other.classes, other.size, other.gene) == (1, 7, 16, "none")
    for arguments, complaint in (
        (["--depth", "3", "--map", "0,x"], "separated by commas"),
        (["--depth", "2", "--map", "0,5"], "stage 5"),
    ):
        assert main(["expand", gene, str(tmp_path / "no"), *arguments]) == 2
        assert complaint in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["expand", str(compared[0] / "teacher"), str(tmp_path / "no"), "--depth", "3"]) == 2
    assert "is a convnet: give a gene or a ViT" in capsys.readouterr().err


def test_eval_of_a_gene_scores_its_auxiliary_net(compared, data, tmp_path, capsys):
    folder, results = compared
    command = [
        "eval",
        str(folder / "gene-sws"),
        "--data",
        str(data / "test"),
        "--crop",
        "1",
        "--json",
        str(tmp_path / "e.json"),
    ]
    assert main(command) == 0
    rows = {row["metric"]: row for row in read_json(tmp_path / "e.json")["rows"]}
    assert (
        rows["top1"]["value"] == 100 * results["genes"]["sws"]["top1"]
        and rows["top5"]["value"] == 100
        and rows["top1"]["n"] == ROWS
    )
    assert read_json(folder / "gene-sws" / "model" / "preprocess.json")["resize"] == 8  # its recipe's crop is 1
    assert main([*command[:4], *command[6:]]) == 0  # without --crop: as trained
    assert read_json(tmp_path / "e.json")["rows"] == list(rows.values())
    assert main(["eval", str(folder / "gene-sws")]) == 2
    assert "give --data" in capsys.readouterr().err


def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(compared, gene_config, tmp_path, monkeypatch):
    folder = compared[0]
    recipe, run, scorer = (
        replace(gene_config, teacher=str(folder / "teacher" / "model")),
        tmp_path / "run",
        train.scorer,
    )

    def stops(*args):
        score = scorer(*args)

        def and_stop(params):
            os.kill(os.getpid(), signal.SIGTERM)
            return score(params)

        return and_stop

    monkeypatch.setattr(train, "scorer", stops)
    with pytest.raises(Stopped):
        recipe.train(run)
    monkeypatch.setattr(train, "scorer", scorer)
    recipe.train(run)
    assert [line["loss"] for line in lines_of(run)] == [line["loss"] for line in lines_of(folder / "gene-sws")]
    ours, theirs = (open_safetensors(r / "model" / "model.safetensors") for r in (run, folder / "gene-sws"))
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def batch_of(cfg, data):
    loaded = decoded(replace(cfg.data, columns=(LOGITS,)), "label", 3, Example(cfg.augment, cfg.pre, 3))
    return {name: value[:6] for name, value in loaded.items() if name != BAD}


def test_the_loss_weighs_labels_and_teacher(gene_config, data):
    student = functional(Vit, gene_config.student)
    params, batch = student.init(jax.random.key(0)), batch_of(gene_config, data)
    pre = gene_config.pre  # a teacher without preprocessing is given ImageNet's, which is the gene's here
    assert (pre.mean, pre.std) == (IMAGENET.mean, IMAGENET.std)
    weights = {"twice": np.float32(2.0)}
    model = SimpleNamespace(
        apply=lambda weights, x: weights["twice"] * (x * np.asarray(pre.std) + np.asarray(pre.mean)).mean((1, 2))
    )
    teacher = Outline(FAMILY, gene_config.student, model)
    pixels = batch["image"].astype(np.float32) / 255
    logits = np.asarray(
        jax.jit(student.apply)(params, (pixels - gene_config.pre.mean) / np.asarray(gene_config.pre.std)), np.float64
    )
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def divergence(target):
        log_p = target - np.log(np.exp(target).sum(1, keepdims=True))
        return (np.exp(log_p) * (log_p - log_q)).sum() / 6

    labels = -log_q[np.arange(6), batch["label"]].mean()
    taught, cached = (
        divergence(2 * pixels.mean((1, 2)).astype(np.float64)),
        divergence(batch[LOGITS].astype(np.float64)),
    )
    for cfg, who, expected in (
        (gene_config, teacher, taught),
        (replace(gene_config, distill=DistillConfig(alpha=0.25)), teacher, 0.75 * labels + 0.25 * taught),
        (replace(gene_config, teacher="logits"), None, cached),
        (gene_config, None, labels),  # nobody to learn from
    ):
        value, metrics = jax.jit(loss_fn(cfg, student, who))(params, batch, jax.random.key(0), weights if who else None)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
        assert metrics["accuracy"][0] == (logits.argmax(1) == batch["label"]).mean()


def test_a_genes_loss_and_tied_gradients_are_the_same_on_a_mesh(gene_config, data, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # the module's own runs take one
    student = functional(Vit, gene_config.student)
    params, loss = student.init(jax.random.key(0)), loss_fn(replace(gene_config, teacher="logits"), student, None)
    batch = {name: np.concatenate([value, value[:2]]) for name, value in batch_of(gene_config, data).items()}

    def gradients(params, batch):
        return jax.value_and_grad(lambda p: loss(p, batch, jax.random.key(0), None)[0])(params)

    expected, untouched = jax.jit(gradients)(params, batch)
    mesh = start(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        places = shardings(student.spec, mesh), batch_sharding(mesh)
        value, grads = jax.device_get(jax.jit(gradients, in_shardings=places)(params, batch))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, gradient in untouched.items():  # a bias of keys has none but for rounding
        np.testing.assert_allclose(grads[path], gradient, atol=1e-5 * max(np.abs(gradient).max(), 1e-4), err_msg=path)


def test_views_are_told_apart_and_share_a_label(gene_config, data):
    cfg = replace(gene_config, storage="stream", augment=AugmentConfig(crop="resized", views=2), teacher="")
    batch = next(train.batches(cfg, Opened(mesh=start(), donor=None, teacher=None)))
    assert batch["image"].shape == (16, 2, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert (np.asarray(batch["image"])[:, 0] != np.asarray(batch["image"])[:, 1]).any()
    student = functional(Vit, cfg.student)
    _, metrics = jax.jit(loss_fn(cfg, student, None))(student.init(jax.random.key(0)), batch, jax.random.key(0), None)
    assert cfg.pictures == 32 and 0 <= metrics["accuracy"][0] <= 1
