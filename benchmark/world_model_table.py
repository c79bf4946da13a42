"""Collect the tests of world_model_test.py into one table and one picture.

    python benchmark/world_model_table.py
    python benchmark/world_model_table.py --runs /scratch/runs
    python benchmark/world_model_table.py --run-name NAME

Reads the run folders that `benchmark/world_model_test.sh` names, `world_model_test-<row>__<seed>`. Writes to
benchmark/results/world_model_test/: `<row>__<seed>.json` (a run's `metrics.json`), `table.md` (means and standard
deviations over seeds), `events.md` (rewards by event) and `steps.png` (violations and roll-outs of each row). What the
folder already holds of other runs stays there. With `--run-name`, only that run's `summary.png` is drawn, into its
folder: rules broken by the most likely, the sampled and the copied frames, and exact frames in a roll-out.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.plot import markdown, usage_error

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {  # heading -> where in metrics.json, factor
    "Obs MSE": ("values", "obs_mse", 1),
    "PSNR (dB)": ("values", "psnr_of_mean", 1),
    "Rew MSE": ("values", "reward_mse", 1),
    "exact %": ("mode", "exact", 100),
    "exact % where changed": ("mode", "exact_changed", 100),
    "copy %": ("copy", "exact", 100),
    "a rule broken in the frame %": ("mode", "violation any in the frame", 100),
    "... or by a reward %": ("mode", "violation any", 100),
    "... of frames drawn %": ("sample", "violation any", 100),
    "rewards % at events": ("mode", "reward_event", 100),
    "20 steps exact %": ("open_loop", "20", 100),
    "Hits@1 %": ("ranking", "hits_at_1", 100),
    "MRR": ("ranking", "mrr", 1),
    "limit %": ("limit", None, 100),
}
Runs = dict[str, list[dict[str, Any]]]


@dataclass
class Args:
    """What to collect."""

    runs: Path = Path("runs")
    """the folder with the run folders"""
    results: Path = ROOT / "benchmark" / "results" / "world_model_test"
    """the folder to write to"""
    run_name: str | None = None
    """draw summary.png into the folder of this run, and do nothing else"""


def values(runs: list[dict[str, Any]], part: str, name: str | None) -> np.ndarray:
    """One number per run; nan where a run has none."""
    found = [run.get(part) if name is None else (run.get(part) or {}).get(name, np.nan) for run in runs]
    return np.array(found, float)


def read_results(folder: Path) -> Runs:
    """The tests in a folder of results, one a seed, by row."""
    rows: Runs = {}
    for path in sorted(folder.glob("*__*.json")):
        rows.setdefault(path.stem.rpartition("__")[0], []).append(json.loads(path.read_text()))
    return rows


def table(rows: Runs) -> str:
    """Mean and sample standard deviation over seeds, in Markdown."""
    lines = []
    for row, runs in rows.items():
        cells = []
        for part, name, factor in COLUMNS.values():
            numbers = factor * values(runs, part, name)
            form = ".1e" if name in ("obs_mse", "reward_mse") else ".3f" if factor == 100 else ".2f"
            spread = f" ± {numbers.std(ddof=1):{form}}" if len(numbers) > 1 and part != "limit" else ""
            cells.append("–" if np.isnan(numbers).all() else f"{np.nanmean(numbers):{form}}{spread}")
        lines.append([row, str(len(runs)), *cells])
    return markdown(["row", "seeds", *COLUMNS], lines)


def pool(runs: list[dict[str, Any]]) -> dict[str, tuple[str, int]]:
    """For each event the share of exact rewards in %, over all seeds' test frames together, and their number."""
    result = {}
    for name in sorted({name for run in runs for name in run["mode"]["events"]}):
        found = [run["mode"]["events"][name] for run in runs if name in run["mode"]["events"]]
        frames = sum(event["frames"] for event in found)
        exact = sum(event["exact"] * event["frames"] for event in found)
        result[name] = f"{100 * exact / frames:.2f} %", frames
    return result


def events(rows: Runs) -> str:
    """`pool` of each row, in Markdown."""
    pooled = {row: pool(runs) for row, runs in rows.items()}
    names = sorted({name for found in pooled.values() for name in found})
    lines = []
    for row, found in pooled.items():
        cells = ["{} of {:,}".format(*found[name]) if name in found else "–" for name in names]
        lines.append([row, *cells])
    return markdown(["row", *names], lines)


def draw(rows: Runs) -> Figure:
    """Frames that break a rule, by row, and exact frames over the steps of a roll-out."""
    figure = Figure(figsize=(12.0, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for i, (row, runs) in enumerate(rows.items()):
        share = 100 * values(runs, "mode", "violation any in the frame").mean()
        bars.barh(i, share, color=f"C{i}")
        bars.text(share, i, f" {share:.3g}", va="center", fontsize=8)
        steps = sorted({int(step) for run in runs for step in run["open_loop"]})
        if steps and np.mean([run["limit"] for run in runs]) == 1.0:
            means = [100 * values(runs, "open_loop", str(step)).mean() for step in steps]
            curves.plot(steps, means, marker=".", color=f"C{i}", label=row)
    bars.set_yticks(range(len(rows)), rows, fontsize=8)
    bars.invert_yaxis()
    bars.set_xscale("symlog", linthresh=0.001)
    bars.margins(x=0.15)
    bars.set(xlabel="frames that break a rule of the game, rewards apart, % (logarithmic)")
    curves.axhline(100.0, color="black", linestyle="--", linewidth=1, label="limit")
    curves.set(xlabel="steps without the true frame", ylabel="frames exactly right, %")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7)
    return figure


def draw_summary(result: dict[str, Any], title: str) -> Figure:
    """One run: violations by rule, and exact frames in open loop with the limit."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    names = [name for name in result["mode"] if name.startswith("violation ")]
    for i, kind in enumerate(kind for kind in ("mode", "sample", "copy") if result[kind]):
        bars.bar(
            np.arange(len(names)) + 0.27 * i, [100 * result[kind].get(name, np.nan) for name in names], 0.25, label=kind
        )
    labels = [name.removeprefix("violation ") for name in names]
    bars.set_xticks(np.arange(len(names)) + 0.27, labels, rotation=40, ha="right", fontsize=8)
    bars.set(title=title, ylabel="frames that break a rule, %")
    steps = [int(step) for step in result["open_loop"]]
    curve.plot(steps, [100 * share for share in result["open_loop"].values()], marker=".", label="most likely frame")
    curve.axhline(100 * result["limit"], color="black", linestyle="--", linewidth=1, label="limit of the first step")
    curve.set(xlabel="steps without the true frame", ylabel="frames exactly right, %", ylim=(0, 103))
    bars.legend(fontsize=8)
    curve.legend(fontsize=8)
    return figure


def main(args: Args) -> None:
    """Read, merge, draw, and print the tables."""
    if args.run_name:
        folder = args.runs / args.run_name
        try:
            result = json.loads((folder / "metrics.json").read_text())
        except (OSError, ValueError) as error:
            usage_error(f"{folder} is no finished run of world_model_test.py ({error})")
        draw_summary(result, args.run_name).savefig(folder / "summary.png", dpi=110)
        print(folder / "summary.png")
        return
    found = sorted(args.runs.glob("world_model_test-*__*/metrics.json"))
    if not found and not any(args.results.glob("*__*.json")):
        usage_error(f"no finished runs in {args.runs} and no results in {args.results}; see world_model_test.sh")
    args.results.mkdir(parents=True, exist_ok=True)
    for path in found:
        name = path.parent.name.removeprefix("world_model_test-")
        (args.results / f"{name}.json").write_text(path.read_text())
    rows = read_results(args.results)
    for name, text in (("table", table(rows)), ("events", events(rows))):
        (args.results / f"{name}.md").write_text(text)
        print(text)
    study = {row: runs for row, runs in rows.items() if not row.startswith("board")}
    draw(study).savefig(args.results / "steps.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
