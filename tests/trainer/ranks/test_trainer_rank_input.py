"""What is wrong with the ranks of `vexact train` before there are any: one message that names the fix, exit code 2."""

import re
import signal
import socket
import sys
import uuid

import processes
import pytest
import rank_runs
from fault_arguments import arguments, assert_readable
from planted_fault import Fault

from vexact.cli import main


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("trainer.n_gpus_per_node=64", "trainer.device=cuda"), "trainer.n_gpus_per_node=64 .* PyTorch sees 0 GPU"),
        (("trainer.n_gpus_per_node=2", "trainer.rollout_gpus=2"), "rollout_gpus=2 of 2 GPUs .* leaves none to train"),
        (("trainer.nnodes=2",), "trainer.nnodes=2 needs a Ray cluster, or torchrun on every node"),
        (("trainer.ray_address=127.0.0.1:1",), "ray_address=127.0.0.1:1: no Ray head answers there: .*refused"),
        (("trainer.ray_address=http://127.0.0.1:8265",), "for `ray job submit`"),
        (("trainer.n_gpus_per_node=0",), "trainer.n_gpus_per_node=0"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(more, text, tiny, tmp_path, capsys):
    assert main(["train", *arguments(tiny, tmp_path / "run", *more)]) == 2
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_without_ray_the_message_says_what_to_install(tiny, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["train", *arguments(tiny, tmp_path / "run", "trainer.n_gpus_per_node=2")]) == 2
    message = capsys.readouterr().err
    assert "several processes need Ray, which is" in message or "several processes need Ray, which cannot" in message
    assert "pip install 'vexact[ray]', or start with torchrun" in message


@pytest.mark.parametrize(
    ("more", "fault", "text"),
    [
        (("trainer.rollout_gpus=2",), None, r"trainer\.rollout_gpus=2 of 2 .*leaves none to train"),
        (("trainer.n_gpus_per_node=3",), None, r"torchrun started 2 process\(es\), and that is not .*=3"),
        (("actor_rollout_ref.model.path=/nowhere",), None, "/nowhere"),
        ((), Fault("generation", "torch"), r"rank 1 \(host .*\) has torch 2\.0\.0, .* install the same on every node"),
    ],
)
def test_ranks_that_cannot_work_together_all_end(more, fault, text, tiny, tmp_path):
    refused = rank_runs.start(tmp_path / "refused", arguments(tiny, tmp_path / "run", *more), fault=fault)
    assert refused.wait(as_agent=True)[0] == 2, refused.output()
    assert_readable(refused.output(), rf"vexact train: .*{text}.*", ".*--debug.*")
    assert refused.output(1) == ""
    assert refused.left() == []


def test_a_port_in_use_is_named(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        blocked = rank_runs.start(
            tmp_path / "blocked", arguments(tiny, tmp_path / "run"), master_port=taken.getsockname()[1]
        )
        assert blocked.wait(as_agent=True)[0] == 2, blocked.output()
    assert_readable(blocked.output(), r".*MASTER_PORT=\d+: the port is in use .*; set MASTER_PORT .*", ".*--debug.*")


def test_the_ranks_of_a_torchrun_that_is_killed_end(tiny, tmp_path):
    mark, directory = uuid.uuid4().hex, tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vexact"]
    command = [*launcher, "train", *arguments(tiny, directory, "trainer.total_training_steps=100000")]
    with processes.ending(mark):
        agent = processes.start(command, mark)
        assert processes.until((directory / "checkpoints" / "step_2").exists)
        agent.send_signal(signal.SIGKILL)
        output, _ = agent.communicate(timeout=processes.PATIENCE_S)
        assert processes.until(lambda: processes.marked(mark) == [])
    # what comes to rank 0 first, the signal or the end of the other rank
    assert re.search(r"(\ninterrupted|: rank 1 .* died in .*); step \d+ is saved in ", output), output
    assert "Traceback" not in output
