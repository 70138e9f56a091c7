"""Corrections for samples whose policy was not the trainer's: importance weights and rejection, verl's definitions.

Everything is a function of d_t = log pi(y_t) - log pi_rollout(y_t), in fp64 on the host over whole batches: how these
are cut into micro-batches or dealt to ranks changes no bit. Where the two policies agree d is 0, every weight is
exactly 1 and nothing is rejected.
"""

from vexact.algorithms.correction.rejection import kept_tokens
from vexact.algorithms.correction.scales import LossScales, loss_scales
from vexact.algorithms.correction.settings import CorrectionConfig, Rejection
from vexact.algorithms.correction.weights import importance_weights

__all__ = [
    "CorrectionConfig",
    "LossScales",
    "Rejection",
    "importance_weights",
    "kept_tokens",
    "loss_scales",
]
