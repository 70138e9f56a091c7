#!/usr/bin/env bash
# A mixture of experts, Qwen3-30B-A3B. Arguments are configuration overrides, as those of
# examples/getting_started/run_qwen3_1b7.sh:
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that checkpoint on that data, on every GPU
#   none of them                                                     trains a tiny Qwen3-MoE, on any machine
#
# The memory plan of the real one fits eight GPUs of 141 GB, or eight of 80 GB with trainer.rollout_gpus=2, so that two
# sample and six train; trainer.async_steps=1 lets both work at once. Add
# actor_rollout_ref.actor.fsdp_config.expert_parallel_size=2 where tokens travel faster than experts.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/example.sh" qwen3_30b_a3b tiny_moe tiny_moe "$@"
