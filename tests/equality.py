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

Every checkpoint is caught by a hook on the rename that completes it, and the first one of the last step ends the run:
what comes after it (model.pt, pictures, reports) takes most of the time and is not compared. The runs use one CPU
thread. The status is 1 if anything differs. Not part of the test suite.
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
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {"rows", "buffer", "frames", "observation", "mask", "initial_embedding", "embedding_history"}

# Python runs this at its start. Each checkpoint.pt is linked into a folder before it is renamed into its place; the one
# of the last step ends the run. Pictures stay blank, which saves time.
HOOK = """
import os, sys
from matplotlib.figure import Figure

Figure.draw = lambda figure, renderer: None

def keep(event, details):
    if event == "os.rename" and os.path.basename(os.fspath(details[1])) == "checkpoint.pt":
        folder = os.environ["EQUALITY_FOLDER"]
        os.link(details[0], os.path.join(folder, f"{len(os.listdir(folder)):06}.pt"))
        if sys.modules["torch"].load(details[0])["step"] == int(os.environ["EQUALITY_LAST_STEP"]):
            os._exit(0)

sys.addaudithook(keep)
"""

HYAR = "--random-episodes 60 --vae-pretrain-steps 60 --eval-episodes 3"
MOVE = f"{HYAR} --env HardMove4-v0 --total-timesteps 240 --learning-starts 60 --eval-frequency 70"
MOVE += " --checkpoint-frequency 50"
SMALL = "--image-size 24 --num-layers 2 --num-filters 4 --hidden-dim 16 --batch-size 8 --eval-episodes 2"
SAC = f"{SMALL} --env Pendulum-v1 --total-timesteps 300 --action-repeat 2 --learning-starts 25 --eval-frequency 140"
SAC += " --checkpoint-frequency 50"
PLAS = f"{SMALL} --env DotHazard-v0 --collect-steps 300 --total-timesteps 200 --frame-stack 2 --random-shift 2"
PLAS += " --eval-frequency 70 --checkpoint-frequency 30"
MOA = "--rows 400 --max-cycles 12 --total-timesteps 150 --batch-size 16 --eval-frequency 40 --checkpoint-frequency 20"
WORLD = "--rows 1500 --test-rows 500 --total-timesteps 300 --batch-size 32 --eval-frequency 70 --eval-episodes 100"
WORLD += " --checkpoint-frequency 40"
CASES = {  # script and variant -> flags
    # Long enough for 1,000 episodes, after which the VAE is trained further; updates begin late, to be quick.
    "hyar_td3 platform": f"{HYAR} --env Platform-v0 --total-timesteps 2100 --learning-starts 1750 "
    "--eval-frequency 400 --checkpoint-frequency 150",
    "hyar_td3 hardmove": MOVE,
    "hyar_td3 one-hot": f"{MOVE} --discrete-embedding one-hot",
    "hyar_td3 original": f"{MOVE} --no-bootstrap-at-limit --rebuild-vae-optimizer --no-relabel-in-latent-range",
    "sac_ae_pixels reconstruction": SAC,
    "sac_ae_pixels no-reconstruction": f"{SAC} --no-reconstruction",
    "sac_ae_pixels random-shift": f"{SAC} --random-shift 2",
    "sac_ae_pixels small-buffer": f"{SAC} --buffer-size 60",
    "sac_ae_pixels bf16": f"{SAC} --bf16",
    "plas_pixels both": f"{PLAS} --encoder-signal both",
    "plas_pixels argmax": f"{PLAS} --policy argmax",
    "plas_pixels separate": f"{PLAS} --encoder-signal separate",
    "plas_pixels pretraining": f"{PLAS} --encoder-signal reconstruction --pretrain-steps 50",
    "plas_pixels bf16": f"{PLAS} --bf16",
    "pretrain_vae_moa frame": MOA,
    "pretrain_vae_moa 4-frames": f"{MOA} --context 4 --objective moa --head-input state+z",
    "pretrain_vae_moa history": f"{MOA} --context history",
    "world_model_test mse": f"{WORLD} --model mse --action-input planes",
    "world_model_test cell": f"{WORLD} --model cell --contrastive-coef 0.1",
    "world_model_test entity": f"{WORLD} --model entity",
}
# These are also ended by SIGKILL.
KILLED = {"hyar_td3 hardmove", "sac_ae_pixels reconstruction", "plas_pixels both", "pretrain_vae_moa frame"}


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

    def __init__(self, case: str, tree: Path, folder: Path, name: str, resume: bool = False) -> None:
        """Start it, or start it again with `resume`."""
        self.run, self.checkpoints, hook = folder / "runs" / name, folder / "caught" / name, folder / "hook"
        for path in (self.checkpoints, hook):
            path.mkdir(parents=True, exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK)
        flags = shlex.split(CASES[case])
        command = [sys.executable, str(tree / f"{case.split()[0]}.py"), *flags, "--no-cuda", "--runs-dir", "runs"]
        command += ["--run-name", name]
        if resume:
            command.append("--resume")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(hook), "EQUALITY_FOLDER": str(self.checkpoints)}
        environment["EQUALITY_LAST_STEP"] = flags[flags.index("--total-timesteps") + 1]
        self.output = (folder / f"{name}.log").open("a+")
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=self.output, stderr=subprocess.STDOUT
        )

    def finish(self, status: int = 0) -> Running:
        """Wait for the end, and return this. Raises RuntimeError, with the output's last line, at another status."""
        ended = self.process.wait()
        self.output.seek(0)
        last = (self.output.read().strip().splitlines() or ["no output"])[-1]
        self.output.close()
        if ended != status:
            raise RuntimeError(f"{self.run.name} ended with status {ended}, not {status}: {last}")
        return self

    def training_seconds(self) -> float:
        """The time from the first checkpoint to the last one."""
        times = [path.stat().st_mtime for path in sorted(self.checkpoints.iterdir())]
        return times[-1] - times[0]

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
    known = [{(v.dtype, v.shape, bytes(v.view(-1).view(torch.uint8).numpy())): k for k, v in s.items()} for s in sides]
    unmatched = known[0].keys() ^ known[1].keys()
    left = [
        {own[key]: side[own[key]] for key in own if key in unmatched} for side, own in zip(sides, known, strict=True)
    ]
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


def examine(case: str, old_tree: Path, new_tree: Path, folder: Path, ignored: set[str]) -> bool:
    """Run a case with both versions, and killed and resumed; print a line; whether all are equal."""
    began, differences, notes = time.monotonic(), [], []
    try:
        old = Running(case, old_tree, folder / "old", "whole").finish()
        new = Running(case, new_tree, folder / "new", "whole").finish()
        differences, notes = compare(old, new, ignored)
        for number in (signal.SIGTERM, signal.SIGKILL) if case in KILLED else (signal.SIGTERM,):
            name = number.name
            step = Running(case, new_tree, folder / "new", name).kill(number, 0.4 * new.training_seconds())
            resumed = Running(case, new_tree, folder / "new", name, resume=True).finish()
            differences += [f"resumed after {name}: {text}" for text in compare(new, resumed, ignored)[0]]
            notes.append(f"{name}, resumed from step {step} of {max(new.states())}")
    except Exception as error:  # whatever a new version leaves behind
        differences.append(f"{type(error).__name__}: {error}")
    verdict = "\n    ".join([f"{case}: DIFFERENT", *differences]) if differences else f"{case}: equal"
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
    cases = [case for case in CASES if args.only in case]
    if not cases:
        parser.error(f"no case has {args.only} in its name: {', '.join(CASES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the worktree is removed then, too
    with tempfile.TemporaryDirectory() as name, worktree(args.old, Path(name) / "tree") as old:

        def equal(case: str) -> bool:
            return examine(case, old, args.new.resolve(), Path(name) / case, IGNORED | {*args.ignore})

        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(equal, cases))
    print(f"{sum(results)} of {len(cases)} cases are equal")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
