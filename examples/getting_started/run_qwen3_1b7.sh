#!/usr/bin/env bash
# The main job. Arguments are configuration overrides: bash run_qwen3_1b7.sh trainer.total_training_steps=10
#
#   model_dir=DIR train_path=train.parquet [test_path=test.parquet]   trains that Hugging Face checkpoint on that data
#   none of them                                                     trains a tiny model on arithmetic, on any machine
#
# Data may also be a procedural task: train_path='reasoning_gym:chain_sum?size=2000&seed=1'.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/example.sh" qwen3_1b7 tiny tiny_arithmetic "$@"
