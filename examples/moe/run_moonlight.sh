#!/usr/bin/env bash
# Experts and latent attention, Moonlight-16B-A3B (DeepSeek-V3). Arguments are configuration overrides, as those of
# examples/getting_started/run_qwen3_1b7.sh:
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that checkpoint on that data, on every GPU
#   none of them                                                     trains a tiny twin, on any machine
#
# The memory plan of the real one fits eight GPUs of 80 GB, or two of 141 GB. Add
# actor_rollout_ref.actor.fsdp_config.expert_parallel_size=2 where tokens travel faster than experts.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/example.sh" moonlight tiny_moonlight tiny_moonlight "$@"
