"""A reward function that attacks its worker; the answer names the attack. Nothing here signals other processes."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time


class Unprintable(BaseException):
    def __str__(self):
        raise Unprintable

    __repr__ = __str__


class Odd:
    def __init__(self, result):
        self.result = result

    def __float__(self):
        return self.result() if callable(self.result) else self.result

    def __repr__(self):
        raise RuntimeError("no text")


def raises(error):
    raise error


def recurse():
    return recurse()


def sockets():
    found = []
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            found.append(socket.socket(fileno=os.dup(descriptor)))
    return found


def garbage(data):
    for each in sockets():
        each.sendall(data)
    return 1.0


def token():
    frame = sys._getframe()
    while "token" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["token"]


def forge_from_fork(index):
    name = token()
    if os.fork() == 0:
        body = struct.pack("<c16sIdd", b"=", name.encode(), index, 9.0, 0.0)
        garbage(struct.pack("<I", len(body)) + body)
        os._exit(0)
    os.wait()
    return 1.0


def hold_the_lock_later():
    threading.Thread(target=lambda: (time.sleep(0.02), re.match(r"(a+)+b", "a" * 64)), daemon=True).start()
    return 1.0


def patch():
    import vexact.reward.worker as worker

    worker.grade = worker._message = worker.call = lambda *a, **k: os._exit(9)
    return 1.0


def alarm():
    signal.signal(signal.SIGALRM, lambda *a: os._exit(7))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    return 1.0


def close_everything():
    os.closerange(0, 256)
    return 1.0


def swallow_signals_and_hang():
    for number in range(1, 32):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def cheap_output():
    sys.stdout = sys.stderr = None
    os.write(1, b"x" * 300_000)
    return 1.0


ATTACK = {
    "fork": lambda: (os.fork() and 1.0) or 1.0,
    "fork and raise": lambda: (os.fork(), raises(ValueError("child and parent"))),
    "forge": lambda: forge_from_fork(4),
    "garbage": lambda: garbage(b"\xff" * 64),
    "long frame": lambda: garbage(struct.pack("<I", 100_000)),
    "a list of its own": lambda: garbage(struct.pack("<I", 9) + b'["ready"]'),
    "deep JSON": lambda: garbage(struct.pack("<I", 50_000) + b"[" * 50_000),
    "close": close_everything,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stop the group": lambda: os.killpg(0, signal.SIGSTOP),
    "exit": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SystemExit": lambda: sys.exit("bye"),
    "KeyboardInterrupt": lambda: raises(KeyboardInterrupt()),
    "GeneratorExit": lambda: raises(GeneratorExit()),
    "Unprintable": lambda: raises(Unprintable()),
    "recursion": recurse,
    "stack": lambda: (sys.setrecursionlimit(10**9), recurse()),
    "signals": swallow_signals_and_hang,
    "1e39": lambda: 1e39,
    "3e38": lambda: {"score": 3e38},
    "10**400": lambda: 10**400,
    "inf": lambda: float("-inf"),
    "nan": lambda: Odd(float("nan")),
    "odd": lambda: Odd(lambda: raises(Unprintable())),
    "odd float": lambda: {"score": Odd(lambda: "text")},
    "huge dict": lambda: {"score": 1.0, **{str(i): 1.0 for i in range(100_000)}},
    "memory": lambda: bytearray(10**15),
    "string": lambda: "1" * 10**7,
    "surrogate": lambda: raises(ValueError("\ud800 \x1b[2J\x07 \u202e")),
}
HARMLESS = {
    "lock": hold_the_lock_later,
    "patch": patch,
    "alarm": alarm,
    "output": cheap_output,
    "daemon": lambda: subprocess.Popen(["sleep", "600"], start_new_session=True) and 1.0,
    "odd keys": lambda: {"score": 1.0, 7: 2.0, None: 3.0, "\ud800\x1b]0;x\x07": 4.0, "x" * 10_000: 5.0},
    "numbers": lambda: {"score": True, "a": Odd(0.5)},
}


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {**ATTACK, **HARMLESS}.get(solution_str, lambda: float(solution_str))()
