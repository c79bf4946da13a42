"""Collect the runs of a script into CSV files, curves and tables.

    python benchmark/plot.py hyar_td3
    python benchmark/plot.py hyar_td3 --runs /scratch/runs --unfinished

Reads run folders as `benchmark/<script>.sh` names them: `<script>__<environment>__<seed>` for the results table and
`<script>-<ablation>__<environment>__<seed>` for an ablation. Writes to benchmark/results/<script>/: for each
environment `<environment>.csv` and `.png`; for each ablation `<environment>__<ablation>.csv`, and all of them in
`<environment>__ablations.png`; `<environment>__reconstruction.png`, what the autoencoder of the first finished run has
learnt, if the script has one; `table.md` and `ablations.md`. What the CSV files already hold of other seeds stays
there, so that results can be collected from several machines.
"""

import csv
import importlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    """What to collect."""

    script: Annotated[str, tyro.conf.Positional]
    """the script's name, without .py"""
    runs: Path = Path("runs")
    """the folder with the run folders"""
    results: Path = ROOT / "benchmark" / "results"
    """the folder to write to, in a folder of the script's name"""
    unfinished: bool = False
    """if toggled, runs that are not finished are drawn too; they never enter CSV files or tables"""


AVERAGED = "averaged-policy"  # not an ablation of its own: the second evaluation of the same runs
# A seed's score is the mean of this many last evaluations, never its best. SAC+AE's paper, and those after it, report
# the ten episodes that are played at a fixed step.
LAST_EVALUATIONS = {"sac_ae_pixels": 1}
DEFAULT_LAST_EVALUATIONS = 10


class Published(NamedTuple):
    """What papers report for an environment: `column` ("return" or "success"), the script's paper, and a later one."""

    column: str
    mean: float
    std: float
    later: float


# The script's paper and a later one, as the pictures name them, the later one's name in tables, and decimals of scores.
PAPERS: dict[str, tuple[str, str, str, int]] = {
    "hyar_td3": ("HyAR-TD3 paper", "CHDP paper", "CHDP", 3),
    "sac_ae_pixels": ("SAC+AE paper at 100,000 steps", "DrQ paper at 100,000 steps", "DrQ", 0),
}

# HyAR-TD3: Li et al., ICLR 2022, table 2. CHDP: the best result published since (AAAI 2026, arXiv 2601.05675).
# SAC+AE at 100,000 environment steps, as CURL's table 1 quotes it (arXiv 2004.04136); its own paper has curves only.
# DrQ: Kostrikov et al., 2020, its authors' raw data at 100,000 steps.
PUBLISHED: dict[str, dict[str, Published]] = {
    "hyar_td3": {
        "Platform-v0": Published("return", 0.98, 0.01, 0.997),
        "Goal-v0": Published("success", 0.78, 0.03, 0.809),
        "HardGoal-v0": Published("success", 0.60, 0.07, 0.795),
        "CatchPoint-v0": Published("success", 0.90, 0.03, 0.938),
        "HardMove4-v0": Published("success", 0.93, 0.02, 0.942),
        "HardMove6-v0": Published("success", 0.92, 0.04, 0.939),
        "HardMove8-v0": Published("success", 0.89, 0.03, 0.906),
        "HardMove10-v0": Published("success", 0.75, 0.05, 0.798),
    },
    "sac_ae_pixels": {
        "cartpole-swingup": Published("return", 311, 11, 759),
        "ball_in_cup-catch": Published("return", 391, 82, 914),
        "finger-spin": Published("return", 740, 64, 901),
        "walker-walk": Published("return", 394, 22, 634),
        "reacher-easy": Published("return", 274, 14, 600),
        "cheetah-run": Published("return", 267, 24, 361),
    },
}

Key = tuple[str, str]  # environment id and ablation, which is "" for the results table
Seeds = dict[int, np.ndarray]  # the evaluations of each seed: rows (T, 3) of step, return, success rate


class Runs(NamedTuple):
    """What run folders hold: curves of finished and other runs, evaluation episodes, unfinished names, pictures."""

    finished: dict[Key, Seeds]
    unfinished: dict[Key, Seeds]
    episodes: dict[Key, set[int]]
    left_out: list[str]
    reconstructions: dict[str, Path]


def usage_error(message: str) -> NoReturn:
    """Print one line about a user's mistake and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_columns(path: Path, names: Iterable[str]) -> np.ndarray:
    """The named columns of a CSV file as an array (rows, columns); columns that it lacks are nan."""
    names = tuple(names)
    rows = [[float(row.get(name) or "nan") for name in names] for row in read_rows(path)]
    return np.array(rows).reshape(len(rows), len(names)).round(6)


def read_runs(script: str, folder: Path) -> Runs:
    """Read all run folders of `script` in `folder`; other folders are skipped."""
    runs = Runs({}, {}, {}, [], {})
    for about in sorted(folder.glob(f"{script}*__*/args.json")):
        name, run = about.parent.name, json.loads(about.read_text())
        ablation = name.split("__")[0].removeprefix(script)
        if run.get("script") != script or (ablation and not ablation.startswith("-")):
            continue
        arguments, evaluations = run["arguments"], about.with_name("eval.csv")
        variants = {ablation[1:]: ("episodic_return", "success_rate")}
        if not ablation:
            variants[AVERAGED] = ("average_episodic_return", "average_success_rate")
        for variant, columns in variants.items():
            rows = read_columns(evaluations, ("step", *columns)) if evaluations.exists() else np.empty((0, 3))
            last = int(rows[-1, 0]) if len(rows) else 0
            finished = last >= arguments["total_timesteps"]
            if not finished and variant != AVERAGED:
                runs.left_out.append(f"{name} ({last:,} of {arguments['total_timesteps']:,} steps)")
            if not len(rows) or np.isnan(rows[:, 1]).all():
                continue  # nothing evaluated yet, or a script that evaluates one policy only
            key = arguments["env_id"].replace("/", "-").replace(":", "-"), variant  # it becomes a file's name
            curves = (runs.finished if finished else runs.unfinished).setdefault(key, {})
            if arguments["seed"] in curves:
                usage_error(f"{about.parent} is a second run of {key[0]}, seed {arguments['seed']}; move one away")
            curves[arguments["seed"]] = rows
            runs.episodes.setdefault(key, set()).add(arguments["eval_episodes"])
            picture = about.with_name("reconstruction.png")
            if finished and not variant and picture.exists():
                runs.reconstructions.setdefault(f"{key[0]}__reconstruction.png", picture)
    return runs


def read_results(folder: Path) -> dict[Key, Seeds]:
    """Read the CSV files that earlier calls have written."""
    results: dict[Key, Seeds] = {}
    for path in sorted(folder.glob("*.csv")):
        environment, _, ablation = path.stem.partition("__")
        rows = read_columns(path, ("step", "return", "success", "seed"))
        results[environment, ablation] = {int(s): rows[rows[:, 3] == s, :3] for s in np.unique(rows[:, 3])}
    return results


def write_results(folder: Path, results: dict[Key, Seeds]) -> None:
    """Write a CSV file `step,return,success,seed` for each environment and ablation, sorted by seed and step."""
    for (environment, ablation), seeds in results.items():
        with open(folder / f"{environment}{'__' * bool(ablation)}{ablation}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("step", "return", "success", "seed"))
            for seed, rows in sorted(seeds.items()):
                writer.writerows((int(step), value, success, seed) for step, value, success in rows.tolist())


# Statistics ----------------------------------------------------------------------------------------------------------
def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean over seeds (..., N, T) -> (..., T) without the lowest and the highest quarter (rounded down)."""
    cut = values.shape[-2] // 4
    return np.sort(values, -2)[..., cut : values.shape[-2] - cut, :].mean(-2)


def bootstrap_interval(values: np.ndarray, samples: int = 2_000) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval (T,), (T,) of the interquartile mean, seeds (N, T) drawn with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    low, high = np.quantile(interquartile_mean(values[draws]), (0.025, 0.975), axis=0)
    return low, high


def score(script: str, rows: np.ndarray, column: str) -> float:
    """A seed's score: the mean of its last evaluations (T, 3), as many as count for this script."""
    last = LAST_EVALUATIONS.get(script, DEFAULT_LAST_EVALUATIONS)
    return float(rows[-last:, 1 if column == "return" else 2].mean())


def published(script: str, environment: str) -> Published:
    """What is published for an environment; where nothing is, the return counts."""
    return PUBLISHED[script].get(environment, Published("return", np.nan, np.nan, np.nan))


# Figures -------------------------------------------------------------------------------------------------------------
def draw_curves(title: str, column: str, curves: dict[str, Seeds], paper: dict[str, float]) -> Figure:
    """Interquartile mean and 95 % interval of each of `curves` by its label, `paper`'s values as horizontal lines.

    A single curve also shows its seeds, as thin lines; with several curves, the legend names the seeds. An interval
    needs two seeds.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (label, seeds) in enumerate(curves.items()):
        steps = sorted(set.intersection(*(set(rows[:, 0]) for rows in seeds.values())))
        values = np.array(
            [[row[1 if column == "return" else 2] for row in rows if row[0] in steps] for rows in seeds.values()]
        )  # (seeds, steps)
        color = f"C{i}"
        if len(curves) == 1 and len(seeds) > 1:
            for rows in seeds.values():
                axis.plot(rows[:, 0], rows[:, 1 if column == "return" else 2], color=color, linewidth=0.7, alpha=0.3)
        plural = "s" * (len(seeds) > 1)
        alone, among = f"{label}, {len(seeds)} seed{plural}", f"{label}, seed{plural} {numbers(set(seeds))}"
        axis.plot(steps, interquartile_mean(values), color=color, label=alone if len(curves) == 1 else among)
        if len(seeds) > 1:
            axis.fill_between(steps, *bootstrap_interval(values), color=color, alpha=0.2, linewidth=0)
    for style, (label, value) in zip(("--", ":"), paper.items(), strict=False):
        if not np.isnan(value):
            axis.axhline(value, color="black", linewidth=1, linestyle=style, label=f"{label}: {value:g}")
    quantity = "return" if column == "return" else "success rate"
    axis.set(title=title, xlabel="environment steps", ylabel=f"evaluation {quantity}")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_all(script: str, folder: Path, results: dict[Key, Seeds]) -> None:
    """Write `<environment>.png`, and `<environment>__ablations.png` where there are any."""
    for environment in sorted({environment for environment, _ in results}):
        about = published(script, environment)
        variants = {ablation: seeds for (name, ablation), seeds in sorted(results.items()) if name == environment}
        if "" in variants:
            paper = dict(zip(PAPERS[script], (about.mean, about.later), strict=False))
            curve = {"interquartile mean, 95 % interval": variants[""]}
            figure = draw_curves(f"{script} on {environment}", about.column, curve, paper)
            figure.savefig(folder / f"{environment}.png", dpi=120)
        if set(variants) - {""}:
            own = [variants[name] for name in set(variants) - {"", AVERAGED}] or list(variants.values())
            end = max(rows[-1, 0] for seeds in own for rows in seeds.values())  # ablations may be shorter
            compared = set().union(*own)  # and have fewer seeds
            curves = {
                name or "unchanged": {seed: rows[rows[:, 0] <= end] for seed, rows in seeds.items() if seed in compared}
                for name, seeds in variants.items()
            }
            curves = {name: seeds for name, seeds in curves.items() if seeds}
            figure = draw_curves(f"{script} on {environment}: ablations", about.column, curves, {})
            figure.savefig(folder / f"{environment}__ablations.png", dpi=120)


# Tables --------------------------------------------------------------------------------------------------------------
def mean_and_std(values: Iterable[float], decimals: int = 3) -> str:
    """`mean ± sample standard deviation`, without the second part for a single value."""
    values = np.array(list(values))
    mean = f"{values.mean():.{decimals}f}"
    return f"{mean} ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else mean


# Student's t, 97.5 %, for 1 to 9 degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: Iterable[float], decimals: int = 3) -> str:
    """The 95 % interval of the mean of 2 to 10 seeds by Student's t, or a dash."""
    values = np.array(list(values))
    if not 2 <= len(values) <= 10:
        return "–"
    half = STUDENT_T[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean() - half:.{decimals}f} to {values.mean() + half:.{decimals}f}"


def spread(values: Iterable[float]) -> str:
    """`mean_and_std` with three decimals; without a deviation that rounds to nothing; a dash if all are nan."""
    values = list(values)
    if np.isnan(values).all():
        return "–"
    return "infinite" if np.isinf(values).any() else mean_and_std(values).removesuffix(" ± 0.000")


def each_seed(scores: dict[int, float], decimals: int = 3) -> str:
    """All scores with their seeds in brackets."""
    return ", ".join(f"{value:.{decimals}f} ({seed})" for seed, value in sorted(scores.items()))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_table_order(script: str, results: dict[Key, Seeds]) -> list[tuple[Key, Seeds]]:
    """Results in the order of the paper's table, then by name."""
    order = list(PUBLISHED[script])
    place = {name: order.index(name) if name in order else len(order) for name, _ in results}
    return sorted(results.items(), key=lambda item: (place[item[0][0]], item[0]))


def results_table(script: str, results: dict[Key, Seeds], episodes: dict[Key, set[int]]) -> str:
    """The results table in Markdown: the papers, and the scores of the finished seeds."""
    _, _, later, decimals = PAPERS[script]
    two_policies = script == "hyar_td3"
    header = [
        "environment", "column", "paper", later, "ours", *["ours, averaged policy"] * two_policies, "seeds", "steps",
        "evaluation episodes", "each seed (seed)",
    ]  # fmt: skip
    rows = []
    for (environment, ablation), seeds in in_table_order(script, results):
        if ablation:
            continue
        about = published(script, environment)
        scores = {seed: score(script, curve, about.column) for seed, curve in seeds.items()}
        curves = results.get((environment, AVERAGED), {}).values()
        averaged = [score(script, curve, about.column) for curve in curves]
        averaged_text = mean_and_std(averaged, decimals) if averaged else "–"
        if averaged and len(averaged) != len(seeds):
            averaged_text += f" ({len(averaged)} of the seeds)"
        digits = max(0, decimals - 1)
        paper = "–" if np.isnan(about.mean) else f"{about.mean:.{digits}f} ± {about.std:.{digits}f}"
        rows.append([
            environment, about.column, paper, "–" if np.isnan(about.later) else f"{about.later:.{decimals}f}",
            mean_and_std(scores.values(), decimals), *[averaged_text] * two_policies, str(len(seeds)),
            numbers({int(curve[-1, 0]) for curve in seeds.values()}),
            numbers(episodes.get((environment, "")) or {default_evaluation_episodes(script)}),
            each_seed(scores, decimals),
        ])  # fmt: skip
    return markdown(header, rows)


def ablations_table(script: str, results: dict[Key, Seeds]) -> str:
    """The ablations in Markdown, each beside the unchanged script on the same seeds, at the ablation's last step."""
    header = ["environment", "column", "change", "score", "95 % interval", "unchanged, same seeds"]
    header += ["paired difference", "95 % interval of it", "seeds", "steps", "each seed (seed)"]
    rows, decimals = [], PAPERS[script][3]
    for (environment, ablation), seeds in in_table_order(script, results):
        if not ablation:
            continue
        column = published(script, environment).column
        scores = {seed: score(script, curve, column) for seed, curve in seeds.items()}
        unchanged, end = results.get((environment, ""), {}), max(curve[-1, 0] for curve in seeds.values())
        same = {
            seed: score(script, curve[curve[:, 0] <= end], column)
            for seed, curve in unchanged.items() if seed in seeds
        }  # fmt: skip
        paired = [scores[seed] - value for seed, value in same.items()]
        rows.append([
            environment, column, ablation, mean_and_std(scores.values(), decimals),
            mean_interval(scores.values(), decimals), mean_and_std(same.values(), decimals) if same else "–",
            f"{np.mean(paired):+.{decimals}f}" if same else "–", mean_interval(paired, decimals), str(len(seeds)),
            numbers({int(curve[-1, 0]) for curve in seeds.values()}), each_seed(scores, decimals),
        ])  # fmt: skip
    return markdown(header, rows)


def numbers(values: set[int]) -> str:
    """Whole numbers in order; all runs of a benchmark should share one."""
    return ", ".join(f"{value:,}" for value in sorted(values))


def default_evaluation_episodes(script: str) -> int:
    """The script's default, for results whose run folders are on another machine."""
    return importlib.import_module(script).Args().eval_episodes


def main(args: Args) -> None:
    """Read, merge, draw, and print the tables."""
    script = args.script
    if script not in PAPERS:
        usage_error(f"{script} has no results table here, expected one of {', '.join(PAPERS)}; see its page in docs/")
    folder, found = args.results / script, read_runs(script, args.runs)
    earlier = read_results(folder)
    collected = {key: earlier.get(key, {}) | found.finished.get(key, {}) for key in {**earlier, **found.finished}}
    drawn = dict(collected)
    if args.unfinished:
        drawn |= {key: seeds | collected.get(key, {}) for key, seeds in found.unfinished.items()}
    if not drawn and not found.left_out:
        usage_error(f"no runs of {script} in {args.runs} and no results in {folder}; see benchmark/{script}.sh")
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, collected)
    draw_all(script, folder, drawn)
    for name, picture in found.reconstructions.items():
        shutil.copyfile(picture, folder / name)
    tables = {"table.md": results_table(script, collected, found.episodes)}
    if any(ablation for _, ablation in collected):
        tables["ablations.md"] = ablations_table(script, collected)
    for name, table in tables.items():
        (folder / name).write_text(table)
        print(table)
    if found.left_out:
        print(f"not finished, left out: {', '.join(found.left_out)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
