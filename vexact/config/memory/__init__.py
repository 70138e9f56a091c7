"""What a run takes of every GPU, known before anything is allocated."""

from vexact.config.memory.advice import (
    Machine,
    MemoryProblem,
    MemoryStage,
    memory_notes,
    memory_problems,
    out_of_memory_advice,
    resume_note,
)
from vexact.config.memory.kv_cache import BYTES, kv_cache_tokens
from vexact.config.memory.model_shape import ExpertShape, ModelShape
from vexact.config.memory.placement import Placement
from vexact.config.memory.plan import MemoryPlan, memory_plan, memory_rows, size_text
from vexact.config.memory.recomputation import with_recomputation

__all__ = [
    "BYTES",
    "ExpertShape",
    "Machine",
    "MemoryPlan",
    "MemoryProblem",
    "MemoryStage",
    "ModelShape",
    "Placement",
    "kv_cache_tokens",
    "memory_notes",
    "memory_plan",
    "memory_problems",
    "memory_rows",
    "out_of_memory_advice",
    "resume_note",
    "size_text",
    "with_recomputation",
]
