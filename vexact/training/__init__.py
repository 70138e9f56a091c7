"""Training: packing, forward with fused linear cross-entropy, policy loss, optimizer, reference policy."""

from vexact.training.actor import Actor
from vexact.training.config import ActorConfig, OptimConfig
from vexact.training.ledger import Ledger, LedgerError
from vexact.training.reference import Reference
from vexact.training.sft import SupervisedConfig, supervised_steps
from vexact.training.state import ActorState, nonfinite_in

__all__ = [
    "Actor",
    "ActorConfig",
    "ActorState",
    "Ledger",
    "LedgerError",
    "OptimConfig",
    "Reference",
    "SupervisedConfig",
    "nonfinite_in",
    "supervised_steps",
]
