#!/usr/bin/env bash
# A mixture of experts, Qwen3-30B-A3B. Arguments are configuration overrides, as those of
# examples/getting_started/run_qwen3_1b7.sh:
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that checkpoint on that data, on every GPU
#   none of them                                                     trains a tiny Qwen3-MoE, on any machine
#
# The memory plan of the real one fits four GPUs of 141 GB or more. Eight of 80 GB take trainer.rollout_gpus=2, and
# trainer.async_steps=1 lets those two sample while the others train.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/example.sh" qwen3_30b_a3b tiny_moe tiny_moe "$@"
