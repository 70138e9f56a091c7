"""Every metric name and what it means: the source of ``docs/metrics.md``."""

from __future__ import annotations

import re
from functools import cache

_SPREAD = "{mean,max,min}"

# Section -> name -> meaning. ``{a,b}`` stands for several names, ``<x>`` for any text.
METRICS: dict[str, dict[str, str]] = {
    "Exactness": {
        "bitwise/tokens_compared": "Sampled tokens whose fp32 log-probability was compared as 32-bit patterns, rollout "
        "against the training forward of the first optimizer step.",
        "bitwise/tokens_different": "How many of them differ in any bit, or are not finite. Expected: 0.",
        "bitwise/tokens_nonfinite": "How many of these are NaN or infinite on either side, whatever their bits. "
        "Expected: 0.",
        "bitwise/sequences_different": "Samples with at least one such token. Expected: 0.",
        "bitwise/max_ulp": "Largest distance in units in the last place. Expected: 0.",
        "bitwise/max_abs_logprob_diff": "Largest absolute difference of log-probabilities (nats); infinite when one is "
        "not finite. Expected: 0.",
        "bitwise/first_different_position": "Position in the response of the first different token; -1: none.",
        "bitwise/tokens_redrawn": "Sampled tokens that were drawn again, from the trainer's logits and what the "
        "request asked for (trainer.audit_redraw_ratio).",
        "bitwise/tokens_redrawn_different": "How many of them came out as another token, or from another kept set. "
        "Expected: 0.",
        "bitwise/routes_compared": "Of a model with experts: sampled tokens whose experts were compared, those of all "
        "layers for the row that predicted the token, rollout against training forward.",
        "bitwise/routes_different": "How many of them went to other experts, in any layer. Expected: 0.",
        "bitwise/weights_checksum_ok": "1 when the rollout's weights have the checksum of the trainer's after a sync.",
        "training/rollout_probs_diff_valid": "1 when probabilities were compared in this step and all were finite.",
        "training/rollout_probs_diff_{max,mean,std}": "Absolute difference of *probabilities* exp(log-prob), rollout "
        "against training, as in verl. Expected: exactly 0.",
        "training/rollout_actor_probs_pearson_corr": "Correlation of the two sides' probabilities. Expected: 1.",
        "rollout_corr/kl": "Mean of rollout log-prob minus training log-prob (nats). Expected: exactly 0.",
        "rollout_corr/k3_kl": "Mean of r - 1 - log r with r = training / rollout probability. Expected: exactly 0.",
        "rollout_corr/{training_ppl,rollout_ppl}": "Perplexity of the responses on either side; equal when exact.",
    },
    "Correction": {
        "rollout_corr/rollout_is_{mean,max,min,std}": "Importance weights per token after truncation "
        "(algorithm.rollout_correction.rollout_is); at sequence level max and min are of the ratios before it. 1, 1, 1 "
        "and 0 when exact.",
        "rollout_corr/rollout_is_eff_sample_size": "Effective sample size, as a share of the tokens: mean(w)^2 / "
        "mean(w^2). 1 when exact.",
        "rollout_corr/rollout_is_ratio_fraction_{high,low}": "Share of the weights beyond the bounds before "
        "truncation; without a lower bound, below 1 / upper.",
        "rollout_corr/rollout_is_seq_<statistic>": "The same over sequences, of the mean weight of each.",
        "rollout_corr/rollout_is_oob_ratio": "With two bounds: share of the tokens whose weight is 0.",
        "rollout_corr/rollout_is_batch_norm_factor": "The mean that weights were divided by "
        "(rollout_is_batch_normalize). 1 when exact.",
        "rollout_corr/rollout_rs_{masked_fraction,seq_masked_fraction}": "Share of the tokens that rollout_rs leaves "
        "out, and of the sequences that lose a token. 0 when exact.",
        "rollout_corr/rollout_rs_<option>_<statistic>": "The statistic of one option: its spread, the share beyond its "
        "bounds, and what it alone leaves out.",
        "rollout_corr/rollout_is_veto_fraction": "Share of the sequences left out by rollout_token_veto_threshold. 0 "
        "when exact.",
        "rollout_corr/rollout_is_catastrophic_token_fraction": "Share of the tokens whose ratio is below it.",
        "rollout_corr/<name>": "verl's further measures of the rollout-training gap.",
    },
    "Reward": {
        f"critic/score/{_SPREAD}": "What the grader gave per sample. The name is verl's; there need be no critic.",
        f"critic/rewards/{_SPREAD}": "Score after shaping (overlong penalty, KL in the reward), per sample.",
        f"critic/advantages/{_SPREAD}": "Advantage per response token.",
        "reward/error_ratio": "Share of samples whose grader raised, crashed or returned no number; they score 0.",
        "reward/timeout_ratio": "Share of samples whose grader ran longer than reward.timeout_s; they score 0.",
        "reward/time_s/{mean,max}": "Seconds the grader took per sample.",
        "reward/frac_zero_std_groups": "Share of prompts whose samples all got the same score: they teach "
        "a group-relative algorithm nothing.",
        "reward/<key>/mean": "Mean of a further numeric key that the grader returned; `extra_time_s` is its `time_s`.",
    },
    "Policy": {
        "actor/pg_loss": "Policy loss, mean over the optimizer steps. In an on-policy one a clipped loss is minus the "
        "mean advantage, weighed as actor.loss_agg_mode weighs tokens.",
        "actor/loss": "What was differentiated: policy loss, entropy bonus, KL term and balance loss.",
        "actor/entropy": "Mean entropy of the sampling distribution per response token (nats).",
        "actor/entropy_loss": "The entropy that entered the loss (nats).",
        "actor/kl_loss": "KL to the reference policy in the loss. Exactly 0 in the first optimizer step, when the "
        "reference still is the policy.",
        "actor/kl_coef": "Coefficient of that term.",
        "actor/reward_kl_penalty": "KL to the reference policy in the reward (algorithm.use_kl_in_reward), without its "
        "coefficient: mean over samples of the mean per token.",
        "actor/reward_kl_penalty_coeff": "Its coefficient.",
        "actor/ppo_kl": "Mean of rollout log-prob minus current log-prob (nats); exactly 0 in an on-policy update.",
        "actor/pg_clipfrac": "Share of tokens whose ratio was clipped: above its range where the advantage is "
        "positive, below it where it is negative. Exactly 0 in an on-policy update.",
        "actor/pg_clipfrac_lower": "Share of tokens cut by dual clipping.",
        "actor/router_aux_loss": "Balance loss of the experts (actor.router_aux_loss_coef), mean over layers and "
        "sequences, without its coefficient; 1 when balanced.",
        "actor/moe_load_max_over_mean": "Tokens of the busiest expert over the mean of all, in a mini-batch; mean over "
        "layers. 1 when balanced.",
        "actor/moe_idle_experts": "Share of the experts, over all layers, that got no token of a mini-batch.",
        "actor/grad_norm": "Gradient norm before clipping.",
        "actor/lr": "Learning rate of the last optimizer step.",
        "actor/skipped_steps": "Optimizer steps skipped because loss or gradient norm was not finite. Expected: 0.",
        "actor/skipped_in_a_row": "The longest series of skipped optimizer steps that reaches into this update; "
        "trainer.max_skipped_updates limits it. Expected: 0.",
        "actor/nonfinite_tensors": "Weights and optimizer moments that hold a NaN or an infinity after the update. "
        "Expected: 0.",
        "actor/<name>": "Further quantities of the chosen policy loss.",
    },
    "Lengths": {
        f"response_length/{_SPREAD}": "Tokens per response.",
        "response_length/clip_ratio": "Share of responses that reached data.max_response_length.",
        f"prompt_length/{_SPREAD}": "Tokens per prompt.",
        "prompt_length/clip_ratio": "Share of prompts that reached data.max_prompt_length.",
    },
    "Rollout": {
        "rollout/kv_usage": "Peak share of key-value pages in use.",
        "rollout/preemptions": "Requests that were pushed out for lack of pages and recomputed.",
        "rollout/prefix_hit_ratio": "Share of prompt tokens whose keys and values were already there.",
        "rollout/decode_tokens_per_s": "Sampled tokens per second of generation.",
        "rollout/num_tokens": "Sampled tokens.",
        "rollout/staleness/{mean,max}": "With trainer.async_steps: weights versions between the one that generated a "
        "sample and the one that trains on it. 0 in the first step, then 1.",
        "rollout/weights_bytes": "Bytes of the weights that the rollout got.",
        "rollout/graph_ratio": "Share of engine steps that replayed a CUDA graph; prefill never does.",
        "rollout/async_ratio": "Share of engine steps that were launched before the host had seen the tokens of the "
        "step before (rollout.async_scheduling).",
        "rollout/own_attention": "With batch_invariant=false: 1 while attention is this project's kernel, for want of "
        "a FlashAttention that reads pages; 0 with stock attention.",
        "rollout/host_us_per_step": "Time per engine step spent outside the model (microseconds). The device works "
        "meanwhile where steps are launched ahead.",
        "rollout/wait_us_per_step": "Time per engine step that the host waited for the device (microseconds): near 0, "
        "the device waits for the host.",
        "rollout/<name>": "Further counters of the engine.",
    },
    "Time and speed": {
        "timing_s/step": "Wall-clock seconds of the whole step.",
        "timing_s/gen": "Seconds generating; with trainer.async_steps, seconds waiting for the next step's samples "
        "after this step has trained.",
        "timing_s/gen_ahead": "Seconds the engines computed on this step's samples while the step before trained "
        "(trainer.async_steps).",
        "timing_s/reward": "Seconds grading.",
        "timing_s/old_log_prob": "Seconds recomputing old log-probabilities (algorithm.recompute_old_log_prob).",
        "timing_s/ref": "Seconds computing reference log-probabilities.",
        "timing_s/adv": "Seconds computing advantages.",
        "timing_s/update_actor": "Seconds training (forward, audit, backward, optimizer).",
        "timing_s/audit": "Seconds the audit spent comparing, part of timing_s/update_actor. Copying the training "
        "log-probabilities to the host is the audit's too but not in it: one copy, 4 bytes a token, right before the "
        "optimizer waits for the device anyway.",
        "timing_s/audit_forward": "Seconds of the forward over what lies outside the first mini-batch "
        "(trainer.audit_every_token_freq), or with trainer.async_steps over all samples under earlier weights; part of "
        "timing_s/update_actor.",
        "timing_s/update_weights": "Seconds moving the new weights into the rollout.",
        "timing_s/sync_weights": "The same as timing_s/update_weights.",
        "timing_s/weights_{cast,gather,copy,check}": "Parts of it: casting to the compute dtype, waiting for other "
        "ranks' shards where no copy hides it, copying into the engine, comparing checksums. Device time on a GPU.",
        "timing_s/testing": "Seconds of validation.",
        "timing_s/save_checkpoint": "Seconds writing a checkpoint.",
        "timing_s/<stage>": "Seconds of a further stage.",
        "perf/total_num_tokens": "Prompt and response tokens of the step.",
        "perf/time_per_step": "Seconds per step.",
        "perf/throughput": "Tokens per second and GPU (per process on a CPU).",
        "perf/mfu/actor": "Model FLOPs utilisation of the update: floating point operations that forward and backward "
        "need, without recomputation, per second of timing_s/update_actor, over the GPUs' peak. Absent where the peak "
        "is not known, and for float32 (vexact/models/flops.py, vexact/trainer/step/mfu.py).",
        "perf/idle_share/actor": "Share of the tokens that the GPUs could compute in the update's rounds of "
        "micro-batches, and do not, as there are too few for all GPUs or uneven ones; absent on one GPU. Where it is "
        "high, lower actor.ppo_max_token_len_per_gpu or train on fewer GPUs.",
        "perf/{max_memory_allocated_gb,max_memory_reserved_gb}": "Most memory (GiB) that one of the run's processes "
        "has had on its GPU since the start; absent on CPUs.",
        "perf/num_alloc_retries": "How often since the last step's weight sync PyTorch found no room on a GPU, gave "
        "back all memory it cached and tried again, in the process where it was most; absent on CPUs. Each time the "
        "GPU stops. Above 0 in step after step, its memory is nearly full: lower actor.ppo_max_token_len_per_gpu or "
        "rollout.gpu_memory_utilization, or offload.",
        "perf/cpu_memory_used_gb": "Memory in use (GiB), of the machine of the process where it is most.",
        "training/global_step": "The step.",
        "training/epoch": "Epoch of the step's first prompt.",
        "training/<name>": "Further counters of the training loop.",
    },
    "Validation": {
        "val-core/<data_source>/{acc,reward}/mean@<k>": "Mean over prompts of the mean over k samples; acc where the "
        "grader returns it, else the score.",
        "val-aux/<data_source>/<key>/mean@<k>": "The same for the grader's other keys; `extra_reward` is its `reward`.",
    },
}


def describe(name: str) -> str | None:
    """The meaning of a metric, from the first entry that fits; None for a name the reference lacks.

    >>> describe("timing_s/reward")
    'Seconds grading.'
    """
    for pattern, meaning in _patterns():
        if pattern.fullmatch(name):
            return meaning
    return None


def is_expected_zero(name: str) -> bool:
    """Whether the metric is 0 in every step of an exact run that is well.

    >>> is_expected_zero("rollout_corr/k3_kl"), is_expected_zero("actor/grad_norm")
    (True, False)
    """
    return (describe(name) or "").endswith(("Expected: 0.", "Expected: exactly 0."))


def render() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Every step writes these to each sink of `trainer.logger`. Names are verl's where the meaning is the same.",
        "`{a,b}` stands for several names, `<x>` for any text. In `metrics.jsonl` a value that is not finite is null.",
        "This page is written from `vexact/report/names.py`: `python -m vexact.report.names > docs/metrics.md`.",
    ]
    for section, metrics in METRICS.items():
        lines += ["", f"## {section}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, meaning in metrics.items()]
    return "\n".join(lines) + "\n"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_pattern(name), meaning) for metrics in METRICS.values() for name, meaning in metrics.items())


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[^}]*\}|<[^>]*>)", name)
    return re.compile("".join(map(_part, parts)))


def _part(part: str) -> str:
    if part.startswith("{"):
        return "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
    return ".+" if part.startswith("<") else re.escape(part)


if __name__ == "__main__":
    import sys

    sys.stdout.write(render())
