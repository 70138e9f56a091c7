#!/usr/bin/env bash
# Types and tests with the newest version of every package that there is today, in .venv-newest; says which versions are
# newer than the tested ones of constraints/. The tests are those that lean on other packages than torch and triton, which
# stay. Without a network: PIP_NO_INDEX=1 (or UV_OFFLINE=1) leaves this out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf 'newest: %s\n' "$*" >&2; }
versions() { # PYTHON -> name==version of all that is installed, one a line
  "$1" -c 'from importlib.metadata import distributions
names = {d.name.lower().replace("_", "-").replace(".", "-"): d.version for d in distributions()}
left_out = {"pip", "setuptools", "vexact"}
print(*sorted(f"{name}=={names[name]}" for name in names.keys() - left_out), sep="\n")'
}

if [[ -n "${PIP_NO_INDEX:-}${UV_OFFLINE:-}" ]]; then
  say "not run: PIP_NO_INDEX or UV_OFFLINE says that there is no network"
  exit 0
fi
tested="$(bash scripts/setup.sh)"
if "$tested" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
  say "not run: $tested is used as it is, and nothing is installed on this machine"
  exit 0
fi
python="$(bash scripts/setup.sh --newest)"
newer="$(LC_ALL=C comm -13 <(versions "$tested") <(versions "$python") | paste -sd ' ')"
if [[ -z "$newer" ]]; then
  say "the tested versions are the newest ones of all packages: nothing further to test"
  exit 0
fi
say "$("$python" --version) with $newer"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$python" -m mypy --no-error-summary
rooms=( # those with long tests first, so that none is left alone at the end
  # all packages in one run, and under Ray
  tests/test_tutorial.py tests/trainer/ranks/test_trainer_ranks.py::test_ray_gives_the_weights_of_one_process
  tests/trainer/checkpoint tests/trainer/preflight tests/trainer/run tests/trainer/workers
  tests/distributed/test_ray.py tests/distributed/test_remote_group.py
  # transformers, tokenizers, safetensors
  tests/models tests/prepare tests/swaps tests/ops/test_hf_attention.py tests/audit/verify tests/rollout/requests
  tests/training/test_grpo_matches_transformers.py
  tests/report tests/reward tests/serve # wandb, tensorboard, plotly; math-verify, reasoning-gym; starlette, openai
  tests/config tests/data # hydra, omegaconf, pyarrow
  tests/test_cli*.py tests/test_import_does_no_work.py tests/test_plugins.py
)
ours=( # in those rooms, but about processes and memory of our own
  tests/reward/test_hostile_graders.py tests/reward/test_reward_pool.py tests/reward/test_sandbox.py
  tests/serve/test_serve_soak.py tests/trainer/run/test_trainer_heap.py tests/trainer/run/test_trainer_sleep.py
)
"$python" -m pytest -n auto --dist loadfile --max-worker-restart=0 --no-loadscope-reorder "$@" \
  "${ours[@]/#/--ignore=}" "${rooms[@]}"
