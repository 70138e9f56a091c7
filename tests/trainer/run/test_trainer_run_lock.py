"""One run per directory: the lock, what a killed run leaves of it, and disks whose locks prove little."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from vexact.trainer.run import lock as lock_module
from vexact.trainer.run.lock import FILE, RunLockedError, run_lock


def _leave(directory, **changes):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "yesterday", "started": None} | changes
    (directory / FILE).write_text(json.dumps(holder))


def test_a_second_holder_is_refused_by_host_and_pid(tmp_path):
    with run_lock(tmp_path):
        expected = rf"in use by another run \(pid {os.getpid()} on host {socket.gethostname()}, since 20.*default_local"
        with pytest.raises(RunLockedError, match=expected), run_lock(tmp_path):
            pass
        assert (tmp_path / FILE).exists()
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path):
        pass


def test_an_error_inside_releases_it(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path):
        pass


def test_a_killed_holder_does_not_keep_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vexact.trainer.run.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(6000)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=rf"pid {holder.pid} on host"), run_lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", "not json"])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with run_lock(tmp_path):
        pass


def test_another_host_counts_on_a_network_disk_only(tmp_path, monkeypatch):
    _leave(tmp_path, host="elsewhere", pid=1)
    monkeypatch.setattr(lock_module, "_is_local_disk", lambda directory: False)
    message = rf"another host \(pid 1 on host elsewhere.*remove .*{FILE}"
    with pytest.raises(RunLockedError, match=message), run_lock(tmp_path):
        pass
    assert (tmp_path / FILE).exists()
    monkeypatch.setattr(lock_module, "_is_local_disk", lambda directory: True)
    with run_lock(tmp_path):
        pass


def test_without_kernel_locks_the_process_counts(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    with run_lock(tmp_path), pytest.raises(RunLockedError, match=f"pid {os.getpid()}"), run_lock(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _leave(tmp_path, pid=ended.pid, started="1")
    with run_lock(tmp_path):
        pass
    _leave(tmp_path, started="1")  # this pid, but of a process that started at another time
    with run_lock(tmp_path):
        pass
