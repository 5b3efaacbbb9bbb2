"""`heirloom push`, against a server on this machine that answers like the hub."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors import safe_open

from heirloom.common import cli
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.fetch import origin
from heirloom.common.files import read_json, write_json
from learngene.zoo import FAMILY

GOLDEN = Path(__file__).parents[1] / "golden" / "vit" / "timm_cls"
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """The models that were pushed: {name: {path: bytes}}. refuse: status by the beginning of a path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.private, self.objects, self.refuse = {}, {}, {}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def respond(self):
        hub, raw, path = self.server, self.body(), self.path.partition("?")[0]
        if path.startswith("/lfs/"):  # the storage, which takes no token
            assert hashlib.sha256(raw).hexdigest() == path.removeprefix("/lfs/")
            hub.objects[path.removeprefix("/lfs/")] = raw
            return self.answer({})
        if status := next((status for start, status in hub.refuse.items() if path.startswith(start)), 0):
            return self.answer({"error": "You cannot do this\nand here is why"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        given = json.loads(raw) if raw and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            if name in hub.models:
                return self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.models[name], hub.private[name] = {}, given.get("visibility") == "private"
            return self.answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if path.endswith("/preupload/main"):
            large = [dict(path=f["path"], uploadMode="lfs" if f["path"].endswith("tensors") else "regular")
                     for f in given["files"]]  # fmt: skip
            return self.answer({"files": [one | {"shouldIgnore": False} for one in large]})
        if path.endswith("/info/lfs/objects/batch"):
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in given["objects"]]
            return self.answer({"transfer": "basic", "objects": actions})
        if path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.models[name][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.models[name][value["path"]] = hub.objects[value["oid"]]
            return self.answer({"success": True, "commitOid": "c0ffee", "commitUrl": f"{hub.url}/{name}/commit/c0ffee"})
        if name in hub.models:
            return self.answer({"id": name, "private": hub.private[name], "sha": "c0ffee"})
        return self.answer({"error": f"nothing answers {path}"}, 404)

    do_GET = do_POST = do_PUT = respond


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The client reads HF_ENDPOINT and the like when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stub has the older protocol
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    convert(open_donor(GOLDEN, [FAMILY]), tmp_path / "vit", "heirloom", verify=False)
    return tmp_path / "vit"


def header(readme):
    return yaml.safe_load(readme.split("---")[1])


def test_a_folder_arrives_with_its_card(hub, folder, tmp_path, capsys):
    write_json(folder / "scores.json", {"rows": [{"dataset": "pets", "metric": "accuracy", "value": 91.234, "n": 37}]})
    record = read_json(folder / "provenance.json")
    write_json(folder / "provenance.json", record | {"source": "hf:timm/vit_tiny_patch16_224@main"})
    (folder / ".hidden").write_text("no")
    argv = ["push", str(folder), "hf:me/vit", "--license", "mit", "--json", str(tmp_path / "out.json")]
    assert cli.main(argv) == 0
    found = hub.models["me/vit"]
    assert found.keys() == {f.name for f in folder.iterdir()} - {".hidden"} >= {"README.md", "model.safetensors"}
    for name, content in found.items():
        assert content == (folder / name).read_bytes(), name
    assert not hub.private["me/vit"] and len(hub.objects) == 1  # the weights went by LFS
    readme = found["README.md"].decode()
    assert header(readme) == {
        "library_name": "heirloom",
        "license": "mit",
        "base_model": "timm/vit_tiny_patch16_224",
        "tags": ["heirloom", "jax", "learngene"],
    }
    assert "A learngene model in the heirloom format with 5,445 parameters" in readme
    assert f"Donor: [timm/vit_tiny_patch16_224]({hub.url}/timm/vit_tiny_patch16_224)" in readme
    assert "100.0% of the parameters come from the donor." in readme
    assert "| pets | accuracy | 91.23 | 37 |" in readme
    assert "The conversion was not verified against a reference: not asked for." in readme
    assert '"hidden": 32' in readme and "heirloom inspect hf:me/vit" in readme
    written = read_json(tmp_path / "out.json")
    assert written["commit"] == f"{hub.url}/me/vit/commit/c0ffee" and written["url"] == f"{hub.url}/me/vit"
    assert written["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert written["commit"] in capsys.readouterr().out
    # The same again, with a changed file: the card is kept, and said.
    (folder / "README.md").write_text("---\ntags: [mine]\n---\nmy own words\n")
    assert cli.main(["push", str(folder), "hf:me/vit"]) == 0
    assert hub.models["me/vit"]["README.md"].endswith(b"my own words\n")
    assert "README.md is kept as it is" in capsys.readouterr().out


def test_a_dry_run_writes_the_card_and_sends_nothing(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    hub.refuse["/"] = 500
    write_json(folder / "pipeline.json", {"pipeline": "/my/pipeline"})
    assert cli.main(["push", str(folder), "hf:me/vit", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "pipeline.json names /my/pipeline, which others will see" in said
    assert hub.models == {} and header((folder / "README.md").read_text())["library_name"] == "heirloom"
    assert "license" not in header((folder / "README.md").read_text()) and "give --license ID, such as mit" in said
    assert f"nothing was uploaded; without --dry-run it goes to {hub.url}/me/vit" in said
    assert "0.02 MB  model.safetensors" in said and "0.00 MB  README.md" in said
    # What the converter read is a path of this machine: that is said, and not in the card.
    assert f"provenance.json names {GOLDEN}, which others will see" in said
    assert str(GOLDEN.parent) not in (folder / "README.md").read_text()
    assert "Donor: `timm_cls`" in (folder / "README.md").read_text()


def test_the_model_of_a_run_arrives_with_its_scores(hub, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(folder, run / "model")
    for name in ("provenance.json", "verify.json"):
        (run / "model" / name).unlink()
    lines = [{"step": 10, "loss": 2.0, "eval/accuracy": 0.5}, {"step": 20, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"donor": "hf:a/gene@v1", "teacher": "hf:b/teacher"}
    write_json(run / "sources.json", {role: {"path": path, "sha256": []} for role, path in paths.items()})
    assert cli.main(["push", str(run), "hf:me/student", "--private"]) == 0
    assert hub.private["me/student"] and "metrics.jsonl" not in hub.models["me/student"]
    readme = hub.models["me/student"]["README.md"].decode()
    assert header(readme)["base_model"] == "a/gene" and "Trained for 20 steps." in readme
    assert "| held out, in training | accuracy | 0.5 |  |" in readme and "Teacher: [b/teacher]" in readme


@pytest.mark.parametrize(
    ("given", "library", "tags"),
    [
        ("timm", "timm", ["heirloom", "jax", "learngene"]),
        ("nnx", "heirloom", ["heirloom", "jax", "learngene", "flax"]),
    ],
)
def test_folders_of_other_forms_arrive_too(given, library, tags, hub, folder, tmp_path):
    source = folder if given != "timm" else GOLDEN
    if given == "timm":
        shutil.copytree(GOLDEN, tmp_path / "other")
    else:
        convert(open_donor(source, [FAMILY]), tmp_path / "other", given, verify=False)
    assert cli.main(["push", str(tmp_path / "other"), "hf:me/other"]) == 0
    assert header(hub.models["me/other"]["README.md"].decode())["library_name"] == library
    assert header(hub.models["me/other"]["README.md"].decode())["tags"] == tags
    assert given == "timm" or "state/_METADATA" in hub.models["me/other"]


def test_errors_are_one_line_and_exit_2(hub, folder, monkeypatch, tmp_path, capsys):
    def refused(*argv):
        assert cli.main(["push", *argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("heirloom: ") and said.count("\n") == 1
        return said

    target = (str(folder), "hf:me/vit")
    assert "write hf:org/name" in refused(str(folder), "me/vit")
    assert "write hf:org/name" in refused(str(folder), "hf:me/vit/sub")
    assert "no such folder" in refused(str(tmp_path / "none"), "hf:me/vit")
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refused(str(tmp_path / "empty"), "hf:me/vit")
    hub.models["me/vit"], hub.private["me/vit"] = {}, False
    assert "hf:me/vit exists and is public; make it private" in refused(*target, "--private")
    assert hub.models["me/vit"] == {}
    hub.refuse["/api/models/me/vit/preupload"] = 403
    assert "could not be uploaded (the hub says 403" in (said := refused(*target)) and "may not write there" in said
    hub.refuse = {"/me/vit.git": 404}
    assert "could not be uploaded (the hub says 404" in refused(*target)
    hub.refuse = {"/api/repos/create": 500}
    assert "could not be created (the hub says 500" in (said := refused(*target)) and "try again" in said
    hub.refuse = {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is not valid" in refused(*target)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "the hub wants a token: set HF_TOKEN" in refused(*target)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "could not be created" in (said := refused(*target)) and "check the network" in said
    write_json(folder / "verify.json", {"passed": True})
    (folder / "README.md").unlink()
    assert "verify.json: 'reference' is missing" in refused(*target)
    write_json(folder / "verify.json", {"passed": True, "reference": None})
    write_json(folder / "scores.json", {"rows": [{"dataset": "pets", "metric": "top-1"}]})
    assert "other content than heirloom writes (KeyError: 'value')" in refused(*target)
    write_json(folder / "verify.json", {"passed": True, "reference": "transformers"})
    assert "other content than heirloom writes (TypeError" in refused(*target)
    assert not (folder / "README.md").exists()
    assert hub.models["me/vit"] == {}


def test_weights_say_what_wrote_them(folder):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        about = file.metadata()
    assert about["format"] == "pt" and about["made_by"].startswith("heirloom ")
    np.testing.assert_array_equal(open_safetensors(folder / "model.safetensors")["head/bias"].shape, (5,))


def test_a_copy_of_the_hub_has_the_address_of_the_model():
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = Path("/cache/hub/models--stabilityai--sd-vae-ft-ema/snapshots") / revision
    assert origin(cached) == f"hf:stabilityai/sd-vae-ft-ema@{revision}"
    assert origin(cached / "vae") == f"hf:stabilityai/sd-vae-ft-ema/vae@{revision}"
    assert origin(Path("/data/models--x/y")) == "/data/models--x/y"
