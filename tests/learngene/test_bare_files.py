"""Files of ViTs without a config: what their tensors and the arguments of a trainer tell, and what is guessed."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.errors import InputError, Remark
from heirloom.common.vit.model import VitConfig
from learngene.bare_files import square
from learngene.zoo import FAMILY


@pytest.fixture
def bare(golden, tmp_path):
    """`bare(about)`: the tensors of a golden as a trainer saves them."""
    torch = pytest.importorskip("torch")
    tensors = {
        key: torch.tensor(value)
        for key, value in open_safetensors(golden[0] / "timm_cls" / "model.safetensors").items()
    }

    def make(**about):
        torch.save({"model": tensors} | about, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return make



def test_what_a_bare_file_does_not_tell_is_a_guess_that_is_said(golden, tmp_path, capsys):
    shutil.copy(golden[0] / "timm_cls" / "model.safetensors", tmp_path / "vit.safetensors")
    with pytest.raises(
        InputError, match=r"vit\.safetensors: the number of heads is unknown.* a width of 16; give --set heads=VALUE"
    ):
        open_donor(tmp_path / "vit.safetensors", [FAMILY])
    with pytest.raises(InputError, match=r"vit\.safetensors: 3 heads do not divide a width of 16"):
        open_donor(tmp_path / "vit.safetensors", [FAMILY], heads=3)
    with pytest.warns(
        Remark, match=r"eps = 1e-06 is a guess: the weights do not contain it \(convert with --set eps=VALUE if"
    ):
        donor = open_donor(tmp_path / "vit.safetensors", [FAMILY], heads=2)
    assert [guess.name for guess in donor.guesses] == ["activation", "eps", "size", "pool"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        told = dict(heads=4, activation="quick_gelu", eps="1e-5", pool="norm_mean", size=8)
        donor = open_donor(tmp_path / "vit.safetensors", [FAMILY], **told)
    assert donor.guesses == ()
    assert (donor.cfg.heads, donor.cfg.activation, donor.cfg.eps, donor.cfg.pool) == (
        4,
        "quick_gelu",
        1e-5,
        "norm_mean",
    )
    for wrong, message in (
        (dict(pool="maps"), "unknown pool 'maps'; did you mean 'map'"),
        (dict(eps="0"), "eps is 0: write a number between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            open_donor(tmp_path / "vit.safetensors", [FAMILY], **wrong)
    flags = ["--set", "heads=2", "--set", "activation=gelu", "--set", "size=8", "--no-verify"]
    assert main(["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "ours"), *flags]) == 0
    saved = json.loads((tmp_path / "ours" / "verify.json").read_text())["guessed"]
    assert [text.split()[0] for text in saved] == [
        "eps",
        "pool",
    ] and "eps = 1e-06 is a guess" in capsys.readouterr().out



def test_a_trainers_arguments_tell_the_model(bare):
    """By the name of the architecture; its sizes must be those of the tensors."""
    sizes = dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, patch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        args_ = dict(
            model="vit_base_patch32_siglip_gap_256",
            input_size=8,
            nb_classes=5,
            model_kwargs=sizes | dict(class_token=True),
        )
        cfg = open_donor(bare(args=args_), [FAMILY]).cfg
    assert (cfg.activation, cfg.pool, cfg.heads) == ("gelu_tanh", "norm_mean", 2)
    for args_, message in (
        (
            dict(model="deit_small_patch16_224"),
            r"the tensors \(deit_small_patch16_224\): embed_dim is 384, and the weights have 16",
        ),
        (
            dict(model="vit_tiny_patch16_224", model_kwargs=sizes, input_size=16),
            "img_size is 16, and the weights have 8",
        ),
        (
            dict(model="vit_tiny_patch16_224", model_kwargs=sizes, nb_classes=4),
            "num_classes is 4, and the weights have 5",
        ),
        (dict(model="deit3_small_patch16_224", model_kwargs=sizes), "init_values is 1e-06, and the weights have 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            open_donor(bare(args=args_), [FAMILY])
    with pytest.warns(Remark, match="trained under, 'my_vit', is not timm's"):
        open_donor(bare(args=dict(model="my_vit")), [FAMILY], heads=2)



@pytest.mark.parametrize(
    ("arguments_", "guessed", "changed"),
    [
        (dict(model="my_vit", num_heads=4), ["activation", "eps", "size", "pool"], dict(heads=4)),
        (dict(num_heads=np.int64(4), input_size=[3, 8, 8]), ["activation", "eps", "pool"], dict(heads=4)),
        (dict(model="my_vit", model_kwargs=dict(num_heads=8, act_layer="quick_gelu", global_pool="avg"),
              img_size=8, patch_size=4),
         ["eps"], dict(heads=8, activation="quick_gelu", pool="norm_mean")),
        (dict(model="vit_base_patch16", num_heads=2, global_pool=False, nb_classes=5),
         ["activation", "eps", "size"], dict(heads=2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["args", "hyper_parameters"])  # the second is Lightning's
def test_a_trainers_arguments_tell_about_models_that_are_not_timms(bare, arguments_, guessed, changed, place):
    donor = open_donor(bare(**{place: arguments_}), [FAMILY])
    assert [guess.name for guess in donor.guesses] == guessed
    plain = VitConfig(size=8, patch=4, width=16, layers=2, heads=0, hidden=32, classes=5, tokens="cls", pool="cls")
    assert donor.cfg == replace(plain, **changed)



@pytest.mark.parametrize(
    ("told", "message"),
    [
        (dict(img_size=64), r"the tensors \(my_vit\): img_size is 64, and the weights have 8"),
        (dict(input_size=[3, 64, 64]), "img_size is 64, and the weights have 8"),
        (dict(input_size=[1, 8, 8]), "in_chans is 1, and the weights have 3"),
        (dict(input_size=[3, 8, 16]), r"img_size is \[8, 16\], and the weights have 8"),
        (dict(img_size=8, input_size=16), "img_size is 8 and input_size is 16, which contradict each other"),
        (dict(patch_size=8), "patch_size is 8, and the weights have 4"),
        (dict(embed_dim=32), "embed_dim is 32, and the weights have 16"),
        (dict(depth=3), "depth is 3, and the weights have 2"),
        (dict(mlp_ratio=4), "mlp_ratio times embed_dim is 64, and the weights have 32"),
        (dict(num_classes=7), "num_classes is 7, and the weights have 5"),
        (dict(num_heads="many"), "num_heads is 'many', and must be a whole number"),
        (dict(num_heads=3), "3 heads do not divide a width of 16"),
        (dict(num_heads={"a": 2}), "num_heads is of type dict, not a number"),
        (dict(model_kwargs=dict(init_values=1e-5)), "init_values is 1e-05, and the weights have 0.0"),
        (dict(model_kwargs=dict(rope=True)), "the field 'rope'"),
        (dict(model_kwargs={1: 2}), "the field '1'"),
        (dict(model_kwargs="heads=2"), "model_kwargs is of type str, not a dictionary"),
    ],
)
def test_a_trainers_arguments_are_compared_whatever_the_models_name(bare, told, message):
    with pytest.raises(InputError, match=message) as error:
        open_donor(bare(args=dict(model="my_vit") | told), [FAMILY])
    assert "\n" not in str(error.value)



def test_a_timm_name_and_other_arguments_that_contradict_it(bare):
    kwargs = dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, patch_size=4)
    known = dict(model="vit_tiny_patch16_224", model_kwargs=kwargs, img_size=8, nb_classes=5)
    with pytest.warns(
        Remark,
        match=r"heads = 2 is a guess: timm's vit_tiny_patch16_224 has as many, and num_heads is 4 in the trainer",
    ):
        assert open_donor(bare(args=known | dict(num_heads=4)), [FAMILY]).cfg.heads == 2
    with pytest.raises(InputError, match="patch_size is 16, and the weights have 4"):
        open_donor(bare(args=known | dict(patch_size=16)), [FAMILY])



def test_a_norm_of_the_class_token_has_the_tensors_of_a_norm_of_the_mean(golden, tmp_path):
    tensors = {k: v.copy() for k, v in open_safetensors(golden[0] / "timm_cls" / "model.safetensors").items()}
    renamed = {
        key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value for key, value in tensors.items()
    }
    save_file(renamed, tmp_path / "vit.safetensors")
    with pytest.warns(
        Remark,
        match=r"pool = mean_norm is a guess: .* the class token with a separate norm \(cls\) has the same tensors",
    ):
        assert open_donor(tmp_path / "vit.safetensors", [FAMILY], heads=2).cfg.pool == "mean_norm"
    told = dict(heads=2, activation="gelu", eps="1e-6", size=8)
    donor = open_donor(tmp_path / "vit.safetensors", [FAMILY], **told, pool="cls")
    plain = open_donor(golden[0] / "timm_cls", [FAMILY])
    assert donor.cfg == plain.cfg and donor.source.values.keys() == plain.source.values.keys()
    for path, value in plain.source.values.items():
        np.testing.assert_array_equal(np.asarray(donor.source.values[path]), np.asarray(value), err_msg=path)
    pytest.importorskip("torch")  # for our own formulas, to which the file's own names go
    assert convert(donor, tmp_path / "ours", "heirloom").passed



@pytest.mark.parametrize(
    ("grid", "other"),
    [(1, None), (2, "4 x 16"), (4, "8 x 32"), (7, None), (9, None), (14, "28 x 112"), (15, "36 x 100")],
)
def test_a_square_is_a_guess_where_a_rectangle_has_as_many_patches(grid, other):
    guesses = square(VitConfig(size=4 * grid, patch=4), "why")
    said = [f"why: pictures of {other} px have as many patches, and only squares are read"]
    assert [guess.why for guess in guesses] == (said if other else [])
