"""Training: packing, forward with fused linear cross-entropy, policy loss, optimizer, reference policy."""

from vexact.training.actor import Actor
from vexact.training.config import ActorConfig, OptimConfig
from vexact.training.ledger import Ledger, LedgerError
from vexact.training.reference import Reference
from vexact.training.sft import SupervisedConfig, supervised_steps
from vexact.training.sharded import StoredState, StoredTensor, local_rows, row_range
from vexact.training.state import ActorState, nonfinite_in

__all__ = [
    "Actor",
    "ActorConfig",
    "ActorState",
    "Ledger",
    "LedgerError",
    "OptimConfig",
    "Reference",
    "StoredState",
    "StoredTensor",
    "SupervisedConfig",
    "local_rows",
    "nonfinite_in",
    "row_range",
    "supervised_steps",
]
