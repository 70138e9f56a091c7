"""verl's TrainingWorker and vexact's server in one process: no Ray, everything else is the real thing."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    RolloutConfig,
    SamplingConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.rollout.replica import RolloutMode
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested
from vexact_verl.adapter import VexactAdapter
from vexact_verl.server import VexactServer

from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.files import write_generation_config
from vexact.prepare.tiny_shapes import tiny_config
from vexact.prepare.tokenizers import character_tokenizer

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TEMPERATURE = 0.8
LONGEST = 24


def write_model(directory: Path) -> Path:
    """The tiny model's shape with random weights wide enough for log-probabilities to differ."""
    tokenizer = character_tokenizer()
    config = ModelConfig.from_hf_dict(tiny_config(tokenizer) | {"initializer_range": 0.2, "num_hidden_layers": 2})
    save_hf(random_model(config, seed=3).named_parameters(), config, directory)
    write_generation_config(directory, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.save_pretrained(directory)
    return directory


def rollout_config(precision: str, **changes: Any) -> RolloutConfig:
    settings: dict[str, Any] = {
        "name": "vexact",
        "tensor_model_parallel_size": 1,
        "dtype": DTYPES[precision],
        "temperature": TEMPERATURE,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "prompt_length": 32,
        "response_length": LONGEST,
        "ignore_eos": True,
        "val_kwargs": SamplingConfig(temperature=0),
        "seed": 3,
    }
    return RolloutConfig(**(settings | changes))


def engine_config(precision: str, strategy: str = "vexact", **changes: Any) -> FSDPEngineConfig:
    config = FSDPEngineConfig(
        mixed_precision={"param_dtype": precision} | changes.pop("mixed_precision", {}),
        use_torch_compile=False,
        max_token_len_per_gpu=256,
        infer_max_token_len_per_gpu=130,
        **changes,
    )
    object.__setattr__(config, "strategy", strategy)  # as verl's FSDPActorConfig does it
    return config


def make_worker(model_path: Path, precision: str, strategy: str = "vexact", **changes: Any) -> TrainingWorker:
    # verl's own engines need to be told; ours has no other attention
    override = {} if strategy == "vexact" else {"attn_implementation": "triton-invariant"}
    model = HFModelConfig(path=str(model_path), external_lib="vexact_verl.actor", override_config=override)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine_config(precision, strategy),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, lr_warmup_steps=2),
            checkpoint_config=CheckpointConfig(**changes),
        )
    )
    worker.reset()
    actor = FSDPActorConfig(
        strategy="fsdp2",
        ppo_mini_batch_size=8,
        ppo_micro_batch_size_per_gpu=8,
        use_dynamic_bsz=True,
        ppo_max_token_len_per_gpu=256,
        entropy_coeff=0.01,
        rollout_n=1,
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


class LocalHandle:
    """A server in this process that is called as if it were a Ray actor."""

    def __init__(self, server: VexactServer) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return _Remote(getattr(self._server, name))


class _Remote:
    def __init__(self, call: Any) -> None:
        self.remote = call


class Rollout:
    """A server and the adapter that feeds it."""

    def __init__(self, model_path: Path, precision: str, **changes: Any) -> None:
        config = rollout_config(precision, **changes)
        self.config = config
        self.server = VexactServer(config, {"path": str(model_path)}, "cpu", RolloutMode.HYBRID)
        self.adapter = VexactAdapter(config, HFModelConfig(path=str(model_path)), None)
        self.adapter._server = LocalHandle(self.server)

    def generate(self, prompts: list[list[int]], step: int, **params: Any) -> list[Any]:
        kind = {"temperature": self.config.temperature, "top_p": self.config.top_p, "top_k": self.config.top_k}
        request = kind | {"repetition_penalty": 1.0, "logprobs": True} | params

        async def everyone() -> list[Any]:
            calls = (self.server.generate(p, dict(request), f"{step}-{i}") for i, p in enumerate(prompts))
            return await asyncio.gather(*calls)

        return asyncio.run(everyone())

    def sync(self, worker: TrainingWorker, version: int) -> None:
        """What a hybrid worker does after a step, in its order."""

        async def update() -> None:
            await self.adapter.release()
            await self.adapter.resume(["weights"])
            weights, _ = worker.engine.get_per_tensor_param()
            await self.adapter.update_weights(weights, global_steps=version, base_sync_done=True, peft_config=None)
            await self.adapter.resume(["kv_cache"])

        asyncio.run(update())


def make_prompts(seed: int = 5, count: int = 8) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 19) for _ in range(draw.randrange(3, 30))] for _ in range(count)]


def jagged(rows: list[Any]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


class Step:
    """One batch of samples as verl's trainer hands it to a worker."""

    def __init__(self, prompts: list[list[int]], outputs: list[Any], num_fillers: int = 0) -> None:
        """The last ``num_fillers`` are what verl makes a batch divisible with: their tokens do not count."""
        responses = [output.token_ids for output in outputs]
        self.rollout_logprobs = jagged([torch.tensor(output.log_probs) for output in outputs])
        masks = [torch.ones(len(response), dtype=torch.long) for response in responses]
        for mask in masks[len(masks) - num_fillers :]:
            mask.zero_()
        self.data = {
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "input_ids": jagged([[*p, *r] for p, r in zip(prompts, responses, strict=True)]),
            "position_ids": jagged([torch.arange(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]),
            "response_mask": jagged(masks),
            "loss_mask": jagged(masks),
            "extra_fields": [output.extra_fields for output in outputs],
        }
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        self.plain = {"temperature": TEMPERATURE, "global_token_num": lengths}

    def logprobs(self, worker: TrainingWorker) -> torch.Tensor:
        """verl's pass for old log-probabilities: jagged (B, R)."""
        options = self.plain | {"calculate_entropy": True, "compute_loss": False}
        output = worker.infer_batch(tu.get_tensordict(dict(self.data), options))
        return response_from_nested(output["log_probs"], self.data["response_mask"])

    def num_different(self, old: torch.Tensor, rows: int | None = None) -> int:
        """Tokens whose log-probability has other bits than the rollout's, of the first ``rows`` sequences."""
        ours, theirs = (torch.cat(x.unbind()[:rows]).view(torch.int32) for x in (old, self.rollout_logprobs))
        return int((ours != theirs).sum())

    def diff_max(self, old: torch.Tensor) -> float:
        """verl's own metric, ``training/rollout_probs_diff_max``."""
        keys = {"rollout_log_probs": self.rollout_logprobs, "old_log_probs": old}
        keys |= {key: self.data[key] for key in ("response_mask", "responses")}
        padded = {key: torch.nested.to_padded_tensor(value, 0) for key, value in keys.items()}
        return calculate_debug_metrics(DataProto.from_single_dict(padded))["training/rollout_probs_diff_max"]

    def train(self, worker: TrainingWorker, old: torch.Tensor, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        lengths = old.offsets().diff().tolist()
        advantages = torch.randn(len(lengths), generator=generator)
        data = self.data | {
            "old_log_probs": old,
            "advantages": jagged([a.expand(n).clone() for a, n in zip(advantages, lengths, strict=True)]),
        }
        options = {"calculate_entropy": True, "global_batch_size": len(lengths), "update_lr_scheduler": True}
        return tu.get(worker.train_batch(tu.get_tensordict(data, self.plain | options)), "metrics")
