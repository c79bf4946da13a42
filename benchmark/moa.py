"""Reports and tables of pretrain_vae_moa.py: its runs compared with what can be known, and one thing changed at a time.

    python benchmark/moa.py report runs/NAME
    python benchmark/moa.py table --runs runs
    python benchmark/moa.py questions --seeds 1 2 3
    python benchmark/moa.py ceilings
    python benchmark/moa.py unseen runs/NAME runs/NAME ...

`report` scores a finished run's best model on all held-out games, next to baselines and exact ceilings, warns if it is
better than anybody can be, and writes table.csv, probes.csv and pictures into the run folder.
`table` reads the run folders that `benchmark/pretrain_vae_moa.sh` names, makes the reports that are missing, and writes
table.csv, table.md, probes.csv, curves.csv and pictures of the curves and of the models between the ceilings to
benchmark/results/pretrain_vae_moa/.
`questions` trains models with traits of a public version of this training step (a softmax before the cross-entropy's
own, a mask sliced from the wrong columns, scores of training rows), without the checks of the loader, and writes
questions.csv and questions.md there.
`ceilings` plays games of several kinds and writes what can be known about their players to ceilings.md.
`unseen` tests runs that were trained on games of NS and NH on games in which 0, 1, 2, ... of the players are NA, beside
Bayes observers who know two scripts or all three, and writes unseen.csv, unseen.md and unseen.png. What unseen.csv
already holds of other runs stays there.
"""

import csv
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pretrain_vae_moa as moa  # noqa: E402
from benchmark.plot import markdown, read_rows, spread, usage_error  # noqa: E402
from envs import stag_hunt  # noqa: E402
from pretrain_vae_moa import MOA, Arrays, Records, confusion, predict_actions, recalls, score_subsets  # noqa: E402
from pretrain_vae_moa import subsets as split_by_strategy  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "pretrain_vae_moa"
SCORES = ("expected_top1", "top1", "top3", "balanced_accuracy", "macro_f1", "nll", "regret", "ece", "achieved")
REFERENCES = ("majority", "prior + mask", "random encoder + probe", "single frame, knows the policies")
CEILINGS = ("history Bayes", "oracle")


LEAK_ERRORS = 3.0  # standard errors above a ceiling: by chance, once in several hundred reports of a perfect model


@dataclass
class Report:
    """Score the best model of a finished run, compared with what can be known."""

    run: tyro.conf.Positional[Path]
    """the run folder; table.csv, probes.csv and pictures are written into it"""
    dataset: str | None = None
    """the dataset file, if it is no longer where the run found it"""
    data_dir: str | None = None
    """the folder in which collected datasets are kept, if it is not the run's"""
    reference_steps: int = 3_000
    """gradient steps of the single-frame strategy classifier (0: leave it out)"""


@dataclass
class Table:
    """Collect finished runs."""

    runs: Path = Path("runs")
    """the folder with the run folders"""
    results: Path = RESULTS
    """the folder to write to"""
    data_dir: str | None = None
    """the folder in which collected datasets are kept, if it is not the runs'"""
    reference_steps: int = 3_000
    """gradient steps of the single-frame strategy classifier in reports that are still to be made"""


@dataclass
class Questions:
    """Train models that differ from `--objective moa` in one thing."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the training; all use the same games"""
    steps: int = 25_000
    """gradient steps of each training"""
    rows: int = 107_010
    """rows of the games"""
    data_dir: str = "data"
    """the folder in which collected datasets are kept"""
    results: Path = RESULTS
    """the folder to write to"""


@dataclass
class Ceilings:
    """Play games of several kinds, and say what can be known about their players."""

    rows: int = 107_010
    """rows of each kind"""
    results: Path = RESULTS
    """the folder to write to"""


@dataclass
class Unseen:
    """Test runs on games with players of a script that was in no training game."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """finished run folders, trained on games of NS and NH; those whose names differ only in the seed are averaged"""
    games: int = 1_000
    """games for each share of unseen players"""
    seed: int = 1_000
    """seed of the games"""
    data_dir: str | None = None
    """the folder in which collected datasets are kept, if it is not the runs'"""
    results: Path = RESULTS
    """the folder to write to"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts with the same keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def number(value: str | float) -> float:
    """A score, rounded as it is written."""
    return round(float(value), 5)


# Report of a run -----------------------------------------------------------------------------------------------------
def baselines(records: Records, rows: np.ndarray) -> Arrays:
    """Predictions (R, A) that see nothing: the training rows' class shares, as they are and among the legal actions."""
    shares = np.bincount(records.arrays["action"][records.rows(0)], minlength=records.sizes.actions) + 1.0
    shares /= shares.sum()
    legal = np.where(records.arrays["action_mask"][rows], shares, 0.0)
    return {"majority": np.tile(shares, (len(rows), 1)), "prior + mask": legal / legal.sum(1, keepdims=True)}


def difference(
    first: np.ndarray, second: np.ndarray, records: Records, rows: np.ndarray, done: bool = False
) -> tuple[float, float]:
    """Expected accuracy of predictions (R, A) minus that of others, and its standard error.

    The error is clustered by episode: rows of one game are not independent. The policies must be known. With `done` it
    is the accuracy on the actions taken, luck included: only this one rises if predictions have seen the labels.
    """
    every, action = np.arange(len(rows)), records.arrays["action"][rows].astype(int)
    true = np.eye(records.sizes.actions)[action] if done else records.ceilings["oracle"][rows]
    gain = true[every, first.argmax(1)] - true[every, second.argmax(1)]
    sums = np.bincount(records.arrays["episode"][rows], weights=gain - gain.mean())
    return float(gain.mean()), float(np.sqrt(np.square(sums).sum()) / len(rows))


def probe(
    agent: MOA, records: Records, test: Arrays, targets: dict[str, tuple[Tensor, int, Tensor]]
) -> dict[str, Tensor]:
    """Likeliest classes (R,) by linear probes of the latent; `targets`: each row's class (N,), how many, legal ones."""
    rows = records.probe_rows()
    latent, found = torch.from_numpy(moa.predict(agent, records, rows)["mean"]), {}
    for name, (target, classes, legal) in targets.items():
        classify = moa.fit_probe(latent, target[rows], classes, legal[rows])
        found[name] = classify(torch.from_numpy(test["mean"]), legal[test["row"]]).argmax(1)
    return found


def run_probes(agent: MOA, records: Records, test: Arrays) -> dict[str, float]:
    """Accuracy of linear probes from the frozen latent mean: action, strategy, and where things are on the board."""
    names, cells = records.channel_names, records.places[0].numel()
    free = torch.ones(len(records.action), 1, dtype=torch.bool)
    targets = {"action": (records.action.cpu(), records.sizes.actions, records.mask.cpu())}
    if len(records.strategies) > 1:
        targets["strategy"] = records.strategy.cpu(), len(records.strategies), free
    for name in [name for name in ("self", "stag") if name in names]:
        plane = records.obs[:, names.index(name)].flatten(1).cpu()
        targets[f"{name}'s cell"] = torch.where((plane > 0).any(1), plane.argmax(1), cells), cells + 1, free
    found = probe(agent, records, test, targets)
    accuracy = {name: float((found[name] == targets[name][0][test["row"]]).float().mean()) for name in targets}
    return {"latent KL": float(test["kl"].mean()), **accuracy}


def reference_strategy(records: Records, rows: np.ndarray, steps: int, augment: bool) -> np.ndarray:
    """P(strategy | one frame) (R, K) by a separate classifier, trained on the true strategies of the training rows.

    Mixed with the known policies this estimates the single-frame ceiling. Leaves the run's random stream alone.
    """
    device = records.obs.device
    records = Records(records.arrays, records.meta, "1", device)
    sampler = moa.Sampler(records, records.rows(0), 256, seed=0)

    def log_probabilities(batch: moa.Batch) -> Tensor:
        return layer(torch.cat((trunk(batch), batch.time[:, None]), 1)).log_softmax(1)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        trunk, layer = (
            moa.Trunk(records.sizes, "1").to(device),
            nn.Linear(moa.HIDDEN + 1, len(records.strategies)).to(device),
        )
        optimizer = torch.optim.Adam([*trunk.parameters(), *layer.parameters()], fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-4 * (1.0 + math.cos(math.pi * step / steps))
            strategy = records.strategy[sampler.draw(step)]
            loss = F.nll_loss(log_probabilities(sampler.batch(step, augment)), strategy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        batches = [records.batch(part) for part in torch.from_numpy(rows).split(2_048)]
        return torch.cat([log_probabilities(batch).exp().cpu() for batch in batches]).numpy()


def final_table(test: Arrays, records: Records, args: moa.Args, reference_steps: int) -> tuple[Arrays, str]:
    """Predictions (R, A) by name: baselines, the model, estimates and ceilings, on the same rows; the model's name."""
    rows, predictions = test["row"], baselines(records, test["row"])
    device = records.obs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(moa.episode_seed(args.seed, 0, stream=3))
        untrained = MOA(replace(args, objective="reconstruction"), records.sizes, device)
    predictions["random encoder + probe"] = predict_actions(untrained, records, rows)["q"]
    name = {"moa": "MOA", "both": "MOA + reconstruction"}.get(args.objective, "reconstruction + probe")
    name = f"{name}, {args.head_input} head, context {args.context}"
    predictions[name] = test["q"]
    if records.ceilings and reference_steps:
        strategy = reference_strategy(records, rows, reference_steps, args.augment)
        policies = records.arrays["policy_probs"][rows].astype(float)
        predictions["single frame, knows the policies"] = np.einsum("rk,rka->ra", strategy, policies)
    return predictions | {name: values[rows] for name, values in records.ceilings.items()}, name


def new_figure(columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure of its own (no pyplot, so no global state), with an array (columns,) of axes."""
    figure = Figure(figsize=(4.0 * columns + 0.6, 3.9), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_confusion(test: Arrays, records: Records) -> Figure:
    """The share of each action's rows, in %, in which each action was predicted, for all rows and for each strategy."""
    parts, names = list(split_by_strategy(records, test["row"])), records.action_names
    figure, axes = new_figure(len(parts), "What was done (rows) and what was predicted (columns)")
    for axis, (name, part) in zip(axes, parts, strict=True):
        counts = confusion(test["q"][part], records, test["row"][part])
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axis.set(title=f"{name}, {len(part):,} rows", yticks=range(len(names)), yticklabels=names)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
            color = "white" if shares[row, column] > 60 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_recall_and_calibration(q: Arrays, records: Records, rows: np.ndarray) -> Figure:
    """Recall of each action, and how often predictions of some confidence are right, for each of `q` (R, A) by name."""
    figure, axes = new_figure(2, "Recall of each action, and calibration")
    action, places, width = records.arrays["action"][rows], np.arange(records.sizes.actions), 0.8 / len(q)
    for i, (name, values) in enumerate(q.items()):
        axes[0].bar(places + (i - (len(q) - 1) / 2) * width, recalls(confusion(values, records, rows)), width)
        sure, hit = values.max(1), values.argmax(1) == action
        bins = np.minimum((sure * 15).astype(int), 14)
        parts = [part for part in (bins == k for k in range(15)) if part.sum() >= 20]
        axes[1].plot([sure[part].mean() for part in parts], [hit[part].mean() for part in parts], ".-", label=name)
    axes[0].set(ylabel="recall", ylim=(0, 1.02))
    axes[0].set_xticks(places, records.action_names, rotation=60, ha="right")
    axes[1].plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    axes[1].set(xlabel="probability of the predicted action", ylabel="how often it was taken")
    axes[1].legend(fontsize=8)
    return figure


def draw_latent(test: Arrays, records: Records, count: int = 3_000) -> Figure:
    """The latent means of some rows in their two main directions, coloured by strategy and by action."""
    chosen = np.random.default_rng(0).permutation(len(test["row"]))[:count]
    z = test["mean"][chosen].astype(np.float64)
    _, strength, directions = np.linalg.svd(z - z.mean(0), full_matrices=False)
    points = (z - z.mean(0)) @ directions[:2].T
    share = np.square(strength[:2]).sum() / max(np.square(strength).sum(), 1e-12)
    colours = {"strategy": records.strategies} if records.strategies else {}
    colours["action"] = records.action_names
    figure, axes = new_figure(len(colours), f"Latent z in two main directions ({share:.0%} of its variance)")
    for axis, (name, labels) in zip(axes, colours.items(), strict=True):
        for number, label in enumerate(labels):
            here = points[records.arrays[name][test["row"][chosen]] == number]
            axis.scatter(here[:, 0], here[:, -1], s=3, alpha=0.5, color=f"C{number}", label=label)
        axis.set(title=f"by {name}", xlabel="first main direction", ylabel="second main direction")
        axis.legend(fontsize=7, markerscale=4)
    return figure


@torch.inference_mode()
def draw_reconstructions(agent: MOA, records: Records, rows: np.ndarray, count: int = 4) -> Figure:
    """Planes of some frames (upper rows), and what the decoder makes of their latent (lower rows)."""
    units = torch.from_numpy(records.units(rows))
    batch = records.batch(units[torch.linspace(0, len(units) - 1, count).long()])
    chosen = torch.linspace(0, len(batch.time) - 1, count).long()  # with history a unit is a sequence of rows
    frames = batch.frames[:, : records.sizes.channels]
    pairs = torch.stack((frames, agent.decoder(agent.encoder(batch)[0]).sigmoid()), 1).cpu()[chosen]
    pairs = F.pad(pairs, (0, 1, 0, 1), value=math.nan)  # (count, 2, C, H + 1, W + 1)
    _, _, channels, height, width = pairs.shape
    figure = Figure(figsize=(1.1 * channels + 0.8, 2.2 * count + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(pairs.transpose(2, 3).reshape(2 * count * height, -1).numpy(), cmap="magma", vmin=0, vmax=1)
    axis.set_title("Frames, and what the decoder makes of their z")
    axis.set_xticks((np.arange(channels) + 0.5) * width - 1, records.channel_names)
    axis.set_yticks((np.arange(2 * count) + 0.5) * height - 1, ["frame", "decoded"] * count)
    return figure


def open_run(args: Report) -> tuple[MOA, Records]:
    """The best model of a run, and the records that it was trained on. Exits 2, with one line, if one is missing."""
    try:
        about = json.loads((args.run / "args.json").read_text())["arguments"]
        own = moa.Args(**about)
        own = replace(own, dataset=args.dataset or own.dataset, data_dir=args.data_dir or own.data_dir)
        state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
        device = torch.device("cuda" if torch.cuda.is_available() and own.cuda else "cpu")
        agent = moa.load_model(args.run / "best_model.pt", device)
        if not state["finished"]:
            raise ValueError(f"{args.run} is not finished; continue it with --run-name {args.run.name} --resume")
        records = Records(*moa.open_dataset(own), own.context, device)
        if state["dataset"] != records.fingerprint():
            raise ValueError(f"{args.run} has another dataset; name it with --dataset or --data-dir")
    except (OSError, LookupError, TypeError) as error:
        usage_error(f"{args.run} is no run folder of pretrain_vae_moa.py ({type(error).__name__}: {error})")
    except ValueError as error:
        usage_error(str(error))
    return agent, records


def report(args: Report) -> None:
    """Score the model on all held-out games: print and write the table, the probes and the pictures."""
    agent, records = open_run(args)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(agent.args.torch_deterministic)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = records.rows(2)
    test = predict_actions(agent, records, rows)
    predictions, model = final_table(test, records, agent.args, args.reference_steps)
    table = [{"name": name, **row} for name, q in predictions.items() for row in score_subsets(q, records, rows)]
    for row in table:
        value = {other["name"]: other["expected_top1"] for other in table if other["subset"] == row["subset"]}
        room = value.get("history Bayes", math.nan) - value["majority"]
        row["achieved"] = (row["expected_top1"] - value["majority"]) / room if room else math.nan
    write_rows(args.run / "table.csv", table)
    probes = run_probes(agent, records, test)
    write_rows(args.run / "probes.csv", [probes])
    print_report(table, records, rows)
    for text in compare_with_ceilings(predictions, model, records, rows):
        print(text)
    print("linear probes of z: " + ", ".join(f"{name} {value:.3f}" for name, value in probes.items()))

    shown = {"model": test["q"], **{name: predictions[name] for name in records.ceilings}}
    figures = {
        "confusion_matrix": draw_confusion(test, records),
        "recall_and_calibration": draw_recall_and_calibration(shown, records, rows),
        "latent": draw_latent(test, records),
    }  # fmt: skip
    if "decoder" in agent.used:
        figures["reconstructions"] = draw_reconstructions(agent, records, rows)
    with SummaryWriter(str(args.run), filename_suffix=".report") as writer:
        for name, figure in figures.items():
            figure.savefig(args.run / f"{name}.png", dpi=110)
            writer.add_figure(f"images/{name}", figure, agent.args.total_timesteps)


def print_report(table: list[dict[str, Any]], records: Records, rows: np.ndarray) -> None:
    """The table on the terminal."""
    games = len(np.unique(records.arrays["episode"][rows]))
    print(f"{len(rows):,} held-out rows of {games:,} games")
    columns = ("expected_top1", "top1", "top3", "balanced_accuracy", "nll", "regret", "ece", "achieved")
    columns = [name for name in columns if not math.isnan(table[0][name])]
    width = max(len(row["name"]) for row in table) + 2
    print(" " * width + "".join(f"{name.replace('_', ' ').replace('accuracy', 'acc.'):>15}" for name in columns))
    for row in table:
        label = row["name"] if row["subset"] == "all" else f"  {row['subset']}"
        print(label.ljust(width) + "".join(f"{row[column]:15.3f}" for column in columns))


def compare_with_ceilings(predictions: Arrays, model: str, records: Records, rows: np.ndarray) -> Iterable[str]:
    """How far the model is from what can be known, and a warning if it is better."""
    games = len(np.unique(records.arrays["episode"][rows]))
    for name in records.ceilings:
        gain, error = difference(predictions[model], predictions[name], records, rows)
        yield f"expected accuracy minus that of {name}: {gain:.4f} ± {error:.4f} (standard error, by game)"
        lucky, luck = difference(predictions[model], predictions[name], records, rows, done=True)
        above = max(gain / max(error, 1e-9), lucky / max(luck, 1e-9))
        if games >= 10 and above > LEAK_ERRORS:  # with fewer games the standard errors are unreliable
            yield f"warning: better than {name} can be: the labels must have leaked into what the model sees"


# Runs ----------------------------------------------------------------------------------------------------------------
def collect(
    folder: Path, data_dir: str | None = None, reference_steps: int = 3_000
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores, probes and curves of all finished runs in a folder, `pretrain_vae_moa-VARIANT__ENVIRONMENT__SEED`.

    Makes the reports that are missing.
    """
    scores, probes, curves = [], [], []
    for about in sorted(folder.glob("pretrain_vae_moa-*__*__*/args.json")):
        name, path = about.parent.name, about.parent
        variant, environment, seed = name.removeprefix("pretrain_vae_moa-").split("__", 2)
        if not seed.isdecimal():
            continue  # somebody's own name
        checkpoint = path / "checkpoint.pt"
        if not (checkpoint.exists() and torch.load(checkpoint, map_location="cpu", weights_only=True)["finished"]):
            print(f"not finished, left out: {name}")
            continue
        if not (path / "latent.png").exists():  # drawn after the tables are written
            report(Report(path, data_dir=data_dir, reference_steps=reference_steps))
        arguments = json.loads(about.read_text())["arguments"]
        own = {"variant": variant, "environment": environment, "seed": int(seed), "rows": arguments["rows"]}
        for row in read_rows(path / "table.csv"):
            kind = row["name"] if row["name"] in (*REFERENCES, *CEILINGS) else "model"
            values = {column: number(row[column]) for column in SCORES}
            scores.append({**own, "name": kind, "subset": row["subset"], **values})
        (row,) = read_rows(path / "probes.csv")
        probes.append({**own, **{column: number(value) for column, value in row.items()}})
        columns = (
            "step",
            "validation_loss",
            "expected_top1",
            "top1",
            "top3",
            "balanced_accuracy",
            "nll",
            "regret",
            "ece",
        )
        curves += [{**own, **{c: number(row[c]) for c in columns}} for row in read_rows(path / "eval.csv")]
    return scores, probes, curves


def scores_table(scores: list[dict[str, Any]]) -> str:
    """Model by model, mean and deviation over seeds, and the references on the same rows."""
    header = ["", "rows", "seeds", *(column.replace("_", " ") for column in SCORES), "NS", "NH"]
    lines = []
    kinds = {}
    for row in scores:
        label = row["variant"] if row["name"] == "model" else row["name"]
        if label == "random encoder + probe":
            frames = [name for name in ("4frames", "history") if name in row["variant"]]
            label += f", {frames[0] if frames else 'one frame'}"
        # The references on the same rows are in the tables of many variants: each seed's are taken from one of them.
        kinds.setdefault((row["name"] != "model", label, row["rows"]), {}).setdefault((row["seed"], row["subset"]), row)
    for (_, label, rows), found in sorted(kinds.items(), key=lambda item: item[0]):
        group = list(found.values())
        every = [row for row in group if row["subset"] == "all"]
        by_strategy = [[row["expected_top1"] for row in group if row["subset"] == s] for s in ("NS", "NH")]
        lines.append([
            label, f"{rows:,}", str(len({row["seed"] for row in every})),
            *(spread(row[column] for row in every) for column in SCORES), *(spread(values) for values in by_strategy),
        ])  # fmt: skip
    return markdown(header, lines)


def probes_table(probes: list[dict[str, Any]]) -> str:
    """What linear probes read from z, mean and deviation over seeds."""
    columns = [column for column in probes[0] if column not in ("variant", "environment", "seed", "rows")]
    lines = []
    for variant in sorted({row["variant"] for row in probes}):
        group = [row for row in probes if row["variant"] == variant]
        lines.append([variant, str(len(group)), *(spread(row[column] for row in group) for column in columns)])
    return markdown(["", "seeds", *columns], lines)


def draw_curves(curves: list[dict[str, Any]], ceilings: dict[str, float]) -> Figure:
    """Expected accuracy over gradient steps, the mean of the seeds and all of them; ceilings as lines."""
    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    axis = figure.subplots()
    for i, variant in enumerate(sorted({row["variant"] for row in curves})):
        group = [row for row in curves if row["variant"] == variant]
        steps = sorted({row["step"] for row in group})
        values = [[row["expected_top1"] for row in group if row["step"] == step] for step in steps]
        axis.plot(steps, [np.mean(v) for v in values], color=f"C{i}", marker=".", label=variant)
        axis.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.15, linewidth=0
        )
    for style, (name, value) in zip((":", "--", "-."), ceilings.items(), strict=False):
        axis.axhline(value, color="black", linewidth=1, linestyle=style, label=f"{name}: {value:.3f}")
    axis.set(xlabel="gradient steps", ylabel="expected top-1 accuracy, held-out games", ylim=(0.55, 0.9))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_ceilings(scores: list[dict[str, Any]]) -> Figure:
    """Expected accuracy of all models between the baselines and the ceilings, by strategy; means of the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    order = ["majority", "prior + mask", "model", "single frame, knows the policies", *CEILINGS]
    fewest = min(row["rows"] for row in scores)  # ceilings depend on the games
    shown = [row for row in scores if row["name"] in order and row["rows"] == fewest]
    for row in sorted(shown, key=lambda row: order.index(row["name"])):
        name = row["variant"] if row["name"] == "model" else row["name"]
        values.setdefault(name, {}).setdefault(row["subset"], []).append(row["expected_top1"])
    figure = Figure(figsize=(8.5, 0.5 * len(values) + 1.6), layout="constrained")
    axis = figure.subplots()
    for kind, marker in (("all", "o"), ("NS", "s"), ("NH", "d")):
        means = [np.mean(found.get(kind, [math.nan])) for found in values.values()]
        axis.plot(means, range(len(means)), marker, label="all rows" if kind == "all" else f"rows of {kind} players")
        for place, mean in enumerate(means if kind == "all" else ()):
            text = f"{mean:.3f}"
            axis.annotate(text, (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.set(yticks=range(len(values)), yticklabels=list(values), xlim=(0, 1.05), ylim=(-0.6, len(values) - 0.3))
    axis.set(xlabel="expected top-1 accuracy, held-out games")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return figure


def table(args: Table) -> None:
    """Write and print the tables of all finished runs."""
    scores, probes, curves = collect(args.runs, args.data_dir, args.reference_steps)
    if not scores:
        usage_error(f"no finished runs in {args.runs}; see benchmark/pretrain_vae_moa.sh")
    for name, rows in (("table", scores), ("probes", probes), ("curves", curves)):
        write_rows(args.results / f"{name}.csv", rows)
    text = scores_table(scores) + "\n" + probes_table(probes)
    (args.results / "table.md").write_text(text)
    print(text)
    common = [row for row in scores if row["rows"] == 107_010 and row["subset"] == "all"]
    ceilings = {
        name: float(np.mean([row["expected_top1"] for row in common if row["name"] == name]))
        for name in (*CEILINGS, "single frame, knows the policies")
        if any(row["name"] == name for row in common)
    }
    draw_curves([row for row in curves if row["variant"] != "reconstruction"], ceilings).savefig(
        args.results / "curves.png", dpi=120
    )
    draw_ceilings(scores).savefig(args.results / "ceilings.png", dpi=120)


# Questions -----------------------------------------------------------------------------------------------------------
class DoubleSoftmax(MOA):
    """The head's probabilities, not its logits, go into a cross-entropy that applies a softmax of its own."""

    def policy_loss(self, logits: Tensor, action: Tensor) -> Tensor:
        """The cross-entropy (scalar) of a softmax of masked logits (R, A), taken for logits."""
        return F.cross_entropy(logits.softmax(1), action)


def without_mask(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every action counts as legal."""
    return {**arrays, "action_mask": np.ones_like(arrays["action_mask"])}


def mis_sliced(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mask's columns are one off, as when a record of many columns is cut in the wrong place."""
    return {**arrays, "action_mask": np.roll(arrays["action_mask"], 1, axis=1)}


CHANGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # what -> (model, what becomes of the arrays, arguments)
    "as it is": (MOA, None, {}),
    "double softmax": (DoubleSoftmax, None, {}),
    "no mask": (MOA, without_mask, {}),
    "mis-sliced mask": (MOA, mis_sliced, {}),
    "mis-sliced mask and double softmax": (DoubleSoftmax, mis_sliced, {}),
    "not augmented": (MOA, None, {"augment": False}),
    "reconstruction, then a probe": (MOA, None, {"objective": "reconstruction"}),
    "both objectives": (MOA, None, {"objective": "both"}),
    "head on z and the state": (MOA, None, {"head_input": "state+z"}),
    "head on the state alone": (MOA, None, {"head_input": "state"}),
}


def train(args: moa.Args, arrays: dict[str, np.ndarray], meta: dict[str, Any], kind: type[MOA]) -> tuple[Any, Any, int]:
    """Train a model as `pretrain_vae_moa.main` does, without a run folder; returns it, the records, and the steps done.

    Ends early when the loss is not finite.
    """
    device = torch.device("cpu")
    torch.manual_seed(args.seed)
    records = Records(arrays, meta, args.context, device)
    model = kind(args, records.sizes, device)
    sampler = moa.Sampler(records, records.rows(0), args.batch_size, args.seed)
    for step in range(args.total_timesteps):
        losses = model.update(sampler.batch(step, args.augment), step)
        if step % 100 == 0 and not math.isfinite(losses["total"]):
            return model, records, step
    return model, records, args.total_timesteps


def examine(model: MOA, records: Records, rows: np.ndarray) -> dict[str, float]:
    """Scores of the model on some rows, and the loss that its training sees there."""
    q = predict_actions(model, records, rows)["q"]
    loss = model.policy_loss(torch.from_numpy(q).log(), torch.from_numpy(records.arrays["action"][rows]).long())
    scores = moa.score(q, records, rows)
    forbidden = ~records.arrays["action_mask"][rows, records.arrays["action"][rows]]
    columns = ("top1", "expected_top1", "top3", "balanced_accuracy", "nll", "ece")
    return {"loss": float(loss), **{c: scores[c] for c in columns}, "forbidden": float(forbidden.mean())}


def questions(args: Questions) -> None:
    """Train all changes with all seeds; write and print the scores, on held-out and on training rows."""
    torch.set_flush_denormal(True)
    base = moa.Args(objective="moa", rows=args.rows, data_dir=args.data_dir, total_timesteps=args.steps)
    arrays, meta = moa.open_dataset(base)
    table = []
    for seed in args.seeds:
        for name, (kind, change, arguments) in CHANGES.items():
            own = dataclasses.replace(base, seed=seed, **arguments)
            model, records, steps = train(own, change(arrays) if change else arrays, meta, kind)
            test, training = records.rows(2), records.rows(0)[:: max(1, len(records.rows(0)) // 10_000)]
            for where, rows in (("held-out games", test), ("training rows", training)):
                if steps < args.steps:
                    scores = dict.fromkeys(
                        examine(kind(own, records.sizes, records.obs.device), records, test), math.nan
                    )
                    scores["loss"] = math.inf
                else:
                    scores = examine(model, records, rows)
                row = {"change": name, "where": where, "seed": seed, "steps": steps}
                table.append({**row, **{key: number(value) for key, value in scores.items()}})
                print(table[-1], flush=True)
            write_rows(args.results / "questions.csv", table)
    text = questions_table(table)
    (args.results / "questions.md").write_text(text)
    print(text)


def questions_table(table: list[dict[str, Any]]) -> str:
    """Mean and deviation over seeds of each change, in Markdown."""
    columns = ("loss", "top1", "expected_top1", "top3", "balanced_accuracy", "nll", "ece", "forbidden")
    lines = []
    for key in dict.fromkeys((row["change"], row["where"]) for row in table):
        group = [row for row in table if (row["change"], row["where"]) == key]
        steps = {row["steps"] for row in group}
        values = [spread(row[column] for row in group) for column in columns]
        if any(math.isinf(row["loss"]) for row in group):
            values[0] = f"infinite at step {min(steps)}"
        lines.append([*key, str(len(group)), *values])
    names = [column.replace("_", " ") for column in columns]
    return markdown(["change", "scored on", "seeds", *names[:-1], "labels that the mask forbids"], lines)


# Ceilings ------------------------------------------------------------------------------------------------------------
KINDS: dict[str, dict[str, Any]] = {
    "8x8, limit 18": {},
    "8x8, limit 30": {"max_cycles": 30},
    "8x8, limit 30, 2 obstacles": {"max_cycles": 30, "config": stag_hunt.Config(n_blocks=2)},
    "8x8, limit 18, always the first of equal steps": {"tie_break": "first"},
    "8x8, limit 18, 2 stags": {"config": stag_hunt.Config(n_stags=2)},
    "4x4, limit 18": {"config": stag_hunt.Config(size=4)},
}


def ceilings(args: Ceilings) -> None:
    """Write and print the class shares, and how good predictions of the action and of the strategy can be."""
    lines = []
    for name, settings in KINDS.items():
        data = stag_hunt.collect(args.rows, **settings)
        records = Records(data.arrays, data.meta, "1", torch.device("cpu"))
        rows = np.arange(args.rows)
        shares = np.bincount(data.arrays["action"], minlength=records.sizes.actions) / args.rows
        scores = [moa.score(q, records, rows) for q in records.ceilings.values()]
        posterior = stag_hunt.history_posterior(data)
        strategy = (posterior.argmax(1) == data.arrays["strategy"]).mean()
        pairs = [f"{score['expected_top1']:.3f} / {score['nll']:.3f}" for score in scores]
        lines.append([name, " ".join(f"{share:.3f}" for share in shares), *pairs, f"{strategy:.3f}"])
    header = ["", "shares of the actions", "history Bayes: top-1 / NLL", "oracle: top-1 / NLL", "strategy from history"]
    text = markdown(header, lines)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "ceilings.md").write_text(text)
    print(text)


# Players that the model has never met ---------------------------------------------------------------------------------
SCRIPTS = ["NS", "NH", "NA"]  # the last is in no training game
SLIP = 0.01  # else a player who is neither NS nor NH soon does something impossible: infinite NLL
TWO, THREE = "history Bayes, knows NS and NH", "history Bayes, knows all three"
EGOS = {"all": "all players", "known": "NS and NH", "unseen": "NA"}


def unseen_games(meta: dict[str, Any], unseen: int, games: int, seed: int) -> stag_hunt.Record:
    """Games as in a record with this meta data, but for `unseen` NA players in each.

    The numbers of NS and NH among the others are as likely as in training. Initial positions depend on the seed alone.
    """
    config = {name: value for name, value in meta["env_kwargs"].items() if name != "max_cycles"}
    vector = stag_hunt.VectorStagHunt(stag_hunt.Config(**config), stag_hunt.episode_seeds(seed, 0, games))
    seats, prior = stag_hunt.rosters(len(SCRIPTS), vector.config.n_players)
    chosen = (seats == SCRIPTS.index("NA")).sum(1) == unseen
    roster = stag_hunt.draw_rosters(vector.seeds, seats[chosen], prior[chosen])
    limit = meta["env_kwargs"]["max_cycles"]
    arrays = stag_hunt.play(vector, roster, limit, SCRIPTS, meta["tie_break"], meta["epsilon"])
    arrays |= {"roster": roster, "episode_seed": vector.seeds, "split": np.full(games, 2, np.int8)}
    return stag_hunt.Record(arrays, {**meta, "strategies": SCRIPTS})


def unseen_scores(q: np.ndarray, records: Records) -> Iterator[dict[str, Any]]:
    """Scores of predictions (N, A) of all rows, of those of players whose script is known, and of unseen ones."""
    rows, stranger = np.arange(len(q)), records.arrays["strategy"] == SCRIPTS.index("NA")
    for ego, part in (("all", rows), ("known", rows[~stranger]), ("unseen", rows[stranger])):
        if len(part):
            scores = moa.score(q[part], records, part)
            columns = ("top1", "expected_top1", "regret", "nll", "ece")
            yield {"ego": ego, "rows": len(part), **{column: number(scores[column]) for column in columns}}


def unseen(args: Unseen) -> None:
    """Write and print the scores of all runs and of both observers, at each share of unseen players."""
    if not args.runs or args.games < 1:
        usage_error("expected at least one run folder and one game; see benchmark/pretrain_vae_moa.sh")
    models, metas = [], []
    for path in args.runs:
        agent, records = open_run(Report(path, data_dir=args.data_dir))
        if "head" not in agent.used:
            usage_error(f"{path} has trained no policy head; expected --objective moa or both")
        if records.strategies != SCRIPTS[:2] or "tie_break" not in records.meta:  # `stag_hunt.collect` tells it
            players = ", ".join(records.strategies) or "unknown players"
            usage_error(f"{path}: expected collected games of NS and NH, but these are of {players}")
        if records.meta["seed"] == args.seed:
            usage_error(f"--seed {args.seed}: {path} was trained on games of this seed")
        game = ("env_kwargs", "tie_break", "epsilon")
        if metas and any(records.meta[name] != metas[0][name] for name in game):
            usage_error(f"{path} has a different game from {args.runs[0]}")
        metas.append(records.meta)
        named = re.fullmatch(r"pretrain_vae_moa-(.+?)__.+__\d+", path.resolve().name)
        variant = named[1] if named else path.resolve().name
        if any((variant, agent.args.seed) == (name, other.args.seed) for name, other, _ in models):
            usage_error(f"{path}: there are two runs of {variant} with seed {agent.args.seed}; leave one out")
        models.append((variant, agent, records.obs.device))
    torch.set_flush_denormal(True)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    table = []
    players = metas[0]["env_kwargs"]["n_players"]
    for count in range(players + 1):
        data = unseen_games(metas[0], count, args.games, args.seed)
        records = Records(data.arrays, data.meta, "1", torch.device("cpu"))
        predictions = [
            (TWO, "", stag_hunt.history_bayes(data, SCRIPTS[:2], SLIP)),
            (THREE, "", records.ceilings["history Bayes"]),
        ]
        for variant, agent, device in models:
            seen = Records(data.arrays, data.meta, agent.args.context, device)
            q = predict_actions(agent, seen, np.arange(len(data.arrays["action"])))["q"]
            predictions.append((variant, agent.args.seed, q))
        for variant, seed, q in predictions:
            own = {"variant": variant, "seed": seed, "unseen": count / players}
            table += [{**own, **row} for row in unseen_scores(q, records)]
    table = with_other_runs(table, args.results / "unseen.csv")
    write_rows(args.results / "unseen.csv", table)
    text = unseen_table(table)
    (args.results / "unseen.md").write_text(text)
    draw_unseen(table).savefig(args.results / "unseen.png", dpi=120)
    print(text)


def with_other_runs(table: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows of `table`, and what the file at `path` holds of other runs. Exits if those were tested on other games.

    The observers are the test of this: in the same games, they have the same figures.
    """
    found = read_rows(path) if path.exists() else []
    rows = [{name: str(value) for name, value in row.items()} for row in table]
    tested = {(row["variant"], row["seed"]) for row in rows}
    observed = [
        {(row["variant"], row["unseen"], row["ego"], row["rows"]): float(row["nll"]) for row in part if not row["seed"]}
        for part in (found, rows)
    ]
    same = all(abs(observed[0].get(key, math.inf) - value) < 1e-4 for key, value in observed[1].items())  # any CPU
    if found and not same:
        usage_error(f"{path} was made with other --games, --seed or data; choose another --results")
    rows += [row for row in found if (row["variant"], row["seed"]) not in tested]
    return sorted(rows, key=lambda row: (float(row["unseen"]), row["seed"] != "", row["variant"], row["seed"]))


def unseen_values(table: list[dict[str, Any]], variant: str, ego: str, share: float, column: str) -> list[float]:
    """The scores of all seeds."""
    found = [row for row in table if (row["variant"], row["ego"], float(row["unseen"])) == (variant, ego, share)]
    return [float(row[column]) for row in found]


def unseen_table(table: list[dict[str, Any]]) -> str:
    """Each score over the share of unseen players, mean and deviation over seeds, in Markdown."""
    shares, variants = (dict.fromkeys(row[name] for row in table) for name in ("unseen", "variant"))
    kinds = [("expected_top1", ego) for ego in EGOS] + [("regret", ego) for ego in EGOS] + [("ece", "all")]
    lines = []
    for (column, ego), variant in itertools.product(kinds, variants):
        values = [unseen_values(table, variant, ego, float(share), column) for share in shares]
        name = {"expected_top1": "expected top-1", "ece": "ECE"}.get(column, column)
        lines.append([f"{name}, {EGOS[ego]}", variant, *(spread(part) if part else "" for part in values)])
    return markdown(["share of NA players", "", *(f"{float(share):.0%}" for share in shares)], lines)


def draw_unseen(table: list[dict[str, Any]]) -> Figure:
    """Expected accuracy and regret over the share of unseen players, of all players' rows; means of the seeds."""
    figure, axes = new_figure(2, "Trained on games of NS and NH, tested beside players of a third script")
    shares, variants = (list(dict.fromkeys(row[name] for row in table)) for name in ("unseen", "variant"))
    labels = {"expected_top1": "expected top-1 accuracy", "regret": "regret, nats"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for i, variant in enumerate(variants):
            means = [np.mean(unseen_values(table, variant, "all", float(share), column)) for share in shares]
            style = {TWO: "k--", THREE: "k-"}.get(variant, f"C{i - 2}-")
            axis.plot([100 * float(share) for share in shares], means, style, marker=".", label=variant)
        axis.set(xlabel="share of NA players, %", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Table, tyro.conf.subcommand("table")]
        | Annotated[Questions, tyro.conf.subcommand("questions")]
        | Annotated[Ceilings, tyro.conf.subcommand("ceilings")]
        | Annotated[Unseen, tyro.conf.subcommand("unseen")]
    )
    commands = {Report: report, Table: table, Questions: questions, Ceilings: ceilings, Unseen: unseen}
    commands[type(chosen)](chosen)
