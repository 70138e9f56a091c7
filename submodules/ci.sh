#!/usr/bin/env bash
# Makes the environment of a bridge and runs its tests:  bash submodules/ci.sh verl|veomni|vllm|all [PYTEST-ARGUMENT...]
# Every bridge has its own, submodules/<bridge>/.venv, with the versions of its constraints.txt. A bridge whose packages
# cannot be had is reported as not run and fails nothing; a test that fails, fails.
# VEXACT_BRIDGES=keep leaves the environments for the next time; by default `all` deletes each before the next one.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
say() { printf 'bridges: %s\n' "$*" >&2; }

installer() { # VENV -> uv if there is one to be had, else nothing
  command -v uv && return
  "$1/bin/python" -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1 && printf '%s\n' "$1/bin/uv"
}

install_bridge() { # BRIDGE VENV: 0 when the bridge and all it needs is there
  local bridge="$1" venv="$2" uv stamp python
  local folder="$here/$bridge"
  stamp="$(cat "$root/pyproject.toml" "$folder/pyproject.toml" "$folder/constraints.txt" | cksum)"
  [[ "$(cat "$venv/.bridge" 2>/dev/null)" != "$stamp" ]] || return 0
  python="$(bash "$root/scripts/setup.sh")" || return 1
  [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv" || return 1
  uv="$(installer "$venv" || true)"
  local packages=(-e "$root" -e "$folder$(extras "$bridge")" pytest pytest-timeout)
  say "installing $bridge into $venv with ${uv:-pip}"
  if [[ -n "$uv" ]]; then
    UV_FIND_LINKS="${UV_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}"
    export UV_FIND_LINKS
    # torchvision and the like come as CUDA builds, which break imports beside a CPU torch; nothing here needs them
    "$uv" pip install -q --python "$venv/bin/python" --override "$here/overrides.txt" -c "$folder/constraints.txt" \
      "${packages[@]}" || return 1
  else
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$folder/constraints.txt" "${packages[@]}" ||
      return 1
    "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec || return 1
  fi
  printf '%s\n' "$stamp" >"$venv/.bridge"
}

extras() { # BRIDGE -> the extras that this machine wants
  [[ "$1" == vllm ]] && printf '[cpu]'
  return 0
}

core_tests() { # BRIDGE -> tests of the core that its other versions of packages could break
  printf '%s\n' tests/models tests/ops/test_hf_attention.py
  [[ "$1" == veomni && -d "$root/tests/swaps" ]] && printf '%s\n' tests/swaps
  return 0
}

run_bridge() { # BRIDGE [PYTEST-ARGUMENT...]: 0 passed, 1 failed, 2 not run
  local bridge="$1" venv="$here/$1/.venv" log start="$SECONDS"; shift
  [[ -d "$here/$bridge/tests" ]] || { say "$bridge: not run: there is no submodules/$bridge"; return 2; }
  log="$(mktemp)"
  if ! install_bridge "$bridge" "$venv" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    rm -rf "$log" "$venv"
    say "$bridge: not run: its packages could not be installed (above)"
    return 2
  fi
  rm -f "$log"
  say "$bridge: installed after $((SECONDS - start)) s"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  (cd "$here/$bridge" && .venv/bin/python -m pytest -q tests "$@") || { say "$bridge: failed"; return 1; }
  if (($# == 0)); then
    local core; mapfile -t core < <(core_tests "$bridge")
    (cd "$root" && "$venv/bin/python" -m pytest -q -p no:cacheprovider "${core[@]}") ||
      { say "$bridge: tests of the core failed with its versions"; return 1; }
  fi
  say "$bridge: passed after $((SECONDS - start)) s"
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
  [[ "$asked" != all || "${VEXACT_BRIDGES:-}" == keep ]] || rm -rf "$here/$bridge/.venv"
done
((${#failed[@]} == 0)) || { say "failed: ${failed[*]}"; exit 1; }
