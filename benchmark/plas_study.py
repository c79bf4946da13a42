"""Collect the study of plas_pixels.py: which losses should train the encoder.

    python benchmark/plas_study.py
    python benchmark/plas_study.py --runs /scratch/runs --steps 2000 10000

Reads the run folders that `benchmark/plas_pixels.sh` names, `plas_pixels-<signal>-<dataset>__<environment>__<seed>`.
Writes to benchmark/results/plas_pixels/: `<environment>.csv` (every evaluation of every run), `<environment>.md` (means
and standard deviations over seeds at fixed steps; the primary measures' differences, with intervals) and
`<environment>.png` (curves). What the CSV file already holds of other runs stays there, so that results can be
collected from several machines.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import plot
from benchmark.plot import bootstrap_interval, interquartile_mean, markdown, usage_error

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ["critic", "vae", "both", "separate", "reconstruction", "none"]
DATASETS = ["random", "medium", "mixed", "expert", "medium-60k", "medium-long"]  # the last two: more data, more steps
DATASETS += [f"{data}-100k{norm}" for norm in ("", "-layer-norm") for data in ("medium", "mixed")]
KEY = ["dataset", "signal", "seed", "step"]
COLUMNS = {  # of eval.csv, and of the table
    "episodic_return": "return", "q_error": "Q error (MSE)", "q_bias": "Q bias", "q_correlation": "Q corr.",
    "prior_action_error": "prior action error", "probe_r2": "probe R²", "encoder_gradient_critic": "critic's gradient",
    "encoder_gradient_vae": "VAE's gradient", "encoder_gradient_cosine": "cosine",
}  # fmt: skip
PRIMARY = ["episodic_return", "q_error"]
PAIRS = [(signal, "both") for signal in SIGNALS if signal != "both"] + [("critic", "vae")]  # differences by seed
LEVELS = ["behaviour_return", "random_return", "expert_return"]
Row = dict[str, str]


@dataclass
class Args:
    """What to collect."""

    runs: Path = Path("runs")
    """the folder with the run folders"""
    results: Path = ROOT / "benchmark" / "results" / "plas_pixels"
    """the folder to write to"""
    steps: tuple[int, ...] = (2_000, 10_000, 25_000, 40_000)
    """gradient steps at which the table compares"""
    unfinished: bool = False
    """if toggled, also take what runs have evaluated that have not ended"""


def read_runs(folder: Path, unfinished: bool = False) -> dict[str, list[Row]]:
    """The evaluations of all finished runs of the study (or of all), by environment, as files are named."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("plas_pixels-*__*/eval.csv")):
        arguments = json.loads(path.with_name("args.json").read_text())["arguments"]
        signal, _, dataset = path.parent.name.removeprefix("plas_pixels-").partition("__")[0].partition("-")
        rows = plot.read_rows(path)
        if signal not in SIGNALS:
            print(f"left out: {path.parent.name} is not plas_pixels-<signal>-<dataset>__<environment>__<seed>")
        elif rows and (unfinished or int(rows[-1]["step"]) == arguments["total_timesteps"]):
            key = {"dataset": dataset, "signal": signal, "seed": str(arguments["seed"])}
            found.setdefault(arguments["env_id"].replace("/", "-"), []).extend({**key, **row} for row in rows)
    return found


def merge(path: Path, rows: list[Row]) -> list[Row]:
    """Merge these rows into those of a CSV file, where they replace old ones; written back, sorted."""
    names = [*KEY, *COLUMNS, *LEVELS]
    merged = {}
    if path.exists():
        merged = {tuple(row[name] for name in KEY): row for row in plot.read_rows(path)}
    for row in rows:
        kept = {name: row[name] if name in KEY else f"{float(row.get(name) or 'nan'):.6g}" for name in names}
        merged[tuple(row[name] for name in KEY)] = kept
    ordered = [merged[key] for key in sorted(merged, key=lambda key: (key[0], key[1], int(key[2]), int(key[3])))]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    return ordered


def datasets_of(rows: list[Row]) -> list[str]:
    """The names of the datasets: the study's in its order, then all others."""
    found = {row["dataset"] for row in rows}
    return [name for name in DATASETS if name in found] + sorted(found.difference(DATASETS))


def by_seed(rows: list[Row], dataset: str, signal: str, step: int, column: str) -> dict[str, float]:
    """One number for each seed."""
    chosen = [row for row in rows if (row["dataset"], row["signal"], int(row["step"])) == (dataset, signal, step)]
    return {row["seed"]: float(row[column]) for row in chosen}


def values(rows: list[Row], dataset: str, signal: str, step: int, column: str) -> np.ndarray:
    """The numbers of all seeds."""
    return np.array(list(by_seed(rows, dataset, signal, step, column).values()))


def mean_and_std(column: np.ndarray) -> str:
    """`mean ± sample standard deviation` over seeds, without the second part for a single one."""
    known = column[~np.isnan(column)]
    return plot.mean_and_std(known, 2) if len(known) else "–"


def difference(rows: list[Row], dataset: str, pair: tuple[str, str], step: int, column: str) -> str:
    """One signal minus another, paired by seed: the mean and, from two seeds, its 95 % interval by Student's t."""
    own, other = (by_seed(rows, dataset, signal, step, column) for signal in pair)
    differences = np.array([value - other[seed] for seed, value in own.items() if seed in other])
    if not len(differences):
        return "–"
    text = f"{differences.mean():.1f}"
    if len(differences) > 1:
        half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
        text += f" [{differences.mean() - half:.1f}, {differences.mean() + half:.1f}]"
    return text


def table(rows: list[Row], steps: tuple[int, ...]) -> str:
    """Mean and standard deviation over seeds, then the differences of PAIRS, in Markdown."""
    parts = []
    for dataset in datasets_of(rows):
        own = [row for row in rows if row["dataset"] == dataset]
        means = {name: np.array([float(row[name]) for row in own]) for name in LEVELS}
        means = {name: np.nanmean(column) for name, column in means.items() if not np.isnan(column).all()}
        levels = [f"{name.removesuffix('_return')} {mean:.2f}" for name, mean in means.items()]
        lines = []
        for step in steps:
            for signal in SIGNALS:
                cells = [values(rows, dataset, signal, step, column) for column in COLUMNS]
                if len(cells[0]):
                    text = [mean_and_std(c) for c in cells]
                    lines.append([signal, f"{step:,}", str(len(cells[0])), *text])
        header = ["encoder trained by", "steps", "seeds", *COLUMNS.values()]
        parts.append(f"Dataset {dataset}. Mean returns: {', '.join(levels)}.\n\n{markdown(header, lines)}")
        trained = {line[0] for line in lines}
        pairs = [pair for pair in PAIRS if trained.issuperset(pair)]
        if pairs:
            reached = [step for step in steps if any(int(row["step"]) == step for row in own)]
            measures = [(name, step) for name in PRIMARY for step in reached]
            header = ["difference", *(f"{COLUMNS[name]}, {step:,}" for name, step in measures)]
            cells = [[difference(own, dataset, pair, step, name) for name, step in measures] for pair in pairs]
            lines = [[" minus ".join(pair), *text] for pair, text in zip(pairs, cells, strict=True)]
            parts.append(f"Differences by seed, mean and 95 % interval.\n\n{markdown(header, lines)}")
    return "\n".join(parts)


def draw(rows: list[Row], title: str) -> Figure:
    """Return and error of Q over gradient steps, a column per dataset, a colour per signal: each seed, and their mean.

    The mean is interquartile, with its 95 % bootstrap interval, at the steps that all seeds have reached.
    """
    datasets = datasets_of(rows)
    figure = Figure(figsize=(4.6 * len(datasets), 7.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(datasets), squeeze=False)
    for column, dataset in enumerate(datasets):
        for i, signal in enumerate(SIGNALS):
            own = [row for row in rows if (row["dataset"], row["signal"]) == (dataset, signal)]
            steps = sorted({int(row["step"]) for row in own})
            for axis, name in zip(axes[:, column], ("episodic_return", "q_error"), strict=True):
                for seed in sorted({row["seed"] for row in own}):
                    curve = [(int(row["step"]), float(row[name])) for row in own if row["seed"] == seed]
                    axis.plot(*zip(*curve, strict=True), color=f"C{i}", linewidth=0.6, alpha=0.4)
                columns = [values(rows, dataset, signal, step, name) for step in steps]
                steps_of_all = [k for k, found in enumerate(columns) if len(found) == max(map(len, columns))]
                if steps:
                    seeds, shown = np.stack([columns[k] for k in steps_of_all], 1), [steps[k] for k in steps_of_all]
                    axis.plot(shown, interquartile_mean(seeds), color=f"C{i}", linewidth=2, label=signal)
                    if len(seeds) > 1:
                        axis.fill_between(shown, *bootstrap_interval(seeds), color=f"C{i}", alpha=0.2, linewidth=0)
        level = np.nanmean([float(row["behaviour_return"]) for row in rows if row["dataset"] == dataset])
        axes[0, column].axhline(level, color="black", linestyle="--", linewidth=1, label="behaviour")
        axes[0, column].set(title=f"dataset {dataset}", ylabel="evaluation return")
        axes[1, column].set(xlabel="gradient steps", ylabel="squared error of Q", yscale="log")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.locator_params(axis="x", nbins=5)  # so that long numbers do not touch
    max(axes[0], key=lambda axis: len(axis.lines)).legend(fontsize=8)  # not every dataset has all signals
    return figure


def main(args: Args) -> None:
    """Read, merge, draw, and print the tables."""
    found = read_runs(args.runs, args.unfinished)
    environments = set(found) | {path.stem for path in args.results.glob("*.csv")}
    if not environments:
        usage_error(f"no finished runs of the study in {args.runs}; see benchmark/plas_pixels.sh")
    args.results.mkdir(parents=True, exist_ok=True)
    for environment in sorted(environments):
        rows = merge(args.results / f"{environment}.csv", found.get(environment, []))
        text = table(rows, args.steps)
        (args.results / f"{environment}.md").write_text(text)
        title = f"plas_pixels on {environment}\ninterquartile means (thick) and seeds (thin)"
        draw(rows, title).savefig(args.results / f"{environment}.png", dpi=110)
        print(f"{environment}\n\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Args))
