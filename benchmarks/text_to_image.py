"""Seconds and memory of text to image on a CPU: LiT, our PixArt-Σ, and diffusers' PixArt-Σ on the same weights.

    python benchmarks/draw_pipeline.py big/sigma --tokenizer TOKENIZER_FOLDER
    python benchmarks/text_to_image.py calls big/sigma --json benchmarks/results/text_to_image_calls.json   # 10 minutes
    python benchmarks/text_to_image.py whole big/sigma --json benchmarks/results/text_to_image.json         # 20 minutes

`calls`: one call of the denoiser, in float32, at 512, 1024 and 2048 pixels, for a prompt of 27 tokens: diffusers pads
it to 300 in every call, our sampler to 32, and computes what depends on the prompt alone before the first call. Each
model has a process of its own, which waits while another one computes, and the calls of the models take turns;
compilation is not counted. A call has two pictures, as guidance needs, and one at 2048 pixels, where it has fewer
layers (--few) and the seconds are multiplied: the row says so. Peak memory is the process's, with the weights of all
its layers. The ratio is to diffusers in the same round; a goal stands next to it.

`whole`: the way from a prompt to one picture, stage by stage, with one step of the denoiser: peak memory of each stage,
for the weights as they are, for int8 weights (--int8 FOLDER, from `heirloom convert --quantize int8`), for a LiT
(--student FOLDER), and for diffusers' pipeline in bfloat16.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench

GOALS = {"lit": {512: 0.9, 1024: 0.6, 2048: 0.35}, "pixart": dict.fromkeys((512, 1024, 2048), 1.1)}
MODELS = ("diffusers", "pixart", "lit")
ROUNDS = {512: 2, 1024: 1, 2048: 1}
PACKAGES = ("jax", "torch", "diffusers", "transformers")
PAUSE = 0.3  # seconds between calls, in which the threads of the last process stop spinning
TOKENS, USED = 300, 27  # of a prompt with padding, and of a prompt of twenty words; the sampler cuts padding to 32
PROMPT = "a photograph of a red fox in the snow at dawn, soft light, shallow depth of field"


def inputs(pixels: int) -> tuple[np.ndarray, ...]:
    """Noise, times, text and its mask for one call."""
    rng, rows = np.random.default_rng(0), 1 if pixels == 2048 else 2
    x = rng.standard_normal((rows, pixels // 8, pixels // 8, 4)).astype(np.float32)
    text = rng.standard_normal((rows, TOKENS, 4096)).astype(np.float32)
    return x, np.full(rows, 500.0, np.float32), text, np.broadcast_to(np.arange(TOKENS) < USED, (rows, TOKENS)).copy()


def make_ours(folder: Path, name: str, layers: int) -> Callable[[int], Callable[[], Any]]:
    """Opens our model, or the LiT that inherits from it; returns a function that prepares a call."""
    from dataclasses import replace
    from functools import partial

    import jax

    from heirloom.common.methods import open_any
    from heirloom.common.nn.functional import functional
    from heirloom.common.surgery.graft import graft
    from lit_jax.inherit import graft_attention
    from lit_jax.pixart import PixArt

    donor = open_any(str(folder))
    cfg = replace(donor.cfg, attention="linear", heads=4) if name == "lit" else donor.cfg
    model = functional(PixArt, cfg)
    plan = graft_attention(donor.cfg, cfg, "o" if name == "lit" else "all")
    params = graft(plan, donor.source, model.spec, None, partial(model.init, jax.random.key(0)))
    if layers < cfg.layers:
        spec, model = model.spec, functional(PixArt, replace(cfg, layers=layers))
        params = {path: value[:layers] if spec[path].layered else value for path, value in params.items()}

    def prepare(pixels: int) -> Callable[[], Any]:
        x, t, text, mask = inputs(pixels)
        text, mask = text[:, :32], mask[:, :32]
        condition = jax.jit(partial(model.apply, method="condition"))(params, text, mask)
        modulation = jax.jit(partial(model.apply, method="modulations"))(params, t)
        compiled = jax.jit(partial(model.apply, method="denoise")).lower(params, x, modulation, condition).compile()
        return lambda: jax.block_until_ready(compiled(params, x, modulation, condition))

    return prepare


def make_diffusers(folder: Path, layers: int) -> Callable[[int], Callable[[], Any]]:
    """Opens diffusers' model; returns a function that prepares a call."""
    import torch
    from diffusers import PixArtTransformer2DModel

    torch.set_num_threads(2)
    model: Any = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    model.eval()
    model.transformer_blocks = model.transformer_blocks[:layers]

    def prepare(pixels: int) -> Callable[[], Any]:
        x, t, text, mask = map(torch.from_numpy, inputs(pixels))
        x = x.permute(0, 3, 1, 2).contiguous()

        def call() -> Any:
            with torch.no_grad():
                return model(x, encoder_hidden_states=text, encoder_attention_mask=mask.float(), timestep=t).sample

        return call

    return prepare


def work(folder: Path, name: str, layers: int) -> None:
    """The process of a model: reads a size from standard input, makes one call, and prints its seconds and peak."""
    from lit_jax.stages import peak_bytes, reset_peak

    prepare = make_diffusers(folder, layers) if name == "diffusers" else make_ours(folder, name, layers)
    prepare(256)()  # the first call of a process starts threads and allocators
    calls: dict[int, Callable[[], Any]] = {}
    for line in sys.stdin:
        pixels = int(line)
        call = calls[pixels] if pixels in calls else calls.setdefault(pixels, prepare(pixels))
        reset_peak()
        started = time.perf_counter()
        call()
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}), flush=True)


def one_round(folder: Path, layers: int, sizes: Sequence[int], rounds: dict[int, int]) -> list[dict[str, Any]]:
    """Starts a process for each model; the calls take turns. Returns a row for each call."""
    arguments = [[sys.executable, __file__, "work", str(folder), name, str(layers)] for name in MODELS]
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = {name: subprocess.Popen(a, **pipes) for name, a in zip(MODELS, arguments, strict=True)}
    rows = []
    for pixels in sizes:
        for number in range(rounds[pixels]):
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                worker.stdin.write(f"{pixels}\n")
                worker.stdin.flush()
                found = json.loads(worker.stdout.readline())
                rows.append({"model": name, "pixels": pixels, "layers": layers, "round": number} | found)
                print(rows[-1], flush=True)
                time.sleep(PAUSE)
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    return rows


def calls(args: argparse.Namespace) -> None:
    rows = one_round(args.folder, args.layers, [p for p in args.pixels if p != 2048], ROUNDS)
    if 2048 in args.pixels:
        rows += one_round(args.folder, args.few, [2048], ROUNDS)
    table = []
    for (pixels, name), found in bench.groups(rows, "pixels", "model").items():
        scale, few = args.layers / found[0]["layers"], found[0]["layers"]
        base = {row["round"]: row["seconds"] for row in rows if (row["pixels"], row["model"]) == (pixels, "diffusers")}
        ratios = [row["seconds"] / base[row["round"]] for row in found]
        ratio, goal = float(np.median(ratios)), GOALS.get(name, {}).get(pixels)
        row = {"pixels": pixels, "model": name, "seconds": scale * min(r["seconds"] for r in found)}
        row |= {"ratio": ratio, "ratios": ratios, "goal": goal, "pictures": 1 if pixels == 2048 else 2}
        row |= {"peak_bytes": max(r["peak_bytes"] for r in found), "measured_layers": few, "extrapolated": scale != 1}
        table.append(row)
        said = "" if goal is None else f"  goal {goal}: {'met' if ratio <= goal else 'MISSED'}"
        print(f"{pixels:>5} px  {name:<10} {row['seconds']:8.1f} s  ratio {ratio:.2f}{said}")
    bench.write(args.json, bench.header(PACKAGES) | {"layers": args.layers, "rows": table, "calls": rows})


def whole(args: argparse.Namespace) -> None:
    """Each way in a process of its own, because memory that one frees may stay with the process."""
    found: dict[str, Any] = {}
    head = bench.header(PACKAGES) | {"pixels": 1024}
    ways = {"heirloom, weights as they are": ["sample_once", str(args.folder)]}
    if args.int8:
        ways["heirloom, int8"] = ["sample_once", str(args.int8)]
    if args.student:
        ways["heirloom, LiT"] = ["sample_once", str(args.student)]
    ways["diffusers, bfloat16"] = ["diffusers_once", str(args.folder)]
    for name, arguments in ways.items():
        done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
        bench.write(args.json, head | {"ways": found})


def sample_once(folder: Path) -> None:
    """One picture of 1024 pixels with one guided step, by our pipeline with the text encoder streamed."""
    from dataclasses import replace

    import lit_jax
    from lit_jax.denoiser import PromptConfig
    from lit_jax.stages import Stages, peak_bytes
    from lit_jax.text_to_image import Request

    before = peak_bytes()
    pipe: Any = lit_jax.load(str(folder))
    pipe = replace(pipe, keep=False, stages=Stages(quiet=True))
    pipe.pictures([Request(PROMPT, size=(1024, 1024))], PromptConfig(steps=1))
    print(json.dumps({"before": before, "stages": pipe.stages.to_json()}))


def diffusers_once(folder: Path) -> None:
    """The same by diffusers' pipeline, all parts in bfloat16, as its users run it."""
    import torch
    from diffusers import PixArtSigmaPipeline

    from lit_jax.stages import peak_bytes, reset_peak

    torch.set_num_threads(2)
    before = peak_bytes()
    started = time.perf_counter()
    pipe = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"load": {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}}
    reset_peak()
    started = time.perf_counter()
    with torch.no_grad():
        pipe(PROMPT, num_inference_steps=1, height=1024, width=1024, clean_caption=False)
    found["prompt to picture"] = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    print(json.dumps({"before": before, "stages": found}))


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        return work(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    if sys.argv[1:2] == ["sample_once"]:
        return sample_once(Path(sys.argv[2]))
    if sys.argv[1:2] == ["diffusers_once"]:
        return diffusers_once(Path(sys.argv[2]))
    parser = bench.parser(__doc__)
    parser.add_argument("what", choices=("calls", "whole"))
    parser.add_argument("folder", type=Path, help="a PixArtSigmaPipeline folder")
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--few", type=int, default=3, help="layers at 2048 pixels")
    parser.add_argument("--int8", type=Path, help="the same pipeline with int8 kernels")
    parser.add_argument("--student", type=Path, help="a LiT that inherits from it (heirloom inherit lit/t2i_1024)")
    args = parser.parse_args()
    return calls(args) if args.what == "calls" else whole(args)


if __name__ == "__main__":
    main()
