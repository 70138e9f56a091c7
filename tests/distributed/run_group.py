"""A command with a group of workers, as small as can be: what it is told to go wrong goes wrong, and it says what a
user would read. Started by hand, by torchrun or as a job of Ray."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from functools import partial

import dummy_worker

from vexact import interrupt
from vexact.cli import is_user_error
from vexact.distributed import Layout, serve_if_follower, start_workers


def main() -> int:
    interrupt.install()
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--size", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=float, default=300.0)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vexact").setLevel(logging.INFO)
    code = serve_if_follower()
    if code is not None:
        return code
    try:
        if arguments.kind == "early":
            raise ValueError("trainer.seed=-1 is wrong")
        with interrupt.unwinding():
            return work(arguments)
    except Exception as error:
        if not is_user_error(error):
            raise
        sys.stderr.write(f"run_group: {error}\n")
        return 2


def work(arguments: argparse.Namespace) -> int:
    layout = Layout(n_gpus_per_node=arguments.size, device=arguments.device)
    make = partial(dummy_worker.make, broken=arguments.kind == "broken")
    with start_workers(layout, make, timeout_s=arguments.timeout, start_timeout_s=arguments.timeout) as group:
        total = group.call("total", 2.0)
        group.call("say", "hello from")
        sys.stdout.write(f"{layout.device} {group.size} {total} pids {[info.pid for info in group.infos]}\n")
        sys.stdout.flush()
        if arguments.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if arguments.kind == "wait":
            time.sleep(arguments.timeout)
        if arguments.kind != "none":
            group.call("fail", 1, arguments.kind, timeout_s=5.0, stage="update")
    return 0


if __name__ == "__main__":
    sys.exit(main())
