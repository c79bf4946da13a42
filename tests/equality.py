"""Shows that a change of the scripts changed no arithmetic: short runs of an old commit and of the new files agree.

    python tests/equality.py OLD_COMMIT                  # compares with the work tree that this file lies in
    python tests/equality.py OLD_COMMIT --only plas      # the cases with "plas" in their name
    python tests/equality.py OLD_COMMIT --new /tmp/other --jobs 2

Each case runs one command with both versions, then again with the new one, which is killed and resumed. At every step
at which two runs wrote an unfinished checkpoint, all float tensors in it must be equal bit for bit: weights, optimizer
moments and steps, and what else was saved. Names do not count, nor how often a tensor was saved. `IGNORED` names what
is left out because its layout is free: the replay memory, the data, and what replays the current episode; --ignore
adds names. Tensors that only one side has are a difference, unless both sides' hold the same set of values (stacked or
split ones), which is a note. In `eval.csv`, the columns that both have must be the same text.

Every checkpoint is caught by a hook on the rename that completes it, as the last one of a run holds less. The runs use
one CPU thread. The status is 1 if anything differs. Not part of the test suite.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {"rows", "buffer", "frames", "observation"}

# Python runs this at its start: it links every checkpoint.pt into a folder, before it is renamed into its place.
HOOK = """
import os, sys

def keep(event, details):
    if event == "os.rename" and os.path.basename(os.fspath(details[1])) == "checkpoint.pt":
        folder = os.environ["EQUALITY_FOLDER"]
        os.link(details[0], os.path.join(folder, f"{len(os.listdir(folder)):06}.pt"))

sys.addaudithook(keep)
"""


class Case(NamedTuple):
    """One command, and the signals that it is killed by and resumed from."""

    name: str
    script: str
    flags: str
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)


BOTH = (signal.SIGTERM, signal.SIGKILL)
HYAR = "--random-episodes 60 --vae-pretrain-steps 60 --eval-episodes 3"
HARD_MOVE = f"{HYAR} --env HardMove4-v0 --total-timesteps 400 --learning-starts 60 --eval-frequency 90"
HARD_MOVE += " --checkpoint-frequency 70"
SMALL = "--image-size 24 --num-layers 2 --num-filters 4 --hidden-dim 16 --batch-size 8 --eval-episodes 2"
SAC = f"{SMALL} --env Pendulum-v1 --total-timesteps 500 --action-repeat 2 --learning-starts 25 --eval-frequency 150"
SAC += " --checkpoint-frequency 70"
PLAS = f"{SMALL} --env DotHazard-v0 --collect-steps 300 --total-timesteps 200 --frame-stack 2 --random-shift 2"
PLAS += " --eval-frequency 70 --checkpoint-frequency 30"
MOA = "--rows 400 --max-cycles 12 --total-timesteps 150 --eval-frequency 40 --batch-size 16 --checkpoint-frequency 20"
WORLD = (
    "--rows 1500 --test-rows 500 --total-timesteps 300 --eval-frequency 70 --batch-size 32 --checkpoint-frequency 40"
)
WORLD += " --eval-episodes 5"
CASES = [
    # Long enough for 1,000 episodes, after which the VAE is trained further; updates begin late, to be quick.
    Case("hyar-platform", "hyar_td3", f"{HYAR} --env Platform-v0 --total-timesteps 4500 --learning-starts 3900 "
         "--eval-frequency 300 --checkpoint-frequency 250"),
    Case("hyar-hardmove", "hyar_td3", HARD_MOVE, BOTH),
    Case("hyar-one-hot", "hyar_td3", f"{HARD_MOVE} --discrete-embedding one-hot"),
    Case("hyar-original", "hyar_td3", f"{HARD_MOVE} --no-bootstrap-at-limit --rebuild-vae-optimizer "
         "--no-relabel-in-latent-range --anneal-vae-learning-rate"),
    Case("sac-reconstruction", "sac_ae_pixels", SAC, BOTH),
    Case("sac-no-reconstruction", "sac_ae_pixels", f"{SAC} --no-reconstruction"),
    Case("sac-random-shift", "sac_ae_pixels", f"{SAC} --random-shift 2"),
    Case("sac-small-buffer", "sac_ae_pixels", f"{SAC} --buffer-size 60"),
    Case("sac-bf16", "sac_ae_pixels", f"{SAC} --bf16"),
    Case("plas-both", "plas_pixels", f"{PLAS} --encoder-signal both", BOTH),
    Case("plas-argmax", "plas_pixels", f"{PLAS} --policy argmax"),
    Case("plas-separate", "plas_pixels", f"{PLAS} --encoder-signal separate"),
    Case("plas-reconstruction", "plas_pixels", f"{PLAS} --encoder-signal reconstruction --pretrain-steps 50"),
    Case("plas-bf16", "plas_pixels", f"{PLAS} --bf16"),
    Case("moa-frame", "pretrain_vae_moa", MOA, BOTH),
    Case("moa-4-frames", "pretrain_vae_moa", f"{MOA} --context 4 --objective moa --head-input state+z"),
    Case("moa-history", "pretrain_vae_moa", f"{MOA} --context history"),
    Case("world-mse", "world_model_test", f"{WORLD} --model mse --action-input planes"),
    Case("world-cell", "world_model_test", f"{WORLD} --model cell --contrastive-coef 0.1"),
    Case("world-entity", "world_model_test", f"{WORLD} --model entity", BOTH),
]  # fmt: skip


@contextlib.contextmanager
def worktree(commit: str, path: Path) -> Iterator[Path]:
    """A git worktree of a commit, for the time being."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


class Running:
    """A command in a folder of its own (data that it collects stay there), under a run name."""

    def __init__(self, case: Case, tree: Path, folder: Path, name: str, resume: bool = False) -> None:
        """Start it, or start it again with `resume`."""
        self.run, self.checkpoints, hook = folder / "runs" / name, folder / "caught" / name, folder / "hook"
        for path in (self.checkpoints, hook):
            path.mkdir(parents=True, exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK)
        command = [sys.executable, str(tree / f"{case.script}.py"), *shlex.split(case.flags), "--no-cuda"]
        command += ["--runs-dir", "runs", "--run-name", name]
        if resume:
            command.append("--resume")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(hook), "EQUALITY_FOLDER": str(self.checkpoints)}
        self.output = (folder / f"{name}.log").open("a+")
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=self.output, stderr=subprocess.STDOUT
        )

    def finish(self, status: int = 0) -> Running:
        """Wait for the end, and return this. Raises RuntimeError, with the last line of the output, at another status."""
        ended = self.process.wait()
        self.output.seek(0)
        last = (self.output.read().strip().splitlines() or ["no output"])[-1]
        self.output.close()
        if ended != status:
            raise RuntimeError(f"{self.run.name} ended with status {ended}, not {status}: {last}")
        return self

    def training_seconds(self) -> float:
        """How long the time from the first checkpoint to the last unfinished one was."""
        times = [path.stat().st_mtime for path in sorted(self.checkpoints.iterdir())]
        return times[-2] - times[0]

    def kill(self, number: signal.Signals, seconds: float) -> int:
        """Send a signal, so long after the first checkpoint, and return the step of the last one."""
        while self.process.poll() is None and not any(self.checkpoints.iterdir()):
            time.sleep(0.002)
        time.sleep(seconds)
        self.process.send_signal(number)
        self.finish(-number if number == signal.SIGKILL else 128 + number)
        return max(self.states())

    def states(self) -> dict[int, dict[str, Any]]:
        """The unfinished checkpoints by their step."""
        files = [torch.load(path, map_location="cpu", weights_only=True) for path in sorted(self.checkpoints.iterdir())]
        return {state["step"]: state for state in files if not state["finished"]}


def float_tensors(value: Any, ignored: set[str], path: str = "") -> dict[str, Tensor]:
    """All float tensors in nested dictionaries and lists, by their path, but those with an ignored name in it."""
    if isinstance(value, Tensor):
        return {path: value.detach().contiguous()} if value.is_floating_point() else {}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {}
    for key, part in items:
        if not ignored.intersection(str(key).split(".")):
            found |= float_tensors(part, ignored, f"{path}.{key}".lstrip("."))
    return found


def compare_states(one: dict[str, Any], other: dict[str, Any], ignored: set[str]) -> tuple[str, str]:
    """What differs between the tensors of two checkpoints, or nothing; and a note, or nothing."""
    sides = [float_tensors(state, ignored) for state in (one, other)]
    if not all(any("exp_avg" in path for path in side) for side in sides):
        return "a checkpoint holds no optimizer moments", ""
    keys = [{(v.dtype, v.shape, bytes(v.view(-1).view(torch.uint8).numpy())): p for p, v in s.items()} for s in sides]
    left = [{path: side[path] for key, path in own.items() if key not in its} for side, own, its in
            zip(sides, keys, reversed(keys), strict=True)]  # fmt: skip
    values = [torch.cat([torch.zeros(0), *[value.flatten() for value in side.values()]]).unique() for side in left]
    if torch.equal(*values):
        return "", f"{len(left[0])} tensors are laid out as {len(left[1])} others" if left[0] else ""
    texts = []
    for side, its, name in zip(left, reversed(left), ("first", "second"), strict=True):
        for path, value in side.items():
            if path not in its:
                texts.append(f"{path} {tuple(value.shape)} is only in the {name}")
            elif its[path].shape != value.shape:
                texts.append(f"{path} has shape {tuple(value.shape)} in the {name}")
            elif name == "first":
                texts.append(f"{path} {tuple(value.shape)} differs by {float((value - its[path]).abs().max()):.2g}")
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return "; ".join(texts[:4]) + more, ""


def compare_evaluations(one: Path, other: Path) -> tuple[str, str]:
    """What differs between the common columns of two `eval.csv`, or nothing; and a note on the others, or nothing."""
    rows = [list(csv.DictReader((path / "eval.csv").open())) for path in (one, other)]
    if len(rows[0]) != len(rows[1]) or not rows[0]:
        return f"eval.csv has {len(rows[0])} and {len(rows[1])} rows", ""
    names = [list(side[0]) for side in rows]
    single = [name for name in dict.fromkeys(names[0] + names[1]) if name not in names[0] or name not in names[1]]
    note = f"eval.csv: only one has {', '.join(single)}" if single else ""
    for row, its in zip(*rows, strict=True):
        for name in names[0]:
            if name in its and row[name] != its[name]:
                return f"eval.csv, step {row['step']}: {name} {row[name]} and {its[name]}", note
    return "", note


def compare(one: Running, other: Running, ignored: set[str]) -> tuple[list[str], list[str]]:
    """Differences of two runs, of their tensors at the first step with one; and notes."""
    states, others = one.states(), other.states()
    difference, note = compare_evaluations(one.run, other.run)
    differences, notes = [difference], [note]
    if not states or not others or max(states) != max(others):
        differences.append(f"last unfinished checkpoints at steps {max(states, default=0)}, {max(others, default=0)}")
    for step in sorted(states.keys() & others.keys()):
        difference, note = compare_states(states[step], others[step], ignored)
        notes.append(note)
        if difference:
            differences.append(f"step {step}: {difference}")
            break
    return [text for text in differences if text], [text for text in dict.fromkeys(notes) if text]


def examine(case: Case, old_tree: Path, new_tree: Path, folder: Path, ignored: set[str]) -> bool:
    """Run a case with both versions, and killed and resumed; print a line; whether all are equal."""
    began, differences, notes = time.monotonic(), [], []
    try:
        old, new = (Running(case, tree, folder / side, "whole").finish() for tree, side in (
            (old_tree, "old"), (new_tree, "new")
        ))  # fmt: skip
        differences, notes = compare(old, new, ignored)
        for number in case.signals:
            killed = Running(case, new_tree, folder / "new", number.name)
            step = killed.kill(number, 0.4 * new.training_seconds())
            resumed = Running(case, new_tree, folder / "new", number.name, resume=True).finish()
            differences += [f"{number.name}, resumed from step {step}: {d}" for d in compare(new, resumed, ignored)[0]]
            notes.append(f"{number.name}, resumed from step {step} of {max(new.states())}")
    except RuntimeError as error:
        differences.append(str(error))
    verdict = "\n    ".join([f"{case.name}: DIFFERENT", *differences]) if differences else f"{case.name}: equal"
    print(f"{verdict} ({time.monotonic() - began:.0f} s; {'; '.join(notes)})", flush=True)
    return not differences


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD_COMMIT")
    parser.add_argument("--new", type=Path, default=ROOT, help="the folder of the new version (default: this one)")
    parser.add_argument("--only", default="", help="run the cases with this in their names")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--ignore", nargs="*", default=[], help="more names of tensors to leave out")
    args = parser.parse_args()
    cases, new, ignored = (
        [case for case in CASES if args.only in case.name],
        args.new.resolve(),
        IGNORED | {*args.ignore},
    )
    if not cases:
        parser.error(f"no case has {args.only} in its name: {', '.join(case.name for case in CASES)}")
    with tempfile.TemporaryDirectory() as folder, worktree(args.old, Path(folder) / "tree") as old:
        with ThreadPoolExecutor(args.jobs) as pool:
            equal = list(pool.map(lambda case: examine(case, old, new, Path(folder) / case.name, ignored), cases))
    print(f"{sum(equal)} of {len(cases)} cases are equal")
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
