"""benchmark/world_model_table.py and plas_study.py: what run folders hold becomes tables and pictures."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import plas_study  # noqa: E402
import world_model_table  # noqa: E402


def cells(text: str, *start: str) -> list[str]:
    """The cells of the only line of a Markdown table that starts with these."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    (found,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return found


# World model ---------------------------------------------------------------------------------------------------------
def metrics(exact: float, frames: int) -> dict:
    """What a run's metrics.json holds, with a share of exact frames and a number of hunts."""
    return {
        "values": {"obs_mse": 2e-3, "psnr_of_mean": 30.0, "reward_mse": 0.5},
        "mode": {
            "exact": exact, "exact_changed": exact, "violation any in the frame": 1.0 - exact, "violation any": 1.0,
            "reward_event": 0.25, "events": {"hare": {"frames": frames, "exact": exact}},
        },
        "copy": {"exact": 0.1}, "sample": None, "open_loop": {"1": exact, "20": exact / 2}, "ranking": None,
        "limit": 1.0,
    }  # fmt: skip


@pytest.fixture
def world_models(tmp_path) -> Path:
    for name, content in (("a__1", metrics(0.9, 10)), ("a__2", metrics(0.7, 30)), ("b__1", metrics(0.5, 8))):
        folder = tmp_path / "runs" / f"world_model_test-{name}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(content))
    (tmp_path / "runs" / "world_model_test-late__1").mkdir()  # not finished
    return tmp_path


def test_tests_of_world_models_become_a_table(world_models, capsys):
    results = world_models / "results"
    world_model_table.main(world_model_table.Args(world_models / "runs", results))
    printed = capsys.readouterr().out
    text = (results / "table.md").read_text()
    assert text in printed and "late" not in text
    heading = cells(text, "row")
    row = dict(zip(heading, cells(text, "a"), strict=True))
    assert row["seeds"] == "2" and row["exact %"] == "80.000 ± 10.000" and row["Obs MSE"] == "2.0e-03 ± 0.0e+00"
    assert row["20 steps exact %"] == "40.000 ± 5.000" and row["Hits@1 %"] == "–" and row["limit %"] == "100.000"
    assert dict(zip(heading, cells(text, "b"), strict=True))["exact %"] == "50.000"
    # Both seeds' hunts together: (0.9 x 10 + 0.7 x 30) / 40.
    assert cells((results / "events.md").read_text(), "a") == ["a", "75.00 % of 40"]
    pixels = np.asarray(Image.open(results / "steps.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_results_of_world_models_stay_when_their_runs_are_gone(world_models):
    results = world_models / "results"
    world_model_table.main(world_model_table.Args(world_models / "runs", results))
    before = (results / "table.md").read_text()
    world_model_table.main(world_model_table.Args(world_models / "nothing", results))
    assert (results / "table.md").read_text() == before


# Who trains the encoder ----------------------------------------------------------------------------------------------
def run_of_the_study(folder: Path, signal: str, seed: int, returns: list[float], steps: int = 4_000) -> None:
    """A run folder with an evaluation each 2,000 steps; the error of Q is a tenth of the return."""
    path = folder / f"plas_pixels-{signal}-medium__DotHazard-v0__{seed}"
    path.mkdir(parents=True)
    arguments = {"seed": seed, "env_id": "DotHazard-v0", "total_timesteps": steps}
    (path / "args.json").write_text(json.dumps({"arguments": arguments}))
    with open(path / "eval.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "episodic_return", "q_error", "behaviour_return", "random_return", "probe_r2"])
        for i, value in enumerate(returns):
            writer.writerow([2_000 * (i + 1), value, value / 10, 13.0, -2.0, ""])


@pytest.fixture
def study(tmp_path) -> Path:
    run_of_the_study(tmp_path / "runs", "both", 1, [10.0, 20.0])
    run_of_the_study(tmp_path / "runs", "both", 2, [12.0, 26.0])
    run_of_the_study(tmp_path / "runs", "critic", 1, [1.0, 2.0])
    run_of_the_study(tmp_path / "runs", "vae", 1, [5.0])  # not finished
    return tmp_path


def test_the_study_becomes_a_table(study, capsys):
    results = study / "results"
    plas_study.main(plas_study.Args(study / "runs", results, steps=(2_000, 4_000)))
    text = (results / "DotHazard-v0.md").read_text()
    assert text in capsys.readouterr().out and "vae |" not in text
    assert "Dataset medium. Mean returns: behaviour 13.00, random -2.00." in text
    heading = cells(text, "encoder trained by")
    row = dict(zip(heading, cells(text, "both", "4,000"), strict=True))
    assert row["seeds"] == "2" and row["return"] == "23.00 ± 3.00" and row["Q error (MSE)"] == "2.30 ± 0.30"
    assert row["probe R²"] == "–"
    assert cells(text, "critic", "2,000")[2:5] == ["1", "1.00", "0.10"]
    pixels = np.asarray(Image.open(results / "DotHazard-v0.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_results_of_the_study_grow(study):
    results = study / "results"
    plas_study.main(plas_study.Args(study / "runs", results))
    run_of_the_study(study / "more", "critic", 2, [3.0, 6.0])
    run_of_the_study(study / "more", "both", 1, [10.0, 30.0])  # made again: it replaces the row
    plas_study.main(plas_study.Args(study / "more", results, steps=(4_000,)))
    text = (results / "DotHazard-v0.md").read_text()
    assert cells(text, "critic", "4,000")[2:4] == ["2", "4.00 ± 2.00"]
    assert cells(text, "both", "4,000")[3] == "28.00 ± 2.00"


@pytest.mark.parametrize("tool", [world_model_table, plas_study])
def test_without_runs_nothing_is_made(tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(tool.Args(tmp_path / "runs", tmp_path / "results"))
    assert stopped.value.code == 2 and not (tmp_path / "results").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: no finished runs") and error.count("\n") == 1
