"""Rules that tie `algorithm.rollout_correction.*` to each other and to other keys."""

from __future__ import annotations

from collections.abc import Iterator

from vexact.config.schema import Config
from vexact.config.sections.rollout_correction import KEY

LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"


def correction_problems(config: Config, exact: bool) -> Iterator[str]:
    """What is wrong with it, one message each. ``exact``: nothing rules out that both policies have the same bits."""
    given, recompute = config.algorithm.rollout_correction, "algorithm.recompute_old_log_prob"
    for parsed in (given.weight_bounds, given.rejections):
        try:
            parsed()
        except ValueError as error:
            yield str(error)
    if given.rollout_rs is None and given.rollout_rs_threshold is not None:
        yield (
            f"{KEY}.rollout_rs_threshold={given.rollout_rs_threshold} has no effect without "
            f"{KEY}.rollout_rs; set it, e.g. to seq_mean_k1, or remove the threshold"
        )
    if given.rollout_is is None and given.rollout_is_batch_normalize:
        yield (
            f"{KEY}.rollout_is_batch_normalize=true has no effect without {KEY}.rollout_is; set it to token or sequence"
        )
    if given.bypass_mode and config.algorithm.recompute_old_log_prob:
        yield (
            f"{KEY}.bypass_mode=true takes the rollout's log-probabilities as the old ones, and {recompute}=true "
            "others; set one of them to false"
        )
    if given.bypass_mode is False and not config.algorithm.recompute_old_log_prob and not exact:
        yield (
            f"{KEY}.bypass_mode=false needs old log-probabilities of the trainer, as this run is not exact; set "
            f"{recompute}=true, or leave bypass_mode null"
        )
    loss = config.actor.policy_loss.loss_mode
    if given.loss_type == "reinforce" and not config.algorithm.bypasses:
        yield (f"{KEY}.loss_type=reinforce has no effect without bypass_mode; set {LOSS}=reinforce")
    elif given.loss_type == "reinforce" and loss == "gspo":
        yield (f"{KEY}.loss_type=reinforce and {LOSS}={loss} are two losses; set one of them to its default")
    by_default = config.algorithm.bypasses and given.bypass_mode is None
    if given.rollout_is is not None and by_default and not exact and config.loss_mode != "reinforce":
        yield (
            f"{KEY}.rollout_is={given.rollout_is} would only be reported: without {recompute}=true the ratio of "
            f"the {loss} loss is the weight already. Set {recompute}=true, or {KEY}.loss_type=reinforce, or "
            f"{KEY}.bypass_mode=true to have it reported only"
        )
