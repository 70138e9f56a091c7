"""What verl's configuration asks for is done, or refused by name."""

import math
import shutil

import pytest
import torch
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
from verl.workers.config.engine import QATEngineConfig
from vexact_verl.checkpoint import Checkpoints
from vexact_verl.settings import actor_config, learning_rate
from worker_support import engine_config, make_worker

from vexact.weights.model_checksums import named_checksums


def refusal(model_path, model=None, engine=None, optim=None):
    with pytest.raises(ValueError, match=r"^actor\.strategy=vexact: ") as caught:
        actor_config(
            HFModelConfig(path=str(model_path), **(model or {})),
            engine_config("bf16", **(engine or {})),
            FSDPOptimizerConfig(**(optim or {})),
            2,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "engine", "optim", "message"),
    [
        ({"lora_rank": 8}, {}, {}, "LoRA is not built in"),
        ({"use_liger": True}, {}, {}, "model.use_liger=True"),
        ({"tiled_mlp": {"enabled": True, "num_shards": 4}}, {}, {}, "model.tiled_mlp.enabled=True"),
        ({"override_config": {"attn_implementation": "sdpa"}}, {}, {}, "attn_implementation=sdpa"),
        ({"override_config": {"rope_theta": 5.0}}, {}, {}, "the model is what its config.json says"),
        ({}, {"ulysses_sequence_parallel_size": 2}, {}, "ulysses_sequence_parallel_size=2"),
        ({}, {"fsdp_size": 1}, {}, "fsdp_size=1: weights are sharded over all 2 ranks"),
        ({}, {"offload_policy": True}, {}, "offload_policy"),
        ({}, {"pad_to_length": True}, {}, "pad_to_length"),
        ({}, {"model_dtype": "bf16"}, {}, "master weights are fp32"),
        ({}, {"qat": QATEngineConfig(enable=True)}, {}, "quantised training"),
        ({}, {"mixed_precision": {"param_dtype": "bf16", "buffer_dtype": "bf16"}}, {}, "the rotary table is fp32"),
        ({}, {}, {"optimizer": "Adafactor"}, "torch.optim.Adafactor: only AdamW"),
        ({}, {}, {"override_optimizer_config": {"amsgrad": True}}, "amsgrad; only eps can be set"),
    ],
)
def test_what_cannot_be_honoured_is_named(model_path, model, engine, optim, message):
    assert message in refusal(model_path, model, engine, optim)


def test_another_configuration_than_the_models_is_refused(model_path, tmp_path):
    shutil.copytree(model_path, tmp_path / "other")
    assert "/other: the model is what config.json in model.path says" in refusal(
        model_path, {"hf_config_path": str(tmp_path / "other")}
    )


def test_all_refusals_come_at_once(model_path):
    found = refusal(model_path, {"lora_rank": 8}, {"pad_to_length": True}, {"optimizer": "SGD"})
    assert all(part in found for part in ("LoRA", "pad_to_length", "torch.optim.SGD"))


def test_the_learning_rate_is_verls(model_path):
    cosine = {"lr": 2.0, "lr_scheduler_type": "cosine", "total_training_steps": 10, "min_lr_ratio": 0.1}
    rate = learning_rate(FSDPOptimizerConfig(**cosine, lr_warmup_steps=2))
    assert [rate(0), rate(1), rate(2)] == [0.0, 1.0, 2.0]
    assert rate(6) == pytest.approx(2.0 * (0.55 + 0.45 * math.cos(math.pi * 0.5)))
    assert rate(10) == pytest.approx(0.2)
    constant = learning_rate(FSDPOptimizerConfig(lr=3.0, total_training_steps=10, lr_warmup_steps_ratio=0.2))
    assert [constant(step) for step in (0, 1, 2, 9)] == [0.0, 1.5, 3.0, 3.0]


def test_a_step_whose_gradient_is_no_number_changes_nothing(model_path, caplog):
    worker = make_worker(model_path, "fp32")
    engine, before = worker.engine, named_checksums(worker.engine.module)
    for parameter in engine.module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert math.isnan(engine.optimizer_step())
    assert "the optimizer step was skipped" in caplog.text
    assert named_checksums(engine.module) == before


def test_checkpoints_without_the_model_are_refused(model_path):
    actor = make_worker(model_path, "fp32").engine.actor
    model = HFModelConfig(path=str(model_path))
    with pytest.raises(ValueError, match="must name `model`"):
        Checkpoints(actor, model, CheckpointConfig(save_contents=["optimizer"]))
    with pytest.raises(ValueError, match="async_save=True is not built in"):
        Checkpoints(actor, model, CheckpointConfig(async_save=True))
