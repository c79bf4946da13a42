"""Fill the tables of README and docs from the committed results.

    python benchmark/tables.py
    python benchmark/tables.py --check

A table stands between `<!-- table NAME: python benchmark/tables.py -->` and `<!-- end of table -->`; what is between
them is replaced. Figures come from the CSV and JSON files in benchmark/results/. With `--check` nothing is written, and
the exit status is 1 if a table is not up to date.
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import plas_study, plot, world_model_table
from benchmark.plot import each_seed, markdown, mean_and_std, spread, usage_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
MARKED = re.compile(r"(<!-- table ([\w-]+): python benchmark/tables.py -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass
class Args:
    """What to do."""

    check: bool = False
    """if toggled, write nothing; exit with status 1 if a table is not up to date"""
    root: Path = ROOT
    """the folder with README.md and docs/"""


# Many cells come from one file, which is read once.
read_rows = functools.cache(plot.read_rows)
read_results = functools.cache(plot.read_results)
read_tests = functools.cache(world_model_table.read_results)


def rows_of(*parts: str) -> list[dict[str, str]]:
    """The rows of a CSV file in benchmark/results/."""
    return read_rows(RESULTS.joinpath(*parts))


# HyAR-TD3 ------------------------------------------------------------------------------------------------------------
def hyar_results() -> str:
    """Score of each task beside the papers'."""
    return plot.results_table("hyar_td3", read_results(RESULTS / "hyar_td3"), {})


def hyar_variants(environment: str) -> str:
    """What changes to the default do on an environment."""
    results = read_results(RESULTS / "hyar_td3")
    kept = {key: seeds for key, seeds in results.items() if key[0] == environment and key[1] != plot.AVERAGED}
    return plot.ablations_table("hyar_td3", kept)


SELECTION = {  # candidate -> what it changes, beyond the limit as a terminal state
    "limit-is-terminal": "nothing else",
    "hl-gauss": "HL-Gauss critics: 101 bins, sigma of 0.75 bins",
    "random-rows": "half of a batch from the random phase, none from step 100,000 on",
    "proposals": "the actor also moves towards the best of 8 random latent actions",
    "replayed": "the actor also moves towards the best of 8 latent actions of other states",
    "explore-replayed": "every tenth action is one of the buffer's",
    "wide": "every fifth action has a noise of 1",
    "slow-noise": "`--exploration-noise-episodes 10000`",
    "noise-0.3": "`--exploration-noise 0.3`",
    "low-kl": "`--kl-weight 0.05 --vae-learning-rate 1e-3`",
    "very-low-kl": "`--kl-weight 0.005 --vae-learning-rate 1e-3`",
}


def hyar_selection() -> str:
    """Each candidate's success in the five evaluations up to step 50,000, by seed."""
    rows = rows_of("hyar_td3", "selection", "selection.csv")
    lines = []
    for name, change in SELECTION.items():
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["candidate"] == name and 37_500 < int(row["step"]) <= 50_000:
                found.setdefault(row["seed"], []).append(float(row["success"]))
        cells = [f"{np.mean(found[seed]):.2f}" if seed in found else "–" for seed in ("101", "102", "103")]
        lines.append([change, *cells])
    return markdown(["change", "seed 101", "seed 102", "seed 103"], lines)


def hyar_fresh() -> str:
    """The best model of each run on fresh episodes."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of("hyar_td3", "fresh", "best_model.csv"):
        found.setdefault(row["environment"], {})[int(row["seed"])] = float(row["score"])
    lines = []
    for environment, scores in found.items():
        paper = plot.published("hyar_td3", environment)
        published = [f"{paper.mean:.2f} ± {paper.std:.2f}", f"{paper.later:.3f}"]
        ours = [mean_and_std(scores.values()), str(len(scores)), each_seed(scores)]
        lines.append([environment, paper.column, *published, *ours])
    header = ["environment", "column", "paper", "CHDP", "ours, best model", "seeds", "each seed (seed)"]
    return markdown(header, lines)


# SAC+AE --------------------------------------------------------------------------------------------------------------
# At 100,000 environment steps. "Plot": read off the figures of SAC+AE's paper (± 10). "Run again": five seeds in the
# logs of KarlXing/RL-Visual-Continuous-Control, with batches of 256 and without the penalties. RAD (arXiv 2004.14990)
# as COVR (AAAI 2026) prints it. ResAct (AAAI 2025) has residual actions, and more. SAC+AE as CURL quotes it, and DrQ's
# means, are in plot.py.
SIX_TASKS = {  # task -> plot, SAC+AE run again, RAD, deviation of DrQ, ResAct
    "cartpole-swingup": ("253", "292 ± 34", "694", "88", "819 ± 44"),
    "ball_in_cup-catch": ("394", "343 ± 173", "825", "51", "948 ± 44"),
    "finger-spin": ("739", "636 ± 113", "813", "99", "974 ± 42"),
    "walker-walk": ("388", "253 ± 30", "552", "160", "772 ± 65"),
    "reacher-easy": ("269", "315 ± 74", "734", "191", "917 ± 59"),
    "cheetah-run": ("261", "237 ± 28", "364", "66", "503 ± 42"),
}


def last_returns(environment: str, variant: str = "") -> dict[int, float]:
    """The last evaluation's return of each seed."""
    seeds = read_results(RESULTS / "sac_ae_pixels").get((environment, variant), {})
    return {seed: float(rows[-1, 1]) for seed, rows in seeds.items()}


def with_seeds(scores: dict[int, float]) -> str:
    """Mean and deviation, with the number of seeds; a dash for none."""
    if not scores:
        return "–"
    return f"{mean_and_std(scores.values(), 0)} ({len(scores)} seed{'s' if len(scores) > 1 else ''})"


def sac_tasks() -> str:
    """The six tasks of the paper at 100,000 steps."""
    lines = []
    for task, (drawn, again, rad, drq_std, resact) in SIX_TASKS.items():
        paper = plot.published("sac_ae_pixels", task)
        own = [with_seeds(last_returns(task, variant)) for variant in ("", "shift-alone", "residual")]
        curl, drq = f"{paper.mean:.0f} ± {paper.std:.0f}", f"{paper.later:.0f} ± {drq_std}"
        lines.append([task, drawn, curl, again, own[0], rad, drq, own[1], resact, own[2]])
    header = ["100,000 environment steps", "SAC+AE, the paper's plot", "SAC+AE, as CURL quotes it"]
    header += ["SAC+AE, run again (5 seeds)", "ours", "RAD", "DrQ", "ours, random shifts, no decoder"]
    return markdown([*header, "ResAct", "ours, shifts and residual actions"], lines)


def sac_pendulum() -> str:
    """Pendulum from pixels in both precisions, and with residual actions."""
    lines = []
    for name, variant in (("float32", ""), ("`--bf16`", "bf16"), ("`--residual-action`", "residual-alone")):
        scores = last_returns("Pendulum-v1", variant)
        lines.append([name, str(len(scores)), "20,000", mean_and_std(scores.values(), 0), each_seed(scores, 0)])
    return markdown(["Pendulum-v1", "seeds", "steps", "return", "each seed (seed)"], lines)


def sac_shifts(environment: str) -> str:
    """What the decoder and random shifts contribute, one seed."""
    names = {
        "shift-alone": "`--random-shift 4 --no-reconstruction`",
        "residual": "the same with `--residual-action`",
        "newcomer": "the first with `--image-size 64`",
        "random-shift": "`--random-shift 4`",
        "": "neither (SAC+AE)",
        "no-reconstruction": "`--no-reconstruction` (SAC:pixel)",
        "actions of 0": "actions of 0",
    }
    results, fresh = read_results(RESULTS / "sac_ae_pixels"), {}
    for row in rows_of("sac_ae_pixels", "fresh", "model.csv"):
        if row["environment"] == environment:
            fresh[row["variant"]] = f"{row['return']} ± {row['std']} ({row['episodes']} episodes, {row['commit']})"
    lines = []
    for variant, name in names.items():
        curve = results.get((environment, variant), {}).get(1)
        if curve is None and variant not in fresh:
            continue
        returns = [] if curve is None else [f"{value:.0f}" for value in curve[:, 1]]
        lines.append([name, returns[-1] if returns else "–", fresh.get(variant, "–"), ", ".join(returns) or "–"])
    return markdown([environment, "last evaluation", "fresh episodes, ± over them", "each 10,000 steps"], lines)


# PLAS ----------------------------------------------------------------------------------------------------------------
def plas_cell(environment: str, dataset: str, signal: str, step: int, column: str, decimals: int) -> str:
    """Mean and deviation over seeds; a dash where nothing was run."""
    rows = rows_of("plas_pixels", f"{environment}.csv")
    values = plas_study.values(rows, dataset, signal, step, column)
    return mean_and_std(values, decimals) if len(values) else "–"


DOT, CARTPOLE = "DotHazard-v0", "dm_control-cartpole-swingup-v0"
ORDER = ("both", "separate", "vae", "critic", "reconstruction", "none")


def plas_results() -> str:
    """Return after 10,000 steps by encoder signal and dataset."""
    columns = [(DOT, name) for name in ("medium", "expert", "random")]
    columns += [(CARTPOLE, name) for name in ("mixed", "medium")]
    lines = []
    levels = {key: rows_of("plas_pixels", f"{key[0]}.csv") for key in columns}
    behaviour = [next(row for row in rows if row["dataset"] == key[1]) for key, rows in levels.items()]
    lines.append(["the data's behaviour", *(f"{float(row['behaviour_return']):.1f}" for row in behaviour)])
    for signal in ORDER:
        cells = [plas_cell(*key, signal, 10_000, "episodic_return", 1) for key in columns]
        lines.append([f"`{signal}`", *cells])
    names = [f"{'Dot Hazard' if environment == DOT else 'cartpole'}, {dataset}" for environment, dataset in columns]
    return markdown(["encoder trained by", *(f"{name}" for name in names)], lines)


def plas_table(environment: str, datasets: tuple[str, ...], steps: tuple[int, int], signals: tuple[str, ...]) -> str:
    """Return and squared error of Q at two steps, correlation and prior-action error at the later one."""
    measures = [("episodic_return", step, 1) for step in steps] + [("q_error", step, 1) for step in steps]
    measures += [("q_correlation", steps[1], 2), ("prior_action_error", steps[1], 2)]
    names = {"episodic_return": "return", "q_error": "squared error of Q", "q_correlation": "correlation of Q"}
    header = ["encoder trained by", "data"]
    header += [f"{names.get(column, 'prior-action error')}, {step:,}" for column, step, _ in measures]
    lines = [
        [signal, dataset, *(plas_cell(environment, dataset, signal, step, column, n) for column, step, n in measures)]
        for dataset in datasets
        for signal in signals
    ]
    return markdown(header, lines)


def plas_cartpole() -> str:
    """Cartpole: each seed's return beside what its VAE has cloned."""
    rows, cloned = rows_of("plas_pixels", f"{CARTPOLE}.csv"), rows_of("plas_pixels", "cloned", f"{CARTPOLE}.csv")
    lines = []
    for dataset in ("mixed", "medium"):
        for signal in ("both", "critic", "vae"):
            returns = plas_study.by_seed(rows, dataset, signal, 10_000, "episodic_return")
            copies = [row["return"] for row in cloned if (row["dataset"], row["signal"]) == (dataset, signal)]
            level = next(float(row["behaviour_return"]) for row in rows if row["dataset"] == dataset)
            own = f"{mean_and_std(returns.values(), 0)} ({', '.join(f'{value:.0f}' for value in returns.values())})"
            cells = [(2_000, "episodic_return", 0), (10_000, "q_error", 0), (10_000, "q_correlation", 2)]
            first, *others = (plas_cell(CARTPOLE, dataset, signal, *cell) for cell in cells)
            lines.append([signal, dataset, f"{level:.0f}", first, own, ", ".join(copies), *others])
    header = ["encoder trained by", "data", "the data's return", "return, 2,000 steps", "10,000 (each seed)"]
    return markdown([*header, "cloned, 10,000", "squared error of Q, 10,000", "correlation of Q"], lines)


def plas_transitions() -> str:
    """Cartpole, encoder trained by both losses: 15,000 transitions beside 100,000."""
    rows, lines = rows_of("plas_pixels", f"{CARTPOLE}.csv"), []
    sizes = {"": "15,000", "100k": "100,000", "100k-no-shift": "100,000, not shifted"}
    for dataset in ("mixed", "mixed-100k", "medium", "medium-100k", "medium-100k-no-shift"):
        own = [row for row in rows if (row["dataset"], row["signal"]) == (dataset, "both")]
        if not own:
            continue
        data, _, size = dataset.partition("-")
        last, seeds = max(int(row["step"]) for row in own), {row["seed"] for row in own}
        level = f"{float(own[0]['behaviour_return']):.0f}"
        returns = [plas_cell(CARTPOLE, dataset, "both", step, "episodic_return", 0) for step in (2_000, 10_000, last)]
        errors = [plas_cell(CARTPOLE, dataset, "both", step, "prior_action_error", 3) for step in (10_000, last)]
        returns[2] += f" ({last:,} steps)"
        lines.append([data, sizes[size], str(len(seeds)), level, *returns, *errors])
    header = ["data", "transitions", "seeds", "the data's return", "return, 2,000 steps", "10,000", "last"]
    return markdown([*header, "prior-action error, 10,000", "last"], lines)


def plas_repair() -> str:
    """What was expected of moving the encoder to the critics' optimizer, compared with what was measured (means)."""
    rows, steps = rows_of("plas_pixels", f"{DOT}.csv"), (2_000, 4_000, 10_000)

    def measured(signal: str, column: str, decimals: int) -> str:
        means = [np.nanmean(plas_study.values(rows, "medium", signal, step, column)) for step in steps]
        return ", ".join(f"{mean:.{decimals}f}" for mean in means)

    def both(column: str, decimals: int) -> str:
        return f"before {measured('vae', column, decimals)}; after {measured('critic', column, decimals)}"

    before = "2.5 at first; 1.8, 1.3, 0.9 after 10, 20, 50 epochs"
    lines = [
        ["squared error of Q, before", before, measured("vae", "q_error", 1)],
        ["squared error of Q, after", "2.5 at first; 1.5, 0.8, 0.3", measured("critic", "q_error", 1)],
        ["norm of the critics' gradient in the encoder", "0.01 to 0.1", both("encoder_gradient_critic", 1)],
        ["norm of the VAE's gradient in the encoder", "0.001 to 0.01", both("encoder_gradient_vae", 2)],
        ["return", "higher after", both("episodic_return", 1)],
    ]
    return markdown(["", "expected", "measured after 2,000, 4,000, 10,000 steps (epochs 9, 17, 43)"], lines)


# MOA -----------------------------------------------------------------------------------------------------------------
MODELS = {  # variant, or name of what is not a model; rows of the data -> label in the table
    ("majority", 107_010): "majority",
    ("prior + mask", 107_010): "prior + mask",
    ("reconstruction", 107_010): "`reconstruction`, probe of z, one frame",
    ("both-z", 107_010): "`both`, head on z, one frame",
    ("moa-z-not-augmented", 107_010): "`moa`, head on z, one frame, not augmented",
    ("moa-z", 107_010): "`moa`, head on z, one frame",
    ("moa-state", 107_010): "`moa`, head on the state, one frame",
    ("moa-state+z", 107_010): "`moa`, head on state and z, one frame",
    ("single frame, knows the policies", 107_010): "single frame, knows the policies",
    ("moa-z-4frames", 107_010): "`moa`, head on z, four frames",
    ("moa-z-history", 107_010): "`moa`, head on z, history",
    ("history Bayes", 107_010): "exact history Bayes",
    ("oracle", 107_010): "oracle (the script is known)",
    ("moa-z-history-600k", 600_000): "`moa`, head on z, history, 600,000 rows",
    ("history Bayes", 600_000): "exact history Bayes of those rows",
}


def moa_results() -> str:
    """Models between baselines and ceilings, on held-out games."""
    columns = ("expected_top1", "top3", "balanced_accuracy", "nll", "ece", "achieved")
    scores = [row for row in rows_of("pretrain_vae_moa", "table.csv") if row["subset"] == "all"]
    lines = []
    for (key, rows), name in MODELS.items():
        found = [row for row in scores if key == (row["variant"] if row["name"] == "model" else row["name"])]
        by_seed = {row["seed"]: row for row in reversed(found) if int(row["rows"]) == rows}
        cells = [spread([float(row[column]) for row in by_seed.values()]) for column in columns]
        trained = any(row["name"] == "model" for row in by_seed.values())
        lines.append([name, str(len(by_seed)) if trained else "", *cells])
    header = ["", "seeds", "expected top-1", "top-3", "balanced accuracy", "NLL", "ECE", "share of the achievable gain"]
    return markdown(header, lines)


def moa_probes() -> str:
    """What linear probes read from the frozen z."""
    columns = ("action", "strategy", "self's cell", "stag's cell")
    probes, lines = rows_of("pretrain_vae_moa", "probes.csv"), []
    for variant in ("reconstruction", "both-z", "moa-z", "moa-state", "moa-state+z", "moa-z-4frames", "moa-z-history"):
        found = [row for row in probes if row["variant"] == variant]
        cells = [spread([float(row[column]) for row in found]) for column in columns]
        kl = np.mean([float(row["latent KL"]) for row in found])
        name = MODELS[variant, 107_010].replace(", probe of z, one frame", "")
        lines.append([name, str(len(found)), *cells, f"{kl:.1f}"])
    return markdown(["z of", "seeds", "action", "strategy", "own cell", "stag's cell", "KL (nats)"], lines)


def moa_questions() -> str:
    """One thing changed at a time, scored on held-out games and on training rows."""
    rows, lines = rows_of("pretrain_vae_moa", "questions.csv"), []
    for change in dict.fromkeys(row["change"] for row in rows):
        parts = {
            where: [row for row in rows if (row["change"], row["where"]) == (change, where)]
            for where in ("held-out games", "training rows")
        }
        held_out = parts["held-out games"]
        if any(row["loss"] == "inf" for row in held_out):
            lines.append([change, f"loss infinite at step {held_out[0]['steps']}", "", "", "", ""])
            continue
        cells = [spread([float(row["expected_top1"]) for row in part]) for part in parts.values()]
        for column in ("balanced_accuracy", "nll", "ece"):
            cells.append(spread([float(row[column]) for row in held_out]))
        lines.append([change, *cells])
    return markdown(["change", "held-out games", "training rows", "balanced accuracy", "NLL", "ECE"], lines)


def moa_unseen() -> str:
    """Scores over the share of players whose script was in no training game."""
    rows = [row for row in rows_of("pretrain_vae_moa", "unseen.csv") if row["ego"] == "all"]
    shares, variants = (dict.fromkeys(row[name] for row in rows) for name in ("unseen", "variant"))
    lines = []
    for column, name in {"expected_top1": "expected top-1", "regret": "regret, nats", "ece": "ECE"}.items():
        for variant in variants:
            cells = [
                spread([float(row[column]) for row in rows if (row["variant"], row["unseen"]) == (variant, share)])
                for share in shares
            ]
            lines.append([name, variant, *cells])
    return markdown(["all players", "", *(f"{float(share):.0%} NA" for share in shares)], lines)


# World model ---------------------------------------------------------------------------------------------------------
def tests_of(row: str) -> list[dict]:
    """The committed tests of a row of the study, one a seed."""
    return read_tests(RESULTS / "world_model_test").get(row, [])


def shares(tests: list[dict], part: str, name: str, decimals: int = 3) -> str:
    """Mean and deviation over seeds in %; a dash where the model has no such figure."""
    values = 100 * world_model_table.values(tests, part, name)
    return "–" if np.isnan(values).all() else mean_and_std(values, decimals)


def world_model_results() -> str:
    """The default model beside the aims and a copied frame."""
    tests = tests_of("6-entity")
    figures = {  # what -> part, name, aim
        "exactly right": ("mode", "exact", "99.5"),
        "exactly right where something changed": ("mode", "exact_changed", "99.5"),
        "breaks a rule of the game": ("mode", "violation any", "at most 0.01"),
        "... sampled from the model": ("sample", "violation any", ""),
        "rewards exact where prey was caught": ("mode", "reward_event", "99"),
        "exactly right after 20 steps of its own frames": ("open_loop", "20", "95"),
        "... of sampled frames": ("open_loop_sample", "20", ""),
    }
    lines = []
    for what, (part, name, aim) in figures.items():
        copied = shares(tests, "copy", name, 1) if part == "mode" else ""
        lines.append([what, shares(tests, part, name), aim, copied])
    return markdown(["`--model entity`, 3 seeds, %", "ours", "aim", "copying the frame"], lines)


def world_model_events() -> str:
    """Exact rewards by event, all seeds' test frames together."""
    pooled = world_model_table.pool(tests_of("6-entity"))
    lines = [[name, share, f"{frames:,}"] for name, (share, frames) in pooled.items()]
    return markdown(["event", "rewards exact", "test frames"], lines)


WAY = {
    "0-mse-planes-4x4": "0: squared error, actions as constant planes, on 4x4",
    "1-mse-planes": "1: the same on 8x8",
    "2-mse-painted": "2: actions painted at their players' cells",
    "3-mse-painted-contrastive": "3: 2 with a contrastive term",
    "4-cell": "4: 2 with probabilities for cells and rewards (`cell`)",
    "5-entity-no-mask": "5: a place for each player and the stag (`entity`, no mask)",
    "6-entity": "6: 5 with the mask: the default",
    "7-entity-moving-stag": "7: 6, stag moves at random",
    "8-mse-painted-moving-stag": "8: 2, stag moves at random",
}


def world_model_way() -> str:
    """From a squared error to the default, one change at a time."""
    lines = []
    for row, name in WAY.items():
        tests = tests_of(row)
        error = np.mean([test["values"]["obs_mse"] for test in tests])
        cells = [shares(tests, "mode", key) for key in ("exact", "violation any in the frame", "violation any")]
        cells += [shares(tests, "mode", "reward_event", 2), shares(tests, "open_loop", "20", 2)]
        lines.append([name, f"{error:.1e}", *cells])
    header = ["", "expected frame's MSE", "exactly right, %", "breaks a rule, %", "... or pays what is never paid, %"]
    return markdown([*header, "rewards right where prey was caught, %", "right after 20 steps, %"], lines)


BOARDS = {
    "board8": ("8x8, 4 hares, 2 blocks", "the same"),
    "board8-on-10": ("8x8, 4 hares, 2 blocks", "10x10, 6 hares, 4 blocks"),
    "board10": ("10x10, 6 hares, 4 blocks", "the same"),
    "board8-on-12": ("8x8, 4 hares, 2 blocks", "12x12, 8 hares, 6 blocks"),
    "board12": ("12x12, 8 hares, 6 blocks", "the same"),
}


def world_model_boards() -> str:
    """Models on boards that they were not trained on, beside models that were."""
    lines = []
    for row, names in BOARDS.items():
        tests = tests_of(row)
        if tests:
            cells = [shares(tests, "mode", key) for key in ("exact", "exact_changed", "violation any")]
            lines.append([*names, str(len(tests)), *cells, shares(tests, "mode", "reward_event", 2)])
    header = ["trained on", "tested on", "seeds", "exactly right, %", "... where something changed, %"]
    return markdown([*header, "breaks a rule, %", "rewards right where prey was caught, %"], lines)


# README --------------------------------------------------------------------------------------------------------------
def scripts() -> str:
    """The five scripts, each with one figure beside its reference."""
    goal = read_results(RESULTS / "hyar_td3")["Goal-v0", ""]
    scores = [plot.score("hyar_td3", rows, "success") for rows in goal.values()]
    shift = last_returns("cartpole-swingup", "shift-alone")
    rows = rows_of("plas_pixels", f"{DOT}.csv")
    medium = plas_study.values(rows, "medium", "both", 10_000, "episodic_return")
    behaviour = next(float(row["behaviour_return"]) for row in rows if row["dataset"] == "medium")
    known = [row for row in rows_of("pretrain_vae_moa", "table.csv") if row["subset"] == "all"]
    known = [row for row in known if row["variant"] == "moa-z-history"]
    model = [float(row["expected_top1"]) for row in known if row["name"] == "model"]
    bayes = [float(row["expected_top1"]) for row in known if row["name"] == "history Bayes"]
    exact = [100 * test["mode"]["exact"] for test in tests_of("6-entity")]
    paper = plot.published("hyar_td3", "Goal-v0")
    drq = plot.published("sac_ae_pixels", "cartpole-swingup").later
    lines = {
        "hyar_td3": (
            "HyAR-TD3 (ICLR 2022): hybrid actions, a discrete choice with continuous parameters, in a latent space",
            f"Goal, success: {np.mean(scores):.3f} (paper {paper.mean}; {len(scores)} seeds)",
        ),
        "sac_ae_pixels": (
            "SAC+AE (2019), or random shifts in place of its autoencoder: continuous control from camera frames",
            f"cartpole-swingup at 100,000 steps: {np.mean(list(shift.values())):.0f} (DrQ {drq}; {len(shift)} seed)",
        ),
        "plas_pixels": (
            "PLAS (CoRL 2020) and BCQ without perturbation, offline from pixels; a switch for what trains the encoder",
            f"Dot Hazard, medium data, return: {medium.mean():.1f} (its data {behaviour:.1f}; {len(medium)} seeds)",
        ),
        "pretrain_vae_moa": (
            "a VAE over a multi-agent game, trained to predict a player's next action",
            f"top-1 accuracy: {np.mean(model):.3f} (exact Bayes-optimal {np.mean(bayes):.3f}; {len(model)} seeds)",
        ),
        "world_model_test": (
            "a model of a grid game, tested by exact frames and by the rules that it breaks",
            f"exact next frames: {np.mean(exact):.3f} % (limit 100 %; {len(exact)} seeds)",
        ),
    }
    header = ["script", "algorithm", "one figure, beside its reference"]
    return markdown(header, [[f"[`{name}.py`](docs/{name}.md)", *texts] for name, texts in lines.items()])


# Speed and survival --------------------------------------------------------------------------------------------------
def speed(scripts: tuple[str, ...]) -> str:
    """Rates, ratios to the plain version, and memory, as `make speed` measured them."""
    lines = []
    for script in scripts:
        found = json.loads((RESULTS / "speed" / f"{script}.json").read_text())
        for i, row in enumerate(found["rows"]):
            name, steps, memory, where = "", "", "", ""
            if i == 0:  # what all rows of a script share
                name, steps = f"`{script}`", f"{row['steps']:,.0f}" if row["steps"] else ""
                memory = f"{found['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in found else "–"
                where = f"{found['commit']}; {found['machine']}"
            updates = f"{row['updates']:,.{1 if row['updates'] < 100 else 0}f}"
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else "–"
            lines.append([name, row["update"], steps, updates, ratio, f"{100 * row['roofline']:.0f} %", memory, where])
    header = ["script", "update", "environment steps/s", "updates/s", "times plain", "share of the roofline"]
    return markdown([*header, "memory of a short run", "commit; machine"], lines)


STRESS = {  # column -> how the lines of stress.md that it sums up begin
    "kills survived": "killed", "full disks": "full disk", "cut checkpoints": "checkpoint cut",
    "changed checkpoints": "a byte", "malformed arguments": "malformed",
}  # fmt: skip


def stress() -> str:
    """What `make stress` found: how many tries of each kind ended as they should."""
    text = (RESULTS / "stress.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    lines = []
    for script in dict.fromkeys(row[0] for row in rows):
        own, cells = [row for row in rows if row[0] == script], []
        for start in STRESS.values():
            tried, held = (sum(int(row[i]) for row in own if row[1].startswith(start)) for i in (2, 3))
            cells.append(f"{held} of {tried}")
        lines.append([script, *cells])
    return markdown(["script", *STRESS], lines) + "\n" + text.splitlines()[0] + "\n"


SCRIPTS = ("hyar_td3", "sac_ae_pixels", "plas_pixels", "pretrain_vae_moa", "world_model_test")
TABLES: dict[str, Callable[[], str]] = {
    "scripts": scripts,
    "hyar-results": hyar_results,
    "hyar-fresh": hyar_fresh,
    "hyar-platform": lambda: hyar_variants("Platform-v0"),
    "hyar-goal": lambda: hyar_variants("Goal-v0"),
    "hyar-hard-goal": lambda: hyar_variants("HardGoal-v0"),
    "hyar-selection": hyar_selection,
    "sac-tasks": sac_tasks,
    "sac-pendulum": sac_pendulum,
    "sac-cartpole": lambda: sac_shifts("cartpole-swingup"),
    "sac-cup": lambda: sac_shifts("ball_in_cup-catch"),
    "plas-results": plas_results,
    "plas-dot-hazard": lambda: plas_table(DOT, ("medium", "expert", "random"), (2_000, 10_000), ORDER),
    "plas-60k": lambda: plas_table(DOT, ("medium-60k",), (2_000, 10_000), ORDER[:4]),
    "plas-long": lambda: plas_table(DOT, ("medium-long",), (10_000, 40_000), ("both", "critic")),
    "plas-cartpole": plas_cartpole,
    "plas-transitions": plas_transitions,
    "plas-repair": plas_repair,
    "moa-results": moa_results,
    "moa-probes": moa_probes,
    "moa-questions": moa_questions,
    "moa-unseen": moa_unseen,
    "world-model-results": world_model_results,
    "world-model-events": world_model_events,
    "world-model-way": world_model_way,
    "world-model-boards": world_model_boards,
    "stress": stress,
    "speed": lambda: speed(SCRIPTS),
    **{
        f"speed-{script}": functools.partial(speed, (script,)) for script in SCRIPTS[:3]
    },  # other pages link to the whole table
}


def fill(text: str, name: str) -> str:
    """A page with its tables filled. Exits with status 2 for a table that is not known, or marks that do not match."""

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            usage_error(f"{name} has a table {found[2]}, which is not one of {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]]() + found[3]

    complete = len(MARKED.findall(text))  # a start without an end would take the next table's end
    if not complete == text.count("<!-- table ") == text.count("<!-- end of table -->"):
        usage_error(f"{name} has a table mark that is misspelt or lacks its other mark")
    return MARKED.sub(table, text)


def main(args: Args) -> None:
    """Fill all pages; exits with status 1 with `--check` if one is not up to date."""
    if not (args.root / "README.md").is_file():
        usage_error(f"--root {args.root}: no README.md there")
    pages = [args.root / "README.md", *sorted((args.root / "docs").rglob("*.md"))]
    pages += (args.root / "benchmark" / "results").glob("speed.md")
    filled = {page: fill(page.read_text(), page.name) for page in pages}  # all, before one is written
    stale = [page for page in pages if page.read_text() != filled[page]]
    if not args.check:
        for page in stale:
            page.write_text(filled[page])
    names = ", ".join(str(page.relative_to(args.root)) for page in stale)
    if not stale:
        print("all tables are up to date")
    elif args.check:
        print(f"not up to date: {names}")
        raise SystemExit(1)
    else:
        print(f"filled: {names}")


if __name__ == "__main__":
    main(tyro.cli(Args))
