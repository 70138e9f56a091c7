"""Whole training runs on one GPU: how many log-probabilities were compared, how many differed, and where the time went.

    python -m benchmarks.trainer.end_to_end --runs tiny qwen3-1.7b --out benchmarks/results/end_to_end_h100.json

``tiny`` is the embedded default, ``qwen3-1.7b`` has that shape with random weights, ``smollm2`` wants --smollm2 DIR,
which ``vexact prepare smollm2`` makes. Every run is the ordinary trainer; rows are read from its metrics.jsonl.
Overrides come first. Where several runs share a GPU, fix what each takes, since the default is half of what is free:

    python -m benchmarks.trainer.end_to_end actor_rollout_ref.rollout.kv_cache_bytes=4000000000 --runs tiny
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shared.clock import machine
from benchmarks.shared.options import out_file
from vexact.config import load_config
from vexact.device import resolve_device
from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.models.load import save_hf
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.trainer.launch import run

QWEN3_1B7 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def random_checkpoint(raw: dict, path: Path) -> Path:
    """Random bf16 weights of this shape, drawn on the GPU, with a tokenizer that decodes every id to text."""
    config = ModelConfig.from_hf_dict(raw)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(config).named_parameters()}
    device = resolve_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    draw = (
        (n, torch.ones(s) if n.endswith("norm.weight") else torch.randn(s, device=device, generator=generator) * 0.02)
        for n, s in shapes.items()
    )
    save_hf(((name, tensor.bfloat16()) for name, tensor in draw), config, path)
    byte_tokenizer(config.vocab_size).save_pretrained(path)
    return path


def write_prompts(path: Path, count: int, length: int) -> Path:
    """Prompts of many different lengths up to ``length`` characters, so that every tile, page and chunk edge is met."""
    rows = (
        {
            "data_source": "length",
            "prompt": "lorem ipsum " * (1 + i * length // (12 * count)),
            "reward_model": {"ground_truth": ""},
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward_file(path: Path) -> Path:
    """A reward that random samples vary: the share of even digits (a random id of the vocabulary decodes to digits)."""
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return sum(c in '02468' for c in solution_str) / max(1, len(solution_str))\n"
    )
    return path


def overrides(name: str, work: Path, smollm2: str | None) -> list[str]:
    if name == "tiny":
        from vexact.prepare import prepare

        tiny = prepare("tiny", work / "tiny")
        return [
            "recipe=tiny_arithmetic",
            f"actor_rollout_ref.model.path={tiny / 'model'}",
            f"data.train_files={tiny / 'train.parquet'}",
            f"data.val_files={tiny / 'test.parquet'}",
        ]
    if name == "smollm2":
        return [
            "recipe=smollm2_chain_sum",
            f"actor_rollout_ref.model.path={smollm2}",
            "data.train_batch_size=16",
            "data.max_response_length=128",
            f"{ACTOR}.ppo_max_token_len_per_gpu=16384",
            "trainer.total_training_steps=20",
            "trainer.test_freq=-1",
            "trainer.val_before_train=false",
        ]
    model = random_checkpoint(QWEN3_1B7, work / "qwen3-1.7b")
    return [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={write_prompts(work / 'prompts.jsonl', 64, 3000)}",
        f"reward.custom_reward_function.path={reward_file(work / 'reward.py')}",
        "data.max_prompt_length=4096",
        "data.max_response_length=640",
        "data.train_batch_size=16",
        f"{ROLLOUT}.n=4",
        f"{ROLLOUT}.ignore_eos=true",
        f"{ROLLOUT}.max_num_batched_tokens=8192",
        f"{ACTOR}.optim.lr=1e-5",
        f"{ACTOR}.ppo_max_token_len_per_gpu=16384",
        "trainer.total_training_steps=3",
        "trainer.save_freq=-1",
    ]


def summarise(rows: list[dict], seconds: float) -> dict:
    steps = [row for row in rows if "bitwise/tokens_compared" in row]
    keep = ("gen", "update_actor", "update_weights", "step")
    audit = [row["timing_s/audit"] / row["timing_s/step"] for row in steps[1:] or steps]  # kernels compile in the first
    return {
        "steps": len(steps),
        "tokens_compared": int(sum(row["bitwise/tokens_compared"] for row in steps)),
        "tokens_different": int(sum(row["bitwise/tokens_different"] for row in steps)),
        "routes_compared": int(sum(row.get("bitwise/routes_compared", 0) for row in steps)),
        "routes_different": int(sum(row.get("bitwise/routes_different", 0) for row in steps)),
        "rollout_probs_diff_max": max(row["training/rollout_probs_diff_max"] for row in steps),
        "rollout_probs_diff_mean": max(row["training/rollout_probs_diff_mean"] for row in steps),
        "audit_share_of_step_max": round(max(audit), 5),
        "audit_share_of_step_mean": round(sum(audit) / len(audit), 5),
        "grad_norm_min": min(row["actor/grad_norm"] for row in steps),
        "grad_norm_max": max(row["actor/grad_norm"] for row in steps),
        "reward_first": steps[0]["critic/score/mean"],
        "reward_last": steps[-1]["critic/score/mean"],
        "response_length_max": max(row["response_length/max"] for row in steps),
        "last_step_s": {name: round(steps[-1][f"timing_s/{name}"], 3) for name in keep},
        "wall_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["tiny", "qwen3-1.7b"], choices=("tiny", "smollm2", "qwen3-1.7b"))
    parser.add_argument("--smollm2", help="checkpoint directory")
    parser.add_argument("--out", type=out_file)
    parser.add_argument("more", nargs="*", metavar="key=value", help="overrides for every run")
    arguments = parser.parse_intermixed_args()
    report = {
        **machine(),
        "overrides": arguments.more,
        "runs": {},
    }
    for name in arguments.runs:
        work = Path(tempfile.mkdtemp())
        common = ["trainer.logger=[console,jsonl]", f"trainer.default_local_dir={work / 'run'}"]
        started = time.monotonic()
        run(load_config([*overrides(name, work, arguments.smollm2), *common, *arguments.more]))
        rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
        report["runs"][name] = summarise(rows, time.monotonic() - started)
        print(name, json.dumps(report["runs"][name]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
