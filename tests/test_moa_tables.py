"""benchmark/moa.py: tables of finished runs, and questions answered by changing one thing."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import moa as tables  # noqa: E402

import pretrain_vae_moa  # noqa: E402
from envs import stag_hunt  # noqa: E402

torch.set_num_threads(1)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Tiny runs of two variants, one of them with two seeds, and one that is not finished."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        blank = Image.new("RGB", (8, 8))
        patch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))
        for variant, seed in (("moa-z", 1), ("moa-z", 2), ("both-z", 1), ("late", 1)):
            path = pretrain_vae_moa.main(pretrain_vae_moa.Args(
                env_id="4p5b4x4", rows=1_500, total_timesteps=6, eval_frequency=3, batch_size=16, probe_rows=300,
                reference_steps=3, runs_dir=str(folder), data_dir=str(folder / "data"), seed=seed,
                objective="both" if variant == "both-z" else "moa",
                run_name=f"pretrain_vae_moa-{variant}__4p5b4x4__{seed}",
            ))  # fmt: skip
            if variant == "late":
                (path / "latent.png").unlink()
    torch.use_deterministic_algorithms(False)
    return folder


def test_runs_become_tables(runs, tmp_path, capsys):
    tables.table(tables.Table(runs, tmp_path / "results"))
    printed = capsys.readouterr().out
    assert "not finished, left out: pretrain_vae_moa-late__4p5b4x4__1" in printed
    scores = read(tmp_path / "results" / "table.csv")
    assert {(row["variant"], row["seed"]) for row in scores} == {("moa-z", "1"), ("moa-z", "2"), ("both-z", "1")}
    own = read(runs / "pretrain_vae_moa-moa-z__4p5b4x4__2" / "table.csv")
    (wanted,) = [row for row in own if row["name"].startswith("MOA") and row["subset"] == "NH"]
    (row,) = [
        row for row in scores
        if (row["variant"], row["seed"], row["name"], row["subset"]) == ("moa-z", "2", "model", "NH")
    ]  # fmt: skip
    for column in tables.SCORES:
        assert float(row[column]) == pytest.approx(float(wanted[column]), abs=1e-5, nan_ok=True)
    text = (tmp_path / "results" / "table.md").read_text()
    assert text in printed and "| moa-z | 1,500 | 2 |" in text and "| oracle |" in text
    values = [
        float(row["expected_top1"])
        for row in scores
        if (row["variant"], row["name"], row["subset"]) == ("moa-z", "model", "all")
    ]
    assert tables.spread(values) in text
    assert len(read(tmp_path / "results" / "curves.csv")) == 6 and len(read(tmp_path / "results" / "probes.csv")) == 3
    for name in ("curves", "ceilings"):
        pixels = np.asarray(Image.open(tmp_path / "results" / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_the_picture_of_the_ceilings_shows_means_of_the_seeds():
    own = {"variant": "moa-z", "environment": "4p5b8x8", "rows": 9}
    values = (("oracle", 0.9, 0.9), ("model", 0.7, 0.8), ("majority", 0.3, 0.3), ("random encoder + probe", 0.5, 0.5))
    scores = [
        {**own, "name": name, "subset": subset, "seed": seed, "expected_top1": value}
        for name, *pair in values for seed, value in enumerate(pair) for subset in ("all", "NS")
    ]  # fmt: skip
    scores.append({**scores[0], "rows": 10, "expected_top1": 0.1})  # other games
    (axis,) = tables.draw_ceilings(scores).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["majority", "moa-z", "oracle"]
    assert [text.get_text() for text in axis.texts] == ["0.300", "0.750", "0.900"]
    assert axis.lines[1].get_xdata() == pytest.approx([0.3, 0.75, 0.9]) and np.isnan(axis.lines[2].get_xdata()).all()


def test_ceilings(tmp_path, capsys):
    tables.ceilings(tables.Ceilings(rows=2_000, results=tmp_path))
    lines = (tmp_path / "ceilings.md").read_text().splitlines()
    assert len(lines) == 2 + len(tables.KINDS) and lines[0] in capsys.readouterr().out
    (deterministic,) = [line for line in lines if "first of equal steps" in line]
    assert "| 1.000 / -0.000 |" in deterministic or "| 1.000 / 0.000 |" in deterministic
    top = [float(line.split("|")[4].split("/")[0]) for line in lines[2:]]
    history = [float(line.split("|")[3].split("/")[0]) for line in lines[2:]]
    assert all(a > b > 0.7 for a, b in zip(top, history, strict=True))


def test_no_runs_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tables.table(tables.Table(tmp_path, tmp_path / "results"))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: no finished runs")
    assert not (tmp_path / "results").exists()


def test_questions_are_answered_by_one_change_each(tmp_path, capsys):
    tables.questions(
        tables.Questions(seeds=(1, 2), steps=4, rows=1_200, data_dir=str(tmp_path), results=tmp_path / "results")
    )
    table = read(tmp_path / "results" / "questions.csv")
    assert len(table) == 2 * 2 * len(tables.CHANGES)
    held_out = {row["change"]: row for row in table if row["where"] == "held-out games" and row["seed"] == "1"}
    assert set(held_out) == set(tables.CHANGES)
    assert held_out["mis-sliced mask"]["loss"] == "inf" and held_out["mis-sliced mask"]["steps"] == "0"
    assert 0.1 < float(held_out["mis-sliced mask and double softmax"]["forbidden"]) < 0.5
    assert float(held_out["as it is"]["forbidden"]) == 0.0
    assert float(held_out["double softmax"]["loss"]) > math.log(math.e + 6) - 1
    assert math.isfinite(float(held_out["as it is"]["loss"]))
    text = (tmp_path / "results" / "questions.md").read_text()
    assert text in capsys.readouterr().out and "infinite at step 0" in text


def test_what_is_changed_is_that_and_nothing_else():
    data = stag_hunt.collect(500, seed=1)
    for change in (tables.without_mask, tables.mis_sliced):
        arrays = change(data.arrays)
        assert [name for name in arrays if not (arrays[name] == data.arrays[name]).all()] == ["action_mask"]
        assert arrays["action_mask"].dtype == bool
    assert tables.without_mask(data.arrays)["action_mask"].all()
    assert (tables.mis_sliced(data.arrays)["action_mask"][:, 1:] == data.arrays["action_mask"][:, :-1]).all()
    logits = torch.randn(5, 7)
    records = pretrain_vae_moa.Records(data.arrays, data.meta, "1", torch.device("cpu"))
    model = tables.DoubleSoftmax(pretrain_vae_moa.Args(), records.sizes, torch.device("cpu"))
    action = torch.arange(5)
    twice = -torch.log_softmax(torch.softmax(logits, 1), 1)[torch.arange(5), action].mean()
    assert torch.allclose(model.policy_loss(logits, action), twice)
    assert not torch.allclose(twice, F.cross_entropy(logits, action))
