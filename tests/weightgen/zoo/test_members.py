"""Folders of foreign checkpoints: what is a member, what an adapter's config means, and what is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from weightgen.zoo.adapter_config import LoraSettings, generated, settings, write_adapter
from weightgen.zoo.checkpoints import import_folder
from weightgen.zoo.lora import canonical_tensors, layout_of, pairs
from weightgen.zoo.zoo import open_zoo

PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "target_modules": ["q"],
}


KEY = "base_model.model.q"


def pair(seed=0, key=KEY, sides=("lora_A.weight", "lora_B.weight"), down=(2, 8), up=(6, 2)):
    rng = np.random.default_rng(seed)
    return {
        f"{key}.{side}": rng.standard_normal(shape).astype(np.float32)
        for side, shape in zip(sides, (down, up), strict=True)
    }


def adapter(folder, tensors, **config):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | config))


def update(zoo, row, module=KEY):
    """B A of a member as the zoo holds it."""
    tensors = zoo.spec.unflatten(zoo.tokens(row), zoo.spec.like)
    found = pairs(tensors)[module].adapter
    return found.up.reshape(len(found.up), -1) @ found.down.reshape(len(found.down), -1)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 64}, 32),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"r": 8, "rank_pattern": {"q": 2}}, 2),
        ({"alpha_pattern": {"^other": 9, r"q": 1}}, 0.5),
        ({"lora_alpha": -4}, -2),
    ],
)
def test_rows_are_the_updates_that_are_made(config, scale, tmp_path):
    adapter(tmp_path / "zoo" / "a", pair())
    adapter(tmp_path / "zoo" / "b", pair(), **config)
    zoo, words = import_folder(tmp_path / "zoo")
    down, up = pair().values()
    np.testing.assert_allclose(update(zoo, 0), 2 * up @ down, atol=1e-5)
    np.testing.assert_allclose(update(zoo, 1), scale * up @ down, atol=1e-4)
    assert words == ("a", "b") and zoo.about["adapters"]["scales"] == pytest.approx({"a": 2.0, "b": scale})
    assert any("scale inside" in note and "adapter_config.json" in note for note in zoo.about["notes"])
    zoo.save(tmp_path / "saved")
    assert open_zoo(tmp_path / "saved").about["adapters"]["scale from"] == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"from_the_future": 1}, "from_the_future is 1"),
        ({"r": 4}, "has rank 2, its adapter_config.json says 4"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; it must be a number"),
        ({"lora_alpha": True}, "lora_alpha is True; it must be a number"),
        ({"rank_pattern": {"q(": 2}}, "no regular expression"),
        ({"modules_to_save": "head"}, "must be a list of names"),
    ],
)
def test_a_config_that_changes_the_function_is_read_or_refused(config, wrong, tmp_path, capsys):
    adapter(tmp_path / "zoo" / "a", pair(), **config)
    assert (
        main(["train", "weightgen/checkpoints", "--run", str(tmp_path / "run"), "--folder", str(tmp_path / "zoo")]) == 2
    )
    said = capsys.readouterr().err
    assert wrong in said and said.count("\n") == 1 and str(tmp_path / "zoo" / "a") in said
    assert not (tmp_path / "run" / "zoo").exists()


def test_harmless_and_absent_fields_change_nothing():
    harmless = {
        "lora_dropout": 0.1,
        "loftq_config": {"loftq_bits": 4},
        "peft_version": "1",
        "unknown": None,
        "init_lora_weights": "eva",
    }
    assert settings(PEFT | harmless, "x").scale("m.q", 2) == 2.0
    for start in ("mica", "Gaussian"):  # peft compares in lower case
        assert settings(PEFT | {"init_lora_weights": start}, "x").scale("m.q", 2) == 2.0
    assert settings({"peft_type": "LORA"}, "x") == LoraSettings(ranks={}, alphas={})


@pytest.mark.parametrize(
    ("sides", "down", "up"),
    [
        (("lora_A.weight", "lora_B.weight"), (2, 8), (6, 2)),
        (("lora_A.sft.weight", "lora_B.sft.weight"), (2, 8), (6, 2)),
        (("lora_embedding_A", "lora_embedding_B"), (2, 8), (6, 2)),
        (("lora_down.weight", "lora_up.weight"), (2, 8), (6, 2)),
        (("lora.down.weight", "lora.up.weight"), (2, 8), (6, 2)),
        (("lora_A.weight", "lora_B.weight"), (2, 3, 3, 3), (6, 2, 1, 1)),
        (("lora_A", "lora_B"), (2, 8), (6, 2)),
        (("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), (2, 8), (6, 2)),
        (("lora_a.weight", "lora_b.weight"), (2, 8), (6, 2)),
    ],
)
def test_every_naming_has_one_gauge(sides, down, up, tmp_path):
    one = pair(0, "m.q", sides, down, up)
    mix = np.random.default_rng(1).standard_normal((2, 2)) + 2 * np.eye(2)
    a, b = one.values()
    turned = (np.linalg.inv(mix) @ a.reshape(2, -1)).reshape(a.shape), (b.reshape(6, 2) @ mix).reshape(b.shape)
    (tmp_path / "zoo").mkdir()
    save_file(one, tmp_path / "zoo" / "a.safetensors")
    save_file(
        {key: x.astype(np.float32) for key, x in zip(one, turned, strict=True)}, tmp_path / "zoo" / "b.safetensors"
    )
    zoo, _ = import_folder(tmp_path / "zoo")
    np.testing.assert_allclose(zoo.weights[0], zoo.weights[1], atol=1e-4)
    assert not any("sft" in name for name in zoo.spec.like)
    assert any("scale 1" in note and "assumed" in note for note in zoo.about["notes"])
    np.testing.assert_allclose(update(zoo, 0, "m.q"), b.reshape(6, 2) @ a.reshape(2, -1), atol=1e-4)


def test_the_two_pairs_of_a_module_of_xlabs_are_two_modules():
    one = {
        f"double_blocks.0.processor.qkv_lora{i}.{side}.weight": np.full(shape, i, np.float32)
        for i in (1, 2)
        for side, shape in (("down", (2, 8)), ("up", (6, 2)))
    }
    made = canonical_tensors(one)
    assert made.keys() == one.keys()
    for i in (1, 2):
        down, up = (made[f"double_blocks.0.processor.qkv_lora{i}.{side}.weight"] for side in ("down", "up"))
        np.testing.assert_allclose(up @ down, np.full((6, 8), 2 * i * i), rtol=1e-5)


@pytest.mark.parametrize(
    ("extra", "wrong"),
    [
        ({f"{KEY}.lora_magnitude_vector": np.ones(6, np.float32)}, "DoRA"),
        ({"lora_unet_x.hada_w1_a": np.ones((2, 2), np.float32)}, "LoHa"),
        ({f"{KEY}.lora_B.bias": np.ones(6, np.float32)}, "biases"),
        ({f"{KEY}.lora_a": np.ones((8, 2), np.float32)}, "not known here"),  # of MLX, transposed
        ({f"{KEY}.qkv_lora1.down": np.ones((2, 2), np.float32)}, "not known here"),
        (pair(0, KEY, ("lora_A.second.weight", "lora_B.second.weight")), "two adapters"),
        (pair(0, "m.k", ("lora_A.weight", "lora_B.weight"), (4, 8), (6, 2)), "no pair"),
        (pair(0, "m.k", ("lora_A.weight", "lora_B.weight"), (2, 0), (6, 2)), "no numbers"),
        ({"m.k.lora_A.weight": np.ones((2, 8), np.float32)}, "only lora_A"),
    ],
)
def test_other_adapters_are_refused_by_name(extra, wrong):
    with pytest.raises(InputError, match=wrong):
        canonical_tensors(pair() | extra)


def test_alphas_in_the_file_and_in_its_metadata_are_scales(tmp_path):
    sides, key = ("lora_down.weight", "lora_up.weight"), "lora_unet_q"
    (tmp_path / "kohya").mkdir()
    for name, alpha in (("a", 2.0), ("b", 1.0)):
        save_file(
            pair(0, key, sides) | {f"{key}.alpha": np.array(alpha, np.float32)},
            tmp_path / "kohya" / f"{name}.safetensors",
        )
    zoo, _ = import_folder(tmp_path / "kohya")
    np.testing.assert_allclose(update(zoo, 0, key), 2 * update(zoo, 1, key), atol=1e-5)
    assert zoo.about["adapters"] | {"form": ""} == {
        "layout": "alpha", "config": None, "form": "", "scale from": ["alpha tensors"],
        "scales": {"a.safetensors": 1.0, "b.safetensors": 0.5},
    }  # fmt: skip
    write_adapter(tmp_path, zoo.spec.unflatten(zoo.tokens(0), zoo.spec.like), zoo.about["adapters"])
    assert load_file(tmp_path / "model.safetensors")[f"{key}.alpha"] == 2, "alpha is the rank: a scale of 1"
    (tmp_path / "diffusers").mkdir()
    for name, alpha in (("a", 2), ("b", 8)):
        about = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": alpha})}
        save_file(pair(0, "unet.q"), tmp_path / "diffusers" / f"{name}.safetensors", about)
    zoo, _ = import_folder(tmp_path / "diffusers")
    np.testing.assert_allclose(update(zoo, 1, "unet.q"), 4 * update(zoo, 0, "unet.q"), atol=1e-4)
    assert zoo.about["adapters"]["layout"] == "named"


def test_members_that_differ_are_named(tmp_path):
    adapter(tmp_path / "1" / "a", pair())
    adapter(tmp_path / "1" / "b", pair() | pair(1, "base_model.model.v"))
    with pytest.raises(
        InputError, match=r"/b is of another architecture .*only it has base_model\.model\.v\.lora_A\.weight"
    ):
        import_folder(tmp_path / "1")
    adapter(tmp_path / "2" / "a", pair())
    adapter(tmp_path / "2" / "b", pair(), fan_in_fan_out=True)
    with pytest.raises(InputError, match=r"/b and .*/a differ in fan_in_fan_out"):
        import_folder(tmp_path / "2")
    adapter(tmp_path / "3" / "a", pair())
    save_file(pair(1), tmp_path / "3" / "b.safetensors")
    with pytest.raises(
        InputError,
        match=r"b\.safetensors and .*/a differ in scale \(none given, 1 is assumed and adapter_config\.json\)",
    ):
        import_folder(tmp_path / "3")
    with pytest.raises(InputError, match=r"select takes one half of the adapter of base_model\.model\.q"):
        import_folder(tmp_path / "1", select="lora_A")


def nets(folder, count=3):
    folder.mkdir()
    for i in range(count):
        save_file(
            {"w": np.full((3, 2), i + 1, np.float32), "b": np.arange(3, dtype=np.float32)}, folder / f"{i}.safetensors"
        )
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_members_that_diverged_are_named_in_one_line(value, tmp_path, capsys):
    folder = nets(tmp_path / "nets")
    save_file({"w": np.full((3, 2), value, np.float32), "b": np.zeros(3, np.float32)}, folder / "1.safetensors")
    broken = pair(1)
    broken[f"{KEY}.lora_A.weight"][0, 0] = value
    adapter(tmp_path / "adapters" / "a", broken)  # the first one, too
    adapter(tmp_path / "adapters" / "b", pair())
    said_of = {
        folder: "1 of 3 members have NaN or infinity: 1.safetensors (w)",
        tmp_path / "adapters": "a (base_model.model.q",
    }
    for zoo, named in said_of.items():
        assert main(["train", "weightgen/checkpoints", "--run", str(tmp_path / "run"), "--folder", str(zoo)]) == 2
        said = capsys.readouterr().err
        assert named in said and said.count("\n") == 1 and not (tmp_path / "run" / "zoo").exists()


def test_strays_are_left_alone_and_counted(tmp_path, capsys):
    folder = nets(tmp_path / "zoo")
    (folder / "4").mkdir()
    save_file({"w": np.zeros((3, 2), np.float32), "b": np.zeros(3, np.float32)}, folder / "4" / "model.safetensors")
    for name in ("optimizer.pt", "training_args.bin", ".hidden.pt", "notes.txt"):
        (folder / name).write_bytes(b"junk")
    for name in ("logs", ".git"):
        (folder / name).mkdir()
    (folder / "4" / "training_args.bin").write_bytes(b"junk")
    zoo, words = import_folder(folder)
    assert words == ("0", "1", "2", "4")
    assert zoo.about["left alone"] == [".git", ".hidden.pt", "logs", "notes.txt", "optimizer.pt", "training_args.bin"]
    assert main(["train", "weightgen/checkpoints", "--run", str(tmp_path / "run"), "--folder", str(folder)]) == 0
    assert "left alone: 6 without weights (.git, .hidden.pt, logs, notes.txt and 2 more)" in capsys.readouterr().out


def test_twins_empties_and_zeros_are_said(tmp_path):
    folder = nets(tmp_path / "zoo")
    save_file({"w": np.full((3, 2), 1, np.float32), "b": np.arange(3, dtype=np.float32)}, folder / "3.safetensors")
    save_file({"w": np.zeros((3, 2), np.float16), "b": np.zeros(3, ml_dtypes.bfloat16)}, folder / "4.safetensors")
    zoo, _ = import_folder(folder)
    assert zoo.about["notes"] == ["the same weights twice: 0.safetensors = 3.safetensors", "all zero: 4.safetensors"]
    save_file({}, folder / "5.safetensors")
    with pytest.raises(InputError, match=r"5\.safetensors is of another architecture .*it lacks b, w"):
        import_folder(folder)
    save_file({"w": np.zeros((0, 2), np.float32)}, nets(tmp_path / "empty", 0) / "0.safetensors")
    with pytest.raises(InputError, match=r"w has no numbers; gather the weights"):
        import_folder(tmp_path / "empty")


def test_tensors_that_are_not_generated_are_said(tmp_path):
    whole = {"bn.running_mean": np.zeros(4, np.float32), "bn.num_batches_tracked": np.array(3)}
    for i in range(2):
        save_file(whole | {"w": np.full((4, 4), i + 1, np.float32)}, tmp_path / f"{i}.safetensors")
    (note,) = import_folder(tmp_path)[0].about["notes"]
    assert note.startswith("not in the zoo: 2 tensors (bn.num_batches_tracked, bn.running_mean): counters and running")
    assert import_folder(tmp_path, select="w")[0].about["notes"] == []


@pytest.mark.parametrize(
    ("write", "wrong"),
    [
        (
            lambda f: (f / "tasks.json").write_text('{"7.safetensors": "cats"}'),
            r"names 7\.safetensors, not in the folder; did you mean",
        ),
        (lambda f: (f / "quality.json").write_text('{"0": 1}'), "names 0, not in the folder"),
        (lambda f: (f / "tasks.json").write_text('{"0.safetensors": ""}'), "must give words"),
        (lambda f: save_file({"w": np.zeros((3, 2), np.int8)}, f / "00.safetensors"), "quantised"),
        (
            lambda f: save_file({"w": np.zeros(2, np.float32)}, f / "model-00001-of-00002.safetensors"),
            "1 of 2 shards are missing",
        ),
        (lambda f: (f / "00.safetensors").write_bytes(b""), "cut short"),
    ],
)
def test_what_is_wrong_in_a_folder_is_said(write, wrong, tmp_path):
    write(nets(tmp_path / "zoo"))
    with pytest.raises(InputError, match=wrong):
        import_folder(tmp_path / "zoo")


def test_a_folder_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["train", "weightgen/checkpoints", "--run", str(tmp_path / "run"), "--folder=~/none"]) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_a_folder_may_keep_shards_under_an_index(tmp_path):
    parts = {"model-00001-of-00002.safetensors": "w", "model-00002-of-00002.safetensors": "b"}
    for file, name in parts.items():
        save_file({name: np.ones(3, np.float32)}, tmp_path / file)
    index = {"weight_map": {name: file for file, name in parts.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    zoo, _ = import_folder(tmp_path)
    assert len(zoo) == 1 and zoo.spec.count == 6


def test_a_generated_adapter_has_a_scale_of_one(tmp_path):
    tensors = pair() | pair(1, "base_model.model.layers.0.v", down=(4, 8), up=(6, 4)) | pair(2, "base_model.model.k")
    about = generated(tensors, LoraSettings(fan_in_fan_out=True, base="b"))
    read = settings(about, "made")
    assert {read.scale(module, len(p.adapter.down)) for module, p in pairs(tensors).items()} == {1.0}
    assert (about["r"], about["rank_pattern"], about["target_modules"]) == (
        2,
        {r"^layers\.0\.v": 4},
        ["k", "layers.0.v", "q"],
    )
    assert read.fan_in_fan_out and read.base == "b"
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert layout_of(tensors, False) == layout_of(bare, True) == "peft" and layout_of(bare, False) == "named"
    write_adapter(tmp_path, bare, {"layout": "peft", "config": about})
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys(), "names that peft accepts"


def test_one_config_is_for_all_adapters_of_a_flat_folder(tmp_path):
    for name in "ab":
        save_file(pair(), tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | {"lora_alpha": 64}))
    zoo, _ = import_folder(tmp_path)
    assert zoo.about["adapters"]["scales"] == pytest.approx({"a.safetensors": 32.0, "b.safetensors": 32.0})
    sides = ("lora_down.weight", "lora_up.weight")
    for name in "ab":  # files with a scale of their own, and files that are no adapters
        save_file(pair(0, "q", sides) | {"q.alpha": np.array(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert import_folder(tmp_path)[0].about["adapters"]["scale from"] == ["alpha tensors"]
    for name in "ab":
        save_file({"w": np.ones((3, 2), np.float32)}, tmp_path / f"{name}.safetensors")
    assert import_folder(tmp_path)[0].spec.count == 6


def test_a_finished_zoo_keeps_its_config(tmp_path, capsys):
    command = ["train", "weightgen/checkpoints", "--run", str(tmp_path / "run"), "--folder", str(nets(tmp_path / "z"))]
    assert main(command) == main(command) == 0 and "is finished" in capsys.readouterr().out
    assert main([*command, "--select", "w"]) == 2
    assert 'was started with another config; take a new folder, or set it back: select: ""' in capsys.readouterr().err
