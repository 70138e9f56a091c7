#!/usr/bin/env bash
# The main job. Arguments are configuration overrides: bash run_qwen3_1b7.sh trainer.total_training_steps=10
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that Hugging Face checkpoint on that data
#   none of them                                                     trains a tiny model on arithmetic, on any machine
#
# Data may also be a procedural task: train_path='reasoning_gym:chain_sum?size=2000&seed=1'.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ -n "${model_dir:-}${train_path:-}${test_path:-}" ]]; then
  exec "$python" -m vexact train --from_env recipe=qwen3_1b7 "$@"
fi

tiny="${VEXACT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vexact}/tiny"
"$python" -m vexact prepare tiny --out "$tiny" & preparing=$!
trap 'kill -TERM "$preparing"; wait "$preparing"' INT TERM HUP # a signal to this script alone ends it, too
wait "$preparing"
trap - INT TERM HUP
exec "$python" -m vexact train recipe=tiny_arithmetic \
  "actor_rollout_ref.model.path=$tiny/model" \
  "data.train_files=$tiny/train.parquet" "data.val_files=$tiny/test.parquet" "$@"
