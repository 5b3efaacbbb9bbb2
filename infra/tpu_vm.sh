#!/usr/bin/env bash
# A training on a slice of TPU VMs: infra/tpu_vm.sh create|setup|run|status|watch|logs|stop|delete
#
#   export NAME=clip ZONE=us-central1-a TYPE=v5litepod-16 BUCKET=gs://my-bucket    # SPOT=1 for spot capacity
#   export SOURCE=git+https://...    # heirloom's repository, or the address of a wheel: it is on no package index
#   infra/tpu_vm.sh create && infra/tpu_vm.sh setup
#   infra/tpu_vm.sh run heirloom train tinyclip/vit_39m_16 --run "$BUCKET/clip" --data.path "$BUCKET/yfcc/{00000..01499}.tar"
#   infra/tpu_vm.sh watch heirloom train ...      # the same command: creates the slice again whenever it is preempted
#
# The hosts share nothing but the bucket. See docs/pods.md.
#
# Not run: written from the documentation of Cloud TPU (queued resources) in November 2026, checked with shellcheck.
set -euo pipefail

NAME=${NAME:?the name of the slice}
ZONE=${ZONE:?a zone with this kind of TPU}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # v6e: v2-alpha-tpuv6e
SOURCE=${SOURCE:-}                      # where pip gets heirloom: git+https://... or https://.../heirloom_jax.whl
LOG=/tmp/heirloom.log                   # on every worker

queued() { gcloud compute tpus queued-resources "$@" --zone "$ZONE"; }
workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$1"; }
state() { queued describe "$NAME" --format 'value(state.state)' 2>/dev/null || echo MISSING; }

create() {
    queued create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$VERSION" ${SPOT:+--spot}
    until [[ $(state) == ACTIVE ]]; do
        [[ $(state) != FAILED ]] || { echo "tpu_vm: the request failed: gcloud compute tpus queued-resources describe $NAME" >&2; exit 1; }
        sleep 30
    done
}

setup() { # The images have an older Python than heirloom needs; uv brings one.
    [[ -n $SOURCE ]] || { echo "tpu_vm: set SOURCE to heirloom's repository (git+https://...) or to a wheel" >&2; exit 2; }
    workers "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.12 ~/heirloom \
        && ~/.local/bin/uv pip install --python ~/heirloom/bin/python 'heirloom-jax[tpu,gcs] @ ${SOURCE}' && ~/heirloom/bin/heirloom doctor"
}

run() { # Starts in the background on all workers, so that a lost connection does not end it.
    [[ $# -gt 0 ]] || { echo "tpu_vm: give the command to run, such as heirloom train ..." >&2; exit 2; }
    local quoted
    printf -v quoted '%q ' "$@"
    workers "PATH=~/heirloom/bin:\$PATH nohup heirloom supervise -- $quoted > $LOG 2>&1 < /dev/null & echo started"
}

alive() { workers 'pgrep -f "heirloom supervise" > /dev/null && echo alive' 2>/dev/null | grep -q alive; }

finished() { workers "tail -n 1 $LOG" 2>/dev/null | grep -q 'heirloom supervise: finished'; }

watch() { # Until the command has finished: creates a preempted slice again; the run continues from its last state.
    while true; do
        case $(state) in
        ACTIVE)
            if finished; then return; fi
            if ! alive; then setup && run "$@"; fi
            ;;
        SUSPENDED | FAILED | MISSING)
            queued delete "$NAME" --force --quiet || true
            create && setup && run "$@"
            ;;
        esac
        sleep 60
    done
}

logs() { workers "tail -n ${LINES_SHOWN:-50} $LOG"; }

stop() { workers "pkill -TERM -f 'heirloom supervise'"; } # all workers save the same step and exit with 75

delete() { queued delete "$NAME" --force --quiet; }

status() { state && logs; }

case ${1:-} in
create | setup | run | status | watch | logs | stop | delete) "$@" ;;
*) sed -n '2,11p' "$0" >&2; exit 2 ;;
esac
