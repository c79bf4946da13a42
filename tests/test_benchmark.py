"""benchmark/: curves and tables from run folders, the job lists, the speed comparison, playing a saved model."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmark"
sys.path[:0] = [str(ROOT), str(BENCHMARK)]

import evaluate  # noqa: E402
import latent  # noqa: E402
import plas_clone  # noqa: E402
import plas_data  # noqa: E402
import plas_study  # noqa: E402
import plot  # noqa: E402
import speed  # noqa: E402
import world_model_table  # noqa: E402

import hyar_td3  # noqa: E402
import plas_pixels  # noqa: E402

torch.set_num_threads(1)


# --- synthetic runs ---
STEPS = 100  # environment steps between two evaluations


def curve(values, success=0.5):
    """An eval.csv's columns: one evaluation for each value."""
    return [
        {"step": STEPS * (i + 1), "episodic_return": value, "return_std": 0.1, "success_rate": success}
        for i, value in enumerate(values)
    ]


def make_run(runs, name, env_id, seed, rows, total=12 * STEPS, script="hyar_td3", average=None, episodes=100):
    """A run folder; `average` is added to the return for the averaged policy's columns."""
    folder = runs / name
    folder.mkdir(parents=True)
    arguments = {"env_id": env_id, "seed": seed, "total_timesteps": total, "eval_episodes": episodes}
    (folder / "args.json").write_text(json.dumps({"script": script, "arguments": arguments}))
    if average is not None:
        rows = [
            {**row, "average_episodic_return": row["episodic_return"] + average, "average_success_rate": 0.7}
            for row in rows
        ]
    if rows:
        with open(folder / "eval.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def ramp(last):
    """12 values; the mean of the last 10 is `last`, the first two would spoil it."""
    return [-100.0, -100.0, *(last + offset for offset in (-0.25, 0.25) * 5)]


def collect(runs, results, **options):
    plot.main(plot.Args("hyar_td3", runs=runs, results=results, **options))
    return results / "hyar_td3"


def table_rows(path):
    """A Markdown table as one dictionary per row."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def assert_picture(path):
    """A picture of some size in which more than a little is drawn, in colour."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert min(image.shape[:2]) > 300
    assert 0.01 < (image < 250).any(2).mean() < 0.6
    assert (np.ptp(image, axis=2) > 60).mean() > 0.001


@pytest.fixture
def runs(tmp_path):
    """Platform with three finished seeds and one unfinished, Goal with one, an ablation, and what does not count."""
    folder = tmp_path / "runs"
    for seed, value in ((1, 0.9), (2, 0.6), (10, 0.3)):
        make_run(folder, f"hyar_td3__Platform-v0__{seed}", "Platform-v0", seed, curve(ramp(value)), average=0.05)
    make_run(folder, "hyar_td3__Platform-v0__4", "Platform-v0", 4, curve(ramp(0.0)[:5]))
    make_run(folder, "hyar_td3__Platform-v0__5", "Platform-v0", 5, [])
    make_run(folder, "hyar_td3__Goal-v0__1", "Goal-v0", 1, curve(ramp(20.0), success=0.75), episodes=50)
    for seed, value in ((1, 0.5), (2, 0.1)):
        make_run(folder, f"hyar_td3-no-kl__Platform-v0__{seed}", "Platform-v0", seed, curve(ramp(value)))
    make_run(folder, "Platform-v0__hyar_td3__1__1700000000", "Platform-v0", 1, curve(ramp(7.0)))
    make_run(folder, "hyar_td3__Goal-v0__2", "Goal-v0", 2, curve(ramp(7.0)), script="other")
    make_run(folder, "hyar_td3x__Goal-v0__2", "Goal-v0", 2, curve(ramp(7.0)))
    return folder


# --- plot.py: statistics ---
def test_interquartile_mean_by_hand():
    values = np.array([[100.0, 1.0], [0.0, 2.0], [2.0, 3.0], [1.0, 4.0], [3.0, 50.0]])
    assert plot.interquartile_mean(values).tolist() == [2.0, 3.0]  # one of five is cut on each side
    assert plot.interquartile_mean(values[:3])[0] == 34.0  # of three, none
    assert plot.interquartile_mean(values[:1]).tolist() == [100.0, 1.0]
    eight = np.array([9.0, 0, 1, 2, 3, 4, -7, 8])[:, None]
    assert plot.interquartile_mean(eight)[0] == np.mean([1, 2, 3, 4])


def test_bootstrap_interval_is_that_of_all_resamples():
    values = np.array([0.1, 0.9, 0.5, 0.6, 0.35])
    every = [np.sort(draw)[1:4].mean() for draw in itertools.product(values, repeat=5)]
    low, high = plot.bootstrap_interval(np.stack((values, 0.0 * values), 1), samples=20_000)
    assert np.allclose((low[0], high[0]), np.quantile(every, (0.025, 0.975)), atol=0.011)
    assert low[1] == high[1] == 0.0
    pair = plot.bootstrap_interval(np.array([[0.0], [1.0]]))
    assert (pair[0][0], pair[1][0]) == (0.0, 1.0)


# --- plot.py: files ---
def test_csv_files_hold_the_finished_runs_sorted(runs, tmp_path):
    folder = collect(runs, tmp_path / "results")
    rows = csv_rows(folder / "Platform-v0.csv")
    assert rows[0] == ["step", "return", "success", "seed"]
    assert [int(row[3]) for row in rows[1:]] == [1] * 12 + [2] * 12 + [10] * 12
    assert [int(row[0]) for row in rows[1:13]] == [STEPS * i for i in range(1, 13)]
    assert [float(value) for value in rows[3][1:3]] == [0.65, 0.5]
    averaged = csv_rows(folder / "Platform-v0__averaged-policy.csv")
    assert [float(value) for value in averaged[3][1:3]] == [0.7, 0.7]
    assert {path.name for path in folder.iterdir()} == {
        "Platform-v0.csv", "Platform-v0__no-kl.csv", "Platform-v0__averaged-policy.csv", "Goal-v0.csv",
        "Platform-v0.png", "Platform-v0__ablations.png", "Goal-v0.png", "table.md", "ablations.md",
    }  # fmt: skip


def test_the_first_finished_runs_reconstruction_is_kept(runs, tmp_path):
    make_run(runs, "hyar_td3__Goal-v0__0", "Goal-v0", 0, curve(ramp(0.0)[:5]))  # not finished
    for name in ("__Platform-v0__2", "__Platform-v0__10", "-no-kl__Platform-v0__1", "__Goal-v0__0", "__Goal-v0__1"):
        (runs / f"hyar_td3{name}" / "reconstruction.png").write_text(name)
    folder = collect(runs, tmp_path / "results")
    kept = {path.name: path.read_text() for path in folder.glob("*__reconstruction.png")}
    assert kept == {
        "Platform-v0__reconstruction.png": "__Platform-v0__10",  # the first in the alphabet, an ablation aside
        "Goal-v0__reconstruction.png": "__Goal-v0__1",
    }


def test_tables_by_hand(runs, tmp_path, capsys):
    folder = collect(runs, tmp_path / "results")
    printed = capsys.readouterr().out
    platform, goal = table_rows(folder / "table.md")
    assert platform == {
        "environment": "Platform-v0", "column": "return", "paper": "0.98 ± 0.01", "CHDP": "0.997",
        "ours": "0.600 ± 0.300", "ours, averaged policy": "0.650 ± 0.300", "seeds": "3", "steps": "1,200",
        "evaluation episodes": "100", "each seed (seed)": "0.900 (1), 0.600 (2), 0.300 (10)",
    }  # fmt: skip
    assert (goal["column"], goal["paper"], goal["CHDP"]) == ("success", "0.78 ± 0.03", "0.809")
    assert (goal["ours"], goal["seeds"], goal["evaluation episodes"]) == ("0.750", "1", "50")
    assert goal["ours, averaged policy"] == "–"
    averaged, no_kl = table_rows(folder / "ablations.md")
    assert (no_kl["change"], no_kl["score"], no_kl["seeds"]) == ("no-kl", "0.300 ± 0.283", "2")
    assert no_kl["unchanged, same seeds"] == "0.750 ± 0.212"
    assert (no_kl["95 % interval"], no_kl["paired difference"]) == ("-2.241 to 2.841", "-0.450")  # t is 12.706
    assert no_kl["95 % interval of it"] == "-1.085 to 0.185"
    assert no_kl["each seed (seed)"] == "0.500 (1), 0.100 (2)"
    assert averaged["change"] == "averaged-policy"
    assert (folder / "table.md").read_text() in printed
    assert (folder / "ablations.md").read_text() in printed
    (line,) = [line for line in printed.splitlines() if "not finished" in line]
    assert "hyar_td3__Platform-v0__4 (500 of 1,200 steps)" in line
    assert "hyar_td3__Platform-v0__5 (0 of 1,200 steps)" in line


def test_a_shorter_ablation_is_compared_at_its_own_end(runs, tmp_path):
    make_run(runs, "hyar_td3-short__Platform-v0__1", "Platform-v0", 1, curve([0.2] * 11), total=11 * STEPS)
    short = table_rows(collect(runs, tmp_path / "results") / "ablations.md")[-1]
    assert (short["change"], short["score"], short["steps"]) == ("short", "0.200", "1,100")
    assert short["unchanged, same seeds"] == f"{np.mean(ramp(0.9)[1:11]):.3f}"  # without the last evaluation


def test_a_picture_of_shorter_ablations_ends_with_them(tmp_path, monkeypatch):
    full, short = (np.array([[step, 0.5, 0.5] for step in range(100, end, 100)]) for end in (1_300, 500))
    drawn = []

    def draw_curves(title, column, curves, paper):
        drawn.append({label: seeds[1][-1, 0] for label, seeds in curves.items()})
        return plot.Figure()

    monkeypatch.setattr(plot, "draw_curves", draw_curves)
    results = {("Platform-v0", ""): {1: full}, ("Platform-v0", plot.AVERAGED): {1: full}}
    plot.draw_all("hyar_td3", tmp_path, {**results, ("Platform-v0", "short"): {1: short}})
    assert drawn[1] == {"unchanged": 400, plot.AVERAGED: 400, "short": 400}
    plot.draw_all("hyar_td3", tmp_path, results)
    assert drawn[3] == {"unchanged": 1_200, plot.AVERAGED: 1_200}


def test_results_of_several_machines_grow_together(runs, tmp_path, capsys):
    results = tmp_path / "results"
    collect(runs, results)
    elsewhere = tmp_path / "elsewhere"
    make_run(elsewhere, "hyar_td3__Platform-v0__4", "Platform-v0", 4, curve(ramp(0.2)))
    make_run(elsewhere, "hyar_td3__Platform-v0__1", "Platform-v0", 1, curve(ramp(0.5)))
    make_run(elsewhere, "hyar_td3__Platform-v0__2", "Platform-v0", 2, curve(ramp(0.0)[:3]))
    folder = collect(elsewhere, results)
    (platform, goal) = table_rows(folder / "table.md")
    assert platform["each seed (seed)"] == "0.500 (1), 0.600 (2), 0.200 (4), 0.300 (10)"
    assert goal["ours"] == "0.750"
    assert goal["evaluation episodes"] == "100"  # the script's default: the run's folder is not here
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    collect(tmp_path / "nothing", results)
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    assert table_rows(folder / "table.md") == [platform, goal]


def test_pictures_show_something(runs, tmp_path):
    folder = collect(runs, tmp_path / "results")
    for name in ("Platform-v0", "Platform-v0__ablations", "Goal-v0"):
        assert_picture(folder / f"{name}.png")


def test_what_a_picture_says():
    rows = np.array([[100.0, 0.1, 0.5], [200.0, 0.2, 0.6], [300.0, 0.3, 0.7]])
    seeds = {1: rows, 2: rows + np.array([0.0, 0.1, 0.1]), 3: rows[:2]}
    figure = plot.draw_curves("hyar_td3 on Goal-v0", "success", {"ours": seeds}, {"paper": 0.78, "none": np.nan})
    (axis,) = figure.axes
    assert (axis.get_title(), axis.get_xlabel()) == ("hyar_td3 on Goal-v0", "environment steps")
    assert axis.get_ylabel() == "evaluation success rate"
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["ours, 3 seeds", "paper: 0.78"]
    (mean,) = [line for line in axis.lines if line.get_label() == "ours, 3 seeds"]
    assert mean.get_xdata().tolist() == [100.0, 200.0]  # as far as all seeds have come
    assert np.allclose(mean.get_ydata(), [(0.5 + 0.6 + 0.5) / 3, (0.6 + 0.7 + 0.6) / 3])
    assert len(axis.collections) == 1
    single = plot.draw_curves("one", "return", {"ours": {1: rows}}, {}).axes[0]
    assert len(single.collections) == 0
    assert single.lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3]


def test_unfinished_runs_are_drawn_only_if_asked_for(runs, tmp_path):
    runs_alone = tmp_path / "alone"
    make_run(runs_alone, "hyar_td3__Platform-v0__4", "Platform-v0", 4, curve(ramp(0.0)[:5]))
    folder = collect(runs_alone, tmp_path / "results")
    assert not list(folder.glob("*.png"))
    collect(runs_alone, tmp_path / "results", unfinished=True)
    assert_picture(folder / "Platform-v0.png")
    assert not list(folder.glob("*.csv"))
    assert table_rows(folder / "table.md") == []


@pytest.mark.parametrize("case", ["nothing", "twice"])
def test_plot_says_what_is_wrong(case, tmp_path, capsys):
    if case == "twice":
        for name in ("hyar_td3__Platform-v0__1", "hyar_td3__Platform-v0__2"):
            make_run(tmp_path / "runs", name, "Platform-v0", 1, curve(ramp(0.0)))
    with pytest.raises(SystemExit) as exit_:
        collect(tmp_path / "runs", tmp_path / "results")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("script", ["plas_pixels", "pretrain_vae_moa", "hyar"])
def test_results_that_are_not_the_tools_own_stay(script, tmp_path, capsys):
    (tmp_path / script).mkdir()
    (tmp_path / script / "DotHazard-v0.csv").write_text("step,seed,q_error\n1,1,2.5\n")
    with pytest.raises(SystemExit) as exit_:
        plot.main(plot.Args(script, runs=tmp_path, results=tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and f"{script} has no results table here" in line and "hyar_td3" in line
    assert (tmp_path / script / "DotHazard-v0.csv").read_text() == "step,seed,q_error\n1,1,2.5\n"


def test_a_picture_compares_ablations_on_their_own_seeds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plot, "draw_curves", lambda title, column, curves, paper: (drawn.append(curves), plot.Figure())[1]
    )
    rows = np.array([[STEPS, 0.1, 0.5], [2 * STEPS, 0.2, 0.5]])
    unchanged = {seed: rows for seed in (1, 2, 3, 4)}
    results = {("Goal-v0", ""): unchanged, ("Goal-v0", plot.AVERAGED): {2: rows}, ("Goal-v0", "a"): {1: rows, 4: rows}}
    plot.draw_all("hyar_td3", tmp_path, results)
    assert {name: set(seeds) for name, seeds in drawn[1].items()} == {"unchanged": {1, 4}, "a": {1, 4}}


def test_plot_from_the_command_line(runs, tmp_path):
    command = [sys.executable, BENCHMARK / "plot.py", "hyar_td3", "--runs", runs, "--results", tmp_path / "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.600 ± 0.300" in done.stdout


# --- the job list and the cluster template ---
def jobs(**environment):
    command = ["bash", str(BENCHMARK / "hyar_td3.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return done.stdout.splitlines()


def test_jobs_are_valid_commands_with_names_of_their_own():
    names, environments = [], set()
    for line in jobs(RUNS="/elsewhere"):
        words = shlex.split(line)
        assert words == line.split() and not set(line) & set("*?[]$`;&|<>(){}")  # the template splits at blanks alone
        assert words[:2] == ["python", "hyar_td3.py"]
        args = tyro.cli(hyar_td3.Args, args=words[2:])
        assert args.resume and args.runs_dir == "/elsewhere"
        assert args.env_id in gym.registry
        prefix, env_id, seed = args.run_name.split("__")
        assert (env_id, int(seed)) == (args.env_id, args.seed)
        plain = hyar_td3.Args(resume=True, runs_dir="/elsewhere", run_name=args.run_name, env_id=env_id, seed=args.seed)
        assert prefix == "hyar_td3" if args == plain else prefix.startswith("hyar_td3-")
        names.append(args.run_name)
        environments.add(env_id)
    assert len(names) == len(set(names)) > 20
    assert environments == set(plot.PUBLISHED["hyar_td3"])


def test_jobs_go_to_runs_by_default():
    environment = {name: value for name, value in os.environ.items() if name != "RUNS"}
    done = subprocess.run(["bash", BENCHMARK / "hyar_td3.sh"], capture_output=True, text=True, env=environment)
    assert all("--runs-dir runs " in line for line in done.stdout.splitlines())


CHILD = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1] + ".stopped").write_text("checkpoint saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_array_template_becomes_the_line_of_its_task(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    lines = [f"{sys.executable} {tmp_path / 'child.py'} {tmp_path / name}" for name in ("first", "second", "third")]
    (tmp_path / "jobs.txt").write_text("\n".join(lines) + "\n")
    command = ["bash", BENCHMARK / "array.sbatch", tmp_path / "jobs.txt"]
    process = subprocess.Popen(command, env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"})
    deadline = time.monotonic() + 20
    while not ((tmp_path / "second").exists() and (tmp_path / "second").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert int((tmp_path / "second").read_text()) == process.pid  # the training has taken the shell's place
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "second.stopped").read_text() == "checkpoint saved"
    assert not (tmp_path / "first").exists() and not (tmp_path / "third").exists()


def test_array_template_has_its_options_before_any_command():
    lines = (BENCHMARK / "array.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)
    assert lines[first_command:] == ['exec $(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")']


# --- speed.py ---
@pytest.fixture(scope="module")
def agent():
    """An agent whose latent range has been set, so that some rows are relabelled and others are not."""
    torch.manual_seed(0)
    args = hyar_td3.Args()
    hyar_td3.check(args)
    agent = hyar_td3.HyARTD3(args, hyar_td3.make_env(args), torch.device("cpu"))
    agent.update_latent_range(batch_of(agent, 500))
    agent.vae.state_error.fill_(0.133)  # a fifth of the typical error of an untrained VAE on these rows
    return agent


def batch_of(agent, rows):
    num_actions, parameter_dim = agent.mask.shape
    observation, next_observation = torch.rand(2, rows, agent.actor[0].in_features).mul_(2.0).sub_(1.0)
    k = torch.randint(num_actions, (rows,))
    latent_action = torch.rand(rows, agent.latent_action_dim).mul_(2.0).sub_(1.0)
    fresh = torch.rand(rows) < 0.5
    latent_action[fresh, : agent.embedding_dim] = agent.vae.discrete_embedding().detach()[k[fresh]]
    x = torch.rand(rows, parameter_dim).mul_(2.0).sub_(1.0)
    terminated = (torch.rand(rows) < 0.2).float()
    return hyar_td3.Batch(observation, latent_action, x, k, next_observation, torch.randn(rows), terminated)


def flat(*modules):
    return torch.cat([parameter.detach().flatten() for module in modules for parameter in module.parameters()])


def test_plain_update_gives_the_fast_ones_weights(agent):
    plain = speed.PlainHyARTD3(agent)
    before = flat(plain.actor, plain.critics)
    rows = agent.args.policy_frequency * agent.args.batch_size
    for _ in range(5):
        batch, noise = batch_of(agent, rows), torch.randn(rows, 2 * agent.latent_action_dim)
        losses = agent.update(batch, noise)
        plain.update(batch, noise)
        assert 0.1 < losses["kept_latent"] < 0.9 and 0.1 < losses["kept_embedding"] < 0.9
    fast_critics, fast_targets = speed.separate_critics(agent.critic), speed.separate_critics(agent.target_critic)
    assert (flat(plain.actor, plain.critics) - before).abs().max() > 1e-3
    for ours, theirs, tolerance in (
        (agent.actor, plain.actor, 1e-5), (fast_critics, plain.critics, 1e-5),
        (fast_targets, plain.target_critics, 1e-7), (agent.target_actor, plain.target_actor, 1e-7),
        (agent.average_actor, plain.average_actor, 1e-7),  # these follow slowly, so they have to be nearer
    ):  # fmt: skip
        assert torch.allclose(flat(ours), flat(theirs), rtol=0.0, atol=tolerance)


def test_operations_are_those_that_pytorch_counts(agent):
    rows = agent.args.policy_frequency * agent.args.batch_size
    batch, noise = batch_of(agent, rows), torch.randn(rows, 2 * agent.latent_action_dim)
    with FlopCounterMode(display=False) as counter:
        losses = agent.update(batch, noise)
    counted = speed.operations_per_update(agent, 1.0 - float(losses["kept_latent"]))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_speed_prints_and_writes_its_figures(tmp_path, capsys):
    speed.main(
        speed.Args(
            "hyar_td3", rounds=1, environment_steps=50, update_cycles=1, random_episodes=30, vae_steps=2,
            training_steps=140, learning_steps=40, memory=False, json=tmp_path / "speed.json",
        )
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    figures = json.loads((tmp_path / "speed.json").read_text())
    (row,) = figures["rows"]
    assert row["steps"] == figures["environments"]["Platform-v0"]["steps_per_second"]
    assert row["updates"] == figures["updates"]["fast"]["updates_per_second"]
    assert (row["ratio"], figures["torch"]) == (figures["updates"]["ratio"], torch.__version__)
    assert figures["commit"] and "cores" in figures["machine"]
    assert figures["environments"]["Platform-v0"]["ratio"] > 1.0
    assert figures["updates"]["fast"]["updates_per_second"] > 10.0
    assert 0.05 < figures["updates"]["fast"]["roofline_share"] < 1.0
    ratio = figures["updates"]["plain"]["milliseconds_per_cycle"] / figures["updates"]["fast"]["milliseconds_per_cycle"]
    assert figures["updates"]["ratio"] == pytest.approx(ratio)
    assert figures["learning"]["episode_length"] >= 1.0
    assert set(figures["vae"]) == {"one Adam", "rebuilt Adam"} and min(figures["vae"].values()) > 10.0
    printed = capsys.readouterr().out
    for words in ("environment steps/s, original 42-50", "of the roofline", "times plain", "sub-steps/s"):
        assert words in printed


def test_speed_of_the_pretrained_vae(tmp_path, capsys):
    speed.main(speed.Args("pretrain_vae_moa", rounds=1, update_cycles=2, memory=False, json=tmp_path / "speed.json"))
    torch.use_deterministic_algorithms(False)
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert [row["update"] for row in figures["rows"]] == ["moa, context 1", "both, context 1", "moa, context history"]
    assert figures["rows"][0]["ratio"] > 1.0 and figures["rows"][1]["ratio"] is None
    assert figures["game"]["vector_steps_per_second"] > 10 * figures["game"]["parallel_env_steps_per_second"] > 1_000
    for name in ("moa, context 1", "both, context 1", "moa, context history"):
        found = figures[name]
        assert 0.0 < found["batch_share"] < 0.5 and 0.02 < found["roofline_share"] < 1.0
        assert found["rows_per_second"] > 500 and found["operations_per_row"] > 1e6
    assert figures["moa, context 1"]["batches_faster"] > 1.0
    printed = capsys.readouterr().out
    for words in ("of the roofline", "environment steps/s of the PettingZoo environment", "a DataLoader"):
        assert words in printed


@pytest.mark.parametrize("script", ["world_model_test", "plas_pixels"])
def test_speed_of_the_other_scripts(script, tmp_path, monkeypatch):
    """Each row of the table has its rates, and the peak memory is that of a run in a process of its own."""
    monkeypatch.setitem(speed.SHORT_RUNS, script, speed.SHORT_RUNS[script] + SHORTER[script])
    speed.main(speed.Args(script, rounds=1, pixel_updates=10, world_updates=1, json=tmp_path / "speed.json"))
    torch.use_deterministic_algorithms(False)
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert 100 * 2**20 < figures["peak_memory"] < 8 * 2**30
    for row in figures["rows"]:
        assert row["updates"] > 0.1 and row["ratio"] > 0.5 and 0.01 < row["roofline"] < 1.0
    assert len(figures["rows"]) == {"world_model_test": 1, "plas_pixels": 4}[script]


SHORTER = {
    "world_model_test": " --rows 600 --test-rows 200 --total-timesteps 1",
    "plas_pixels": " --collect-steps 300 --total-timesteps 1",
}


def test_a_short_run_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(speed.SHORT_RUNS, "hyar_td3", "--env Nothing-v0")
    with pytest.raises(RuntimeError, match=r"--env Nothing-v0 failed: .*Nothing"):
        speed.peak_memory("hyar_td3")


def test_speed_of_an_unknown_script(capsys):
    with pytest.raises(SystemExit) as exit_:
        speed.main(speed.Args("nothing"))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: no measurement of nothing; there are {', '.join(speed.MEASUREMENTS)}\n"


# --- evaluate.py ---
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a very short run."""
    args = hyar_td3.Args(
        runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="tiny", total_timesteps=150, random_episodes=20,
        vae_pretrain_steps=5, eval_frequency=75, eval_episodes=2, seed=3,
    )  # fmt: skip
    folder = hyar_td3.main(args)
    torch.use_deterministic_algorithms(False)
    return folder


def test_evaluate_plays_the_saved_policy(trained, capsys):
    evaluate.main(evaluate.Args(trained, model="model.pt", episodes=5, average=False))
    printed = capsys.readouterr().out
    agent = evaluate.load_agent(trained / "model.pt")
    environments = [hyar_td3.make_env(agent.args, agent.scale) for _ in range(5)]
    result = hyar_td3.evaluate(agent, environments, hyar_td3.episode_seed(12345, 3, stream=3))
    assert f"return {result['episodic_return']:.3f} ± {result['return_std']:.3f}, success rate 0.000" in printed
    content = torch.load(trained / "model.pt", weights_only=True)
    saved = [value.flatten() for name, value in content["agent"].items() if name.startswith("actor.")]
    assert torch.equal(flat(agent.actor), torch.cat(saved))


def test_evaluate_plays_a_model_with_another_critic(trained, tmp_path):
    """Also one from before the agent was a module, with options that are gone, and without an average."""
    content = torch.load(trained / "model.pt", weights_only=True)
    wanted = evaluate.load_agent(trained / "model.pt")
    older = {"center": content["center"], "scale": content["width"]}
    for part, prefix in (("actor", "network."), ("vae", "")):
        state = getattr(wanted, part).state_dict()
        older[part] = {f"{prefix}{name}": value for name, value in state.items()}
    older["arguments"] = json.dumps(json.loads(content["arguments"]) | {"latent_range_samples": 5_000})
    other = {**content["agent"], "critic.weight1": torch.zeros(2, 2)}
    for changed in (older, {**content, "agent": other}):
        torch.save(changed, tmp_path / "model.pt")
        agent = evaluate.load_agent(tmp_path / "model.pt")
        assert torch.equal(flat(agent.actor), flat(wanted.actor)) and torch.equal(flat(agent.vae), flat(wanted.vae))
        assert (agent.scale.width == wanted.scale.width).all() and (agent.scale.center == wanted.scale.center).all()
        average = wanted.actor if changed is older else wanted.average_actor
        assert torch.equal(flat(agent.average_actor), flat(average))


def test_latent_draws_what_the_latent_space_holds(trained, capsys):
    latent.main(latent.Args(trained))
    paths = [trained / f"{name}.png" for name in ("latent_alternatives", "latent_interpolation", "embedding")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and (pixels < 250).any(2).mean() > 0.02


def test_evaluate_plays_episodes_of_its_own(trained, monkeypatch, tmp_path):
    seeds = []
    reset = hyar_td3.HybridEnv.reset

    def recorded(env, *, seed=None, options=None):
        seeds.append(seed)
        return reset(env, seed=seed, options=options)

    monkeypatch.setattr(hyar_td3.HybridEnv, "reset", recorded)
    for seed in (12345, 3):  # also with the run's own seed
        evaluate.main(evaluate.Args(trained, episodes=20, seed=seed))
    used = {hyar_td3.episode_seed(3, i, stream) for i in range(1_000) for stream in (0, 1, 2)}
    assert len(set(seeds)) == 40 and not set(seeds) & used
    for own in (False, True):  # a video shows the first three of those that were scored
        seeds.clear()
        evaluate.main(evaluate.Args(trained, episodes=4, own_episodes=own, video=tmp_path / f"{own}"))
        resets = [seed for seed in seeds if seed is not None]
        assert resets[:3] == resets[4:7] and bool(set(resets) & used) == own


@pytest.mark.parametrize("residual_action", [False, True])
def test_evaluate_plays_from_pixels_and_stands_still(residual_action, tmp_path, monkeypatch, capsys):
    import sac_ae_pixels

    args = sac_ae_pixels.Args(
        env_id="Pendulum-v1", image_size=16, num_layers=1, num_filters=2, hidden_dim=8, action_repeat=20, seed=3,
        residual_action=residual_action,
    )  # fmt: skip
    sac_ae_pixels.check(args)
    torch.manual_seed(0)
    agent = sac_ae_pixels.SACAE(args, (16, 16), 1, torch.device("cpu"))
    content = {**sac_ae_pixels.model_state(agent), "arguments": json.dumps(asdict(args))}
    torch.save(content, tmp_path / "model.pt")
    env, given, step = sac_ae_pixels.make_env(args), [], sac_ae_pixels.PixelEnv.step
    own = sac_ae_pixels.evaluate(agent, [env] * 2, 3)
    monkeypatch.setattr(sac_ae_pixels, "probe", lambda env: None)
    monkeypatch.setattr(sac_ae_pixels.PixelEnv, "step", lambda self, a: (given.append(float(a[0])), step(self, a))[1])
    printed = []
    for changes in ({"own_episodes": True}, {}, {"own_episodes": True, "still": True}):
        given.clear()
        evaluate.main(evaluate.Args(tmp_path, model="model.pt", episodes=2, **changes))
        assert len(given) == 20 and any(given) != ("still" in changes)
        printed.append(capsys.readouterr().out)
    assert f"return {own['episodic_return']:.3f} ± {own['return_std']:.3f}, length 10.0" in printed[0]
    assert "fresh episodes of Pendulum-v1, the policy's mean" in printed[1] and "actions of 0" in printed[2]
    assert len({text.splitlines()[1] for text in printed}) == 3


@pytest.mark.parametrize("policy", ["latent", "argmax"])
def test_evaluate_plays_offline_agents_and_what_they_cloned(policy, tmp_path, monkeypatch, capsys):
    args = plas_pixels.Args(hidden_dim=8, num_filters=2, policy=policy, seed=3)
    plas_pixels.check(args)
    torch.manual_seed(0)
    environments = [plas_pixels.make_env(args) for _ in range(2)]
    agent = plas_pixels.PLAS(args, environments[0], torch.device("cpu"))
    torch.save({"agent": agent.state_dict(), "arguments": json.dumps(asdict(args))}, tmp_path / "model.pt")
    own = plas_pixels.evaluate(agent, environments, 3)
    given, step = [], plas_pixels.PixelEnv.step  # but for the actions of 0 that environments are tried with
    monkeypatch.setattr(
        plas_pixels.PixelEnv,
        "step",
        lambda self, a: (given.append((self.observation, a)) if a.any() else None, step(self, a))[1],
    )
    played = {"model": "model.pt", "episodes": 2, "own_episodes": True}
    evaluate.main(evaluate.Args(tmp_path, **played))
    printed = capsys.readouterr().out
    assert f"return {own['episodic_return']:.3f} ± {own['return_std']:.3f}" in printed and "the policy:" in printed

    def cloned():
        picture = torch.from_numpy(given[0][0])[None]
        with torch.no_grad():
            return agent.vae.decode(agent.vae_encoder(picture), torch.zeros(1, agent.vae.latent_dim))[0].numpy()

    assert np.abs(given[0][1] - cloned()).max() > 1e-3
    given.clear()
    evaluate.main(evaluate.Args(tmp_path, cloned=True, **played))
    assert "cloned actions (z = 0)" in capsys.readouterr().out
    np.testing.assert_allclose(given[0][1], cloned(), atol=1e-6)


def test_evaluate_refuses_flags_of_other_scripts(trained, capsys):
    for flag, script in (("still", "sac_ae_pixels"), ("cloned", "plas_pixels")):
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(evaluate.Args(trained, **{flag: True}))
        assert exit_.value.code == 2
        assert capsys.readouterr().err == f"error: --{flag} is for models of {script}.py; leave it out\n"


def test_evaluate_fails_below_the_limit(trained, capsys):
    evaluate.main(evaluate.Args(trained, episodes=2, at_least=-1.0))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(evaluate.Args(trained, episodes=2, at_least=2.0))
    assert exit_.value.code == 1
    assert "is below 2" in capsys.readouterr().out


def test_an_exported_model_plays_alone(trained, tmp_path, capsys):
    """It is small, plays the averaged policy as the run's own model does, and knows that it has no other."""
    file = tmp_path / "Platform-v0" / "best_model.pt"
    evaluate.main(evaluate.Args(trained, episodes=3, export=file))
    third, first, second = capsys.readouterr().out.splitlines()
    assert file.stat().st_size < 1e6 and third == f"{file}: {file.stat().st_size / 1e6:.2f} MB, for playing alone"
    evaluate.main(evaluate.Args(file.parent, episodes=3, video=tmp_path / "videos"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == first.replace(str(trained), str(file.parent)) and lines[1] == second
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3
    refused = {"average": False}, {"video": tmp_path / "videos"}, {"export": file}
    for changes in refused:
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(evaluate.Args(file.parent, episodes=1, **changes))
        assert exit_.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_evaluate_from_the_command_line_without_a_model(tmp_path):
    command = [sys.executable, BENCHMARK / "evaluate.py", tmp_path, "--at-least", "0.9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no model")


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_evaluate_of_a_damaged_model(content, tmp_path, capsys):
    if content is None:
        torch.save({"actor": {}, "arguments": "{}"}, tmp_path / "best_model.pt")
    else:
        (tmp_path / "best_model.pt").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(evaluate.Args(tmp_path))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for changes in ({"episodes": 0}, {"seed": -1}):
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(evaluate.Args(tmp_path, **changes))
        assert exit_.value.code == 2


def test_evaluate_of_a_model_whose_environment_is_not_here(trained, tmp_path, capsys):
    content = torch.load(trained / "best_model.pt", weights_only=True)
    content["arguments"] = json.dumps(json.loads(content["arguments"]) | {"env_id": "SomePackage:Their-v0"})
    torch.save(content, tmp_path / "best_model.pt")
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(evaluate.Args(tmp_path))
    assert exit_.value.code == 2 and "unknown environment SomePackage:Their-v0" in capsys.readouterr().err


# --- tables of the studies ---
def cells(text: str, *start: str) -> list[str]:
    """The cells of the only line of a Markdown table that starts with these."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    (found,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return found


# --- world_model_table.py ---
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
    assert row["seeds"] == "2" and row["exact %"] == "80.000 ± 14.142" and row["Obs MSE"] == "2.0e-03 ± 0.0e+00"
    assert row["20 steps exact %"] == "40.000 ± 7.071" and row["Hits@1 %"] == "–" and row["limit %"] == "100.000"
    assert dict(zip(heading, cells(text, "b"), strict=True))["exact %"] == "50.000"
    # Both seeds' hunts together: (0.9 x 10 + 0.7 x 30) / 40.
    assert cells((results / "events.md").read_text(), "a") == ["a", "75.00 % of 40"]
    assert_picture(results / "steps.png")


def test_the_summary_of_one_world_model_is_drawn(world_models, capsys):
    args = world_model_table.Args(runs=world_models / "runs", run_name="world_model_test-a__1")
    world_model_table.main(args)
    path = args.runs / args.run_name / "summary.png"
    assert str(path) in capsys.readouterr().out
    assert_picture(path)
    args.run_name = "world_model_test-late__1"
    with pytest.raises(SystemExit) as stopped:
        world_model_table.main(args)
    assert stopped.value.code == 2 and "no finished run" in capsys.readouterr().err


def test_results_of_world_models_stay_when_their_runs_are_gone(world_models):
    results = world_models / "results"
    world_model_table.main(world_model_table.Args(world_models / "runs", results))
    before = (results / "table.md").read_text()
    world_model_table.main(world_model_table.Args(world_models / "nothing", results))
    assert (results / "table.md").read_text() == before


# --- plas_data.py ---
def data(folder: Path, **options) -> plas_data.Args:
    """Few steps of a task that is quickly drawn."""
    return plas_data.Args(**{"env": "DotHazard-v0", "folder": folder, "steps": 90, "random_steps": 60, **options})


def columns_of(path: Path) -> dict[str, np.ndarray]:
    """What an npz file holds."""
    with np.load(path) as file:
        return dict(file)


def test_data_are_what_plas_pixels_reads(tmp_path, capsys):
    """Whole episodes; the same again from the same arguments; random at first; and nothing is done twice."""
    for name in ("one", "two"):
        plas_data.main(data(tmp_path / name))
    settings = plas_pixels.Args()
    plas_pixels.check(settings)
    env = plas_pixels.make_env(settings)
    for name in ("mixed.npz", "medium.npz"):
        dataset, *_ = plas_pixels.load(tmp_path / "one" / name, env)
        columns, again = (columns_of(tmp_path / folder / name) for folder in ("one", "two"))
        assert all(np.array_equal(columns[key], again[key]) for key in columns)
        assert len(dataset.action) == len(columns["action"]) - columns["is_first"].sum() >= 90
        assert columns["env_id"] == "DotHazard-v0"
        assert columns["action_repeat"] == 1
    mixed = columns_of(tmp_path / "one" / "mixed.npz")
    generator = np.random.default_rng(1)
    uniform = generator.uniform(-1.0, 1.0, (60, 2)).astype(np.float32)
    assert np.array_equal(mixed["action"][~mixed["is_first"]][:60], [*uniform])
    before = (tmp_path / "one" / "mixed.npz").stat().st_mtime_ns
    capsys.readouterr()
    plas_data.main(data(tmp_path / "one"))
    assert "complete" in capsys.readouterr().out
    assert (tmp_path / "one" / "mixed.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["random", "medium", "expert", "scripted"])
def test_data_of_other_policies_are_what_plas_pixels_reads(kind, tmp_path, capsys):
    """The actions are those of the policy alone: the same file again, and rows that are what the environment does."""
    for name in ("one.npz", "two.npz"):
        plas_data.main(data(tmp_path, collect=kind, file=tmp_path / name))
        assert "episodes, return" in capsys.readouterr().out
    columns, again = (columns_of(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert all(np.array_equal(columns[key], again[key]) for key in columns)
    settings = plas_pixels.Args()
    plas_pixels.check(settings)
    env = plas_pixels.make_env(settings)
    dataset, _, about = plas_pixels.load(tmp_path / "one.npz", env)
    assert len(dataset.rows) == 120 and about["collect"] == kind
    assert plas_pixels.is_reproduced(dataset, env, about["first_seed"])
    expert = []
    env.reset(seed=about["first_seed"])
    for action in columns["action"][1:41]:
        expert.append(env.unwrapped.expert_action())
        env.step(action)
    same = (np.array(expert) == columns["action"][1:41]).all(1).mean()
    assert same == (kind in ("expert", "scripted"))
    plas_data.main(data(tmp_path, collect=kind, file=tmp_path / "one.npz"))
    assert "one.npz is complete" in capsys.readouterr().out


def test_the_script_has_dot_hazards_data_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = plas_pixels.Args(dataset="expert", collect_steps=80)
    plas_pixels.check(settings)
    env = plas_pixels.make_env(settings)
    dataset, digest = plas_pixels.find_dataset(settings, env)
    assert len(dataset.rows) == 80 and dataset.returns.mean() > 15.0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["DotHazard-v0_expert_80.npz"]
    assert plas_pixels.find_dataset(settings, env)[1] == digest
    assert "expert_80.npz, collected by expert; remove it to collect it anew" in capsys.readouterr().out


def test_a_model_of_sac_ae_collects_by_its_mean_actions(tmp_path, monkeypatch):
    agent = plas_data.sac_ae_pixels.SACAE.__new__(plas_data.sac_ae_pixels.SACAE)
    sizes = {"image_size": 28, "frame_stack": 1, "action_repeat": 1, "camera": 0, "residual_action": False}
    own = {
        "args": SimpleNamespace(**sizes, seed=1), "action_dim": 2,
        "act": lambda pictures, _: np.tanh(pictures.reshape(len(pictures), -1)[:, :2] / 255.0 - 0.2, dtype=np.float32),
    }  # fmt: skip
    agent.__dict__.update(own)
    monkeypatch.setattr(plas_data.evaluate, "load_agent", lambda path: agent)
    (tmp_path / "model.pt").write_bytes(b"a model")
    plas_data.main(data(tmp_path, collect=str(tmp_path / "model.pt"), file=tmp_path / "sac.npz"))
    columns = columns_of(tmp_path / "sac.npz")
    pictures = np.moveaxis(columns["image"][:40], 3, 1)
    np.testing.assert_array_equal(columns["action"][1:41], own["act"](pictures, None))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"action_dim": 3}, "has 3 actions, the environment 2"),
        ({"frame_stack": 3}, "was made with --frame-stack 3, but this run differs"),
        ({"image_size": 84}, "was made with --image-size 84, but this run differs"),
        ({"residual_action": True}, "was trained with --residual-action"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, part, tmp_path, monkeypatch, capsys):
    agent = plas_data.sac_ae_pixels.SACAE.__new__(plas_data.sac_ae_pixels.SACAE)
    sizes = {"image_size": 28, "frame_stack": 1, "action_repeat": 1, "camera": 0, **changes}
    agent.__dict__.update(args=SimpleNamespace(**sizes, seed=1), action_dim=changes.get("action_dim", 2))
    monkeypatch.setattr(plas_data.evaluate, "load_agent", lambda path: agent)
    (tmp_path / "model.pt").write_bytes(b"a model")
    with pytest.raises(SystemExit) as exit_:
        plas_data.main(data(tmp_path / "new", collect=str(tmp_path / "model.pt")))
    assert exit_.value.code == 2 and part in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_agent_that_makes_data_learns():
    """A task of one step: the reward is the negative square of what the action differs from the state by."""
    torch.manual_seed(1)
    generator = np.random.default_rng(1)
    agent = plas_data.TD3(1, 1, 1_000)
    for _ in range(1_000):
        state, action = generator.uniform(-0.8, 0.8, 1), generator.uniform(-1.0, 1.0, 1)
        agent.add(state, action, -np.square(state - action).sum(), 0.0, state)

    def error() -> float:
        states = np.linspace(-0.8, 0.8, 50)[:, None]
        with torch.no_grad():
            actions = torch.tanh(agent.actor(torch.from_numpy(states.astype(np.float32)))).numpy()
        return np.square(actions - states).mean()

    untrained = error()
    for step in range(400):
        agent.update(step)
    assert error() < 0.01 < 0.1 < untrained
    draws = np.array([agent.act(np.zeros(1)) for _ in range(500)])
    assert abs(draws.std() - plas_data.EXPLORATION_NOISE) < 0.02
    assert agent.values(agent.critics, torch.zeros(3, 1), torch.zeros(3, 1))[0].shape == (3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 50}, "--random-steps 60 of --steps 50"), ({"random_steps": 0}, "--random-steps 0"),
        ({"env": "CartPole-v1"}, "Box action space"), ({"env": "cartpol-swingup"}, "unknown environment"),
        ({"image_size": -1}, "--image-size -1"), ({"file": Path("x.npz")}, "td3 writes two files"),
        ({"collect": "best"}, "expected td3, random, medium, expert or a model.pt"),
        ({"env": "Pendulum-v1", "collect": "expert"}, "no expert_action"), ({"steps": 10**12}, "GiB of memory"),
    ],
)  # fmt: skip
def test_data_of_what_cannot_be_had(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plas_data.main(data(tmp_path / "new", **options))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
    assert not (tmp_path / "new").exists()


def test_data_cannot_be_where_a_file_is(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        plas_data.main(data(tmp_path / "file"))
    assert "cannot write" in capsys.readouterr().err


# --- plas_study.py ---
def run_of_the_study(folder: Path, signal: str, seed: int, returns: list[float], steps: int = 4_000) -> None:
    """A run folder with an evaluation each 2,000 steps; the error of Q is a tenth of the return."""
    levels = {"behaviour_return": 13.0, "random_return": -2.0, "probe_r2": ""}
    rows = [
        {"step": 2_000 * (i + 1), "episodic_return": value, "q_error": value / 10, **levels}
        for i, value in enumerate(returns)
    ]
    name = f"plas_pixels-{signal}-medium__DotHazard-v0__{seed}"
    make_run(folder, name, "DotHazard-v0", seed, rows, total=steps, script="plas_pixels")


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
    assert row["seeds"] == "2" and row["return"] == "23.00 ± 4.24" and row["Q error (MSE)"] == "2.30 ± 0.42"
    assert row["probe R²"] == "–"
    assert cells(text, "critic", "2,000")[2:5] == ["1", "1.00", "0.10"]
    assert_picture(results / "DotHazard-v0.png")
    plas_study.main(plas_study.Args(study / "runs", results, steps=(2_000, 4_000), unfinished=True))
    assert cells((results / "DotHazard-v0.md").read_text(), "vae", "2,000")[2:4] == ["1", "5.00"]


def test_results_of_the_study_grow(study):
    results = study / "results"
    plas_study.main(plas_study.Args(study / "runs", results))
    run_of_the_study(study / "more", "critic", 2, [3.0, 6.0])
    run_of_the_study(study / "more", "both", 1, [10.0, 30.0])  # made again: it replaces the row
    plas_study.main(plas_study.Args(study / "more", results, steps=(4_000,)))
    text = (results / "DotHazard-v0.md").read_text()
    assert cells(text, "critic", "4,000")[2:4] == ["2", "4.00 ± 2.83"]
    assert cells(text, "both", "4,000")[3] == "28.00 ± 2.83"
    # By seed 2 - 30 and 6 - 26: mean -24 with a standard error of 4; Student's t of one degree of freedom is 12.71.
    assert cells(text, "difference")[1] == "return, 4,000"
    assert cells(text, "critic minus both")[1] == "-24.0 [-74.8, 26.8]" and "minus vae" not in text
    run_of_the_study(study / "more", "vae", 2, [3.0, 9.0])
    plas_study.main(plas_study.Args(study / "more", results, steps=(4_000,)))
    assert cells((results / "DotHazard-v0.md").read_text(), "critic minus vae")[1] == "-3.0"  # seed 2 has both


def test_data_of_ones_own_have_a_table_too(study, capsys):
    run_of_the_study(study / "runs", "both-mine-medium", 3, [1.0, 9.0])  # a dataset named mine-medium-medium
    run_of_the_study(study / "runs", "mine", 3, [1.0, 9.0])  # no signal
    plas_study.main(plas_study.Args(study / "runs", study / "results", steps=(4_000,)))
    assert "left out: plas_pixels-mine-medium__DotHazard-v0__3 is not" in capsys.readouterr().out
    text = (study / "results" / "DotHazard-v0.md").read_text()
    assert text.index("Dataset medium.") < text.index("Dataset mine-medium-medium.")
    assert text.count("| both |") == 2 and "mine |" not in text
    assert_picture(study / "results" / "DotHazard-v0.png")


@pytest.mark.parametrize("tool", [world_model_table, plas_study])
def test_without_runs_nothing_is_made(tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(tool.Args(tmp_path / "runs", tmp_path / "results"))
    assert stopped.value.code == 2 and not (tmp_path / "results").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: no finished runs") and error.count("\n") == 1


# --- plas_clone.py ---
def test_a_clone_from_states_stays_where_untrained_policies_leave(tmp_path, capsys):
    """Returns are those of the run's own evaluation, errors those of the actions, and bad input is one line."""
    plas_data.main(data(tmp_path, collect="expert", steps=4000))
    args = plas_pixels.Args(hidden_dim=8, num_filters=2, seed=3, dataset=str(tmp_path / "expert.npz"))
    plas_pixels.check(args)
    torch.manual_seed(0)
    environments = [plas_pixels.make_env(args) for _ in range(3)]
    agent = plas_pixels.PLAS(args, environments[0], torch.device("cpu"))
    torch.save({"agent": agent.state_dict(), "arguments": json.dumps(asdict(args))}, tmp_path / "model.pt")
    capsys.readouterr()
    asked = plas_clone.Args(tmp_path, episodes=3, steps=1000)
    plas_clone.main(asked)
    title, *lines, last = capsys.readouterr().out.strip().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    moved, noise = (float(word) for word in last.replace(";", "").split() if word[0] == "0")
    assert moved > 0.0 and noise == pytest.approx(float(rows[0][1]) ** 0.5, abs=0.01)
    assert [row[0] for row in rows] == ["cloned from states", "cloned from pictures (z = 0)", "the policy"]
    dataset, *_ = plas_pixels.load(tmp_path / "expert.npz", environments[0])
    assert f"the data's return: {dataset.returns.mean():.0f}" in title

    own = plas_pixels.evaluate(agent, environments, 3)
    assert rows[2][2] == f"{own['episodic_return']:.0f} ± {own['return_std']:.0f}"
    late = dataset.rows > int(dataset.starts[int(np.ceil(0.9 * len(dataset.starts)))])
    batch = dataset.batch(late.nonzero()[:, 0])
    with torch.no_grad():
        cloned = agent.vae.decode(agent.vae_encoder(batch.observation), torch.zeros(len(batch.action), 4))
    assert float(rows[1][1]) == pytest.approx(float((cloned - batch.action).square().mean()), abs=6e-4)
    errors, outside = [float(row[1]) for row in rows], [int(row[3].rstrip("%")) for row in rows]
    assert errors[0] < 0.3 * min(errors[1:]) and outside[0] < min(outside[1:]) and max(outside) > 20

    np.savez(tmp_path / "blind.npz", **{k: v for k, v in columns_of(tmp_path / "expert.npz").items() if k != "state"})
    for wrong, said in (
        (replace(asked, dataset=tmp_path / "blind.npz"), "name an npz file with the column state"),
        (replace(asked, dataset=tmp_path / "none.npz"), "there is no dataset"),
        (replace(asked, episodes=0), "--episodes 0"),
        (replace(asked, model="absent.pt"), "there is no model"),
    ):
        with pytest.raises(SystemExit) as exit_:
            plas_clone.main(wrong)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
