#!/usr/bin/env bash
# Writes constraints/3.11.txt, 3.12.txt and 3.13.txt anew: the newest version of every package that set-up installs, for
# each Python. Needs uv and a network; the Python versions themselves need not be there. Then run the tests and commit.
#
# torch, triton and the CUDA packages are left out: the extra `tested` pins them, and a GPU machine keeps its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || { printf 'lock: uv is not installed; pip install uv, or pipx run uv\n' >&2; exit 1; }

export UV_FIND_LINKS="${UV_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
mkdir -p constraints
for version in 3.11 3.12 3.13; do
  resolved="$(uv pip compile -q --upgrade --python-platform linux --python-version "$version" --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --all-extras pyproject.toml)"
  grep -Ev '^(torch|triton|setuptools|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==' <<<"$resolved" >"constraints/$version.txt"
  printf 'lock: constraints/%s.txt: %s packages\n' "$version" "$(wc -l <"constraints/$version.txt")" >&2
done
