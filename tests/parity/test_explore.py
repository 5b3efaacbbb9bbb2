"""Exploring a small GPT-2 of transformers by the command."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from weightgen.explore import LanguageModel, read_questions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    cfg = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    transformers.GPT2LMHeadModel(cfg).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("questions"), np.random.default_rng(0)
    files = {}
    for name, count in (("select", 24), ("test", 20)):
        rows = []
        for i in range(count):
            length = 3 + i % 3
            choices = [" " + " ".join(rng.choice(WORDS[2:], 1 + (i + j) % 2)) for j in range(3)]
            rows.append({"question": " ".join(rng.choice(WORDS[2:], length)), "choices": choices, "answer": i % 3})
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def test_an_answer_is_the_likeliest_choice(folder, questions):
    """Against transformers' own loss, one choice at a time and without padding."""
    asked, model = read_questions(questions["test"]), LanguageModel(str(folder), batch=7)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for one in asked:
        scores = []
        for choice in one.choices:
            ids, start = model.tokenizer(one.question + choice)["input_ids"], len(one.question.split())
            labels = torch.tensor([[-100] * start + ids[start:]])
            with torch.no_grad():
                scores.append(-theirs(torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - start))
        expected.append(int(np.argmax(scores)) == one.answer)
    assert model.right(asked).tolist() == expected and 0 < sum(expected) < len(expected)


def test_from_a_folder_to_another_model_beside_noise(folder, questions, tmp_path, capsys):
    out, before = tmp_path / "out", (folder / "model.safetensors").read_bytes()
    command = ["explore", str(folder), "--select", str(questions["select"]), "--test", str(questions["test"])]
    command += ["--out", str(out), "--step", "1", "--candidates", "6", "--latent", "8", "--share", "0.5"]
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads((out / "explore.json").read_text())
    rows = found["accuracy"]
    assert rows["rows"]["trials"] == rows["noise"]["trials"] == 6 * len(found["searched"]) > 0
    assert rows["rows"]["select"] > rows["base"]["select"] and rows["rows"]["kept"]
    gained = 100 * (rows["rows"]["test"] - rows["noise"]["test"])
    assert found["gains"]["rows - noise"][0] == pytest.approx(gained)
    assert found["says"] in capsys.readouterr().out
    # What was written is what was measured, and only what was kept has changed.
    again = LanguageModel(str(out), batch=16)
    asked = {name: read_questions(file) for name, file in questions.items()}
    assert {name: again.right(part).mean() for name, part in asked.items()} == pytest.approx(
        {name: rows["rows"][name] for name in asked}
    )
    base = LanguageModel(str(folder), batch=16).tensors
    changed = {name for name, value in again.tensors.items() if not np.array_equal(value, base[name])}
    assert changed == set(rows["rows"]["kept"]) and (folder / "model.safetensors").read_bytes() == before
    assert main(command) == 2 and "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "wrong"),
    [({"question": "w2 " * 20, "choices": [" w3", " w4"], "answer": 0}, "the model takes 16"),
     ({"question": "", "choices": ["w3", "w4"], "answer": 0}, "need a token each")],
)  # fmt: skip
def test_a_question_that_the_model_cannot_take_is_named(row, wrong, folder, questions, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    command = ["explore", str(folder), "--select", str(questions["select"]), "--test", str(tmp_path / "bad.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert wrong in said and said.count("\n") == 1


def test_a_folder_without_a_language_model_is_one_line(questions, tmp_path, capsys):
    command = ["explore", str(tmp_path), "--select", str(questions["select"]), "--test", str(questions["test"])]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "does not open it as a language model" in said and said.count("\n") == 1


@pytest.mark.parametrize(("change", "wrong"), [("lacks", "1 missing tensors"), ("adds", "1 unexpected tensors")])
def test_a_checkpoint_that_is_not_the_whole_model_is_refused(change, wrong, folder, tmp_path):
    """transformers would draw what is missing at random."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    if change == "lacks":
        del tensors["transformer.h.1.mlp.c_fc.weight"]
    else:
        tensors["adapter.weight"] = np.zeros((4, 4), np.float32)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"is not a whole GPT2LMHeadModel: {wrong}"):
        LanguageModel(str(copy), batch=4)


def test_the_mask_of_a_gpt_neo_in_the_file_is_no_part_of_the_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    mask = {"bias": np.tril(np.ones((1, 1, 16, 16), np.uint8)), "masked_bias": np.array(-1e9, np.float32)}
    tensors |= {f"transformer.h.0.attn.attention.{name}": value for name, value in mask.items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert not any("attn.attention" in name for name in LanguageModel(str(copy), batch=4).tensors)
