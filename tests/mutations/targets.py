"""Every kind of file that comes from outside, with its reader."""

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from mutate import Target, mutate_bytes, mutate_json
from PIL import Image
from pyarrow import parquet

import learngene.zoo
import lit_jax.zoo
import tinyclip_jax.zoo
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.unwrap import open_weights
from heirloom.common.checkpoint.weights import create_safetensors
from heirloom.common.data.pictures import decode
from heirloom.common.data.preprocess import Preprocess, eval_image
from heirloom.common.data.preprocess_formats import find
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import EOT, SOT, Tokenizer
from heirloom.common.nn.functional import functional
from lit_jax.text.layouts import FAMILY as T5
from lit_jax.text.t5 import T5Config, T5Encoder
from lit_jax.text.tokenizer import T5Tokenizer

GOLDENS = Path(__file__).parents[1] / "golden"
FAMILIES = [*tinyclip_jax.zoo.FAMILIES, *learngene.zoo.FAMILIES, *lit_jax.zoo.FAMILIES]


def golden(name: str, file: str) -> Callable[[Path], Path]:
    """A committed checkpoint, and the file in it to damage."""

    def write(folder: Path) -> Path:
        for source in (GOLDENS / name).iterdir():
            if source.suffix in (".json", ".safetensors", ".msgpack"):
                shutil.copy(source, folder)
        return folder / file

    return write


@cache
def converted(name: str) -> Path:
    """A committed checkpoint as a folder of ours."""
    folder = Path(tempfile.mkdtemp())
    convert(open_donor(GOLDENS / name, FAMILIES), folder / "ours", "heirloom", verify=False)
    return folder / "ours"


def own(name: str) -> Callable[[Path], Path]:
    """The config.json of a folder of ours."""

    def write(folder: Path) -> Path:
        shutil.copytree(converted(name), folder, dirs_exist_ok=True)
        return folder / "config.json"

    return write


def opened(folder: Path) -> None:
    donor = open_donor(folder, FAMILIES)
    for value in donor.source.values.values():
        np.asarray(value)


def text_file(name: str, value: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return folder / name

    return write


def picture(format: str, mode: str = "RGB", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, format)
    return out.getvalue()


def records(path: str, **fields: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        source = open_source(SourceConfig(str(folder / path), **fields))
        for i in range(len(source)):
            source[i]

    return read


def tar_file(folder: Path) -> Path:
    with tarfile.open(folder / "0.tar", "w") as archive:
        for i in range(3):
            for ending, data in (
                ("png", picture("PNG", seed=i)),
                ("txt", b"a caption"),
                ("json", b'{"caption": "a caption"}'),
            ):
                member = tarfile.TarInfo(f"{i:05d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "0.tar"


def table(folder: Path) -> Path:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture("PNG", seed=i))
    (folder / "data.csv").write_text("image,caption\n" + "".join(f'{i}.png,"caption, {i}"\n' for i in range(3)))
    return folder / "data.csv"


def parquet_file(folder: Path) -> Path:
    columns = {"image": [picture("PNG", seed=i) for i in range(3)], "caption": [f"caption {i}" for i in range(3)]}
    parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    return folder / "data.parquet"


def npz_file(folder: Path) -> Path:
    np.savez(folder / "weights.npz", a=np.zeros((2, 3), np.float32), b=np.arange(5))
    return folder / "weights.npz"


def picture_file(format: str, mode: str = "RGB") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "picture").write_bytes(picture(format, mode))
        return folder / "picture"

    return write


def seen(folder: Path) -> None:
    eval_image(decode((folder / "picture").read_bytes()), Preprocess(size=16))


def tokenizer_file(folder: Path) -> Path:
    small_tokenizer().save(folder)
    return folder / "tokenizer.json"


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["a caption", "another caption of a picture"], 520)


def words_of_transformers(name: str) -> Callable[[Path], Path]:
    """What transformers saves next to a tokenizer."""
    about: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "bos_token": SOT, "eos_token": EOT, "unk_token": EOT,
            "model_max_length": 77,
            "added_tokens_decoder": {
                "520": {"content": "<cat>", "special": False, "lstrip": False, "rstrip": False, "normalized": True},
            },
        },
        "special_tokens_map.json": {"bos_token": SOT, "eos_token": {"content": EOT, "special": True}},
        "added_tokens.json": {"<cat>": 520},
    }  # fmt: skip

    def write(folder: Path) -> Path:
        tokenizer_file(folder)
        (folder / name).write_text(json.dumps(about[name]))
        return folder / name

    return write


def found(format: str) -> Callable[[Path], None]:
    return lambda folder: find(folder, format, 32, Preprocess(32), "CLIP's own") and None


PROCESSOR = dict(
    image_processor_type="CLIPImageProcessor", do_resize=True, size={"shortest_edge": 36}, resample=3,
    do_center_crop=True, crop_size={"height": 32, "width": 32}, do_rescale=True, rescale_factor=1 / 255,
    do_normalize=True, image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5], do_convert_rgb=True,
)  # fmt: skip
NUMBERS = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic")
OPEN_CLIP = {"preprocess_cfg": NUMBERS | dict(size=[32, 32], resize_mode="shortest", fill_color=0)}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": NUMBERS | dict(input_size=[3, 32, 32], crop_pct=0.9, crop_mode="center"),
}
OURS = asdict(Preprocess(32, resize=36))


def tokenized(folder: Path) -> None:
    Tokenizer.load(folder)(["a caption", ""], 16)


def t5_encoder(folder: Path) -> Path:
    """A text encoder in the format of transformers; the file is its config.json."""
    cfg = T5Config(vocabulary=160, width=8, layers=2, heads=2, head_dim=4, hidden=12, buckets=8, max_distance=20)
    hf = T5.format("hf")
    with create_safetensors(folder / hf.file, hf.layout_of(cfg).foreign(functional(T5Encoder, cfg).spec)):
        pass
    hf.write_config(cfg, folder)
    return folder / "config.json"


def t5_tokenizer(name: str) -> Callable[[Path], Path]:
    """T5's tokenizer as spiece.model with its companions, or as tokenizer.json."""
    about: dict[str, Any] = {
        "added_tokens.json": {"<extra_id_1>": 150, "<extra_id_0>": 151, "<cat>": 152},
        "tokenizer_config.json": {
            "tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "unk_token": "<unk>",
            "added_tokens_decoder": {"152": {"content": "<cat>", "special": False, "normalized": True}},
        },
    }  # fmt: skip

    def write(folder: Path) -> Path:
        shutil.copy(GOLDENS / "t5_tokenizer" / "spiece.model", folder)
        if name in about:
            (folder / name).write_text(json.dumps(about[name]))
        if name == "tokenizer.json":
            T5Tokenizer.load(folder).save(folder)
        return folder / name

    return write


def t5_tokenized(folder: Path) -> None:
    T5Tokenizer.load(folder)(["a caption of a <cat>", ""], 30)


def tensors(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        for value in open_weights(file).tensors.values():
            np.asarray(value)


TARGETS = [
    Target("safetensors header", golden("clip/hf_gelu", "model.safetensors"), opened, mutate_bytes),
    Target("npz", npz_file, tensors, mutate_bytes),
    Target("Flax msgpack", golden("flax/vit", "flax_model.msgpack"), opened, mutate_bytes),
    Target("CLIP config.json", golden("clip/hf_gelu", "config.json"), opened, mutate_json, weight=1),
    Target(
        "open_clip_config.json", golden("clip/open_clip_f16", "open_clip_config.json"), opened, mutate_json, weight=1
    ),
    Target("ViT config.json", golden("vit/hf_vit", "config.json"), opened, mutate_json, weight=1),
    Target("DeiT config.json", golden("vit/hf_deit_teacher", "config.json"), opened, mutate_json, weight=1),
    Target("timm config.json", golden("vit/timm_cls", "config.json"), opened, mutate_json, weight=1),
    Target("DiT config.json", golden("dit", "config.json"), opened, mutate_json, weight=1),
    Target("PixArt config.json", golden("pixart", "config.json"), opened, mutate_json, weight=1),
    Target("autoencoder config.json", golden("autoencoder", "config.json"), opened, mutate_json, weight=1),
    Target("T5 config.json", t5_encoder, opened, mutate_json, weight=1),
    Target("spiece.model", t5_tokenizer("spiece.model"), t5_tokenized, mutate_bytes),
    *(
        Target(f"T5 {name}", t5_tokenizer(name), t5_tokenized, mutate_json)
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    ),
    *(
        Target(f"our {name} config.json", own(name), opened, mutate_json, weight=1)
        for name in ("clip/hf_gelu", "vit/timm_cls", "dit", "pixart", "autoencoder")
    ),
    Target("tar", tar_file, records("0.tar"), mutate_bytes),
    Target("csv", table, records("data.csv"), mutate_bytes),
    Target("parquet", parquet_file, records("data.parquet"), mutate_bytes),
    Target("png", picture_file("PNG"), seen, mutate_bytes),
    Target("png with transparency", picture_file("PNG", "RGBA"), seen, mutate_bytes),
    Target("jpeg", picture_file("JPEG"), seen, mutate_bytes),
    Target("webp", picture_file("WEBP"), seen, mutate_bytes),
    Target("gif", picture_file("GIF", "P"), seen, mutate_bytes),
    Target("tokenizer.json", tokenizer_file, tokenized, mutate_json),
    *(
        Target(name, words_of_transformers(name), tokenized, mutate_json)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    ),
    Target("preprocessor_config.json", text_file("preprocessor_config.json", PROCESSOR), found("hf"), mutate_json),
    Target(
        "processor_config.json",
        text_file("processor_config.json", {"image_processor": PROCESSOR}),
        found("hf"),
        mutate_json,
    ),
    Target("preprocess_cfg", text_file("open_clip_config.json", OPEN_CLIP), found("open_clip"), mutate_json),
    Target("pretrained_cfg", text_file("config.json", TIMM), found("timm"), mutate_json),
    Target("preprocess.json", text_file("preprocess.json", OURS), found("heirloom"), mutate_json),
]
