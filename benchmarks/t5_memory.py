"""Seconds and peak memory of a prompt through a T5 encoder whose weights stay in their files.

    python benchmarks/t5_memory.py /tmp/t5xxl --tokenizer TOKENIZER_FOLDER --keep        # two CPU cores, 9.5 GB of disk

Writes random weights of the size asked for as a pipeline would have them (`text_encoder/` in bfloat16 shards of
transformers, `tokenizer/`), unless the folder has them, and removes them at the end without --keep. A row is: how the
weights are held, the prompt's tokens, the seconds of a first and a second call (the first compiles), and the peak of
resident memory above that before the encoder was opened, pages of the files included. The files are in the page cache
unless --cold asks the system to drop them before each call.
"""

import argparse
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from heirloom.common.checkpoint.weights import create_safetensors
from heirloom.common.files import write_json
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Tensor
from lit_jax.text.encoder import open_text
from lit_jax.text.layouts import HF, write_config
from lit_jax.text.t5 import T5Config, T5Encoder, t5
from lit_jax.text.tokenizer import FILES

PROMPT = "a photograph of a red fox in the snow at dawn, soft light, shallow depth of field, 85 mm"
LAYERS = 4  # in a shard


def write_encoder(cfg: T5Config, folder: Path, tokenizer: Path) -> None:
    """Writes random weights and a tokenizer as the folders `text_encoder` and `tokenizer` of a pipeline."""
    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True)
    write_config(cfg, encoder)
    tensors = {
        key: Tensor(tensor.shape, np.dtype(ml_dtypes.bfloat16))
        for key, tensor in HF.foreign(functional(T5Encoder, cfg).spec).items()
    }
    shards: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer = key.removeprefix("encoder.block.").partition(".")[0]
        shards.setdefault(int(layer) // LAYERS if layer.isdecimal() else 0, {})[key] = tensor
    names = {i: f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in shards}
    rng = np.random.default_rng(0)
    for i, shard in shards.items():
        _write_shard(encoder / names[i], shard, cfg, rng)
    index = {key: names[i] for i, shard in shards.items() for key in shard}
    write_json(encoder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    (folder / "tokenizer").mkdir()
    for name in FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / "tokenizer" / name)


def _write_shard(file: Path, shard: Mapping[str, Tensor], cfg: T5Config, rng: np.random.Generator) -> None:
    """Writes tensors of the standard deviations that T5 begins with, and norms near 1."""
    with create_safetensors(file, shard) as out:
        for key, value in out.items():
            if value.ndim == 1:
                value[...] = rng.uniform(0.5, 1.5, value.shape)
                continue
            std = 1.0 if key == "shared.weight" else value.shape[1] ** -0.5
            std *= cfg.head_dim**-0.5 if key.endswith(".q.weight") else 1.0
            for rows in np.array_split(value, max(1, value.size // 2**24)):
                rows[...] = std * rng.standard_normal(rows.shape, np.float32)


def _resident(name: str) -> int:
    """Returns a number of /proc/self/status in bytes: VmRSS, or VmHWM, its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _drop_pages(folder: Path) -> None:
    for file in (folder / "text_encoder").iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, prompts: list[str], tokens: int, resident: bool, cold: bool) -> str:
    """Encodes prompts twice and returns the row of the table."""
    _forget_peak()
    before, seconds = _resident("VmRSS"), []
    encoder = open_text(folder, tokens=tokens, resident=resident)
    for _ in range(2):
        if cold:
            _drop_pages(folder)
        start = time.perf_counter()
        features, mask = encoder.encode(prompts)
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(features).all() or not features.any():
        raise SystemExit("the features are zero or not finite")
    peak = (_resident("VmHWM") - before) / 1e9
    held, lengths = "resident" if resident else "streamed", "+".join(str(n) for n in mask.sum(1))
    return f"{held:9} {lengths:>9} tokens   {seconds[0]:6.1f} s  {seconds[1]:6.1f} s   peak {peak:5.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json or spiece.model")
    parser.add_argument("--size", default="xxl", choices=("small", "base", "large", "xl", "xxl"))
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--resident", action="store_true", help="also with all weights in memory")
    parser.add_argument("--long", action="store_true", help="also with a prompt that fills all tokens")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each call")
    parser.add_argument("--keep", action="store_true", help="leave the weights")
    given = parser.parse_args()
    cfg = t5(given.size)
    if not given.folder.exists():
        size = 2 * sum(leaf.count for leaf in functional(T5Encoder, cfg).spec.values())
        free = shutil.disk_usage(given.folder.parent).free
        if free < 1.2 * size:
            needed = 1.2 * size / 1e9
            raise SystemExit(f"{given.folder.parent} has {free / 1e9:.0f} GB free, and {needed:.0f} are needed")
        start = time.perf_counter()
        write_encoder(cfg, given.folder, given.tokenizer)
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
    cases = [[PROMPT], [PROMPT, ""]] + ([["long " * given.tokens]] if given.long else [])
    for resident in (False, True) if given.resident else (False,):
        for prompts in cases:
            print(measure(given.folder, prompts, given.tokens, resident, given.cold), flush=True)
    if not given.keep:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
