"""docs/fork.md, as a newcomer would follow it, with fewer steps."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "fork.md").read_text()
SHORTER = "--total-timesteps 600 --random-episodes 40 --vae-pretrain-steps 50 --eval-frequency 300 --eval-episodes 5"


def blocks(language: str) -> list[str]:
    """The code blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path) -> str:
    """What a command of the page prints; training is made shorter. Fails if it fails."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if "--run-name" in words:
        words += SHORTER.split()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def critic_losses(folder: Path) -> list[float]:
    """What a run has logged of the critics' loss."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    losses = [event.value for event in events.Scalars("losses/critic")]
    assert len(losses) == 2
    return losses


def test_the_page_from_an_environment_to_a_changed_loss(tmp_path):
    """The environment trains, the change applies, and what it changes is the learning."""
    for name in ("hyar_td3.py", "sac_ae_pixels.py", "plas_pixels.py", "envs", "benchmark"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "hyar_td3.py").unlink()
    shutil.copy(ROOT / "hyar_td3.py", tmp_path)
    (environment,) = blocks("python")
    (diff,) = blocks("diff")
    lines = len(environment.splitlines()) + len(diff.splitlines())
    assert lines <= 40 and f"in {lines} lines of code" in PAGE
    (tmp_path / "my_package.py").write_text(environment)
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    train, copy, train_fork, compare, tensorboard, play = commands
    assert tensorboard == "tensorboard --logdir runs"  # waits for a browser
    run(train, tmp_path)
    run(copy, tmp_path)
    old, new = (line[1:] + "\n" for line in diff.splitlines())
    source = (tmp_path / "huber.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "huber.py").write_text(source.replace(old, new))
    run(train_fork, tmp_path)
    header, *rows = run(compare, tmp_path).splitlines()
    assert header == rows[2] == "step,episodic_return,success_rate"
    assert [row.split(",")[0] for row in rows] == ["300", "600", "step", "300", "600"]
    assert critic_losses(tmp_path / "runs" / "line") != critic_losses(tmp_path / "runs" / "line-huber")
    assert (tmp_path / "runs" / "line-huber" / "huber.py").exists()
    assert "3 fresh episodes of my_package:Line-v0, the actor" in run(play.replace("1000", "3"), tmp_path)
