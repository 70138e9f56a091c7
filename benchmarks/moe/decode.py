"""Decode steps of whole models with experts, of random weights, beside the time it takes to read what a step needs.

    python -m benchmarks.moe.decode --out benchmarks/results/moe_decode_h100.json
    python -m benchmarks.moe.decode --shapes moonlight-16b-a3b --sequences 64
    python -m benchmarks.moe.decode --shapes tiny-moe --sequences 4           # on a CPU, in seconds

A step's bytes are those of all weights but the embedding, the matrices of the experts that its tokens chose, and each
sequence's keys and values; the experts are counted by running the sampled tokens through the training forward, whose
routes are the same. Its floor is the time to read them at 3.0 TB/s; its time is from one step's return to the next
one's, host included, the median while every sequence decodes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.shared.clock import machine
from benchmarks.shared.options import at_least_one, out_file
from benchmarks.shared.roofline import HBM_BYTES_PER_S
from benchmarks.trainer.grpo_run import SHAPES as RUNS
from vexact.device import resolve_device
from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.models.layers import MoE
from vexact.prepare.shapes import SHAPES
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.execution.runner import kv_page_bytes
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

PROMPT_TOKENS, NEW_TOKENS, WARM_STEPS = 128, 160, 16
COUNTED = 8  # steps whose experts are counted


def random_model(raw: dict[str, Any], dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Weights N(0, 0.02), drawn where they stay."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_hf_dict(raw)).to(dtype)
    model.to_empty(device=device)
    model.init_rope(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    return model


def decode(engine: Engine, prompts: Sequence[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
    """The responses, and seconds of every step in which all sequences decode."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    ids = [engine.add_request(prompt, params)[0] for prompt in prompts]
    samples, times = {}, []
    before = time.perf_counter()
    while engine.has_unfinished:
        for sample in engine.step():
            samples[sample.request_id] = list(sample.token_ids)
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return [samples[one] for one in ids], times[-(new - WARM_STEPS) :]


def experts_hit(model: CausalLM, sequences: list[TokenSequence], device: torch.device) -> dict[MoE, float]:
    """How many experts of each layer the tokens of a step chose, on average over COUNTED steps."""
    prompt, new = len(sequences[0].prompt), len(sequences[0].response)  # all are alike
    steps = [WARM_STEPS + i * (new - WARM_STEPS - 1) // COUNTED for i in range(COUNTED)]
    first = torch.arange(len(sequences)) * sequences[0].num_input_tokens + prompt
    found: dict[MoE, float] = {}

    def count(layer: MoE) -> Any:
        def see(_router: nn.Module, _inputs: Any, output: Any) -> None:
            rows = [(first + step).to(output[0].experts.device) for step in steps]
            found[layer] = statistics.mean(output[0].experts[at].unique().numel() for at in rows)

        return layer.router.register_forward_hook(see)

    hooks = [count(layer) for layer in model.modules() if isinstance(layer, MoE)]
    with torch.no_grad():
        token_scores(model, pack_tokens(sequences, device))
    for hook in hooks:
        hook.remove()
    return found


def step_bytes(model: CausalLM, hit: dict[MoE, float], tokens: float) -> dict[str, float]:
    """What a step reads, with ``tokens`` of all sequences in the cache."""
    experts = {p for layer in hit for p in layer.experts.parameters()}
    dense = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if p not in experts and (not name.startswith("embed") or model.config.tie_word_embeddings)
    )
    chosen = sum(
        share * sum(p[0].numel() * p.element_size() for p in layer.experts.parameters()) for layer, share in hit.items()
    )
    return {"dense": float(dense), "experts": chosen, "keys_and_values": tokens * kv_page_bytes(model, 1)}


def measure(name: str, counts: Sequence[int], prompt: int, new: int) -> dict[str, Any]:
    raw = (SHAPES[name] if name in SHAPES else RUNS[name].raw) | {"eos_token_id": 1}
    device = torch.device(resolve_device("auto"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(raw, dtype, device)
    room = int(1.3 * max(counts) * (prompt + new + 16) * kv_page_bytes(model, 1))
    engine = Engine(model=model, max_num_seqs=max(counts), max_model_len=prompt + new, kv_cache_bytes=room)
    chance, record, size = random.Random(0), {}, sum(p.numel() for p in model.parameters())
    print(f"{name}: {size / 1e9:.1f} B parameters, {raw['num_hidden_layers']} layers")
    for count in counts:
        prompts = [[chance.randrange(raw["vocab_size"]) for _ in range(prompt)] for _ in range(count)]
        responses, times = decode(engine, prompts, new)
        graphs = engine.stats()["rollout/graph_ratio"]
        sequences = [TokenSequence(p, r) for p, r in zip(prompts, responses, strict=True)]
        hit = experts_hit(model, sequences, device)
        parts = step_bytes(model, hit, count * (prompt + (WARM_STEPS + new) / 2))
        floor, seconds = sum(parts.values()) / HBM_BYTES_PER_S, statistics.median(times)
        record[count] = {
            "step_ms": seconds * 1e3,
            "floor_ms": floor * 1e3,
            "of_roofline": floor / seconds,
            "tokens_per_s": count / seconds,
            "experts_hit": statistics.mean(hit.values()),
            "graph_ratio": graphs,
            "gb": {part: value / 1e9 for part, value in parts.items()},
        }
        print(f"{count:4d} sequences: " + json.dumps(record[count]), flush=True)
    return {"layers": raw["num_hidden_layers"], "prompt_tokens": prompt, "new_tokens": new, "steps": record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b", "moonlight-16b-a3b"])
    parser.add_argument("--sequences", type=at_least_one, nargs="+", default=[1, 16, 64])
    parser.add_argument("--out", type=out_file)
    arguments = parser.parse_args()
    report = machine() | {"shapes": {}}
    for name in arguments.shapes:
        prompt, new = (PROMPT_TOKENS, NEW_TOKENS) if name in SHAPES else (24, 32)
        report["shapes"][name] = measure(name, arguments.sequences, prompt, new)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
