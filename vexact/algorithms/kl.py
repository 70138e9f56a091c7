"""Per-token estimates of KL(policy || reference) from log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """The estimator named ``kind``, per token: (T,), (T,) -> (T,).

    Kinds (verl's names): ``kl``/``k1`` d, ``abs`` |d|, ``mse``/``k2`` d^2/2, ``low_var_kl``/``k3`` exp(-d) + d - 1,
    with d = logprob - ref_logprob; http://joschu.net/blog/kl-approx.html. A trailing ``+`` (as in ``k3+``) keeps the
    value but takes the gradient of k2, the only one of them whose expected gradient is that of the KL divergence.

    Raises ValueError for an unknown kind.
    """
    base = kind.removesuffix("+")
    if base not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL penalty {kind!r}; choose one of {', '.join(KL_ESTIMATORS)}, or add '+'")
    value = KL_ESTIMATORS[base](logprobs - ref_logprobs)
    if base == kind:
        return value
    surrogate = _k2(logprobs - ref_logprobs)
    return surrogate - surrogate.detach() + value.detach()


def _k1(difference: Tensor) -> Tensor:
    return difference


def _k2(difference: Tensor) -> Tensor:
    return 0.5 * difference.square()


def _k3(difference: Tensor) -> Tensor:
    log_ratio = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1).clamp(-MAX_K3, MAX_K3)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": _k1,
    "k1": _k1,
    "abs": lambda difference: difference.abs(),
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}
