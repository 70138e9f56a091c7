"""A resume that may not fit into the machine's memory says so before it reads its checkpoint."""

import logging

from vexact.config import load_config
from vexact.config.memory import Machine
from vexact.trainer.launch import run


def test_only_a_resume_warns_of_what_it_reads(overrides, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="vexact")
    monkeypatch.setattr("vexact.trainer.launch.machine_of", lambda _: Machine("cuda", 1, 80 << 30, 1024))

    def warned(steps):
        caplog.clear()
        assert run(load_config(overrides(f"trainer.total_training_steps={steps}"))) == 0
        said = [(record.levelname, record.getMessage()) for record in caplog.records]
        warnings = [i for i, (level, text) in enumerate(said) if level == "WARNING" and "reading a checkpoint" in text]
        return said, warnings

    said, warnings = warned(1)
    assert not warnings
    assert any("memory: " in text and "while a resume reads its checkpoint" in text for _, text in said)
    said, (warning,) = warned(2)
    (resuming,) = [i for i, (_, text) in enumerate(said) if text.startswith("resuming after step 1")]
    assert warning < resuming
    assert "per GPU of the machine's memory, and 0 MiB are free for each" in said[warning][1]
