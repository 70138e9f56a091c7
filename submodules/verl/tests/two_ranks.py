"""One of two ranks of a hybrid worker group, each with a rollout of its own: ``RANK=0 two_ranks.py MODEL OUT``."""

import json
import sys
from pathlib import Path

from worker_support import Rollout, Step, make_prompts, make_worker

from vexact.weights.model_checksums import named_checksums


def main(model_path: Path, out: Path) -> None:
    worker, rollout = make_worker(model_path, "bf16"), Rollout(model_path, "bf16")
    rank = worker.rank
    prompts = make_prompts(seed=50 + rank, count=4 + rank)  # more micro-batches on one than on the other
    different, tokens, norms = [], [], []
    for step in range(3):
        batch = Step(prompts, rollout.generate(prompts, step))
        old = batch.logprobs(worker)
        different.append(batch.num_different(old))
        tokens.append(batch.data["responses"].values().tolist())
        if step < 2:
            norms.append(batch.train(worker, old, seed=10 * rank + step)["grad_norm"])
            rollout.sync(worker, step + 1)
    worker.save_checkpoint(str(out / "actor"), global_step=2)
    said = {"different": different, "tokens": tokens, "grad_norms": norms}
    sys.stdout.write("\n" + json.dumps(said | {"checksums": named_checksums(worker.engine.module)}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
