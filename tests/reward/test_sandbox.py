"""What graders are kept from, what they may still do, and how more is allowed.

A protection that this machine cannot give is named in ``RewardPool.lacking``; then its test asks for the reason.
"""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import until

from vexact import env
from vexact.reward.pool import RewardPool
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.spec import GradeRequest

EVALUATE = """
import os, shutil, signal, socket, subprocess, sys, tempfile, threading
from pathlib import Path

def compute_score(solution_str, ground_truth, **_):
    exec("result = 1.0\\n" + ground_truth, scope := {**globals(), "text": solution_str})
    return scope["result"]
"""


def run(pool, code, text=""):
    """The outcome of a grader that executes ``code``."""
    return pool.score([GradeRequest("mine", text, textwrap.dedent(code)), GradeRequest("mine", "", "")])[0]


def assert_refused(pool, protection, code, text=""):
    score = run(pool, code, text)
    if protection in pool.lacking:
        assert pool.lacking[protection]
    else:
        assert score.status == "error", code
        assert "PermissionError" in score.message, score.message


@pytest.fixture
def pool(reward_file):
    with RewardPool(1, reward_file(EVALUATE)) as made:
        yield made


def test_no_key_of_the_environment_reaches_graders(reward_file, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "very secret")
    code = "result = {'score': 1.0, **{name: 1.0 for name, value in os.environ.items() if 'secret' in value}}"
    in_child = (
        "import json; text = subprocess.run(['env'], capture_output=True, text=True).stdout\n"
        "result = float('secret' not in text and 'PATH=' in text)"
    )
    with RewardPool(1, reward_file(EVALUATE)) as pool:
        assert run(pool, code).extra == {}
        assert run(pool, in_child).value == 1.0
    allowed = reward_file(EVALUATE, sandbox=SandboxPolicy(env=("OPENAI_API_KEY",)))
    with RewardPool(1, allowed) as pool:
        assert run(pool, code).extra == {"OPENAI_API_KEY": 1.0}


def test_the_drivers_environment_cannot_be_read(pool):
    assert_refused(pool, "files", "open(f'/proc/{text}/environ', 'rb').read()", str(os.getpid()))
    assert_refused(pool, "files", "open(f'/proc/{text}/mem', 'r+b')", str(os.getpid()))


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ValueError, match=r"reward\.sandbox\.env names NO_SUCH_KEY, which is not set"):
        env.grader_environment(["NO_SUCH_KEY"], {"PATH": "/bin"})
    assert env.grader_environment((), {"PATH": "/bin", "TOKEN": "x"}) == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "code",
    [
        "open(f'{text}/new', 'w')",
        "open(f'{text}/old', 'a')",
        "os.truncate(f'{text}/old', 0)",
        "os.remove(f'{text}/old')",
        "os.mkdir(f'{text}/folder')",
        "os.symlink('/etc/passwd', f'{text}/link')",
        "os.rename(f'{text}/old', f'{text}/renamed')",
        "os.link(f'{text}/old', f'{text}/twice')",
        "if subprocess.call(['touch', f'{text}/new']): raise PermissionError",
    ],
)
def test_nothing_is_written_outside_the_scratch_folder(pool, tmp_path, code):
    (tmp_path / "old").write_text("kept")
    assert_refused(pool, "files", code, str(tmp_path))
    if "files" not in pool.lacking:
        assert (tmp_path / "old").read_text() == "kept"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "reward.py"]


def test_the_scratch_folder_serves_programs_and_goes_away(pool):
    score = run(
        pool,
        """
        folder = Path(tempfile.mkdtemp())
        (folder / "program.py").write_text("print(6 * 7)")
        done = subprocess.run([sys.executable, folder / "program.py"], capture_output=True, text=True)
        (folder / "program.py").rename(folder / "moved.py")
        result = float(done.stdout)
        threading.Thread(target=print).start()
        """,
    )
    assert (score.value, score.status) == (42.0, "ok"), score.message
    folder = Path(run(pool, "raise ValueError(tempfile.gettempdir())").message.removeprefix("ValueError: "))
    assert folder.is_dir()
    pool.close()
    assert not folder.exists()


def test_folders_that_may_be_written(reward_file, tmp_path):
    allowed = reward_file(EVALUATE, sandbox=SandboxPolicy(write=(str(tmp_path / "out"),)))
    with pytest.raises(ValueError, match=r"reward\.sandbox\.write names .*out, which does not exist"):
        RewardPool(1, allowed)
    (tmp_path / "out").mkdir()
    with RewardPool(1, allowed) as pool:
        assert run(pool, "Path(text).write_text('x')", str(tmp_path / "out" / "file")).value == 1.0
        assert_refused(pool, "files", "Path(text).write_text('x')", str(tmp_path / "file"))


@pytest.mark.parametrize("network", ["none", "local", "all"])
def test_network(reward_file, network):
    codes = {
        "all": "socket.create_connection(('127.0.0.1', int(text)), 2).close()",
        "udp": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "local": "socket.socket(socket.AF_UNIX).close()",
        "pair": "socket.socketpair()",
    }
    fine = {"none": ["pair"], "local": ["pair", "local"], "all": ["pair", "local", "all"]}[network]
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        RewardPool(1, reward_file(EVALUATE, sandbox=SandboxPolicy(network=network))) as pool,
    ):
        port = str(server.getsockname()[1])
        for name, code in codes.items():
            if name in fine:
                assert run(pool, code, port).status == "ok"
            elif network != "all":
                assert_refused(pool, "network", code, port)
                in_child = f"import socket; text = {port!r}; {code}"
                assert_refused(
                    pool, "network", f"if subprocess.call([sys.executable, '-c', {in_child!r}]): raise PermissionError"
                )


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(int(text), 0)",
        "os.kill(os.getppid(), signal.SIGSTOP)",
        "os.killpg(os.getpgid(int(text)), 0)",
        "os.kill(-1, 0)",
        "import resource; resource.prlimit(int(text), resource.RLIMIT_NOFILE, (8, 8))",
    ],
)
def test_driver_and_warden_cannot_be_touched(pool, code):
    if code.startswith("os.killpg") and os.getpgid(0) != os.getpid():
        code = code.replace("os.getpgid(int(text))", "int(text)")  # a group of its own need not be the driver's
    assert_refused(pool, "network", code, str(os.getpid()))  # signals are held by the filter that holds the network
    assert run(pool, "child = subprocess.Popen(['sleep', '9']); os.kill(child.pid, 9); child.wait()").status == "ok"


def test_memory_is_limited(reward_file):
    with RewardPool(1, reward_file(EVALUATE, sandbox=SandboxPolicy(memory_gb=0.5))) as pool:
        assert "MemoryError" in run(pool, "x = bytearray(2**30)").message or "limits" in pool.lacking
        assert run(pool, "x = bytearray(2**28)").status == "ok"
    with RewardPool(1, reward_file(EVALUATE, sandbox=SandboxPolicy(memory_gb=None))) as pool:
        assert run(pool, "x = bytearray(2**30)").status == "ok"


def test_files_beside_the_reward_file_and_packages_are_readable(reward_file, tmp_path):
    (tmp_path / "words.txt").write_text("seven")
    (tmp_path / "helper_of_reward.py").write_text("VALUE = 7")
    spec = reward_file(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\nimport numpy\n"
        "import helper_of_reward\nWORDS = Path(__file__).with_name('words.txt').read_text()\n"
        "def compute_score(**_):\n    return float(numpy.float64(helper_of_reward.VALUE)) * (WORDS == 'seven')\n"
    )
    with RewardPool(1, spec) as pool:
        assert pool.score([GradeRequest("mine", "", "")])[0].value == 7.0


SPAWN = """
import os, signal, subprocess, sys, time
IGNORE = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)"

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "{mark}"])
        os._exit(0)

def spawn():
    subprocess.Popen(["sleep", "{mark}"])
    subprocess.Popen(["sleep", "{mark}"], start_new_session=True)
    subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; setsid sleep {mark} & sleep {mark}"], start_new_session=True)
    daemon()

spawn()
def compute_score(solution_str, **_):
    if solution_str == "spawn":
        spawn()
    if solution_str == "hang":
        time.sleep(600)
    if solution_str == "leave":
        spawn()
        os._exit(1)
    return 1.0
"""


def marked(mark):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().split(b"\0")[:2] == [b"sleep", mark.encode()]:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(count, mark):
    until(lambda: len(marked(mark)) == count)
    return len(marked(mark))


def test_a_worker_takes_everything_with_it(reward_file, hopeless):
    hopeless("hang")
    mark = f"6{os.getpid()}1"
    with RewardPool(1, reward_file(SPAWN.replace("{mark}", mark)), timeout_s=0.4) as pool:
        assert wait_for(5, mark) == 5
        pool.score([GradeRequest("mine", text, "") for text in ("spawn", "a")])
        assert wait_for(10, mark) == 10
        scores = pool.score([GradeRequest("mine", text, "") for text in ("leave", "b", "hang", "c")])
        assert [score.status for score in scores] == ["error", "ok", "timeout", "ok"]
        assert wait_for(5, mark) == 5, "those of the last worker alone"
    assert wait_for(0, mark) == 0


@pytest.mark.parametrize("state", ["idle", "busy", "forked"])
def test_nothing_survives_a_driver_that_is_killed(reward_file, tmp_path, state):
    """``forked``: a child of the driver lives on and holds all its descriptors."""
    mark = f"6{os.getpid()}{2 + ['idle', 'busy', 'forked'].index(state)}"
    spec = reward_file(SPAWN.replace("{mark}", mark))
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        from vexact.reward.pool import RewardPool
        from vexact.reward.spec import GradeRequest, RewardSpec
        pool = RewardPool(3, RewardSpec({spec.path!r}), timeout_s=6000)
        pool.score([GradeRequest("mine", "", "")] * 30)
        other = os.fork() if {state == "forked"} else 1
        if other == 0:
            time.sleep(6000)
            os._exit(0)
        print(other, flush=True)
        if {state == "busy"}:
            pool.score([GradeRequest("mine", "hang", "")] * 3)
        time.sleep(6000)
        """)
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    other = int(driver.stdout.readline())
    try:
        assert wait_for(15, mark) == 15
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert wait_for(0, mark) == 0
    finally:
        driver.kill()
        if other > 1:
            os.kill(other, signal.SIGKILL)
