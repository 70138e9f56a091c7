#!/usr/bin/env bash
# Sets up if needed, then lint, format, types and tests, then types and tests with the newest packages (newest.sh).
# Arguments go to pytest, and leave the last out: bash scripts/test.sh tests/config -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(bash scripts/setup.sh)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

stage() { # NAME COMMAND...
  local name="$1" start="$SECONDS"; shift
  "$@" || { printf 'test: %s failed after %s s\n' "$name" "$((SECONDS - start))" >&2; exit 1; }
  printf 'test: %s passed in %s s\n' "$name" "$((SECONDS - start))" >&2
}

stage lint "$python" -m ruff check --quiet .
stage format "$python" -m ruff format --check --quiet .
stage types "$python" -m mypy --no-error-summary
# one process per core, one thread each: the tests are many and small; one that ends its process would do so again
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n auto --dist loadfile --max-worker-restart=0)
stage tests "$python" -m pytest --durations=15 --durations-min=10 ${parallel[@]+"${parallel[@]}"} "$@"
(($# > 0)) || stage newest bash scripts/newest.sh
