#!/usr/bin/env bash
# Finds or makes a Python environment that can run vexact. Doing it twice does nothing.
# Progress goes to stderr; stdout is the path of the Python to use:  python="$(bash scripts/setup.sh)"
#
# An active virtual environment is used as it is found; else $VEXACT_VENV or .venv, made if needed. What is installed has
# the versions of constraints/, which the tests ran with. A system Python that already has CUDA PyTorch and all required
# packages is used without installing anything, so that an offline GPU machine works; one that only has CUDA PyTorch
# lends it to .venv, whatever its version.
#
# With --newest: a second one beside it, .venv-newest, with the newest version of everything but torch and triton.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
required="torch triton transformers safetensors tokenizers numpy pyarrow hydra omegaconf jinja2 rich"
optional="wandb wandb_workspaces tensorboard plotly reasoning_gym math_verify starlette uvicorn pydantic prometheus_client gguf accelerate ray \
pytest pytest_timeout xdist hypothesis ruff mypy openai"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
supported() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; }
absent() { # PYTHON MODULE... -> the modules that cannot be found, without importing any
  local python="$1"; shift
  "$python" -Pc 'import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' "$@"
}
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
constraints() { "$1" -c 'import sys; print("{}/constraints/{}.{}.txt".format(sys.argv[1], *sys.version_info))' "$root"; }

find_python() {
  local name
  for name in python3 python3.12 python3.11 python3.13; do
    if supported "$name"; then command -v "$name"; return; fi
  done
  die "no Python 3.11, 3.12 or 3.13 found; install one"
}

is_made() { [[ -x "$1/bin/python" && ! -e "$1/.vexact-unfinished" ]]; } # VENV

make_venv() { # PYTHON VENV [OPTION...]; one whose making was interrupted has a python and no pip, so it starts anew
  local start="$SECONDS" python="$1" venv="$2"; shift 2
  [[ ! -e "$venv/.vexact-unfinished" ]] || rm -r "$venv"
  mkdir -p "$venv"
  : >"$venv/.vexact-unfinished"
  "$python" -m venv "$@" "$venv" || die "could not create $venv; is the venv module of $python installed?"
  rm "$venv/.vexact-unfinished"
  say "created $venv in $((SECONDS - start)) s"
}

install_into() { # VENV EXTRAS OPTION...: the whole set, quietly
  local venv="$1" extras="$2" python="$1/bin/python" start="$SECONDS"; shift 2
  local target="$root[$extras,dev,wandb,tensorboard,report,tasks,serve,smollm2,ray]"
  local install=("$python" -m pip install -q --disable-pip-version-check)
  # uv does not see packages that a system Python lends, and would fetch another torch
  if command -v uv >/dev/null && ! grep -qs 'include-system-site-packages = true' "$venv/pyvenv.cfg"; then
    install=(uv pip install -q --python "$python")
    UV_FIND_LINKS="${UV_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
    export UV_FIND_LINKS
  fi
  say "installing packages into $venv; the first time takes a few minutes"
  if ! "${install[@]}" "$@" -e "$target" >"$venv/setup.log" 2>&1; then
    tail -n 20 "$venv/setup.log" >&2
    return 1
  fi
  say "packages installed in $((SECONDS - start)) s"
}

ensure_installed() { # VENV EXTRAS
  local venv="$1" python="$1/bin/python" tested stamp before="" missing
  tested="$(constraints "$python")"
  stamp="$2 $(cat "$root/pyproject.toml" "$root/setup.py" "$tested" | cksum)"
  [[ ! -f "$venv/.vexact-setup" ]] || before="$(<"$venv/.vexact-setup")"
  [[ "$before" != "$stamp" ]] || return 0
  # shellcheck disable=SC2086  # the lists are split on purpose
  if [[ -n "$before" || -n "$(absent "$python" $required $optional)" ]] && ! install_into "$venv" "$2" -c "$tested"; then
    missing="$(absent "$python" $required)"
    [[ -z "$missing" ]] || die "installing failed (log: $venv/setup.log); still missing: $missing"
    say "installing failed (log: $venv/setup.log); going on without: $(absent "$python" $optional)"
    return 0
  fi
  printf '%s\n' "$stamp" >"$venv/.vexact-setup"
}

tested() { # the environment to run and test in
  local extras=tested system venv options=()
  venv="${VIRTUAL_ENV:-${VEXACT_VENV:-$root/.venv}}"
  if ! is_made "$venv"; then
    system="$(find_python)"
    if has_gpu && has_cuda_torch "$system"; then
      # shellcheck disable=SC2086
      if [[ -z "$(absent "$system" $required)" ]]; then
        say "using $system, which has all required packages"
        printf '%s\n' "$system"
        return
      fi
      options=(--system-site-packages) # keeps the PyTorch that is there
    fi
    make_venv "$system" "$venv" ${options[@]+"${options[@]}"}
  fi
  supported "$venv/bin/python" || die "$venv has an unsupported Python; vexact needs 3.11, 3.12 or 3.13"
  if has_gpu; then
    extras=gpu,tested
    ! has_cuda_torch "$venv/bin/python" || extras=gpu
  fi
  ensure_installed "$venv" "$extras"
  printf '%s\n' "$venv/bin/python"
}

newest() { # the same packages without constraints, always brought up to date
  local python venv="${VEXACT_VENV:-$root/.venv}-newest" options=()
  python="$(tested)"
  ! grep -qs 'include-system-site-packages = true' "$(dirname "$python")/../pyvenv.cfg" || options=(--system-site-packages)
  is_made "$venv" || make_venv "$python" "$venv" ${options[@]+"${options[@]}"}
  "$python" -c 'from importlib.metadata import version as v
for name in ("torch", "triton"): print(f"{name}=={v(name)}")' >"$venv/kept.txt"
  # pip alone takes what is installed for the newest when it reaches no index
  "$venv/bin/python" -m pip install -q --dry-run --ignore-installed --no-deps rich >"$venv/setup.log" 2>&1 ||
    die "no package index can be reached (log: $venv/setup.log); PIP_NO_INDEX=1 says that there is none"
  options=(--upgrade)
  command -v uv >/dev/null || options+=(--upgrade-strategy eager)
  install_into "$venv" gpu "${options[@]}" -c "$venv/kept.txt" || die "installing the newest versions failed"
  printf '%s\n' "$venv/bin/python"
}

case "${1:-}" in
  "") tested ;;
  --newest) newest ;;
  *) die "unknown argument $1; there is --newest" ;;
esac
