"""Wrapped weights: averages first, prefixes off, harmless objects read, and what was done is said."""

import json
import shutil
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heirloom.common.checkpoint.names import clean_names
from heirloom.common.checkpoint.unwrap import open_weights, weights_files
from heirloom.common.errors import InputError

torch = pytest.importorskip("torch")

RAW = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
MEAN = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}
KEYS = ["a.bias", "a.weight"]


def opened(path, value, name="weights.pt"):
    torch.save(value, path / name)
    return clean_names(open_weights(path / name))


def total(found):
    return float(found.tensors["a.weight"].sum()), sorted(found.tensors)


@pytest.mark.parametrize(
    "average",
    [
        "ema",
        "model_ema",
        "state_dict_ema",
        "ema_state_dict",
        "ema_model",
        "params_ema",
        "averaged_model",
        "EMA",
        "model-ema",
        "ema_0.9999",
        "ema2",
        "emas",
        "model_avg",
    ],
)
@pytest.mark.parametrize("raw", ["model", "state_dict", "params"])
def test_an_average_is_taken_before_the_raw_weights_and_that_is_said(raw, average, tmp_path):
    found = opened(tmp_path, {raw: RAW, average: MEAN, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}})
    assert total(found) == (6, KEYS)
    assert found.notes == (f"the tensors under {average!r} taken, and not those under {raw!r}",)


@pytest.mark.parametrize("averages", [{"ema": {"stds": [0.05, 0.1], "emas": [MEAN, MEAN]}}, {"emas": [MEAN, MEAN]}])
def test_a_list_of_averages_is_not_passed_over(averages, tmp_path):
    """As EDM2 saves them."""
    with pytest.raises(InputError, match=r"'emas?' is a list of averages or of tensors without names: save the"):
        opened(tmp_path, {"net": RAW, **averages})


@pytest.mark.parametrize("average", ["ema.pt", "ema_model.pt", "ema/model.pt"])
def test_an_average_in_a_file_of_its_own_is_asked_for(average, tmp_path):
    (tmp_path / average).parent.mkdir(exist_ok=True)
    torch.save(MEAN, tmp_path / average)
    torch.save(RAW, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin and its average ema.*: name the one you mean"):
        weights_files(tmp_path)
    assert weights_files(tmp_path / average) == [tmp_path / average]


def test_a_set_of_tensors_that_is_left_out_is_named(tmp_path):
    found = opened(tmp_path, {"model": MEAN, "target_model": RAW, "optimizer": {"exp_avg": torch.zeros(2)}})
    assert total(found) == (6, KEYS)
    assert found.notes == ("the tensors under 'model' taken, and not those under 'target_model'",)


@pytest.mark.parametrize(
    "about",
    [
        {"callbacks": {"EMA": {"ema_state_dict": MEAN}, "ModelCheckpoint": {"best": torch.zeros(2, 2)}}},
        {"trainer": {"state": {"model_ema": MEAN}}},
    ],
)
def test_an_average_further_down_is_taken_before_raw_weights(about, tmp_path):
    """As callbacks of Lightning save theirs; averages of losses, and those of optimizers, are none of weights."""
    others = {"optimizer_states": {"exp_avg": RAW}, "metrics": {"avg": {"loss": torch.ones(1)}}}
    found = opened(tmp_path, {"state_dict": RAW, **about, **others})
    assert total(found) == (6, KEYS)
    said = f"the tensors under {next(iter(about))!r} taken, and not those under 'state_dict', 'metrics'"
    assert found.notes[0] == said


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"model": RAW, "ema1": MEAN, "ema2": RAW}, "ema1, ema2"),
        ({"model": RAW, "ema": MEAN, "callbacks": {"EMA": {"weights": RAW}}}, "ema, callbacks.EMA"),
        ({"model": RAW, "callbacks": {"EMA": MEAN, "swa": RAW}}, "EMA, swa"),
        ({f"{name}.{key}": RAW[key] for name in ("net", "ema_1", "ema_2") for key in KEYS}, "ema_1, ema_2"),
    ],
)
def test_of_several_averages_none_is_taken(state, names, tmp_path):
    with pytest.raises(InputError, match=rf"holds several averages \({names}\); save the one you mean"):
        opened(tmp_path, state)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module", "net", "generator", "student"])
def test_a_dictionary_around_the_tensors_is_opened_whatever_its_name(wrapper, tmp_path):
    assert total(opened(tmp_path, {"epoch": 3, wrapper: MEAN})) == (6, KEYS)


def test_wrappers_nest(tmp_path):
    inner = {f"module.{key}": value for key, value in MEAN.items()}
    assert total(opened(tmp_path, {"state": {"model": {"ema": inner}}})) == (6, KEYS)


def test_two_sets_of_tensors_without_a_known_name_are_named(tmp_path):
    with pytest.raises(InputError, match=r"weights\.pt: holds several sets of tensors \(student, teacher\)"):
        opened(tmp_path, {"student": RAW, "teacher": MEAN})


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module.",
        "net.",
        "model._orig_mod.",
    ],
)
def test_prefixes_of_wrappers_are_taken_off_in_any_combination(prefix, tmp_path):
    found = opened(tmp_path, {"state_dict": {prefix + key: value for key, value in MEAN.items()}})
    assert total(found) == (6, KEYS) and "removed from the names" in found.notes[-1]


def test_wrappers_inside_a_name_are_taken_off(tmp_path):
    assert list(opened(tmp_path, {"blocks.0._orig_mod.attn.weight": torch.zeros(1)}).tensors) == [
        "blocks.0.attn.weight"
    ]


def test_an_average_under_a_prefix_is_taken_and_its_twin_left(tmp_path):
    both = {f"model.{key}": value for key, value in RAW.items()} | {
        f"ema_model.module.{key}": value for key, value in MEAN.items()
    }
    found = opened(tmp_path, both | {name: torch.tensor(7) for name in ("n_averaged", "initted", "step")})
    assert total(found) == (6, KEYS)
    assert "'ema_model.*' taken, and not 'model.*'" in found.notes


@pytest.mark.parametrize(
    "name", ["criterion.weight", "loss_fn.weight", "train_acc.confmat", "val_accuracy.tp", "test_metrics.F1.tp"]
)
def test_losses_and_metrics_next_to_a_model_are_left_out(name, tmp_path):
    """As Lightning saves them: attributes of the module that trains."""
    both = {f"model.{key}": value for key, value in MEAN.items()}
    found = opened(tmp_path, {"state_dict": both | {name: torch.ones(2)}}, "last.ckpt")
    assert total(found) == (6, KEYS)
    assert found.notes[0] == f"{name} left out, a part of the training outside 'model.'"


def test_another_part_next_to_a_model_is_named(tmp_path):
    both = {f"model.{key}": value for key, value in MEAN.items()}
    found = opened(tmp_path, {"state_dict": both | {"face.weight": torch.ones(2)}}, "last.ckpt")
    assert sorted(found.tensors) == [*KEYS, "face.weight"]
    assert found.notes == ("'model.' removed from the names of its tensors; outside of these: face.weight",)


@pytest.mark.parametrize(("raw", "average"), [("net", "net_ema"), ("model", "ema_dit"), ("network", "network_avg")])
def test_an_average_under_any_prefix_is_taken(raw, average, tmp_path):
    both = {f"{raw}.{key}": value for key, value in RAW.items()}
    found = opened(tmp_path, both | {f"{average}.{key}": value for key, value in MEAN.items()})
    assert total(found) == (6, KEYS) and f"'{average}.*' taken, and not '{raw}.*'" in found.notes


def test_the_average_of_latent_diffusion_gets_its_dots_back(tmp_path):
    """LDM's LitEma: buffers have no names without dots, and parameters have nothing else."""
    raw = {f"model.net.{key}": value for key, value in RAW.items()} | {"model.net.table": torch.ones(3)}
    average = {f"model_ema.net{key.replace('.', '')}": value for key, value in MEAN.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert total(opened(tmp_path, {"state_dict": raw | average | counters})) == (6, [*KEYS, "table"])


@pytest.mark.parametrize(
    "state",
    [
        {"model": RAW, "ema": {"decay": 0.99, "num_updates": 3, "shadow_params": list(MEAN.values())}},
        {"model": RAW, "shadow_params": list(MEAN.values())},
        {"model": RAW, "callbacks": {"EMA": {"ema_weights": list(MEAN.values())}}},
    ],
)
def test_an_average_without_names_is_refused(state, tmp_path):
    with pytest.raises(InputError, match=r"is a list of averages or of tensors without names.*\(copy_to\)"):
        opened(tmp_path, state)


def test_two_names_that_become_one_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"two tensors have the name 'a\.weight'"):
        opened(tmp_path, {"module.a.weight": torch.zeros(1), "a.weight": torch.ones(1)})


def test_harmless_objects_next_to_the_weights_are_read(tmp_path):
    extra = {
        "best": np.float64(0.5),
        "seen": np.int64(3),
        "curve": np.arange(3.0),
        "args": Namespace(prediction="velocity", lr=0.1),
    }
    found = opened(tmp_path, {"model": OrderedDict(MEAN), **extra})
    assert (
        total(found)[0] == 6
        and found.about["args"] == {"prediction": "velocity", "lr": 0.1}
        and found.about["best"] == 0.5
    )


def test_arguments_inside_others_and_objects_in_them_are_read(tmp_path):
    made = Namespace(out=Path("/a/b/c"), begun=datetime(2024, 1, 2), inner=Namespace(prediction="velocity"))
    found = opened(tmp_path, {"model": MEAN, "hyper_parameters": {"args": made}})
    assert total(found) == (6, KEYS)
    assert found.about["hyper_parameters"]["args"]["inner"] == {"prediction": "velocity"}


def test_configs_that_keep_their_settings_in_attributes_are_read(tmp_path, monkeypatch):
    """As ml_collections and omegaconf pickle theirs; nodes of omegaconf know what contains them."""
    for package in ("ml_collections", "omegaconf"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))

    def made(package, name, **attributes):
        kind = type(name, (), {"__module__": package})
        setattr(sys.modules[package], name, kind)
        value = kind()
        vars(value).update(attributes)
        return value

    node = made("omegaconf", "AnyNode", _val=0.0015, _metadata=Any, _parent=None)
    config = made("omegaconf", "DictConfig", _content={"linear_start": node}, _parent=None)
    node._parent = config
    other = made("ml_collections", "ConfigDict", _fields={"prediction": "velocity"}, _locked=True)
    torch.save({"model": MEAN, "config": config, "cfg": other}, tmp_path / "x.pt")
    monkeypatch.undo()
    found = clean_names(open_weights(tmp_path / "x.pt"))
    assert found.about == {"config": {"linear_start": 0.0015}, "cfg": {"prediction": "velocity"}}


def test_configs_of_trainers_are_opened_without_their_classes(tmp_path):
    """A class of a package that is not installed, in the place where Lightning keeps hyperparameters."""
    kind = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    names = ["pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].AttributeDict = kind
    try:
        torch.save({"state_dict": MEAN, "hyper_parameters": kind(lr=0.1)}, tmp_path / "last.ckpt")
    finally:
        for name in names:
            del sys.modules[name]
    found = clean_names(open_weights(tmp_path / "last.ckpt"))
    assert total(found) == (6, KEYS) and found.about["hyper_parameters"]["lr"] == 0.1


@pytest.mark.parametrize("name", ["last.ckpt", "best.pth.tar", "weights.th", "model.pt.bak", "weights"])
def test_a_torch_file_is_one_whatever_its_ending(name, tmp_path):
    assert total(opened(tmp_path, {"state_dict": MEAN}, name)) == (6, KEYS)


@pytest.mark.parametrize("name", ["last.ckpt", "best.pth.tar", "weights.th"])
def test_it_is_found_in_a_folder(name, tmp_path):
    torch.save(MEAN, tmp_path / name)
    assert weights_files(tmp_path) == [tmp_path / name]


def test_files_that_are_no_weights_are_left_alone(tmp_path):
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state.pth", "pytorch_model.bin"):
        torch.save(MEAN, tmp_path / name)
    assert weights_files(tmp_path) == [tmp_path / "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file of TensorFlow or Keras"),
        (b"GGUF" + b"\0" * 100, "a quantised GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer .* `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "a web page instead of the weights"),
        (b"\x1f\x8b\x08" + b"\0" * 100, "a gzip archive; unpack it first"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "weights.pt"])
def test_other_files_are_named(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / name)


def test_a_pipeline_and_an_adapter_are_named_with_what_to_do(tmp_path):
    for part in ("vae", "transformer"):
        (tmp_path / "pipe" / part).mkdir(parents=True)
        (tmp_path / "pipe" / part / "config.json").write_text("{}")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"a pipeline of several models; name one of them: .*pipe/transformer, .*pipe/vae"
    ):
        weights_files(tmp_path / "pipe")
    (tmp_path / "st" / "0_CLIPModel").mkdir(parents=True)
    (tmp_path / "st" / "0_CLIPModel" / "config.json").write_text("{}")
    (tmp_path / "st" / "modules.json").write_text('[{"idx": 0, "path": "0_CLIPModel"}]')
    with pytest.raises(InputError, match=r"name the one with the weights, .*st/0_CLIPModel$"):
        weights_files(tmp_path / "st")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter, not a model: merge it into its base"):
        weights_files(tmp_path / "lora")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "model.safetensors.index.json", "sub/x.safetensors"]
)
def test_an_index_names_files_of_its_own_folder_only(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="cannot be a file of weights; fetch it again"):
        open_weights(index)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "tensor, kind",
    [
        (torch.eye(2).to_sparse(), "torch.float32, sparse_coo, on the device cpu"),
        (torch.zeros(2, device="meta"), "torch.float32, strided, on the device meta"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn, strided, on the device cpu"),
    ],
)
def test_a_tensor_that_numpy_cannot_hold_is_described(tensor, kind, tmp_path):
    with pytest.raises(InputError, match=rf"holds a tensor \({kind}\) that cannot be read"):
        opened(tmp_path, {"a.weight": tensor})
