#!/usr/bin/env bash
# A mixture of experts, Qwen3-30B-A3B. Arguments are configuration overrides, as those of
# examples/getting_started/run_qwen3_1b7.sh:
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that checkpoint on that data, on every GPU
#   none of them                                                     trains a tiny Qwen3-MoE, on any machine
#
# The memory plan of the real one fits eight GPUs of 141 GB; eight of 80 GB with
# actor_rollout_ref.rollout.enable_sleep_mode=true, which gives the rollout's weights back for every update, or with
# trainer.rollout_gpus=2, so that two sample and six train (trainer.async_steps=1 lets both work at once); and four of
# 80 GB in a machine of 512 GiB with
#
#   actor_rollout_ref.rollout.enable_sleep_mode=true actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096
#   actor_rollout_ref.actor.fsdp_config.expert_parallel_size=4
#
# expert_parallel_size also helps elsewhere, where tokens travel faster than experts.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/example.sh" qwen3_30b_a3b tiny_moe tiny_moe "$@"
