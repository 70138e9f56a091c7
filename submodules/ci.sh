#!/usr/bin/env bash
# Makes the environment of a bridge and runs its tests:  bash submodules/ci.sh verl|veomni|vllm|all [PYTEST-ARGUMENT...]
# Every bridge has its own, submodules/<bridge>/.venv, with the versions of its constraints.txt. A bridge whose packages
# cannot be had is reported as not run and fails nothing; a test that fails or does not end, fails.
# VEXACT_BRIDGES=keep leaves the environments for the next time; by default `all` deletes each before the next one.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
install_seconds=300 # with a cold cache and a slow index; an index that does not answer must not hold anybody up
test_seconds="${VEXACT_BRIDGES_SECONDS:-900}"
export PIP_DEFAULT_TIMEOUT=15 PIP_RETRIES=1 UV_HTTP_TIMEOUT=30 UV_HTTP_RETRIES=1
say() { printf 'bridges: %s\n' "$*" >&2; }

limit() { # SECONDS COMMAND...: 124 when it takes longer; what it started ends with it, and with this script
  local pid code=0
  timeout --kill-after=20 "$@" &
  pid="$!"
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
  wait "$pid" || code=$?
  trap - INT TERM
  return "$code"
}

find_python() { # BRIDGE -> a Python that it runs on, first of all that of the constraints
  local name
  for name in python3.11 python3.12 python3 python3.13; do
    if command -v "$name" >/dev/null && "$name" - "$here/$1/pyproject.toml" 2>/dev/null <<'END'
import re, sys, tomllib
from pathlib import Path

wanted = tomllib.loads(Path(sys.argv[1]).read_text())["project"]["requires-python"]
first, after = (tuple(map(int, part.split("."))) for part in re.findall(r"[\d.]+", wanted))
sys.exit(not first <= sys.version_info < after)
END
    then
      command -v "$name"
      return
    fi
  done
  printf 'no Python found that it runs on (requires-python in %s)\n' "$here/$1/pyproject.toml" >&2
  return 1
}

installer() { # VENV -> uv if there is one to be had, else nothing
  command -v uv && return
  limit 60 "$1/bin/python" -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1 && printf '%s\n' "$1/bin/uv"
}

delete() { # VENV
  [[ ! -d "$1" ]] || { rm -f "$1/.bridge" && rm -r "$1"; }
}

install_bridge() { # BRIDGE VENV: 0 when it is there with all it needs, 2 when its packages cannot be had
  local bridge="$1" venv="$2" uv="" stamp python folder="$here/$1" options=()
  stamp="$(cat "$root/pyproject.toml" "$folder/pyproject.toml" "$folder/constraints.txt" | cksum)"
  [[ "$(cat "$venv/.bridge" 2>/dev/null)" != "$stamp" || ! -x "$venv/bin/python" ]] || return 0
  python="$(find_python "$bridge")" || return 2
  # the stamp is there while all else is whole: without it, what made, changed or deleted the rest was interrupted
  [[ -f "$venv/.bridge" && -x "$venv/bin/python" ]] || delete "$venv" || return 1
  rm -f "$venv/.bridge" || return 1
  [[ -d "$venv" ]] || "$python" -m venv "$venv" || return 1
  local install=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  uv="$(installer "$venv" || true)"
  if [[ -n "$uv" ]]; then
    UV_FIND_LINKS="${UV_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}"
    export UV_FIND_LINKS
    # torchvision and the like come as CUDA builds, which break imports beside a CPU torch; nothing here needs them
    install=("$uv" pip install -q --python "$venv/bin/python")
    options=(--override "$here/overrides.txt")
  fi
  limit "$install_seconds" "${install[@]}" ${options[@]+"${options[@]}"} -r "$folder/constraints.txt" || return 2
  [[ -n "$uv" ]] || "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec || return 1
  limit "$install_seconds" "${install[@]}" --no-deps -e "$root" -e "$folder" || return 1
  printf '%s\n' "$stamp" >"$venv/.bridge"
}

core_tests() { # BRIDGE -> tests of the core that its other versions of packages could break
  printf '%s\n' tests/models tests/ops/test_hf_attention.py
  [[ "$1" == veomni && -d "$root/tests/swaps" ]] && printf '%s\n' tests/swaps
  return 0
}

run_bridge() { # BRIDGE [PYTEST-ARGUMENT...]: 0 passed, 1 failed, 2 not run
  local bridge="$1" venv="$here/$1/.venv" log code=0 start="$SECONDS"; shift
  [[ -d "$here/$bridge/tests" ]] || { say "$bridge: not run: there is no submodules/$bridge"; return 2; }
  [[ -s "$here/$bridge/constraints.txt" ]] || { say "$bridge: failed: it has no constraints.txt (lock.sh)"; return 1; }
  log="$(mktemp)"
  install_bridge "$bridge" "$venv" >"$log" 2>&1 || code=$?
  ((code == 0)) || tail -n 15 "$log" >&2
  rm -f "$log"
  case "$code" in
    0) ;;
    2) say "$bridge: not run: its packages cannot be had (above)"; return 2 ;;
    *) say "$bridge: failed: it could not be installed (above)"; return 1 ;;
  esac
  say "$bridge: installed after $((SECONDS - start)) s"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  run_tests "$bridge" "its tests" "$here/$bridge" tests "$@" || return 1
  if (($# == 0)); then
    local core; mapfile -t core < <(core_tests "$bridge")
    run_tests "$bridge" "tests of the core, with its versions," "$root" -p no:cacheprovider "${core[@]}" || return 1
  fi
  say "$bridge: passed after $((SECONDS - start)) s"
}

run_tests() { # BRIDGE WHAT FOLDER PYTEST-ARGUMENT...
  local bridge="$1" what="$2" folder="$3" code=0; shift 3
  limit "$test_seconds" env --chdir="$folder" "$here/$bridge/.venv/bin/python" -m pytest -q "$@" || code=$?
  case "$code" in
    0) ;;
    124 | 137) say "$bridge: failed: $what did not end within $test_seconds s"; return 1 ;;
    *) say "$bridge: failed: $what"; return 1 ;;
  esac
}

bridges=(verl veomni vllm)
asked="${1:-}"
case "$asked" in
  all) shift ;;
  verl | veomni | vllm) bridges=("$asked"); shift ;;
  *) say "which one? ${bridges[*]} or all"; exit 2 ;;
esac
failed=()
for bridge in "${bridges[@]}"; do
  code=0
  run_bridge "$bridge" "$@" || code=$?
  ((code != 1)) || failed+=("$bridge")
  [[ "$asked" != all || "${VEXACT_BRIDGES:-}" == keep ]] || delete "$here/$bridge/.venv"
done
((${#failed[@]} == 0)) || { say "failed: ${failed[*]}"; exit 1; }
