"""Cost of auditing the draws: updates on the same samples with no draw, a share and all of them repeated, in turn.

    python -m benchmarks.trainer.audit --shape qwen3-1.7b --out benchmarks/results/audit_h100.json

Peer: the same update without repeated draws (``trainer.audit_redraw_ratio=0``). The learning rate is 0, so that every
update sees the weights that the samples were drawn with. ``--shape tiny`` is the shape of the embedded default.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time

import numpy as np
import torch

from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.end_to_end import QWEN3_1B7
from vexact.audit import Audit
from vexact.config.schema import Config
from vexact.device import resolve_device
from vexact.models import CausalLM, ModelConfig, random_model
from vexact.rollout import Engine, EngineConfig, SamplingParams
from vexact.rollout.requests.request import draw_settings
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import Sample, TrainSequence

TINY = QWEN3_1B7 | {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
SHAPES = {"tiny": (TINY, 256, 6, 3), "qwen3-1.7b": (QWEN3_1B7, 64, 1024, 512)}
"""Configuration, sequences, longest prompt, new tokens."""
DEFAULT = Config().trainer.audit_redraw_ratio


def sides(raw: dict, count: int, length: int, device: str, dtype: str) -> tuple[Engine, Actor]:
    """Both with the same random weights; the engine has pages for ``count`` sequences of ``length`` tokens."""
    model = random_model(ModelConfig.from_hf_dict(raw), 0, device=device)
    optim = OptimConfig(lr=0.0, weight_decay=0.0)
    config = ActorConfig(dtype=dtype, optim=optim, enable_gradient_checkpointing=True)
    actor = Actor(copy.deepcopy(model), config, device)
    page = EngineConfig().page_size
    max_model_len = min(4096, raw["max_position_embeddings"])
    return Engine(
        model=_in(model, dtype), max_model_len=max_model_len, page_size=page, num_pages=count * -(-length // page)
    ), actor


def _in(model: CausalLM, dtype: str) -> CausalLM:
    for parameter in model.parameters():  # but not the rotary table, which stays fp32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def timed_update(actor: Actor, samples: list[Sample], params: SamplingParams, ratio: float) -> tuple[float, dict]:
    audit = Audit("strict", ratio)
    audit.begin(samples, [draw_settings(params, 0, sample.request_id) for sample in samples])
    sequences = [TrainSequence(sample, np.ones(len(sample.token_ids), np.float32)) for sample in samples]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    actor.update(sequences, audit.check, redraw=audit.redraw)  # ends with the gradient norm on the host
    return time.perf_counter() - started, audit.metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    raw, count, longest, new = SHAPES[arguments.shape]
    engine, actor = sides(raw, count, longest + new, device, "float32" if device == "cpu" else "bfloat16")
    rng = random.Random(0)
    prompts = [[rng.randrange(raw["vocab_size"]) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    samples = engine.generate(prompts, params)
    started = time.perf_counter()
    samples = engine.generate(prompts, params, [f"audit/{index}" for index in range(count)])
    generation = time.perf_counter() - started
    seconds: dict[float, list[float]] = {0.0: [], DEFAULT: [], 1.0: []}
    redrawn = different = 0.0
    for repeat in range(arguments.repeats + 1):
        for ratio, times in seconds.items():
            elapsed, metrics = timed_update(actor, samples, params, ratio)
            redrawn += metrics.get("bitwise/tokens_redrawn", 0.0)
            different += metrics.get("bitwise/tokens_redrawn_different", 0.0) + metrics["bitwise/tokens_different"]
            if repeat:  # kernels are compiled in the first
                times.append(elapsed)
    medians = {ratio: statistics.median(times) for ratio, times in seconds.items()}
    step = generation + medians[0.0]
    report = {
        **machine(),
        "shape": arguments.shape,
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "draws_repeated": int(redrawn),
        "different": int(different),
        "generation_s": round(generation, 4),
        "update_s": {str(ratio): round(median, 4) for ratio, median in medians.items()},
        "share_of_step": {str(ratio): round((median - medians[0.0]) / step, 5) for ratio, median in medians.items()},
    }
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
