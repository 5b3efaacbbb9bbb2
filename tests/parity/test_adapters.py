"""Generated adapters in peft: the update applied is the generated B A, whatever the members' alpha and ranks."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from weightgen.zoo.adapter_config import write_adapter
from weightgen.zoo.checkpoints import import_folder
from weightgen.zoo.lora import pairs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_rows_of_a_zoo_and_peft_make_the_same_update(rslora, tmp_path):
    """A packed Conv1D, which peft transposes, an embedding, and a rank of its own for one layer."""
    for i in range(2):
        config = peft.LoraConfig(
            r=2,
            lora_alpha=6 + i,
            use_rslora=rslora,
            target_modules=["c_attn", "wte"],
            rank_pattern={r"h\.1\.attn\.c_attn": 3},
            alpha_pattern={r"h\.0\.attn\.c_attn": 5},
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(i)
        model = peft.get_peft_model(gpt2(), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(0, 0.3)
        model.save_pretrained(tmp_path / "zoo" / f"{i}", save_embedding_layers=False)
    zoo, _ = import_folder(tmp_path / "zoo")
    base = {name: p.detach().clone() for name, p in gpt2().named_parameters()}
    for i in range(2):
        tensors = zoo.spec.unflatten(zoo.tokens(i), zoo.spec.like)
        (tmp_path / f"made{i}").mkdir()
        write_adapter(tmp_path / f"made{i}", tensors, zoo.about["adapters"])
        merged = []
        for folder in (tmp_path / "zoo" / f"{i}", tmp_path / f"made{i}"):
            loaded = peft.PeftModel.from_pretrained(gpt2(), folder)
            merged.append({name: p.detach() for name, p in loaded.merge_and_unload().named_parameters()})
        for name, weight in merged[0].items():
            np.testing.assert_allclose(merged[1][name], weight, atol=1e-5, err_msg=name)
        for module, pair in pairs(tensors).items():
            name = f"{module.removeprefix('base_model.model.')}.weight"
            delta = (merged[1][name] - base[name]).numpy()
            np.testing.assert_allclose(delta, (pair.adapter.up @ pair.adapter.down).T, atol=1e-5, err_msg=name)
            assert np.abs(delta).max() > 0.05
    written = json.loads((tmp_path / "made0" / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM" and written["r"] == written["lora_alpha"] == 2


def test_a_convolution_is_generated_for_peft(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    base = Net()
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, 3, 3, 3), "lora_B": (4, 2, 1, 1)}
    tensors = {
        f"base_model.model.conv.{side}.weight": rng.standard_normal(shape).astype(np.float32)
        for side, shape in shapes.items()
    }
    (tmp_path / "zoo" / "a").mkdir(parents=True)
    save_file(tensors, tmp_path / "zoo" / "a" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["conv"]}
    (tmp_path / "zoo" / "a" / "adapter_config.json").write_text(json.dumps(about))
    zoo, _ = import_folder(tmp_path / "zoo")
    write_adapter(tmp_path, zoo.spec.unflatten(zoo.tokens(0), zoo.spec.like), zoo.about["adapters"])
    before = base.conv.weight.detach().clone()
    after = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().conv.weight.detach()
    a, b = tensors.values()
    np.testing.assert_allclose((after - before).numpy(), 3 * np.einsum("or,rihw->oihw", b[..., 0, 0], a), atol=1e-5)


def test_torch_files_and_saved_modules_are_members(tmp_path):
    for i in range(2):
        torch.manual_seed(i)
        config = peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=["c_proj"], modules_to_save=["ln_f"], fan_in_fan_out=True
        )
        model = peft.get_peft_model(gpt2(), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    p.normal_(0, 0.3)
        folder = tmp_path / "zoo" / f"{i}"
        model.save_pretrained(folder)
        if i == 0:  # as older versions of peft wrote them
            file = folder / "adapter_model.safetensors"
            torch.save({name: torch.from_numpy(x) for name, x in load_file(file).items()}, folder / "adapter_model.bin")
            file.unlink()
        torch.save({"lr": 1.0}, folder / "training_args.bin")
        torch.save({}, folder / "optimizer.pt")
    zoo, words = import_folder(tmp_path / "zoo")
    assert words == ("0", "1") and zoo.about["adapters"]["config"]["modules_to_save"] == ["ln_f"]
    write_adapter(tmp_path, zoo.spec.unflatten(zoo.tokens(0), zoo.spec.like), zoo.about["adapters"])
    first, made = (
        peft.PeftModel.from_pretrained(gpt2(), folder).merge_and_unload()
        for folder in (tmp_path / "zoo" / "0", tmp_path)
    )
    for (name, a), b in zip(first.named_parameters(), made.parameters(), strict=True):
        np.testing.assert_allclose(b.detach(), a.detach(), atol=1e-5, err_msg=name)
