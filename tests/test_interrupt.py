"""Signals that land where Python drops what their handler raises, or where nothing can be raised at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_S

from vexact import cli, interrupt
from vexact.commands import train

ROOT = Path(__file__).resolve().parents[1]
LINE = "\ninterrupted\n"

# A process whose command is `run`. `shoot` signals the process itself and lets bytecodes pass, for the handler to run.
PROGRAM = """
import atexit, ctypes, gc, os, signal, sys, threading, time, weakref
from vexact import cli, interrupt
from vexact.commands import train

def shoot(number=signal.{name}):
    os.kill(os.getpid(), number)
    for _ in range(100):
        pass

def go_on():
    for _ in range(1000):
        interrupt.check()
        time.sleep(0.01)

class Dropped:
    def __del__(self):
        shoot()

{body}

train.run = lambda arguments: run() or 0
sys.argv = ["vexact", "train"]
sys.exit(cli.main())
"""

# `land` shoots where an exception is dropped.
PLACES = {
    "finalizer": "def land(): Dropped()",
    "collected cycle": """
        def land():
            cycle = Dropped()
            cycle.self = cycle
            del cycle
            gc.collect()
    """,
    "value of a weak dictionary": """
        def land():
            held = {0: Dropped()}
            weak = weakref.WeakValueDictionary(held)
            held.clear()
    """,
    "callback of a weak reference": """
        def land():
            thing = type("Thing", (), {})()
            watch = weakref.ref(thing, lambda _: shoot())
            del thing
    """,
    "weakref.finalize": """
        def land():
            thing = type("Thing", (), {})()
            weakref.finalize(thing, shoot)
            del thing
    """,
    "closing a generator": """
        def generate():
            try:
                yield
            finally:
                shoot()
        def land():
            generator = generate()
            next(generator)
            del generator
    """,
    "callback from C": """
        def land():
            kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            compare = kind(lambda left, right: shoot() or 0)
            ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), ctypes.c_size_t(2), ctypes.c_size_t(4), compare)
    """,
    "callback of the collector": """
        def land():
            gc.callbacks.append(lambda *_: shoot())
            gc.collect()
            gc.callbacks.clear()
    """,
    "lock of an import": """
        def land():
            def profile(frame, event, _):
                if event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
                    sys.setprofile(None)
                    shoot()
            sys.setprofile(profile)
            import colorsys
            assert sys.getprofile() is None
    """,
    "except that takes everything": """
        def land():
            try:
                shoot()
            except BaseException:
                pass
    """,
    "finally that returns": """
        def land():
            try:
                shoot()
            finally:
                return
    """,
    "clean-up of another interrupt": """
        def land():
            try:
                shoot()
            except KeyboardInterrupt:
                Dropped()
    """,
    "library that raises its own error": """
        def land():
            try:
                shoot()
            except KeyboardInterrupt as error:
                raise RuntimeError("initialization failed") from error
    """,
}


def start(body: str, name: str = "SIGTERM", **options: object) -> subprocess.Popen[str]:
    source = PROGRAM.format(name=name, body=textwrap.dedent(body))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def run(body: str, name: str = "SIGTERM") -> tuple[int, str, str]:
    return result(start(body, name))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_asleep(process: subprocess.Popen[str]) -> bool:
    """Whether its main thread waits for something, in C code."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("place", PLACES)
def test_a_dropped_interrupt_is_noticed_and_what_is_open_is_closed(place: str, name: str) -> None:
    command = """
        def run():
            with interrupt.unwinding():
                try:
                    land()
                    go_on()
                    print("went on")
                finally:
                    print("closed")
    """
    assert run(textwrap.dedent(PLACES[place]) + textwrap.dedent(command), name) == (130, "closed\n", LINE)


@pytest.mark.parametrize("place", PLACES)
def test_where_nothing_is_open_the_process_ends_there(place: str) -> None:
    assert run(textwrap.dedent(PLACES[place]) + "\ndef run():\n    land()\n    print('went on')\n") == (130, "", LINE)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_one_that_is_dropped_in_the_last_moment_counts(name: str) -> None:
    assert run("def run():\n    with interrupt.unwinding(): Dropped()", name) == (130, "", LINE)


AT_EXIT = {
    "after a finished run": "def run(): atexit.register(shoot)",
    "after an interrupted run": "def run():\n    atexit.register(shoot)\n    shoot()",
    "twice while closing": """
        def run():
            with interrupt.unwinding():
                try:
                    shoot()
                finally:
                    shoot()
                    shoot(signal.SIGINT)
    """,
    "in a finalizer of a finished run": "def run(): weakref.finalize(sys, shoot)",
    "while a thread is waited for": """
        def run():
            threading.Thread(target=time.sleep, args=(20,)).start()
            threading.Timer(0.2, shoot).start()
    """,
}


@pytest.mark.parametrize("when", AT_EXIT)
def test_a_signal_at_exit(when: str) -> None:
    assert run(AT_EXIT[when]) == (130, "", LINE)


IN_C = "mutex = ctypes.create_string_buffer(64)\nlock = ctypes.CDLL(None).pthread_mutex_lock\n"
STUCK = (
    IN_C
    + """
def run():
    with interrupt.unwinding(0.3):
        interrupt.note("step 2 is saved")
        lock(mutex)
        print("stuck", flush=True)
        lock(mutex)
"""
)


def test_code_that_never_comes_back_is_left_after_a_while() -> None:
    process = start("interrupt._grace_s = 0.3\n" + STUCK)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert result(process) == (130, "", "\ninterrupted; step 2 is saved\n")


def test_a_second_signal_hurries() -> None:
    """Of two that come together the second belongs to the first; the grace of that is longer than any test."""
    process = start("interrupt._grace_s, interrupt.REPEAT_S = 1000.0, 4.0\n" + STUCK)
    assert process.stdout is not None
    process.stdout.readline()
    wait_for(lambda: is_asleep(process))  # from its last bytecode into C code, where no handler runs
    process.terminate()
    process.terminate()
    time.sleep(0.2)
    assert process.poll() is None, "signals that come together are one"
    while process.poll() is None:  # it counts from when it heard of the first
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert result(process) == (130, "", "\ninterrupted; step 2 is saved\n")


def test_where_nothing_is_open_c_code_holds_nobody_up() -> None:
    process = start(IN_C + "def run():\n    lock(mutex)\n    print('stuck', flush=True)\n    lock(mutex)")
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert result(process) == (130, "", LINE)


def test_the_command_handles_signals_before_its_imports(tmp_path: Path) -> None:
    """The last of its imports never ends, so that no signal comes too late."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Last:\n"
        "    def find_spec(self, name, *_):\n"
        "        while name == 'vexact.rollout.engine':\n"
        "            time.sleep(0.01)\n"
        "sys.meta_path.insert(0, Last())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "vexact", "generate", "--model_path", "/nowhere", "--prompt", "x"]
    caught = 1 << (signal.SIGTERM - 1)

    def handles_signals(process: subprocess.Popen[str]) -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(mask.split()[1], 16) & caught)

    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: handles_signals(process))  # noqa: B023
        time.sleep(delay)
        process.terminate()
        assert result(process) == (130, "", LINE)


def test_an_interrupt_that_leaves_exec_gives_the_same_code(tmp_path: Path) -> None:
    """As while a dataclass is defined. After it, `python -m` would end by SIGINT whatever the code is."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from vexact import interrupt\n"
        "from vexact.commands import train\n"
        "def run(arguments):\n"
        "    with interrupt.unwinding():\n"
        "        exec('os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(100): pass')\n"
        "train.run = run\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "vexact", "train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


def test_an_ignored_signal_stays_ignored() -> None:
    body = """
        def run():
            with interrupt.unwinding():
                shoot(signal.SIGHUP)
                interrupt.check()
                print("goes on")
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = start(body)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result(process) == (0, "goes on\n", "")


def test_signals_to_a_forked_child_are_not_ours() -> None:
    body = """
        import warnings
        def run():
            warnings.simplefilter("ignore")  # Python 3.12 and later warn of forks beside threads
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            os.kill(child, signal.SIGINT)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            time.sleep(0.1)
            interrupt.check()
    """
    assert run(body) == (0, f"{-signal.SIGINT}\n", "")


def test_nobody_reads_any_more() -> None:
    """A closed terminal, or Ctrl-C that has ended `tee` as well."""
    body = """
        def run():
            with interrupt.unwinding():
                try:
                    print("started", flush=True)
                    go_on()
                finally:
                    print("x" * 100_000)
    """
    process = start(body)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE_S) == 130


def test_a_failure_that_was_being_explained_is_told() -> None:
    body = """
        class MismatchError(Exception):
            __module__ = "vexact.audit.compare"
        def run():
            with interrupt.unwinding():
                try:
                    raise MismatchError("token 3 differs")
                except MismatchError:
                    shoot()
    """
    assert run(body) == (130, "", f"vexact train: token 3 differs\n{LINE}")


def test_a_call_from_another_program_gives_the_signals_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shoot(_: object) -> int:
        interrupt.note("step 4 is saved")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(train, "run", shoot)
    before = [signal.getsignal(number) for number in interrupt.SIGNALS], sys.unraisablehook
    for _ in range(2):
        assert cli.main(["train"]) == 130
        assert capsys.readouterr().err == "\ninterrupted; step 4 is saved\n"
    assert ([signal.getsignal(number) for number in interrupt.SIGNALS], sys.unraisablehook) == before
    interrupt.check()
