"""Plain REINFORCE: no ratio, no clipping; correct only for samples of the current weights."""

from __future__ import annotations

from vexact.algorithms.losses.inputs import PolicyLossConfig, PolicyLossInputs, PolicyLossOutput


def reinforce(inputs: PolicyLossInputs, config: PolicyLossConfig) -> PolicyLossOutput:
    """-A logprob (verl's ``gpg``). Williams 1992, https://doi.org/10.1007/BF00992696."""
    log_ratio = (inputs.logprobs - inputs.old_logprobs).detach()
    return PolicyLossOutput(-inputs.advantages * inputs.logprobs, {"ppo_kl": -log_ratio})
