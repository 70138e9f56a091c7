#!/usr/bin/env bash
# Trains a tiny model on additions twice, on a CPU in about two minutes: with vLLM's samples, then with our own, and prints
# how many log-probabilities differ from the trainer's.  bash examples/vllm_baseline.sh [key=value...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VEXACT_BRIDGES=keep bash submodules/ci.sh vllm --collect-only -q >/dev/null # makes the environment
vexact=("$PWD/submodules/vllm/.venv/bin/python" -m vexact)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
tiny="${VEXACT_TINY:-outputs/tiny}"
[[ -f "$tiny/prepared.json" ]] || "${vexact[@]}" prepare tiny --out "$tiny"
for rollout in vllm vexact; do
  "${vexact[@]}" train recipe=tiny_arithmetic "trainer.logger=[console,jsonl]" \
    "actor_rollout_ref.rollout.name=$rollout" "actor_rollout_ref.model.path=$tiny/model" \
    "data.train_files=$tiny/train.parquet" "data.val_files=$tiny/test.parquet" data.val_max_samples=32 \
    trainer.total_training_steps=10 trainer.test_freq=10 trainer.save_freq=-1 trainer.resume_mode=disable \
    "trainer.default_local_dir=outputs/baseline_$rollout" "$@"
done
