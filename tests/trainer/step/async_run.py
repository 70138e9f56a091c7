"""`vexact train` whose workers do, at given moments, what a test asks for.

    async_run.py FOLDER PLAN KEY=VALUE…

In every process generation of step t touches FOLDER/gen-t as it begins, an update FOLDER/update-t. PLAN is JSON, from
such a name to what is done then: ``wait NAME`` until another process has touched that, ``hang``, ``kill`` or
``interrupt`` (this process). ``"weights-v": "spoil X"`` adds X to a weight of the rollout once it has version v.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from vexact.cli import main
from vexact.trainer.workers import worker

folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
PATIENCE_S = 400.0  # only ends a run in which they are not at the same time


def reached(name: str) -> None:
    (folder / name).touch()
    action, _, argument = plan.get(name, "").partition(" ")
    if action == "wait":
        deadline = time.monotonic() + PATIENCE_S
        while not (folder / argument).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} waits for {argument}, and they are not at the same time")
            time.sleep(0.01)
    elif action == "hang":
        while True:
            time.sleep(1.0)
    elif action:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[action])


def step_of(request_id: str) -> int | None:
    match = re.match(r"step(\d+)-", request_id)
    return int(match[1]) if match else None


def generate(self, prompts, params, request_ids):
    if request_ids and step_of(request_ids[0]):
        reached(f"gen-{step_of(request_ids[0])}")
    return original_generate(self, prompts, params, request_ids)


def update(self, sequences, *arguments):
    reached(f"update-{step_of(sequences[0].sample.request_id)}")
    return original_update(self, sequences, *arguments)


def receive_weights(engine, version):
    metrics = original_receive(engine, version)
    if (action := plan.get(f"weights-{version}")) is not None:
        next(engine.model.parameters()).data[:, 0] += float(action.removeprefix("spoil "))
    return metrics


original_generate, original_update = worker.Worker.generate, worker.Worker.update
original_receive = worker.receive_weights
worker.Worker.generate, worker.Worker.update, worker.receive_weights = generate, update, receive_weights
sys.exit(main(["train", *sys.argv[3:]]))
