"""What the start of a worker promises to its memory and to its deadlines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vexact.config import load_config
from vexact.distributed import Layout, RankInfo
from vexact.distributed.process_group import MARGIN_S
from vexact.trainer.preflight.checks import check_shared
from vexact.trainer.workers import Inputs, Roles, build, worker
from vexact.trainer.workers.groups import ActorGroup

KL = "actor_rollout_ref.actor.use_kl_loss=true"
INFO = RankInfo(0, 1, 0, 0, "here", 1, "cpu")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is built in place of models, in order, and the group it is given."""
    made: list[tuple[str, Any]] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def make(*args: Any) -> Any:
            made.append((name, args[-1]))
            return SimpleNamespace(
                model=torch.nn.Module(), config=SimpleNamespace(torch_dtype=torch.float32), sharded_state=dict
            )

        return make

    for module in (build, worker):
        for name in ("actor", "reference", "engine"):
            monkeypatch.setattr(module, f"build_{name}", stand_in(name))
    monkeypatch.setattr(worker, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(build, "start_rewards", lambda config: None)
    return made


@pytest.fixture
def default_group() -> Iterator[None]:
    begin = not dist.is_initialized()
    if begin:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if begin:
        dist.destroy_process_group()


def test_the_cache_is_sized_when_all_weights_are_there(
    built: list[tuple[str, Any]], overrides: Callable[..., list[str]]
) -> None:
    config = load_config(overrides(KL))
    worker.Worker(config, Roles(1, range(1), range(1)), 3, INFO)
    assert [name for name, _ in built] == ["actor", "reference", "engine"]
    built.clear()
    rows: Any = range(8)
    inputs = Inputs(None, rows, None)
    build.build_workers(config, Layout(1, 1, "cpu", None, "local"), inputs)
    assert [name for name, _ in built] == ["actor", "reference", "engine"]


def test_ranks_that_train_apart_wait_as_long_as_all(
    built: list[tuple[str, Any]], overrides: Callable[..., list[str]], default_group: None
) -> None:
    """PyTorch's own limit, half an hour or ten minutes, would end a waiting rank before the one to blame is found."""
    config = load_config(overrides(KL, "trainer.worker_timeout_s=5000"))
    worker.Worker(config, Roles(2, range(1), range(1, 2)), 3, INFO)
    groups = [group for _, group in built]
    assert [name for name, _ in built] == ["actor", "reference"]
    assert groups[0] is groups[1]
    limit = groups[0]._get_backend(torch.device("cpu")).options._timeout
    assert limit == timedelta(seconds=5000 + MARGIN_S)


def test_a_rank_with_another_run_directory_is_named_before_the_first_step(
    built: list[tuple[str, Any]],
    overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A relative path is another directory where a process has been started elsewhere."""
    config, roles = load_config(overrides()), Roles(2, range(2), range(2))
    here = worker.Worker(config, Roles(1, range(1), range(1)), 3, INFO)
    folders = [tmp_path, tmp_path]

    def call(method: str, *args: Any, ranks: list[int], stage: str) -> list[Any]:
        answers = []
        for rank in ranks:
            monkeypatch.chdir(folders[rank])
            answers.append(getattr(here, method)(*args))
        return answers

    group: Any = SimpleNamespace(infos=(INFO, replace(INFO, rank=1, host="there")), call=call)
    actor = ActorGroup(config, group, roles, 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_shared(Path("run"), actor)
    folders[1] = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"run is not the driver's on rank 1 \(host there, .*default_local_dir"):
        check_shared(Path("run"), actor)
    assert list(tmp_path.rglob(".seen-*")) == []
