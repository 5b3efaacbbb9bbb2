"""Ranking a checkpoint: what is ranked, in which order, and what is refused rather than ranked in part."""

import json
import re
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.cli import main
from heirloom.common.errors import InputError, Remark
from weightgen.ranking import Ranked, rank, rank_checkpoint, snr, top, unfrozen, unstacked


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


U8 = np.zeros((512, 1), np.uint8)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"q.weight": U8, "q.weight.absmax": np.ones(16, np.float32)}, "q.weight.absmax is of weights in 4 or 8 bits"),
        ({"q.weight.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8)}, "bitsandbytes"),
        ({"mlp.experts.down_proj_blocks": np.zeros((4, 8, 2, 16), np.uint8)}, "mxfp4"),
        ({"q.weight": U8}, "q.weight is uint8"),
        ({"q.qweight": np.zeros((4, 32), np.int32)}, "GPTQ or AWQ"),
        ({"q.codebooks": np.ones((1, 256, 1, 8), np.float16)}, "AQLM, VPTQ or SpQR"),
        ({"q.weight": weights(32, 32), "q.weight_scale_inv": np.ones((1, 1), np.float32)}, "q.weight_scale_inv"),
        ({"q.weight_packed": np.zeros((32, 4), np.int32)}, "q.weight_packed"),
        ({"q.SCB": np.ones(32, np.float32)}, "q.SCB"),
    ],
)
def test_quantised_weights_are_refused_by_name(tensors, named, tmp_path):
    save_file({"o.weight": weights(32, 32), **tensors}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{named}.*quantised"):
        rank_checkpoint(str(tmp_path))


def test_a_config_that_says_quantised_and_float8_are_refused(tmp_path):
    save_file({"o.weight": weights(32, 32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match=r"quantization_config \(fp8\).*quantised"):
        rank_checkpoint(str(tmp_path))
    header = json.dumps({"q.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match=r"'q\.weight' has dtype F8_E4M3.*quantised"):
        rank_checkpoint(str(tmp_path))


def test_weights_that_mlx_packed_are_said_to_be_quantised(tmp_path):
    save_file({"q.weight": np.zeros((32, 8), np.uint32), "q.scales": weights(32, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"'q\.weight' has dtype U32.*quantised; take the original in bfloat16"):
        rank_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_not_finite_are_all_named(value):
    broken = {f"h.{i}.w.weight": weights(16, 16, seed=i) for i in range(4)} | {"norm.weight": np.ones(4, np.float32)}
    for name in ("h.1.w.weight", "norm.weight"):
        broken[name].flat[0] = value
    with pytest.raises(InputError, match=r"NaN or infinity in 2 of 5 tensors \(h\.1\.w\.weight, norm\.weight\)"):
        rank(broken)


@pytest.mark.parametrize("prefix", ["h.0.attn", "h.0.attn.attention", "gpt_neox.layers.0.attention"])
def test_the_mask_of_a_gpt_may_be_infinite_and_a_bias_may_not(prefix):
    mask = {f"{prefix}.bias": np.full((1, 1, 4, 4), -np.inf, np.float32), "h.0.w.weight": weights(16, 16)}
    mask[f"{prefix}.masked_bias"] = np.array(-np.inf, np.float16)  # -1e9 in half precision
    with pytest.warns(UserWarning, match=rf"buffers: {re.escape(prefix)}\.bias, {re.escape(prefix)}\.masked_bias"):
        assert [r.name for r in rank(mask)] == ["h.0.w.weight"]
    with pytest.raises(InputError, match=rf"NaN or infinity in 1 of 3 tensors \({re.escape(prefix)}\.bias\)"):
        rank(mask | {f"{prefix}.bias": np.full(4, np.inf, np.float32)})


def test_the_order_falls_and_equal_ratios_go_by_name():
    same = weights(16, 16, seed=7)
    tensors = {f"{name}.weight": same for name in "dbca"} | {f"e{i}.weight": weights(16, 24, seed=i) for i in range(5)}
    found = rank(tensors)
    assert [(-r.snr, r.name) for r in found] == sorted((-snr(x), name) for name, x in tensors.items())
    assert [r.name[0] for r in found if r.snr == snr(same)] == list("abcd")


def test_experts_are_ranked_one_by_one_and_the_rest_is_said():
    experts = weights(3, 16, 20)
    tensors = {
        "layers.0.mlp.experts.gate_up_proj": experts,
        "layers.0.mlp.experts.gate_up_proj_bias": weights(32, 40),
        "layers.0.attn.qkv_proj.weight": weights(48, 16),
        "model.embed_tokens.weight": weights(100, 16),
        "model.embed_tokens_per_layer.weight": weights(100, 16),
        "layers.0.norm.weight": np.ones(16, np.float32),
        "conv.weight": weights(16, 16, 3),
        "router.weight": weights(3, 16),
        "position_ids": np.arange(512)[None],
    }
    with pytest.warns(UserWarning, match="left out of the ranking") as said:
        found = {r.name: r for r in rank(tensors)}
    one_by_one = {f"layers.0.mlp.experts.gate_up_proj@{i}" for i in range(3)}
    assert found.keys() == one_by_one | {"layers.0.attn.qkv_proj.weight"}
    assert {found[name].kind for name in one_by_one} == {"layers.mlp.experts.gate_up_proj"}
    assert found["layers.0.mlp.experts.gate_up_proj@1"].snr == snr(experts[1])
    text = str(said[0].message)
    for part in (
        "embeddings: model.embed_tokens.weight",
        "16: router.weight",
        "3 axes: conv.weight",
        "buffers: position_ids",
    ):
        assert part in text
    assert "gate_up_proj_bias, layers.0.norm.weight" in text


def test_a_head_that_is_tied_to_an_embedding_is_left_out_with_it():
    table = weights(64, 32)
    tensors = {
        "lm_head.weight": table.copy(),
        "embed_tokens.weight": table,
        "layers.0.up.weight": weights(64, 32, seed=1),
    }
    with pytest.warns(Remark, match="embeddings: lm_head.weight, embed_tokens.weight"):
        assert [one.name for one in rank(tensors)] == ["layers.0.up.weight"]


@pytest.mark.parametrize(
    "name", ["emb", "transformer.w", "decoder.input_embeds_layer", "embed_text_tokens", "model.embed_audio_tokens"]
)
def test_embeddings_of_any_name_are_left_out(name):
    with pytest.warns(Remark, match=f"embeddings: {name}.weight"):
        assert [one.name for one in rank({f"{name}.weight": weights(64, 32), "h.0.w.weight": weights(32, 32)})] == [
            "h.0.w.weight"
        ]


def test_shards_that_are_missing_or_double_are_named(tmp_path):
    save_file({"a.weight": weights(16, 16)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(
        InputError, match=r"2 of 3 shards are missing \(model-00001-of-00003\.safetensors, model-00003-of"
    ):
        rank_checkpoint(str(tmp_path))
    for i in (1, 3):
        save_file({f"{i}.weight": weights(16, 16)}, tmp_path / f"model-0000{i}-of-00003.safetensors")
    assert len(rank_checkpoint(str(tmp_path))) == 3
    with pytest.raises(InputError, match="is one of 3 shards; name the folder"):
        rank_checkpoint(str(tmp_path / "model-00001-of-00003.safetensors"))
    save_file({"a.weight": weights(16, 16, seed=1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"several files of weights \(model-00001-of-00003\.safetensors, .*, other"):
        rank_checkpoint(str(tmp_path))


def test_adapters_and_checkpoints_without_matrices_are_refused():
    for name in ("q.lora_A.weight", "q.lora_a.weight", "q.lora_linear_layer.down.weight", "qkv_lora1.down.weight"):
        with pytest.raises(InputError, match=f"{name} is of an adapter"):
            rank({name: weights(16, 32)})
    with pytest.raises(InputError, match="no matrix to rank among norm"):
        rank({"norm": np.ones(4, np.float32)})


def test_half_precision_ranks_as_its_numbers_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = weights(20, 16).astype(np.float16)
        assert rank({"w.weight": half})[0].snr == snr(half.astype(np.float32))


def test_parameters_that_are_no_weight_of_a_layer_are_said_and_not_ranked():
    names = ("mixer.A_log", "att.time_faaaa", "att.r_k", "vision_model.positional_embedding_vlm", "rel_pos_bias_table")
    layers = ("mixer.x_proj.weight", "attn.in_proj_weight", "mlp/up/kernel", "h0/c_attn/w", "head.0.weight")
    with pytest.warns(UserWarning, match=r"that are no weight of a layer: mixer\.A_log, att\.time_faaaa") as said:
        found = rank({name: weights(32, 16) for name in (*names, *layers)})
    assert {one.name for one in found} == set(layers) and len(said) == 1


def test_spectrum_of_known_singular_values(rng):
    values = np.array([10.0, 4, 3, 2.5, 2, 1.5, 1, 0.5])
    left, right = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in (8, 16))
    low, high = np.quantile(values, (0.25, 0.75))
    eps = (high - low) / 1.349 * (1 + np.sqrt(0.5))
    expected = values[values > eps].sum() / values[values <= eps].sum() / 10
    assert snr((left * values) @ right.T) == pytest.approx(expected, rel=1e-4)
    assert snr(np.eye(4)) == pytest.approx(4.0)  # no noise at all: the sum below counts as 1
    assert snr(np.zeros((3, 3))) == 0
    noise = np.linalg.svd(rng.standard_normal((256, 256)), compute_uv=False)
    low, high = np.quantile(noise, (0.25, 0.75))
    assert np.mean(noise > 2 * (high - low) / 1.349) == pytest.approx(0.23, abs=0.03)  # a ranking, not a test of noise


def test_ranking_a_checkpoint_reads_files_and_refuses_quantised_ones(tmp_path, rng):
    tensors = {f"h.{i}.w": rng.standard_normal((32, 32)).astype(np.float32) for i in range(4)}
    save_file(
        tensors | {"norm": np.ones(32, np.float32), "position_ids": np.arange(512)[None]},
        tmp_path / "model.safetensors",
    )
    with pytest.warns(UserWarning, match="buffers: position_ids; norms, biases and other vectors: norm"):
        ranked = rank_checkpoint(str(tmp_path))
    assert [r.kind for r in ranked] == ["h.w"] * 4
    assert [r.snr for r in ranked] == sorted((snr(tensors[f"h.{i}.w"]) for i in range(4)), reverse=True)
    assert [r.name for r in top(ranked, 0.25)] == [ranked[0].name]
    stacked = unstacked({"blocks/up/kernel": np.stack(list(tensors.values()))[:4]})
    assert len(stacked) == 4 and len(top(rank(stacked))) == 1, "layers of a stack are of one kind"
    with pytest.raises(InputError, match="quantised"):
        rank({"w": np.ones((32, 32), np.int8)})


def test_the_command_lists_the_best_of_each_kind_and_what_to_train(tmp_path, capsys):
    names = [f"model.layers.{i}.mlp.up.weight" for i in range(4)] + ["model.embed_tokens.weight"]
    save_file({name: weights(32, 48, seed=i) for i, name in enumerate(names)}, tmp_path / "model.safetensors")
    file, told = tmp_path / "train.yaml", tmp_path / "rank.json"
    command = ["rank", str(tmp_path), "--share", "0.5", "--unfreeze", str(file), "--json", str(told)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(command) == 0
    found = json.loads(told.read_text())
    assert len(found["ranked"]) == 4 and len(found["best"]) == 2
    assert "2 of 4 matrices of 1 kinds" in capsys.readouterr().out
    ratios = {one["name"]: one["snr"] for one in found["ranked"]}
    assert found["best"] == sorted(ratios, key=ratios.__getitem__, reverse=True)[:2]
    first, *patterns = file.read_text().splitlines()
    assert first == "unfrozen_parameters:"
    # as axolotl reads them (LayerNamePattern in utils/freeze.py): it escapes the dots, and matches from the start
    read = [re.compile(re.sub(r"\.(?!\+)", "\\.", line.removeprefix("- "))) for line in patterns]
    near = [name.replace(".", "x") for name in names]
    assert [name for name in names + near if any(one.match(name) for one in read)] == sorted(found["best"])
    assert patterns == [f"- ^{name}$" for name in found["best"]]  # Spectrum's own form
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(command) == 2 and f"{file} exists" in capsys.readouterr().err
        assert main(["rank", str(tmp_path), "--share", "0"]) == 2 and "share is 0.0" in capsys.readouterr().err


def test_a_part_of_a_tensor_cannot_be_listed_for_training(tmp_path, capsys):
    save_file({"mlp.experts.up": weights(3, 32, 32)}, tmp_path / "model.safetensors")
    assert main(["rank", str(tmp_path), "--unfreeze", str(tmp_path / "x.yaml")]) == 2
    assert "is a part of a tensor" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()


def test_one_model_under_two_names_is_not_ranked_twice(tmp_path):
    save_file({"layers.0.w.weight": weights(16, 16)}, tmp_path / "model.safetensors")
    save_file({"layers.0.attention.w.weight": weights(16, 16)}, tmp_path / "consolidated.safetensors")
    several = r"holds several files of weights \(consolidated\.safetensors, model\.safetensors\): name one of them"
    with pytest.raises(InputError, match=several):
        rank_checkpoint(str(tmp_path))
    assert [one.name for one in rank_checkpoint(str(tmp_path / "model.safetensors"))] == ["layers.0.w.weight"]


@pytest.mark.parametrize("name", ["consolidated.{:02}.safetensors", "mp_rank_{:02}_model_states.safetensors"])
def test_slices_of_a_model_parallel_checkpoint_are_refused(tmp_path, name):
    save_file({"w.weight": weights(16, 16)}, tmp_path / name.format(0))
    assert len(rank_checkpoint(str(tmp_path))) == 1  # the only one is the whole model
    save_file({"w.weight": weights(16, 16, seed=1)}, tmp_path / name.format(1))
    for source in (tmp_path, tmp_path / name.format(0)):
        with pytest.raises(InputError, match="are slices of a model-parallel checkpoint; take the files"):
            rank_checkpoint(str(source))


def test_experts_one_by_one_are_said_in_a_list_for_training(tmp_path, capsys):
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    save_file({name: weights(32, 32)}, tmp_path / "model.safetensors")
    assert main(["rank", str(tmp_path), "--unfreeze", str(tmp_path / "x.yaml")]) == 0
    assert f"note: --unfreeze: {name} is one expert: transformers 5 joins" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [("h.0.mlp.c_fc", True), ("decoder.layers.0.fc1", True), ("transformer.h.0.mlp.c_fc", False), ("lm_head", False)],
)
def test_names_without_the_prefix_of_the_base_model_are_said(name, said, tmp_path, capsys):
    save_file({f"{name}.weight": weights(32, 32)}, tmp_path / "model.safetensors")
    assert main(["rank", str(tmp_path), "--unfreeze", str(tmp_path / "x.yaml")]) == 0
    assert (f"{name}.weight is a name of a model without its head" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("others", "name", "loaded"),
    [
        ((), "language_model.model.layers.0.up", "model.language_model.layers.0.up"),
        ((), "language_model.lm_head", "lm_head"),
        (("language_model.lm_head",), "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        (("language_model.lm_head",), "vision_tower.vision_model.layers.0.fc1", "model.vision_tower.layers.0.fc1"),
        (("visual.blocks.0.mlp.fc1",), "model.layers.0.mlp.up", "model.language_model.layers.0.mlp.up"),
        ((), "visual.blocks.0.mlp.fc1", "model.visual.blocks.0.mlp.fc1"),
        ((), "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ((), "model.layers.0.mlp.up", None),
        ((), "model.language_model.layers.0.mlp.up", None),
    ],
)
def test_patterns_match_the_names_of_the_file_and_of_transformers(others, name, loaded):
    listed = unfrozen([Ranked(f"{one}.weight", "", 1.0) for one in (name, *others)]).splitlines()
    pattern = re.compile(re.sub(r"\.(?!\+)", "\\.", listed[1].removeprefix("- ")))  # as axolotl does
    assert [one for one in (name, loaded) if one and not pattern.match(f"{one}.weight")] == []
    assert (listed[1] == f"- ^{name}.weight$") == (loaded is None)
