#!/usr/bin/env bash
# Finds or makes a Python environment that can run vexact. Doing it twice does nothing.
# Progress goes to stderr; stdout is the path of the Python to use:  python="$(bash scripts/setup.sh)"
#
# An active virtual environment is used as it is found; else $VEXACT_VENV or .venv, made if needed. A system Python that
# already has CUDA PyTorch and all required packages is used without installing anything, so that an offline GPU
# machine works; one that only has CUDA PyTorch lends it to .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
required="torch triton transformers safetensors tokenizers numpy pyarrow hydra omegaconf jinja2 rich"
optional="wandb tensorboard reasoning_gym math_verify gguf accelerate pytest pytest_timeout xdist hypothesis ruff mypy"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
supported() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; }
absent() { # PYTHON MODULE... -> the modules that cannot be found, without importing any
  local python="$1"; shift
  "$python" -Pc 'import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' "$@"
}
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.12 python3.11 python3.13; do
    if supported "$name"; then command -v "$name"; return; fi
  done
  die "no Python 3.11, 3.12 or 3.13 found; install one"
}

install_into() { # VENV EXTRA: the whole set, quietly
  local venv="$1" python="$1/bin/python" start="$SECONDS"
  local target="$root[$2,dev,wandb,tensorboard,tasks,smollm2]"
  local install=("$python" -m pip install -q --disable-pip-version-check)
  if command -v uv >/dev/null; then
    install=(uv pip install -q --python "$python")
    UV_FIND_LINKS="${UV_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
    export UV_FIND_LINKS
  fi
  say "installing packages ($2) into $venv; the first time takes a few minutes"
  if ! "${install[@]}" -e "$target" >"$venv/setup.log" 2>&1; then
    tail -n 20 "$venv/setup.log" >&2
    return 1
  fi
  say "packages installed in $((SECONDS - start)) s"
}

ensure_installed() { # VENV EXTRA
  local venv="$1" python="$1/bin/python" stamp before="" missing
  stamp="$2 $(cat "$root/pyproject.toml" "$root/setup.py" | cksum)"
  [[ ! -f "$venv/.vexact-setup" ]] || before="$(<"$venv/.vexact-setup")"
  [[ "$before" != "$stamp" ]] || return 0
  # shellcheck disable=SC2086  # the lists are split on purpose
  if [[ -n "$before" || -n "$(absent "$python" $required $optional)" ]] && ! install_into "$venv" "$2"; then
    missing="$(absent "$python" $required)"
    [[ -z "$missing" ]] || die "installing failed (log: $venv/setup.log); still missing: $missing"
    say "installing failed (log: $venv/setup.log); going on without: $(absent "$python" $optional)"
    return 0
  fi
  printf '%s\n' "$stamp" >"$venv/.vexact-setup"
}

main() {
  local extra=cpu system venv start="$SECONDS" options=()
  command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 && extra=gpu
  venv="${VIRTUAL_ENV:-${VEXACT_VENV:-$root/.venv}}"
  if [[ ! -x "$venv/bin/python" ]]; then
    system="$(find_python)"
    if [[ "$extra" == gpu ]] && has_cuda_torch "$system"; then
      # shellcheck disable=SC2086
      if [[ -z "$(absent "$system" $required)" ]]; then
        say "using $system, which has all required packages"
        printf '%s\n' "$system"
        return
      fi
      options=(--system-site-packages) # keeps the PyTorch that is there
    fi
    "$system" -m venv ${options[@]+"${options[@]}"} "$venv" || die "could not create $venv; is the venv module of $system installed?"
    say "created $venv in $((SECONDS - start)) s"
  fi
  supported "$venv/bin/python" || die "$venv has an unsupported Python; vexact needs 3.11, 3.12 or 3.13"
  ensure_installed "$venv" "$extra"
  printf '%s\n' "$venv/bin/python"
}

main
