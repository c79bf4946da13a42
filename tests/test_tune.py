"""benchmark/tune.py: a search of three trials that take seconds, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import tune  # noqa: E402

HYAR = "--env Platform-v0 --random-episodes 5 --vae-pretrain-steps 5 --learning-starts 20 --total-timesteps 40"
HYAR += " --eval-frequency 20 --eval-episodes 2"


def test_three_trials(tmp_path, capsys):
    """Each is a run of its own with the values that were drawn; a second call opens the same study."""
    words = ["hyar_td3", "--runs-dir", str(tmp_path), "--seed", "1", "--search"]
    words += ["learning_rate=log:1e-5:1e-3", "policy_frequency=1,2", "batch_size=int:8:16"]
    study = tune.main([*words, "--trials", "3", "--", *HYAR.split()])
    assert "best of 3 trials: " in capsys.readouterr().out
    for trial in study.trials:
        folder = tmp_path / "tune" / f"trial-{trial.number}"
        arguments = json.loads((folder / "args.json").read_text())["arguments"]
        assert (
            arguments["learning_rate"] == trial.params["learning_rate"] and 1e-5 <= arguments["learning_rate"] <= 1e-3
        )
        assert arguments["policy_frequency"] == int(trial.params["policy_frequency"])
        assert 8 <= arguments["batch_size"] <= 16 and arguments["total_timesteps"] == 40
        assert trial.value == pytest.approx(tune.score(folder / "eval.csv", "episodic_return", 10))
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 3
    again = tune.main([*words, "--trials", "0", "--", *HYAR.split()])
    assert again.best_value == study.best_value


def test_a_trial_that_fails_is_no_end(tmp_path):
    words = ["hyar_td3", "--runs-dir", str(tmp_path), "--trials", "1", "--search", "gamma=2,3", "--", *HYAR.split()]
    with pytest.raises(SystemExit, match="no trial was finished"):
        tune.main(words)


def test_scores_are_means_of_the_last_evaluations(tmp_path):
    (tmp_path / "eval.csv").write_text("step,success_rate\n1,0.0\n2,0.5\n3,1.0\n")
    assert tune.score(tmp_path / "eval.csv", "success_rate", 2) == 0.75
    with pytest.raises(ValueError, match="has no column x; it has step, success_rate"):
        tune.score(tmp_path / "eval.csv", "x", 2)


@pytest.mark.parametrize(
    "word", ["a=linear:0:1", "a=log:1", "a=log:0:1", "a=int:1:x", "a=float:2:1", "a", "=1,2", "a=", "a=log:1:2:3"]
)
def test_a_space_of_no_kind_is_refused(word, tmp_path, capsys):
    """In one line, before the study's folder is made."""
    with pytest.raises(SystemExit) as stopped:
        tune.main(["hyar_td3", "--runs-dir", str(tmp_path / "runs"), "--search", word])
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: --search {word}: " in last and "expected NAME=log:LOW:HIGH, float:, int: or A,B,C" in last
