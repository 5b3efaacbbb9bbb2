#!/usr/bin/env bash
# Everything here that is worth measuring on a GPU, in under ten minutes:   benchmarks/gpu.sh OUT   ->   OUT/gpu.json
# Needs Python with: pip install -e '.[cuda]'; with torch installed its rows join. A part that runs out of time leaves what it measured;
# if one did or failed, so does this.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
rm -f "$out"/{steps,linear_attention,gpu}.json # of an earlier run
failed=0
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false

part() { # name, seconds, command: ends with a line that says how it went
  local name=$1 limit=$2
  shift 2
  local code=0
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code" | tee -a "$out/gpu.log"
  [ "$code" -eq 0 ] || failed=1
}

: > "$out/gpu.log"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv > "$out/device.csv" 2>&1
part steps 330 "$python" benchmarks/steps.py --json "$out/steps.json"
part linear_attention 240 "$python" benchmarks/linear_attention.py --widths 1152 --images 256 1024 4096 --repeats 50 --json "$out/linear_attention.json"

"$python" - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {name: json.loads((out / f"{name}.json").read_text()) for name in ("steps", "linear_attention") if (out / f"{name}.json").exists()}
result = {"device": (out / "device.csv").read_text(), "ended": (out / "gpu.log").read_text().splitlines(), **parts}
(out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
print(out / "gpu.json")
PY
[ $? -eq 0 ] || failed=1
exit "$failed"
