"""The published recipes compiled for TPU slices, without a TPU: docs/compile.md and docs/compile.json.

pip install -e '.[tpu]' && python scripts/compile_recipes.py            # what the table lacks: minutes each, under 4 GB
python scripts/compile_recipes.py lit/xl_2_512                          # this one again
"""

import argparse
import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from heirloom.common import config
from heirloom.common.chips import GIB
from heirloom.common.compile import Topology, compile_for
from heirloom.common.errors import InputError

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = {
    "tinyclip/vit_61m_32": ["v5e:16x16", "v5e:16x16 --student.remat none", "v5e:16x16 --mesh.fsdp 8"],
    "lit/xl_2_256": [
        "v5e:8x8",
        "v5e:8x8 --student.remat full",
        "v5e:8x8 --mesh.fsdp 2 --student.remat full",
        "v5e:8x8 --mesh.fsdp 8",
        "v5e:8x8 --mesh.fsdp 8 --student.implementation mosaic_tpu",
    ],
    "lit/xl_2_512": ["v5e:8x8 --mesh.fsdp 8", "v5e:8x8 --mesh.fsdp 2 --student.remat full"],
    "lit/t2i_512": ["v5e:8x8 --mesh.fsdp 8"],
    "lit/t2i_1024": ["v5e:4x8 --mesh.fsdp 8", "v5e:4x8 --mesh.fsdp 8 --step.accumulate 3"],
    "tinyclip/vit_40m_32": ["v5e:16x16"],
    "tinyclip/vit_39m_16": ["v5e:16x16"],
    "tinyclip/vit_8m_16": ["v5e:16x16"],
    "lit/s_2_256": ["v5e:4x4"],
    "lit/b_2_256": ["v5e:4x4"],
    "lit/l_2_256": [
        "v5e:8x8 --student.remat full",
        "v5e:8x8 --mesh.fsdp 2 --student.remat full",
        "v5e:8x8 --mesh.fsdp 8",
    ],
    "tinyclip/rn_30m": ["v5e:16x16"],
    "tinyclip/auto_45m_32": ["v5e:16x16"],
    "learngene/aux_ti": ["v5e:4x4"],
    "learngene/aux_s": ["v5e:4x4"],
    "learngene/aux_b": ["v5e:4x4"],
    "learngene/vit_s": ["v5e:4x4", "v5e:4x4 --student.remat full", "v5e:4x4 --student.remat dots"],
}
HEAD = """# The recipes on TPU pods

The train step of each published recipe, teacher included, is compiled here for a TPU pod, on a machine without a TPU. The table
shows whether it fits the memory of the chips, and estimates the best possible time of a step. **No step has run on a TPU**: memory
is the compiler's own figure, and the time is what FLOPs, bytes and links alone would take, which no run is likely to reach.

    python scripts/compile_recipes.py

| column | what it is |
|---|---|
| GiB a device | arguments, results and temporaries, added up |
| of | the memory that the compiler gives to a program, less than the chip has |
| fits | the compiler's own judgement: it accepted one step whose sum is above *of* |
| collectives a step | the operations of one device; their sizes are those of the whole arrays. One in a loop is counted once for each iteration; where the number of iterations is unknown, once in all, which is then too few. Both branches of a conditional are counted, which is then too many. A fused reduce-scatter is listed as an all-reduce |
| bound by | the limit of a chip that gives the estimate: matmuls (our count of FLOPs at the chip's bf16 peak), memory (state once, temporaries written and read once each, a rule of thumb), or links (all collectives, one after the other) |
| of peak | the share of the chip's bf16 peak that this leaves: 100 % where matmuls bind |
| compiled | the day of a row, its versions of jax and libtpu. *bfloat16 sums*: in that version devices added up gradients in bfloat16; they now do so in float32 |

tinyclip/auto_45m_32 is the step after its masks are cut, at the size before the cut. tinyclip/progressive_32 is tinyclip/vit_61m_32 and
then tinyclip/vit_40m_32, so it has no row. Models as small as TinyCLIP's are copied to every chip: split over eight (`--mesh.fsdp 8`) the
61M needs a little over a third of the memory, and its links take five times the step.

LiT's class-conditional recipes of size L and XL are best on a mesh of pairs, with blocks computed again in the backward pass (`--mesh.fsdp 2 --student.remat
full`): split over eight, links bind at 29 to 36 % of the peak, and whole on every chip, memory at 76 to 80 %. What is computed again is no part of
our count of FLOPs, so *of peak* is a bound for useful work, and a step with remat takes up to a third longer than the estimate where
matmuls bind. The two text-to-image rows are bound by links at half of the peak; fewer parts were not tried, a compilation takes half an
hour.

| recipe | slice | mesh | batch | GiB a device | of | fits | collectives a step | TFLOP a step | estimated step | bound by | of peak | compiled |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def row(name: str, how: str, r: dict) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
    found = (
        ", ".join(f"{c['count']} {kind} ({c['bytes'] / 2**20:,.0f} MiB)" for kind, c in r["collectives"].items()) or "-"
    )
    fits = "yes" if r["fits"] else f"no: {r['advice']}"
    limit = "- | - | -"
    if r["fits"]:
        share = r["parts"]["matmuls"] / r["step_seconds"]
        limit = f"{1e3 * r['step_seconds']:.1f} ms | {r['bound']} | {100 * share:.0f} %"
    memory = f"{r['bytes_per_device'] / GIB:.2f} | {r['hbm'] / GIB:.2f}"
    compiled = f"{r['date']}, {r['jax']}, {r['libtpu']}{'' if 'summed' in r or not r['fits'] else ', bfloat16 sums'}"
    return (
        f"| {name} | {how} | {mesh} | {r['batch']:,} | {memory} | {fits} | {found} | {r['flops'] / 1e12:,.4g} | {limit}"
        f" | {compiled} |"
    )


def main(wanted: list[str]) -> None:
    file = DOCS / "compile.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in wanted or RECIPES:
        for how in RECIPES[name]:
            if f"{name} {how}" in results and not wanted:
                continue
            topology, *flags = how.split()
            made = {"date": str(date.today()), "jax": version("jax"), "libtpu": version("libtpu")}
            try:
                results[f"{name} {how}"] = made | compile_for(config.load(name, flags), Topology.parse(topology))
            except InputError as error:
                sys.exit(f"{name}: {error}")
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(row(name, how, results[f"{name} {how}"]), flush=True)
            write(results)


def write(results: dict[str, dict]) -> None:
    rows = [
        row(name, how, results[f"{name} {how}"])
        for name, ways in RECIPES.items()
        for how in ways
        if f"{name} {how}" in results
    ]
    (DOCS / "compile.md").write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", help=f"compile this one again: {', '.join(RECIPES)}")
    wanted = parser.parse_args().recipe
    if unknown := [name for name in wanted if name not in RECIPES]:
        parser.error(f"no row of {unknown[0]}; there are {', '.join(RECIPES)}")
    main(wanted)
