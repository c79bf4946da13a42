"""The tables of pretrain_vae_moa.py: collect its runs, and answer questions by changing one thing at a time.

    python benchmark/moa.py table --runs runs
    python benchmark/moa.py questions --seeds 1 2 3
    python benchmark/moa.py ceilings

`table` reads the run folders that `benchmark/pretrain_vae_moa.sh` names and writes table.csv, table.md, probes.csv,
curves.csv and pictures of the curves and of the models between the ceilings to benchmark/results/pretrain_vae_moa/.
`questions` trains models with what a public version of this training step had (a softmax before the cross-entropy's
own, a mask sliced from the wrong columns, scores of training rows), without the checks of the loader, and writes
questions.csv and questions.md there.
`ceilings` plays games of several kinds and writes what can be known about their players to ceilings.md.
"""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from plot import markdown, usage_error
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pretrain_vae_moa as moa  # noqa: E402
from envs import stag_hunt  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "pretrain_vae_moa"
SCORES = ("expected_top1", "top1", "top3", "balanced_accuracy", "macro_f1", "nll", "regret", "ece", "achieved")
REFERENCES = ("majority", "prior + mask", "random encoder + probe", "single frame, knows the policies")
CEILINGS = ("history Bayes", "oracle")


@dataclass
class Table:
    """Collect finished runs."""

    runs: Path = Path("runs")
    """the folder with the run folders"""
    results: Path = RESULTS
    """the folder to write to"""


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
    """the folder that collected datasets are kept in"""
    results: Path = RESULTS
    """the folder to write to"""


@dataclass
class Ceilings:
    """Play games of several kinds, and say what can be known about their players."""

    rows: int = 107_010
    """rows of each kind"""
    results: Path = RESULTS
    """the folder to write to"""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


def spread(values: Iterable[float]) -> str:
    """`mean ± standard deviation` (NumPy's, over N), without the second part for a single value or for none at all."""
    values = np.array(list(values))
    if np.isnan(values).all():
        return "–"
    if np.isinf(values).any():
        return "infinite"
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 and values.std() >= 5e-4 else "")


# Runs ----------------------------------------------------------------------------------------------------------------
def collect(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores, probes and curves of all finished runs in a folder, `pretrain_vae_moa-VARIANT__ENVIRONMENT__SEED`."""
    scores, probes, curves = [], [], []
    for about in sorted(folder.glob("pretrain_vae_moa-*__*__*/args.json")):
        name, path = about.parent.name, about.parent
        variant, environment, seed = name.removeprefix("pretrain_vae_moa-").split("__", 2)
        if not seed.isdecimal():
            continue  # somebody's own name
        if not (path / "latent.png").exists():  # drawn once, after the tables are written
            print(f"not finished, left out: {name}")
            continue
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
    """Model by model, mean and deviation over seeds, and what is known of the same rows."""
    header = ["", "rows", "seeds", *(column.replace("_", " ") for column in SCORES), "NS", "NH"]
    lines = []
    kinds = {}
    for row in scores:
        label = row["variant"] if row["name"] == "model" else row["name"]
        if label == "random encoder + probe":
            frames = [name for name in ("4frames", "history") if name in row["variant"]]
            label += f", {frames[0] if frames else 'one frame'}"
        # What is known of the same rows is in the tables of many variants: each seed's is taken from one of them.
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
    scores, probes, curves = collect(args.runs)
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
class DoubleSoftmax(moa.MOA):
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
    "as it is": (moa.MOA, None, {}),
    "double softmax": (DoubleSoftmax, None, {}),
    "no mask": (moa.MOA, without_mask, {}),
    "mis-sliced mask": (moa.MOA, mis_sliced, {}),
    "mis-sliced mask and double softmax": (DoubleSoftmax, mis_sliced, {}),
    "not augmented": (moa.MOA, None, {"augment": False}),
    "reconstruction, then a probe": (moa.MOA, None, {"objective": "reconstruction"}),
    "both objectives": (moa.MOA, None, {"objective": "both"}),
    "head on z and the state": (moa.MOA, None, {"head_input": "state+z"}),
    "head on the state alone": (moa.MOA, None, {"head_input": "state"}),
}


def train(
    args: moa.Args, arrays: dict[str, np.ndarray], meta: dict[str, Any], kind: type[moa.MOA]
) -> tuple[Any, Any, int]:
    """Train a model as `pretrain_vae_moa.main` does, without a run folder; returns it, the records, and the steps done.

    Ends early when the loss is not finite.
    """
    device = torch.device("cpu")
    torch.manual_seed(args.seed)
    records = moa.Records(arrays, meta, args.context, device)
    model = kind(args, records.sizes, device)
    sampler = moa.Sampler(records, records.rows(0), args.batch_size, args.seed)
    for step in range(args.total_timesteps):
        losses = model.update(sampler.batch(step, args.augment), step)
        if step % 100 == 0 and not math.isfinite(losses["total"]):
            return model, records, step
    return model, records, args.total_timesteps


def examine(model: moa.MOA, records: moa.Records, rows: np.ndarray) -> dict[str, float]:
    """Scores of the model on some rows, and the loss that its training sees there."""
    result = moa.evaluate(model, records, rows)
    loss = model.policy_loss(torch.from_numpy(result.q).log(), torch.from_numpy(records.arrays["action"][rows]).long())
    scores = moa.score(result.q, records, rows)
    forbidden = ~records.arrays["action_mask"][rows, records.arrays["action"][rows]]
    columns = ("top1", "expected_top1", "top3", "balanced_accuracy", "nll", "ece")
    return {"loss": float(loss), **{c: scores[c] for c in columns}, "forbidden": float(forbidden.mean())}


def questions(args: Questions) -> None:
    """Train all changes with all seeds; write and print what comes of it, on held-out and on training rows."""
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
                    scores = dict.fromkeys(examine(kind(own, records.sizes, model.device), records, test), math.nan)
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
        records = moa.Records(data.arrays, data.meta, "1", torch.device("cpu"))
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


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Table, tyro.conf.subcommand("table")]
        | Annotated[Questions, tyro.conf.subcommand("questions")]
        | Annotated[Ceilings, tyro.conf.subcommand("ceilings")]
    )
    {Table: table, Questions: questions, Ceilings: ceilings}[type(chosen)](chosen)
