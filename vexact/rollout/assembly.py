"""The parts of one engine, put together around a model that is loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vexact.rollout.execution.decode_graphs import decode_graphs
from vexact.rollout.execution.runner import ModelRunner, kv_page_bytes
from vexact.rollout.loading import Loaded
from vexact.rollout.requests.finish import Finisher
from vexact.rollout.requests.intake import Intake
from vexact.rollout.sampling.prompt_scores import PromptScorer
from vexact.rollout.scheduling.block_manager import BlockManager
from vexact.rollout.scheduling.scheduler import Scheduler
from vexact.rollout.scheduling.state import SlotState
from vexact.rollout.stepping.collector import Collector
from vexact.rollout.stepping.stepper import Stepper


class Parts(NamedTuple):
    """In the order in which a request meets them; ``max_model_len`` and ``num_pages`` are as they were resolved."""

    max_model_len: int
    num_pages: int
    intake: Intake
    scheduler: Scheduler
    state: SlotState
    blocks: BlockManager
    runner: ModelRunner
    stepper: Stepper
    collector: Collector


def assemble(loaded: Loaded) -> Parts:
    """Allocates the key-value cache. Raises ValueError if it cannot hold one page, or for a length that does not
    fit the model."""
    config, model, device = loaded.config, loaded.model, loaded.device
    max_model_len = config.resolve_model_len(model.config.max_position_embeddings)
    num_pages = config.resolve_num_pages(
        page_bytes=kv_page_bytes(model, config.page_size),
        max_model_len=max_model_len,
        free_device_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )
    state = SlotState(config.max_num_seqs, max_model_len, config.page_size, has_routes=model.chooses_experts)
    blocks = BlockManager(num_pages, config.page_size)
    scheduler = Scheduler(
        state,
        blocks,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    runner = ModelRunner(
        model,
        num_pages=num_pages,
        page_size=config.page_size,
        num_slots=config.max_num_seqs,
        device=device,
        graphs=decode_graphs(model, config, max_model_len=max_model_len, device=device),
    )
    intake = Intake(
        blocks,
        seed=config.seed,
        max_model_len=max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        tokenizer=loaded.tokenizer,
        hash_pages=config.enable_prefix_caching,
        prompt_scorer=PromptScorer(model, config),
    )
    collector = Collector(model, state, scheduler, intake, Finisher(state, loaded.tokenizer))
    runs_ahead = config.resolve_async_scheduling(device.type)
    stepper = Stepper(state, blocks, scheduler, runner, collector, runs_ahead=runs_ahead)
    return Parts(max_model_len, num_pages, intake, scheduler, state, blocks, runner, stepper, collector)
