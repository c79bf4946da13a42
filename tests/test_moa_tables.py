"""benchmark/moa.py: reports of a run beside the ceilings, tables of finished runs, and one thing changed at a time."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import moa as tables  # noqa: E402

import pretrain_vae_moa  # noqa: E402
from envs import stag_hunt  # noqa: E402
from pretrain_vae_moa import MOA, Args, Records, main, predict_actions, score  # noqa: E402

torch.set_num_threads(1)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_pictures(monkeypatch):
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))


@pytest.fixture(scope="module")
def data() -> stag_hunt.Record:
    return stag_hunt.collect(4_000, seed=2)


def train(folder: Path, **changes) -> Path:
    """A tiny run."""
    return main(Args(**{
        "env_id": "4p5b4x4", "rows": 1_500, "total_timesteps": 6, "eval_frequency": 3, "batch_size": 16,
        "runs_dir": str(folder), "data_dir": str(folder / "data"), "run_name": "run", **changes,
    }))  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Tiny runs of two variants, one of them with two seeds, and one that is not finished."""
    folder = tmp_path_factory.mktemp("runs")
    for variant, seed in (("moa-z", 1), ("moa-z", 2), ("both-z", 1), ("late", 1)):
        objective = "both" if variant == "both-z" else "moa"
        path = train(folder, seed=seed, objective=objective, run_name=f"pretrain_vae_moa-{variant}__4p5b4x4__{seed}")
        if variant == "late":
            state = torch.load(path / "checkpoint.pt", weights_only=True)
            torch.save({**state, "finished": False}, path / "checkpoint.pt")
    return folder


def test_a_report_has_tables_and_pictures(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "pretrain_vae_moa-both-z__4p5b4x4__1", run)
    tables.report(tables.Report(run, reference_steps=3))
    printed = capsys.readouterr().out
    for word in ("majority", "history Bayes", "oracle", "linear probes of z", "standard error, by game"):
        assert word in printed
    names = list(dict.fromkeys(row["name"] for row in read(run / "table.csv")))
    assert names == [
        "majority", "prior + mask", "random encoder + probe", "MOA + reconstruction, z head, context 1",
        "single frame, knows the policies", "history Bayes", "oracle",
    ]  # fmt: skip
    (probes,) = read(run / "probes.csv")
    assert {"action", "strategy", "self's cell", "stag's cell", "latent KL"} == set(probes)
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    pictures = ["confusion_matrix", "recall_and_calibration", "latent", "reconstructions"]
    for name in pictures:
        pixels = np.asarray(Image.open(run / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 150
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and (pixels < 250).any(2).mean() > 0.02
    assert {f"images/{name}" for name in pictures} <= set(events.Tags()["images"])


def test_what_is_no_finished_run_has_no_report(runs, tmp_path, capsys):
    late = runs / "pretrain_vae_moa-late__4p5b4x4__1"
    other = str(tmp_path / "other.npz")
    data = stag_hunt.collect(500, seed=1)
    stag_hunt.save_records(Path(other), data)
    for args, part in (
        (tables.Report(tmp_path), "is no run folder"), (tables.Report(late), "is not finished"),
        (tables.Report(runs / "pretrain_vae_moa-moa-z__4p5b4x4__1", dataset=other), "has another dataset"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            tables.report(args)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and part in line


def test_runs_become_tables(runs, tmp_path, capsys):
    tables.table(tables.Table(runs, tmp_path / "results", reference_steps=3))
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


# --- players that the model has never met ---
def test_runs_meet_players_of_a_third_script(runs, tmp_path, capsys):
    names = [f"pretrain_vae_moa-{name}" for name in ("moa-z__4p5b4x4__1", "moa-z__4p5b4x4__2", "both-z__4p5b4x4__1")]
    shutil.copytree(runs / names[2], tmp_path / "own")
    paths = (runs / names[0], runs / names[1], tmp_path / "own")
    tables.unseen(tables.Unseen(paths, games=8, seed=9, results=tmp_path / "results"))
    found = read(tmp_path / "results" / "unseen.csv")
    kinds = {(row["variant"], row["seed"]) for row in found}
    assert kinds == {("moa-z", "1"), ("moa-z", "2"), ("own", "1"), (tables.TWO, ""), (tables.THREE, "")}
    for kind in kinds:
        own = [row for row in found if (row["variant"], row["seed"]) == kind]
        rows = {(row["unseen"], row["ego"]): int(row["rows"]) for row in own}
        for share in ("0.0", "0.25", "0.5", "0.75", "1.0"):
            parts = [rows.get((share, ego), 0) for ego in ("known", "unseen")]
            assert rows[share, "all"] == sum(parts) and [part > 0 for part in parts] == [share != "1.0", share != "0.0"]
    regrets = {
        name: [float(row["regret"]) for row in found if row["variant"] == name] for name in (tables.THREE, "own")
    }
    assert set(regrets[tables.THREE]) == {0.0} and min(regrets["own"]) > 0.0 and max(regrets["own"]) < math.inf

    agent = pretrain_vae_moa.load_model(paths[1] / "best_model.pt")
    meta = json.loads(json.dumps(Records(*pretrain_vae_moa.open_dataset(agent.args), "1", CPU).meta))
    data = tables.unseen_games(meta, 3, 8, 9)
    assert ((data.arrays["roster"] == 2).sum(1) == 3).all() and set(data.arrays["roster"].ravel()) == {0, 1, 2}
    records = Records(data.arrays, data.meta, "1", CPU)
    assert set(records.split) == {2} and records.sizes == agent.sizes
    rows = np.flatnonzero(data.arrays["strategy"] == 2)
    true = data.arrays["policy_probs"][rows, 2]
    guess = predict_actions(agent, records, rows)["q"].argmax(1)
    key = ("moa-z", "2", "0.75", "unseen")
    (row,) = [row for row in found if (row["variant"], row["seed"], row["unseen"], row["ego"]) == key]
    assert float(row["expected_top1"]) == pytest.approx(true[np.arange(len(rows)), guess].mean(), abs=1e-5)
    text = (tmp_path / "results" / "unseen.md").read_text()
    assert text in capsys.readouterr().out and text == tables.unseen_table(found)
    assert "| expected top-1, NA | moa-z |  | " in text
    pixels = np.asarray(Image.open(tmp_path / "results" / "unseen.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20

    # Another call adds its runs, and does not mix them with other games.
    args = tables.Unseen(paths[:1], games=8, seed=9, results=tmp_path / "results")
    written = (tmp_path / "results" / "unseen.csv").read_bytes()
    tables.unseen(args)
    assert (tmp_path / "results" / "unseen.csv").read_bytes() == written
    with pytest.raises(SystemExit):
        tables.unseen(dataclasses.replace(args, games=9))
    assert "other --games, --seed or data; choose another --results" in capsys.readouterr().err
    assert (tmp_path / "results" / "unseen.csv").read_bytes() == written


def test_games_of_each_share_begin_alike_and_the_others_are_as_in_training():
    meta = stag_hunt.collect(50, seed=1).meta
    few, many = (tables.unseen_games(meta, count, 400, 9).arrays for count in (1, 4))
    assert (few["episode_seed"] == many["episode_seed"]).all() and (many["roster"] == 2).all()
    for data in (few, many):
        assert (np.unique(data["episode"]) == np.arange(400)).all()
    first = [data["obs"][(data["t"] == 0) & (data["agent"] == 0)] for data in (few, many)]
    assert (first[0] == first[1]).all()
    counts = np.bincount((few["roster"] == 0).sum(1), minlength=4) / 400
    assert counts == pytest.approx(np.full(4, 0.25), abs=0.08)
    assert (few["roster"] == 2).mean(0) == pytest.approx(np.full(4, 0.25), abs=0.08)


def test_which_runs_can_meet_strangers(runs, tmp_path, capsys):
    run = runs / "pretrain_vae_moa-moa-z__4p5b4x4__1"
    path = tmp_path / "three.npz"
    stag_hunt.save_records(path, stag_hunt.collect(600, stag_hunt.Config(size=4), strategies=tables.SCRIPTS))
    three = train(tmp_path, dataset=str(path), objective="moa", run_name="three")
    headless = train(tmp_path, objective="reconstruction", run_name="headless")
    larger = train(tmp_path, env_id="4p5b8x8", objective="moa", run_name="larger")
    for args, part in (
        (tables.Unseen(()), "at least one run folder"), (tables.Unseen((run,), games=0), "and one game"),
        (tables.Unseen((runs / "pretrain_vae_moa-late__4p5b4x4__1",)), "is not finished"),
        (tables.Unseen((three,)), "of NS and NH, but these are of NS, NH, NA"),
        (tables.Unseen((run,), seed=1), "trained on games of this seed"),
        (tables.Unseen((headless,)), "no policy head"),
        (tables.Unseen((run, larger)), "has a different game from"),
        (tables.Unseen((run, run)), "there are two runs of moa-z with seed 1; leave one out"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            tables.unseen(dataclasses.replace(args, results=tmp_path / "results"))
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and part in line
    assert not (tmp_path / "results").exists()


def test_the_table_of_unseen_players_has_the_committed_figures():
    text = tables.unseen_table(read(tables.RESULTS / "unseen.csv"))
    assert text == (tables.RESULTS / "unseen.md").read_text()


# --- scores beside what can be known ---
def test_the_standard_error_is_clustered_by_game(data):
    records = Records(data.arrays, data.meta, "1", CPU)
    rows = np.arange(4_000)
    q = np.random.default_rng(0).dirichlet(np.ones(7), len(rows))
    true = records.ceilings["oracle"]
    gain, error = tables.difference(true, q, records, rows)
    values = true.max(1) - true[rows, q.argmax(1)]
    assert gain == pytest.approx(values.mean()) and gain > 0
    episodes = [values[data.arrays["episode"] == e] for e in np.unique(data.arrays["episode"])]
    draws = np.random.default_rng(1).integers(len(episodes), size=(1_000, len(episodes)))
    sums, counts = (np.array([f(part) for part in episodes]) for f in (np.sum, len))
    assert error == pytest.approx((sums[draws].sum(1) / counts[draws].sum(1)).std(), rel=0.15)
    assert tables.difference(q, q, records, rows) == (0.0, 0.0)


def test_no_one_beats_the_ceilings():
    """The more one knows, the better: class shares, legal actions, the whole history, the strategy itself."""
    data = stag_hunt.collect(30_000, seed=7)
    records = Records(data.arrays, data.meta, "1", CPU)
    rows = records.rows(2)
    known = {name: q[rows] for name, q in records.ceilings.items()}
    ladder = [*tables.baselines(records, rows).values(), known["history Bayes"], known["oracle"]]
    scores = [score(q, records, rows)["expected_top1"] for q in ladder]
    nll = [score(q, records, rows)["nll"] for q in ladder]
    assert scores == sorted(scores) and nll == sorted(nll, reverse=True)
    assert scores[2] == pytest.approx(0.85, abs=0.02) and scores[3] == pytest.approx(0.876, abs=0.02)
    legal = data.arrays["action_mask"][rows]
    assert all((q[~legal] == 0).all() for q in ladder[1:])


def test_learns_more_than_it_could_guess(tmp_path, no_pictures):
    folder = train(
        tmp_path, rows=12_000, total_timesteps=1_000, eval_frequency=500, batch_size=64, eval_episodes=60,
        learning_rate=1e-3, reconstruction_weight=0.01,
    )  # fmt: skip
    tables.report(tables.Report(folder, reference_steps=200))
    table = {row["name"]: row for row in read(folder / "table.csv") if row["subset"] == "all"}
    value = {name: float(row["expected_top1"]) for name, row in table.items()}
    model = next(name for name in value if name.startswith("MOA"))
    assert value[model] > value["prior + mask"] + 0.2 and value[model] > value["random encoder + probe"] + 0.05
    assert value["oracle"] > value["history Bayes"] > value[model]
    assert value["history Bayes"] >= value["single frame, knows the policies"] - 0.01
    assert float(table[model]["nll"]) < float(table["prior + mask"]["nll"]) - 0.4
    assert float(table[model]["top3"]) > 0.93 and float(table["history Bayes"]["achieved"]) == 1.0
    rows = read(folder / "eval.csv")
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"])
    assert float(rows[-1]["validation_reconstruction"]) < 0.5 * 7 * 16 * math.log(2)


def test_an_untrained_model_does_not(data):
    records = Records(data.arrays, data.meta, "1", CPU)
    rows = records.rows(2)
    torch.manual_seed(0)
    q = predict_actions(MOA(Args(latent_dim=5), records.sizes, CPU), records, rows)["q"]
    guess = score(tables.baselines(records, rows)["prior + mask"], records, rows)["top1"]
    assert score(q, records, rows)["top1"] < guess + 0.2


def test_a_leak_is_noticed(tmp_path, no_pictures, monkeypatch, capsys):
    """A model that is shown its labels does better than anybody can."""
    report = tables.Report(train(tmp_path, rows=6_000, total_timesteps=2), reference_steps=5)
    honest = tables.predict_actions

    def cheat(agent, records, rows):
        true = records.ceilings["oracle"][rows]
        did = np.eye(records.sizes.actions)[records.arrays["action"][rows]]
        return {**honest(agent, records, rows), "q": (true + did) / 2}

    tables.report(report)
    assert "leaked" not in capsys.readouterr().out
    monkeypatch.setattr(tables, "predict_actions", cheat)
    tables.report(report)
    assert "warning: better than history Bayes can be" in capsys.readouterr().out

    def copy(agent, records, rows):
        """Mostly what was done: no better in expectation, and better than the oracle in fact."""
        result = honest(agent, records, rows)
        did = np.eye(records.sizes.actions)[records.arrays["action"][rows]]
        copied = np.random.default_rng(0).random(len(rows)) < 0.98
        return {**result, "q": np.where(copied[:, None], did, result["q"])}

    monkeypatch.setattr(tables, "predict_actions", copy)
    large = train(tmp_path, rows=6_000, total_timesteps=2, run_name="copy", env_id="4p5b8x8")
    tables.report(tables.Report(large, reference_steps=5))
    printed = capsys.readouterr().out
    assert "better than history Bayes can be" in printed and "better than oracle can be" in printed
