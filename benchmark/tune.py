"""Search a script's hyper-parameters with Optuna: a trial is one call of the script's own command line.

    python benchmark/tune.py hyar_td3 --trials 20 --search learning_rate=log:1e-5:1e-3 kl_weight=0.05,0.5 \
        -- --env Platform-v0 --total-timesteps 20000 --eval-frequency 2000

Start the same command on any machines that share the folder: they work on one study, whose journal is a file.
A trial's value is the mean of the last evaluations in its run's eval.csv. What a search may range over:
`name=log:LOW:HIGH`, `name=float:LOW:HIGH`, `name=int:LOW:HIGH`, `name=A,B,C`. Flags after `--` are the same in all
trials. If a trial fails, the search goes on without it; a search that was stopped continues when it is started
again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROOT = Path(__file__).resolve().parents[1]


def distribution(word: str) -> tuple[str, optuna.distributions.BaseDistribution]:
    """The option and the range of one `NAME=SPACE`. Raises ValueError for an unknown kind of space."""
    name, _, space = word.partition("=")
    kind, *bounds = space.split(":")
    try:
        if name and space and not bounds:
            return name, optuna.distributions.CategoricalDistribution(space.split(","))
        low, high = bounds
        if kind == "int":
            return name, optuna.distributions.IntDistribution(int(low), int(high))
        if kind in ("float", "log"):
            return name, optuna.distributions.FloatDistribution(float(low), float(high), log=kind == "log")
        raise ValueError(f"there is no kind {kind}")
    except ValueError as error:
        raise ValueError(f"--search {word}: {error}; expected NAME=log:LOW:HIGH, float:, int: or A,B,C") from None


def suggest(trial: optuna.Trial, name: str, space: optuna.distributions.BaseDistribution) -> str:
    """Draw a value of one hyper-parameter, as the command line takes it."""
    if isinstance(space, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    draw = trial.suggest_int if isinstance(space, optuna.distributions.IntDistribution) else trial.suggest_float
    return str(draw(name, space.low, space.high, log=space.log))


def score(evaluations: Path, column: str, last: int) -> float:
    """The mean of a column's last values in an eval.csv. Raises ValueError if it has no such column."""
    with open(evaluations, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise ValueError(f"{evaluations} has no column {column}; it has {', '.join(rows[0]) if rows else 'no rows'}")
    values = [float(row[column]) for row in rows[-last:]]
    return sum(values) / len(values)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line; what follows `--` is the script's."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="the script's name, without .py")
    parser.add_argument("--search", nargs="+", required=True, metavar="NAME=SPACE", help="what to search over")
    parser.add_argument("--trials", type=int, default=20, help="trials that this process runs")
    parser.add_argument("--column", default="episodic_return", help="the column of eval.csv to optimize")
    parser.add_argument("--last", type=int, default=10, help="last evaluations of a run whose mean is its value")
    parser.add_argument("--minimize", action="store_true", help="search for the lowest value")
    parser.add_argument("--study", default="tune", help="the name of the study, and of its folder in --runs-dir")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the study's folder is")
    parser.add_argument("--seed", type=int, default=None, help="seed of the search (for one worker)")
    args = parser.parse_args(words[:cut])
    args.fixed = words[cut + 1 :]
    if not (ROOT / f"{args.script}.py").exists():
        parser.error(f"there is no {args.script}.py; try hyar_td3")
    try:
        args.spaces = dict(distribution(word) for word in args.search)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(words: list[str]) -> optuna.Study:
    """Run the trials, print the best one, and return the study."""
    args = parse(words)
    folder = args.runs_dir / args.study
    folder.mkdir(parents=True, exist_ok=True)

    def objective(trial: optuna.Trial) -> float:
        """Train once, and read the run's evaluations."""
        chosen = {name: suggest(trial, name, space) for name, space in args.spaces.items()}
        name = f"trial-{trial.number}"
        command = [sys.executable, str(ROOT / f"{args.script}.py"), "--runs-dir", str(folder), "--run-name", name]
        for option, value in chosen.items():
            command += [f"--{option.replace('_', '-')}", value]
        done = subprocess.run([*command, *args.fixed], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
        return score(folder / name / "eval.csv", args.column, args.last)

    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), study_name=args.study,
        direction="minimize" if args.minimize else "maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=args.seed),
    )  # fmt: skip
    study.optimize(objective, n_trials=args.trials, catch=(RuntimeError,))
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not finished:
        sys.exit("error: no trial was finished; see the warnings above")
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in study.best_params.items())
    print(f"best of {len(finished)} trials: {study.best_value:.4g} with {flags}; run: trial-{study.best_trial.number}")
    return study


if __name__ == "__main__":
    main(sys.argv[1:])
