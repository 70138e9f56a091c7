"""One GRPO run of the real program in processes of its own: its inputs, its launch, and what its rows say.

Shapes have random weights. Prompts and responses have fixed lengths, so that all runs of a shape do the same work.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.shared.family import end_family
from benchmarks.trainer.end_to_end import random_checkpoint, reward_file
from vexact.prepare.shapes import SHAPES as CHECKPOINTS

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
NO_TIME = "none before the time was up"
CHAT_TOKENS = 18  # of the byte tokenizer's chat template around a prompt
TIMES = ("gen", "gen_ahead", "old_log_prob", "adv", "update_actor", "update_weights", "audit", "step")
TINY = CHECKPOINTS["qwen3-0.6b"] | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
TINY_MOE = TINY | {
    **{key: CHECKPOINTS["qwen3-30b-a3b"][key] for key in ("architectures", "model_type", "norm_topk_prob")},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's config.json and the work of a step: prompts, samples of each, and tokens."""

    raw: dict
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    token_budget: int
    overrides: tuple[str, ...] = ()


OFFLOAD = (f"{ACTOR}.fsdp_config.param_offload=true", f"{ACTOR}.fsdp_config.optimizer_offload=true")
SHAPES = {
    "tiny": Shape(TINY, 4, 4, 24, 16, 128),
    "tiny-moe": Shape(TINY_MOE, 4, 4, 24, 16, 128),
    "qwen3-1.7b": Shape(CHECKPOINTS["qwen3-1.7b"], 64, 8, 512, 1024, 16384),
    # layers of the public checkpoints, as many as one GPU trains without offload
    "qwen3-30b-a3b": Shape(CHECKPOINTS["qwen3-30b-a3b"] | {"num_hidden_layers": 4}, 16, 8, 128, 576, 16384),
    "moonlight-16b-a3b": Shape(CHECKPOINTS["moonlight-16b-a3b"] | {"num_hidden_layers": 5}, 16, 8, 128, 576, 16384),
    "qwen3-8b": Shape(CHECKPOINTS["qwen3-8b"], 16, 8, 512, 1024, 8192, OFFLOAD),
}


def inputs(shape: Shape, work: Path, steps: int, seed: int = 0) -> list[str]:
    """Writes checkpoint, prompts and reward below ``work``, or takes the checkpoint of this shape that is there
    already; returns the overrides of every run of the shape."""
    work.mkdir(parents=True, exist_ok=True)
    raw = shape.raw | {"eos_token_id": 1, "rope_theta": 1e6}
    model = work / "model"
    if not _is_of_shape(model / "config.json", raw):
        random_checkpoint(raw, model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the runs, which have this GPU next
    draw = random.Random(seed)
    rows = [
        {
            "data_source": "random",
            "prompt": "".join(draw.choices("abcdefghij ", k=shape.prompt_tokens - CHAT_TOKENS)),
            "reward_model": {"ground_truth": ""},
        }
        for _ in range(shape.prompts * steps)
    ]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={work / 'prompts.jsonl'}",
        f"reward.custom_reward_function.path={reward_file(work / 'reward.py')}",
        f"data.max_prompt_length={shape.prompt_tokens}",
        f"data.max_response_length={shape.new_tokens}",
        f"data.train_batch_size={shape.prompts}",
        f"{ROLLOUT}.n={shape.samples}",
        f"{ROLLOUT}.ignore_eos=true",
        f"{ACTOR}.optim.lr=1e-5",
        f"{ACTOR}.ppo_max_token_len_per_gpu={shape.token_budget}",
        f"trainer.total_training_steps={steps}",
        "trainer.samples_per_step=0",
        "trainer.logger=[console,jsonl]",
        *shape.overrides,
    ]


def _is_of_shape(config: Path, raw: dict) -> bool:
    """Whether a whole checkpoint of this shape is there: its config.json is written last."""
    return config.is_file() and raw.items() <= json.loads(config.read_text()).items()


def visible_gpus(count: int) -> list[str]:
    """The first GPUs of those that CUDA_VISIBLE_DEVICES names; of all, where it is not set.

    Raises:
        ValueError: there are fewer.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    found = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if len(found) < count:
        raise ValueError(f"{count} GPUs are wanted and {len(found)} are visible; lower --runs")
    return found[:count]


def command(gpus: int, launcher: str, overrides: Sequence[str], program: str = "vexact") -> list[str]:
    """The command line of a run; ``launcher`` starts the processes of several GPUs: torchrun, or ray by the program."""
    train = ["-m", program, "train", *overrides]
    if gpus == 1 or launcher == "ray":
        return [sys.executable, *train]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", *train]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has ended well, or what one has to show that ran out of time."""

    rows: list[dict]  # of metrics.jsonl, one per step
    directory: Path
    wall_s: float
    peak_bytes: int | None  # of the fullest GPU, as the driver sees it; None without a GPU
    attention: str  # what the rollout attends with, by name


class OutOfTime(RuntimeError):
    """The time of ``run`` was up after its first step or later; its rows are all that it finished."""

    def __init__(self, run: Finished) -> None:
        super().__init__(f"the time was up after step {len(run.rows)}")
        self.run = run


def train(
    gpus: int,
    launcher: str,
    overrides: Sequence[str],
    directory: Path,
    timeout_s: float,
    stop_after: int | None = None,
    program: str = "vexact",
) -> Finished:
    """
    Args:
        stop_after: interrupt the run after so many steps, before it saves a checkpoint that no disk has room for.
        program: the module that trains, with the command line of ``vexact``.

    Raises:
        OutOfTime: the time was up after its first step or later.
        RuntimeError: the run failed, or the time was up before that; the message ends with its last lines. None of its
            processes is left.
    """
    environment, devices = dict(os.environ), None
    if torch.cuda.is_available():
        devices = environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(gpus))
    directory.mkdir(parents=True, exist_ok=True)
    log, started = directory.parent / f"{directory.name}.log", time.monotonic()
    endless = [] if stop_after is None else ["trainer.total_training_steps=1000000"]
    line = command(gpus, launcher, [*overrides, *endless, f"trainer.default_local_dir={directory}"], program)
    with (
        _peak_memory(devices) as peak,
        log.open("w") as output,
        subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        code = wait(process, directory / "metrics.jsonl", started + timeout_s, stop_after)
    seconds, said = time.monotonic() - started, log.read_text(errors="replace")
    steps = _steps(directory / "metrics.jsonl")
    finished = Finished(steps, directory, seconds, max(peak, default=0) or None, attention(said))
    if code == NO_TIME and steps:
        raise OutOfTime(finished)
    if code != 0:
        tail = "\n".join(said.splitlines()[-30:])
        raise RuntimeError(f"{' '.join(line)}\nexit code {code}; the end of {log}:\n{tail}")
    return finished


def _steps(metrics: Path) -> list[dict]:
    """Rows of whole training steps; a last line that is cut is none."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "timing_s/step" in row and "actor/loss" in row]


def attention(log: str) -> str:
    """What the engine of a run said that it attends with; only one on stock operators has anything to say.

    >>> attention("INFO rollout on stock operators (batch_invariant=false), attention: sdpa (no CUDA graphs)\\n")
    'sdpa (no CUDA graphs)'
    """
    found = re.search(r"rollout on stock operators .*, attention: (.*)", log)
    return found[1].strip() if found else "triton-invariant"


def wait(process: subprocess.Popen, rows: Path, deadline: float, stop_after: int | None) -> int | str:
    """The exit code; 0 for a run that was interrupted where it was to stop, and has no step to lose if the time is up
    while it is still leaving."""
    has_stopped = False
    while process.poll() is None:
        if stop_after is not None and not has_stopped:
            has_stopped = len(_steps(rows)) >= stop_after
            if has_stopped:
                process.send_signal(signal.SIGINT)
        if time.monotonic() > deadline:
            end_family(process)
            return 0 if has_stopped else NO_TIME
        time.sleep(0.2)
    return 0 if has_stopped else process.returncode


def figures(run: Finished) -> dict:
    """Counts over all steps, and the median times of all but the first, in which kernels compile."""
    timed = run.rows[1:] or run.rows
    seconds = {name: [row[f"timing_s/{name}"] for row in timed if f"timing_s/{name}" in row] for name in TIMES}
    return {
        "steps": len(run.rows),
        "tokens_compared": int(sum(row.get("bitwise/tokens_compared", 0) for row in run.rows)),
        "tokens_different": int(sum(row.get("bitwise/tokens_different", 0) for row in run.rows)),
        "routes_compared": int(sum(row.get("bitwise/routes_compared", 0) for row in run.rows)),
        "routes_different": int(sum(row.get("bitwise/routes_different", 0) for row in run.rows)),
        "tokens_sampled": int(sum(row["rollout/num_tokens"] for row in run.rows)),
        "prompt_tokens": run.rows[0]["prompt_length/mean"],
        "response_tokens": run.rows[0]["response_length/mean"],
        "graph_ratio": run.rows[-1].get("rollout/graph_ratio"),
        "attention": run.attention,
        "grad_norm": [row["actor/grad_norm"] for row in run.rows],
        **_ahead(run.rows),
        "step_s": [round(row["timing_s/step"], 2) for row in run.rows],
        "beside_steps_s": round(run.wall_s - sum(row["timing_s/step"] for row in run.rows), 1),
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items() if values},
        "peak_gib": None if run.peak_bytes is None else round(run.peak_bytes / 2**30, 2),
        "wall_s": round(run.wall_s, 1),
    }


def _ahead(rows: list[dict]) -> dict:
    """How old the samples of each step were, where they are generated ahead."""
    ages = [row["rollout/staleness/max"] for row in rows if "rollout/staleness/max" in row]
    return {"staleness": ages} if ages else {}


@contextmanager
def _peak_memory(devices: str | None) -> Iterator[list[int]]:
    """Appends the memory in use on the fullest of these GPUs, in bytes, twice a second."""
    seen: list[int] = []
    if devices is None:
        yield seen
        return
    ended = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "-i", devices, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not ended.wait(0.5):
            result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            used = [int(line) * 2**20 for line in result.stdout.split() if line.isdigit()]
            seen.append(max(used, default=0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
