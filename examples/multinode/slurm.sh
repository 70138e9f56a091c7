#!/usr/bin/env bash
#SBATCH --job-name=vexact
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# Trains on the nodes of a Slurm job, through a Ray cluster of its own. Arguments are configuration overrides:
#
#   sbatch --nodes=4 examples/multinode/slurm.sh recipe=qwen3_1b7 data.train_files=…
#
# Submit it from the checkout; checkout, Python environment, model and data have to lie where every node reads them.
# It starts a head and workers, waits until all GPUs are there and names the nodes that are missing, runs the job, and
# ends all that it started. WAIT_S is how long to wait (300), RAY_PORT and DASHBOARD_PORT are the head's ports.
set -euo pipefail
root="${SLURM_SUBMIT_DIR:-$PWD}"
nodes="${SLURM_JOB_NUM_NODES:?run it with sbatch}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
port="${RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
dashboard="${DASHBOARD_PORT:-$((port + 10000))}"
wait_s="${WAIT_S:-300}"
work="$(mktemp -d "$root/.ray-$SLURM_JOB_ID-XXXXXX")"

say() { printf 'slurm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
command -v ray >/dev/null || die "no \`ray\` on the PATH; activate the environment before sbatch"
export PYTHON="${PYTHON:-$(dirname "$(command -v ray)")/python}"
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${names[0]}"
address="$(srun --nodes=1 --ntasks=1 -w "$head" hostname -I | awk '{print $1}')"

# a token of this job only: whoever else reaches the ports can do nothing
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_AUTH_TOKEN_PATH="$work/token" RAY_USAGE_STATS_ENABLED=0
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$work/token")

steps=()
finish() {
  trap - EXIT INT TERM
  ((${#steps[@]} == 0)) || kill "${steps[@]}" 2>/dev/null || true
  wait || true
  rm -f "$work"/*
  rmdir "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

start() { # NODE OPTION...: a part of the cluster that ends with this script
  local node="$1"; shift
  srun --nodes=1 --ntasks=1 --overlap -w "$node" ray start --block --disable-usage-stats --num-gpus="$gpus" "$@" \
    >"$work/$node.log" 2>&1 &
  steps+=("$!")
}

joined() { # -> the nodes that are in the cluster, with their GPUs, one a line
  "$PYTHON" - "$address:$port" <<'PY' 2>/dev/null
import sys, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
for node in ray.nodes():
    if node["Alive"]:
        print(node["NodeManagerHostname"].split(".")[0], int(node["Resources"].get("GPU", 0)))
PY
}

say "head on $head ($address:$port), $nodes node(s) with $gpus GPU(s) each"
start "$head" --head --node-ip-address="$address" --port="$port" --dashboard-host="$address" \
  --dashboard-port="$dashboard"
for node in "${names[@]:1}"; do start "$node" --address="$address:$port"; done

deadline=$((SECONDS + wait_s))
while :; do
  there="$(joined || true)"
  missing=()
  for node in "${names[@]}"; do
    grep -qx "${node%%.*} $gpus" <<<"$there" || missing+=("$node")
  done
  ((${#missing[@]} > 0)) || break
  for index in "${!steps[@]}"; do
    kill -0 "${steps[index]}" 2>/dev/null || {
      tail -n 5 "$work/${names[index]}.log" >&2
      die "Ray ended on ${names[index]}"
    }
  done
  if ((SECONDS >= deadline)); then
    for node in "${missing[@]}"; do say "$node:"; tail -n 5 "$work/$node.log" >&2; done
    die "after $wait_s s still without: ${missing[*]}"
  fi
  say "waiting for ${missing[*]} ($((deadline - SECONDS)) s left)"
  sleep "${POLL_S:-5}"
done
say "all $((nodes * gpus)) GPUs are there"
RAY_API="http://$address:$dashboard" NNODES="$nodes" GPUS_PER_NODE="$gpus" \
  bash "$root/examples/multinode/ray_job.sh" "$@"
