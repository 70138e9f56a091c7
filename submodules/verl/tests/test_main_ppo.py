"""``python -m verl.trainer.main_ppo`` as a user runs it: Ray, agent loop, hybrid worker, reference, checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

from vexact_verl.tiny import add_chat_tokens
from worker_support import write_model

from vexact.data.rows import Row
from vexact.prepare.files import write_parquet

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "verl_grpo.sh"
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_two_steps_end_to_end(tmp_path):
    model = write_model(tmp_path / "model")
    add_chat_tokens(model)
    write_parquet([Row(f"{i}+{i}=", "letters", str(2 * i)) for i in range(16)], tmp_path / "train.parquet", "train")
    overrides = [
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=8",
        "data.dataloader_num_workers=0",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.top_k=12",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.use_kl_loss=True",
        f"reward.custom_reward_function.path={Path(__file__).with_name('reward.py')}",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=False",
        "trainer.save_freq=2",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
    ]
    environment = {key: value for key, value in os.environ.items() if key not in RANK} | {
        "PYTHON": sys.executable,
        "model_dir": str(model),
        "train_path": str(tmp_path / "train.parquet"),
    }
    done = subprocess.run(
        ["bash", SCRIPT, *overrides],
        cwd=tmp_path,  # Hydra writes where it is run
        env=environment,
        text=True,
        capture_output=True,
        timeout=840,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    assert logged(log, "training/rollout_probs_diff_max") == [0.0, 0.0]
    distances = logged(log, "actor/kl_loss")
    assert distances[0] == 0.0, "the reference policy begins as the actor"
    assert distances[1] > 0
    norms = logged(log, "actor/grad_norm")
    assert len(norms) == 2
    assert min(norms) > 0, "weights that do not move would be synchronised by anything"
    saved = tmp_path / "checkpoints" / "global_step_2" / "actor"
    assert (saved / "trainer_state" / "weight-00001-of-00001.safetensors").is_file()
    assert (saved / "huggingface" / "config.json").is_file()


def logged(log, name):
    """The values of a metric in verl's console lines, step by step."""
    lines = re.findall(r"step:(\d+) - (.*)", log)
    found = {int(step): re.search(rf"\b{re.escape(name)}:(\S+)", line) for step, line in lines}
    return [float(match[1].removeprefix("np.float64(").rstrip(")")) for _, match in sorted(found.items()) if match]
