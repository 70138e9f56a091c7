#!/usr/bin/env bash
# Trains on a Ray cluster that runs. Arguments are configuration overrides:
#
#   RAY_API=http://HEAD:8265 NNODES=2 GPUS_PER_NODE=8 bash ray_job.sh recipe=qwen3_1b7 data.train_files=…
#
# Model and data have to lie where every node reads them. The cluster is started once, on every node with the same
# RAY_AUTH_MODE (and, with `token`, the same token: RAY_AUTH_TOKEN_PATH=FILE):
#
#   ray start --head --dashboard-host=0.0.0.0         on the first node
#   ray start --address=HEAD:6379                     on the others
#
# The job's output comes here, it fails when this script does, and Ctrl-C stops it. SHIP=1 sends this checkout to the
# nodes, which then need the packages only. PYTHON is the interpreter on the nodes: by default the one beside `ray`.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here="$root/examples/multinode"
api="${RAY_API:-http://127.0.0.1:8265}"
job="vexact-$(date +%Y%m%d-%H%M%S)-$$"
command -v ray >/dev/null || { printf "ray_job: no \`ray\` on the PATH; pip install 'vexact[ray]'\n" >&2; exit 2; }
python="${PYTHON:-$(dirname "$(command -v ray)")/python}"
unset RAY_ADDRESS # it would be taken for the address to submit to

keys=()
[[ -z "${NNODES:-}" ]] || keys+=("trainer.nnodes=$NNODES")
[[ -z "${GPUS_PER_NODE:-}" ]] || keys+=("trainer.n_gpus_per_node=$GPUS_PER_NODE")
options=("--address=$api" "--submission-id=$job" "--runtime-env=$here/ray_runtime_env.yaml")
[[ "${SHIP:-0}" != 1 ]] || options+=("--working-dir=$root")

stop() {
  trap - INT TERM HUP
  printf 'ray_job: stopping %s\n' "$job" >&2
  ray job stop "--address=$api" "$job" >/dev/null || true
  exit 130
}
trap stop INT TERM HUP
ray job submit "${options[@]}" -- "$python" -m vexact train ${keys[@]+"${keys[@]}"} "$@" &
wait "$!"
