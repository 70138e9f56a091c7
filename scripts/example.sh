#!/usr/bin/env bash
# Called by examples: example.sh RECIPE TINY TINY_RECIPE [override...]
#
#   model_dir=DIR train_path=… [test_path=…] in the environment: trains that model with RECIPE
#   none of them: makes the tiny model TINY and trains it with TINY_RECIPE
set -euo pipefail
recipe="$1" name="$2" tiny_recipe="$3"
shift 3
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -Pc 'import importlib.util, sys; sys.exit(importlib.util.find_spec("wandb") is None)'; then
  echo "example: wandb is not installed; metrics go to the console and metrics.jsonl" >&2
  set -- 'trainer.logger=[console,jsonl]' "$@"
fi

if [[ -n "${model_dir:-}${train_path:-}${test_path:-}" ]]; then
  exec "$python" -m vexact train --from_env "recipe=$recipe" "$@"
fi

tiny="${VEXACT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vexact}/$name"
"$python" -m vexact prepare "$name" --out "$tiny" & preparing=$!
trap 'kill -TERM "$preparing"; wait "$preparing"' INT TERM HUP # a signal to this script alone ends it, too
wait "$preparing"
trap - INT TERM HUP
exec "$python" -m vexact train "recipe=$tiny_recipe" \
  "actor_rollout_ref.model.path=$tiny/model" \
  "data.train_files=$tiny/train.parquet" "data.val_files=$tiny/test.parquet" "$@"
