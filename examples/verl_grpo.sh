#!/usr/bin/env bash
# GRPO by verl's own trainer, with vexact's rollout and training engine. Arguments are verl's configuration overrides:
#
#   bash verl_grpo.sh trainer.total_training_steps=20
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that Hugging Face checkpoint on that data
#   none of them                                                     trains a tiny model on arithmetic, on any machine
#
# verl logs `training/rollout_probs_diff_max:0.0` in every step: what was sampled is what is trained.
# PYTHON names an interpreter that has vexact-verl; by default one is made in submodules/verl/.venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/submodules/verl/.venv/bin/python}"
if [[ -z "${PYTHON:-}" && ! -f "$root/submodules/verl/.venv/.bridge" ]]; then
  # made, or finished, by the tests' script, which collects the tests and runs none
  VEXACT_BRIDGES=keep bash "$root/submodules/ci.sh" verl --collect-only -q >/dev/null
fi
unset RAY_ADDRESS # the cluster is this run's own
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"

machine=(+ray_kwargs.ray_init.include_dashboard=False)
if ! { command -v nvidia-smi && nvidia-smi; } >/dev/null 2>&1; then
  export VERL_PLATFORM=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  # verl places workers by GPUs and CPUs that it counts, not uses
  machine+=(trainer.device=cpu +ray_kwargs.ray_init.num_gpus=1 ray_kwargs.ray_init.num_cpus=8)
fi

task=()
if [[ -n "${model_dir:-}${train_path:-}" ]]; then
  model="${model_dir:?give model_dir and train_path together}"
  train="${train_path:?give model_dir and train_path together}"
  test="${test_path:-$train}"
else
  tiny="$("$python" -m vexact_verl.tiny "${VEXACT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vexact}/tiny_verl")"
  model="$tiny/model" train="$tiny/train.parquet" test="$tiny/test.parquet"
  task=(
    data.train_batch_size=16 data.max_prompt_length=16 data.max_response_length=8 data.dataloader_num_workers=0
    actor_rollout_ref.rollout.n=8 actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.optim.lr=2e-4
    "reward.custom_reward_function.path=$root/vexact/reward/graders/exact.py"
    trainer.total_training_steps=4 trainer.val_before_train=False
  )
fi

exec "$python" -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \
  "actor_rollout_ref.model.path=$model" "data.train_files=$train" "data.val_files=$test" \
  actor_rollout_ref.model.external_lib=vexact_verl.actor \
  actor_rollout_ref.actor.strategy=vexact actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.rollout.name=vexact actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.agent.num_workers=1 reward.num_workers=1 \
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
  trainer.n_gpus_per_node=1 trainer.save_freq=-1 trainer.test_freq=-1 'trainer.logger=["console"]' \
  "${machine[@]}" ${task[@]+"${task[@]}"} "$@"
