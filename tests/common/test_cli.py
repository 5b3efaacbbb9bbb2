"""What a person types, and what it answers to mistakes."""

import io
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path

import pytest

from heirloom.common import cli, config, doctor
from heirloom.common.arguments import VERBS
from heirloom.common.cli import main
from heirloom.common.doctor import check_pair
from heirloom.common.errors import InputError

MISTAKES = {
    "an unknown verb": (["convertt", "a", "b"], "invalid choice: 'convertt'"),
    "a missing argument": (["convert", "a"], "DEST"),
    "a misspelt flag": (
        ["inspect", "tinyclip/smoke", "--jsn", "x"],
        "unknown argument '--jsn'; did you mean '--json'?",
    ),
    "an unknown recipe": (["inspect", "tinyclip/smok"], "no recipe 'tinyclip/smok'; did you mean 'tinyclip/smoke'?"),
    "a file that is not there": (
        ["inspect", "nowhere/model.safetensors"],
        "nowhere/model.safetensors: no such file or folder",
    ),
    "an unknown method": (["demo", "tinyclop"], "no method 'tinyclop'; did you mean 'tinyclip'?"),
    "an embedded model nobody has": (["inspect", "embedded:emoij"], "no embedded model 'emoij'; did you mean 'emoji'?"),
    "no run": (["report", "."], "is not a run"),
    "a negative seed": (["demo", "--seed", "-1"], "--seed -1: choose a whole number from 0 to 4294967295"),
    "flags before the recipe": (
        ["train", "--run", "R", "--steps", "5", "learngene/smoke"],
        "'5' is no recipe; write it before its flags: heirloom train learngene/smoke --steps ...",
    ),
    "a recipe without donor": (["inherit", "tinyclip/smoke", "out"], "has no donor to inherit from"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = MISTAKES[case]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("heirloom: ") and error.count("\n") == 1
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] in ([], ["heirloom-demo"])


def test_a_method_without_a_verb_and_models_of_several_families(capsys, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from heirloom.common import methods
    from tinyclip_jax.zoo import EMBEDDED, FAMILY

    here = methods.methods()
    monkeypatch.setitem(sys.modules, "mute", SimpleNamespace(FAMILIES=[replace(FAMILY, name="other"), FAMILY]))
    mute = {"families": "mute:FAMILIES"}
    monkeypatch.setattr(methods, "methods", lambda: {"mute": mute})
    assert main(["demo", "mute", "--out", str(tmp_path)]) == 2
    assert main(["eval", str(EMBEDDED["emoji"])]) == 2
    monkeypatch.setattr(methods, "methods", lambda: {"mute": mute, "tinyclip": here["tinyclip"]})
    assert main(["demo", "mute", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "heirloom: 'demo' is not available for mute (for no installed method)" and lines[1].startswith(
        "heirloom: 'evaluate' is not available for mute"
    )
    assert lines[2] == "heirloom: 'demo' is not available for mute (only for tinyclip)"


def test_help_comes_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom heirloom.common.cli import main\nfrom heirloom.common.arguments import VERBS\n"
        "for words in ([], *([verb.name] for verb in VERBS if not verb.settings)):\n"
        "    try: main([*words, '--help'])\n    except SystemExit: pass\n"
        "print([m for m in ('jax', 'numpy', 'flax', 'transformers', 'tyro', 'rich', 'fsspec') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert all(verb in out for verb in ("doctor", "demo", "convert", "inspect", "inherit", "train", "report"))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_describes_every_argument_and_fits(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb.name, "--help"])
    out = capsys.readouterr().out.splitlines()
    assert f"{verb.help[0].upper()}{verb.help[1:]}." in out and max(map(len, out)) <= 80
    assert all(one.options.get("help") for one in verb.arguments)
    names = [f.name for path in verb.settings for f in fields(pkgutil.resolve_name(path))]
    assert all(f"--{name.replace('_', '-')}" in "\n".join(out) for name in names if name != "sample")
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["--help"])
    assert re.search(rf"^    {verb.name} +{re.escape(verb.help)}$", capsys.readouterr().out, re.MULTILINE)


def test_the_help_of_sample_has_the_defaults_that_a_model_of_classes_gets(capsys):
    from lit_jax.generate import default_sampling
    from lit_jax.zoo import dit

    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    of_classes = capsys.readouterr().out.split("--guidance FLOAT")[1]
    used = default_sampling(dit("s"))
    assert re.findall(r"\(default:\s+([^)]+)\)", of_classes)[:2] == [str(used.guidance), used.guided]


def test_the_fields_of_a_recipe_are_listed_with_defaults(capsys):
    for command in (["train", "tinyclip/smoke", "--help"], ["train", "--run", "x", "tinyclip/smoke", "-h"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        out = capsys.readouterr().out
        assert not ended.value.code and "heirloom train tinyclip/smoke" in out
        assert "--optim.lr" in out and "(default: 0.001)" in out and "--student.image.layers" in out


def test_inspect_counts_as_published(tmp_path, capsys):
    assert main(["inspect", "tinyclip/vit_61m_32", "--json", str(tmp_path / "i.json")]) == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["parameters"] == {
        "image": 61_411_200,
        "text": 28_674_048,
        "token_table": 25_296_896,
        "total": 115_382_145,
    }
    assert round(found["macs"] / 1e9, 1) == 5.3
    out = capsys.readouterr().out
    assert "image 61,411,200" in out.replace("\n", " ")


def test_doctor_multiplies_and_reports(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["devices"] == 8 and found["gflops"] > 0 and {"jax", "flax"} <= found["versions"].keys()
    assert capsys.readouterr().out.rstrip().endswith("ready")


@pytest.mark.parametrize(
    ("mode", "set_to", "told"),
    [("always [madvise] never", "", True), ("[always] madvise never", "", False),
     ("always [madvise] never", "glibc.malloc.hugetlb=1", False)],
)  # fmt: skip
def test_doctor_names_huge_pages_where_only_asking_is_missing(mode, set_to, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "enabled").write_text(f"{mode}\n")
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(doctor, "_accelerator_hint", lambda: None)
    monkeypatch.setenv("GLIBC_TUNABLES", set_to)
    assert main(["doctor"]) == 0
    assert ("start it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("jax", "flax", "hint"),
    [
        ("0.12.0.1", "0.12.8", "flax>=0.12.12"),
        ("0.12.0", "0.12.12rc1", "flax>=0.12.12"),
        ("0.10.2", "0.12.1", "flax>=0.12.8"),
        ("0.9.0", "0.12.8", "jax>=0.10.2"),
    ],
)
def test_doctor_names_the_pair_that_does_not_go_together(jax, flax, hint):
    with pytest.raises(InputError, match=hint):
        check_pair(jax, flax)


def test_doctor_accepts_the_tested_pairs():
    check_pair("0.10.2", "0.12.8")
    check_pair("0.12.0.1", "0.12.12")
    check_pair("0.12.3.dev20260101", "0.12.12+local")


def test_command_line_flags_override_the_recipe_and_a_wrong_one_is_refused():
    from heirloom.common import config

    cfg = config.load("tinyclip/smoke", ["--optim.lr", "3e-4", "--student.image.layers", "1"])
    assert cfg.optim.lr == 3e-4 and cfg.student.image.layers == 1 and cfg.student.text.layers == 2
    with pytest.raises(InputError, match=r"Unrecognized options: --optim\.learning-rate") as wrong:
        config.load("tinyclip/smoke", ["--optim.learning-rate", "3e-4"])
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("recipe", "flags", "field", "value"),
    [
        ("learngene/aux_s", ["--student.layout", "3,3,4,3,2"], "student.layout", (3, 3, 4, 3, 2)),
        ("learngene/aux_s", ["--student.layout=3,3,4,3,2"], "student.layout", (3, 3, 4, 3, 2)),
        ("learngene/vit_s", ["--layers", "0,0,1", "--steps", "9"], "layers", (0, 0, 1)),
        ("learngene/vit_s", ["--layers", "0", "0", "1"], "layers", (0, 0, 1)),
        ("learngene/vit_s", ["--writers=wandb,tensorboard"], "writers", ("wandb", "tensorboard")),
        ("learngene/vit_s", ["--augment.scale", "0.1,0.9"], "augment.scale", (0.1, 0.9)),
        ("learngene/vit_s", ["--optim.no-decay", "a,b"], "optim.no_decay", ("a,b",)),  # text has commas of its own
        ("learngene/emoji", ["--gene.student.layout", "1,2,1"], "gene.student.layout", (1, 2, 1)),
    ],
)
def test_a_list_is_written_with_commas_or_spaces(recipe, flags, field, value):
    cfg = config.load(recipe, flags)
    assert attrgetter(field)(cfg) == value


def test_a_home_folder_is_found_where_the_shell_leaves_it(tmp_path, monkeypatch):
    """It expands ~/x, and not --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = cli._parser().parse_args(["demo", "--out=~/x"])
    assert parsed.out == tmp_path / "x"
    for verb in VERBS:  # every argument that is a path
        assert not any(one.options.get("type") is Path for one in verb.arguments)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\ndef get_config(:", "line 2: SyntaxError"),
        ("def get_config():\n    raise KeyError('lr')", "line 2: KeyError"),
        ("x = 1", "no get_config"),
    ],
)
def test_a_recipe_that_does_not_run_says_where(tmp_path, text, complaint):
    from heirloom.common import config

    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=complaint):
        config.load(str(tmp_path / "mine.py"))


def test_names_that_are_not_utf_8_are_printed(tmp_path, monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="utf-8", errors="strict", write_through=True))
    assert main(["inspect", str(tmp_path / os.fsdecode(b"caf\xe9"))]) == 2
    assert rb"caf\udce9" in written.getvalue()


def test_a_report_of_a_run_cut_short_in_the_middle_of_a_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<dt>steps</dt><dd>2</dd>" in page and "<dt>loss</dt><dd>not finite</dd>" in page


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["eval", "tinyclip/smoke", "--data", "emoji"], "its own data (--held-out.path), and --data is for weights"),
        (["eval", "tinyclip/smoke", "--task", "zeroshot"], "and --task is for weights: leave it out"),
        (["eval", "tinyclip/smoke", "--image", "png"], "and --image is for weights: leave it out"),
        (["eval", "tinyclip/smoke", "--text", "txt"], "and --text is for weights: leave it out"),
        (["eval", "embedded:emoji", "--dta", "emoji"], "unknown argument '--dta'; did you mean '--data'?"),
        (["demo", "--out", __file__ + "/x"], "cannot write results here"),
        (["inspect", "tinyclip/smokes"], "did you mean 'tinyclip/smoke'?"),
    ],
)
def test_more_mistakes(command, complaint, capsys):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_the_recipes_are_listed_a_line_each(tmp_path, capsys):
    assert main(["recipes", "lit/", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found) == {name for name in config.recipes() if name.startswith("lit/")}
    assert found["lit/smoke"].startswith("A tiny LiT from scratch") and all(found.values())
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in found)
    assert main(["recipes", "lti"]) == 2
    assert capsys.readouterr().err == "heirloom: no recipe starts with 'lti'; heirloom recipes lists all\n"


SLOW = """
import sys, threading, time
from heirloom.common import verbs
from heirloom.common.cli import main

def slow(args):
    try:
        print("began", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

verbs.recipes = slow
sys.exit(main(["recipes"]))
"""


def test_sigterm_before_a_training_runs_cleans_up_and_asks_for_the_same_command():
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and rest.startswith("cleaned up\nstopped by SIGTERM"), rest
