#!/usr/bin/env bash
# Does VeOmni's training compute the bits that the rollout sampled? On a tiny model, or on yours:
#
#   bash veomni_verify.sh [--model_path DIR] [--dtype bfloat16] [further options of `vexact verify`]
#
# PYTHON names an interpreter that has vexact-veomni; by default one is made in submodules/veomni/.venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/submodules/veomni/.venv/bin/python}"
if [[ -z "${PYTHON:-}" && ! -f "$root/submodules/veomni/.venv/.bridge" ]]; then
  # made, or finished, by the tests' script, which collects the tests and runs none
  VEXACT_BRIDGES=keep bash "$root/submodules/ci.sh" veomni --collect-only -q >/dev/null
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
given="$*"
if [[ " $given" != *" --model_path"* ]]; then
  tiny="${VEXACT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vexact}/tiny"
  "$python" -m vexact prepare tiny --out "$tiny" >&2
  set -- --model_path "$tiny/model" "$@"
fi
exec "$python" -m vexact verify --model_backend veomni --attn_impl triton-invariant \
  --use_remove_padding true --use_fused_lce true --num_prompts 8 --max_new_tokens 8 "$@"
