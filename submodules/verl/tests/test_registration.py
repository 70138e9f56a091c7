"""verl finds the bridge by its entry point alone, and when it does not, somebody says so."""

import subprocess
import sys

import pytest
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import RolloutReplicaRegistry, get_rollout_replica_class
from vexact_verl import registration
from vexact_verl.adapter import VexactAdapter
from vexact_verl.replica import VexactReplica


def test_verl_knows_the_rollout():
    assert get_rollout_class("vexact") is VexactAdapter
    assert get_rollout_replica_class("vexact") is VexactReplica
    assert registration.problems() == []


def test_the_self_check_says_what_is_wrong(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", {})
    found = registration.problems()
    assert found[0] == "VERL_USE_EXTERNAL_PLUGINS=none keeps verl from loading it; unset it, or add vexact"
    assert "Unknown rollout mode: vexact" in found[1]


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0"])
def test_another_verl_is_refused(monkeypatch, version):
    monkeypatch.setattr(registration, "version", lambda _: version)
    with pytest.raises(
        RuntimeError, match=rf"verl {version} is installed; vexact-verl works with verl >= 0.9.1, < 0.10"
    ):
        registration.register()


def test_a_plugin_that_fails_is_heard():
    """verl hides the error; the bridge has written it to stderr by then."""
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '9.9' if name == 'verl' else real(name)\n"
        "import verl; print('verl goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.endswith("verl goes on\n")
    assert "vexact-verl could not register itself with verl in process" in done.stderr
    assert "RuntimeError: verl 9.9 is installed" in done.stderr
