"""`reward.*`: how responses are graded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vexact.config.fields import opt, section


@dataclass(frozen=True)
class CustomReward:
    path: str | None = opt(None, "Python file with your reward function; null grades by data_source.")
    name: str = opt("compute_score", "Name of the function.")
    reward_kwargs: dict[str, Any] = opt({}, "Extra keyword arguments passed to it.")


@dataclass(frozen=True)
class RewardSandbox:
    network: Literal["none", "local", "all"] = opt(
        "none",
        "Sockets that graders may open: none, local ones (UNIX sockets, which managers of multiprocessing use) or all.",
    )
    env: tuple[str, ...] = opt(
        (), "Environment variables that graders get in addition to those that find programs and files, e.g. a key."
    )
    write: tuple[str, ...] = opt(
        (), "Folders or files that graders may write besides a scratch folder of their own (TMPDIR), e.g. /dev/shm."
    )
    memory_gb: float | None = opt(
        4.0,
        "GiB of private memory that a grader process, and each process it starts, may take; null for no limit.",
        gt=0,
    )


@dataclass(frozen=True)
class OverlongBuffer:
    enable: bool = opt(False, "DAPO's soft penalty for responses near the limit.")
    len: int = opt(0, "Tokens before max_resp_len over which the penalty grows.", ge=0)
    penalty_factor: float = opt(1.0, "Penalty at max_resp_len.", ge=0)


@dataclass(frozen=True)
class RewardKwargs:
    overlong_buffer_cfg: OverlongBuffer = section(OverlongBuffer, "Penalty for overlong responses.")
    max_resp_len: int | None = opt(
        None, "Tokens of a response at which that penalty is penalty_factor; null takes data.max_response_length.", ge=1
    )


@dataclass(frozen=True)
class RewardManager:
    name: Literal["naive", "dapo"] = opt(
        "naive",
        "naive and dapo both grade sample by sample; the penalty is reward_kwargs.overlong_buffer_cfg.",
        refused={"prime": "use reward.custom_reward_function", "batch": "use reward.custom_reward_function"},
    )


@dataclass(frozen=True)
class RewardSection:
    custom_reward_function: CustomReward = section(
        CustomReward, "A reward function of your own, with verl's signature."
    )
    sandbox: RewardSandbox = section(RewardSandbox, "What grader processes may do; docs/rewards.md.")
    reward_manager: RewardManager = section(RewardManager, "How samples reach the grader.")
    reward_kwargs: RewardKwargs = section(RewardKwargs, "Reward shaping.")
    num_workers: int = opt(2, "Grader processes.", verl=8, ge=1, le=1024)
    timeout_s: float = opt(
        10.0, "Seconds one sample may take to grade; a later one scores 0 and is counted.", gt=0, le=86400
    )
