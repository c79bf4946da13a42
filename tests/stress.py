"""Shows that runs survive: kills at random moments, a full disk, damaged checkpoints and malformed arguments.

    python tests/stress.py                                # all scripts; make stress
    python tests/stress.py --script plas_pixels --only kills disk --kills 4

For each script, against a short run that nothing disturbs:

- kills: SIGKILL or SIGTERM at random moments (start, evaluation, checkpoint, end, anywhere). Each run is resumed after
  each kill until it is finished; its weights and `eval.csv` must then be the undisturbed run's, byte for byte. A kill
  that comes after the end of a run is not counted.
- disk: the disk of the run folder (a small tmpfs, which root can mount) fills up during a checkpoint or a picture. The
  run must end with one line and status 1, its last checkpoint must load, and once there is room again, the resumed run
  must end as the undisturbed one.
- damage: a checkpoint that was cut, or in which one byte was changed, must be refused with one line and status 2, and
  the run folder must stay as it was.
- inputs: malformed arguments, drawn by Hypothesis, must be refused with status 2 and one line, or tyro's box, before
  anything is created. What is valid by chance (`--run-name a/b`) is counted apart and stopped.

It prints a Markdown table; the status is 1 if anything failed. Linux only, and not part of the test suite. A script
that is edited meanwhile is no longer equal to itself.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import typing
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hypothesis
import torch
import tyro
from hypothesis import strategies as st
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.equality import MOA, MOVE, PLAS, SAC, WORLD  # noqa: E402

RUNS = {  # script -> flags of a run of seconds
    "hyar_td3": MOVE, "sac_ae_pixels": SAC, "plas_pixels": PLAS, "pretrain_vae_moa": MOA,
    "world_model_test": f"{WORLD} --model mse",
}  # fmt: skip
MOST_MEMORY = 2**34  # bytes that a call with malformed arguments can have: one that is accepted must not starve others

# Python runs this at its start. It ends the run, or fills the disk, when what the plan names happens.
HOOK = """
import json, os, sys, threading, time

plan = json.loads(os.environ["STRESS_PLAN"])
PLACES = {"save_checkpoint": "checkpoint", "evaluate_agent": "evaluation", "evaluate_model": "evaluation"}
PLACES |= {"finish": "end", "main": "training"}

def place():
    frame, names = sys._current_frames().get(threading.main_thread().ident), set()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return next((place for name, place in PLACES.items() if name in names), "start")

def kill():
    time.sleep(plan["after"])
    while plan["place"] in PLACES.values() and place() != plan["place"]:
        time.sleep(0.001)
    time.sleep(plan["delay"])
    with open("hit", "w") as file:
        file.write(place())
    os.kill(os.getpid(), plan["signal"])

def fill(event, details):
    if event == "open" and str(details[0]).endswith(plan["file"]):
        plan["opening"] -= 1
        if plan["opening"] == 0:
            filler = os.open("filler", os.O_WRONLY | os.O_CREAT)
            try:
                while True:
                    os.write(filler, bytes(4096))
            except OSError:
                os.ftruncate(filler, os.fstat(filler).st_size - plan["left"])

if "signal" in plan:
    threading.Thread(target=kill, daemon=True).start()
if "file" in plan:
    sys.addaudithook(fill)
"""


class Row(NamedTuple):
    """A line of the table; `failures` says of each failed try what happened."""

    what: str
    tried: int
    held: int
    failures: list[str]
    note: str = ""


class Outcome(NamedTuple):
    """How a process ended (minus a signal's number, if one ended it), and what it wrote."""

    status: int
    out: str
    err: str

    def is_one_line(self) -> bool:
        """Whether there is one line for the user on stderr, and no traceback anywhere."""
        return len(self.err.splitlines()) == 1 and self.err.startswith("error: ") and "Traceback" not in self.out

    def __str__(self) -> str:
        return f"status {self.status}, stdout ...{self.out[-200:]!r}, stderr ...{self.err[-400:]!r}"


def run(script: str, folder: Path, plan: dict[str, Any] | None = None) -> Outcome:
    """Start or continue a run in `folder`/runs/run, which the plan disturbs."""
    (folder / "hook").mkdir(parents=True, exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags(script), "--run-name", "run", "--resume"]
    environment = os.environ | {"PYTHONPATH": str(folder / "hook"), "STRESS_PLAN": json.dumps(plan or {})}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def flags(script: str) -> list[str]:
    """The arguments of a script's run, without its name."""
    return [*RUNS[script].split(), "--no-cuda", "--runs-dir", "runs"]


def difference(whole: Path, folder: Path) -> str:
    """Which results of two finished runs are not the same bytes; "" if all are."""
    one, other = whole / "runs" / "run", folder / "runs" / "run"
    names = ["model.pt", "eval.csv", *(["best_model.pt"] if (one / "best_model.pt").exists() else [])]
    changed = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    return f"{', '.join(changed)} differ" if changed else ""


def kills(script: str, folder: Path, whole: Path, args: argparse.Namespace) -> list[Row]:
    """Kill runs until so many kills have hit one, resume each until it is finished, and compare."""
    draw = random.Random(f"{args.seed} {script}")
    seconds = (whole / "ended").stat().st_mtime - (whole / "hook").stat().st_mtime  # of a run
    latest = {"start": 0.3, "evaluation": 0.6, "anywhere": 1.0, "checkpoint": 0.6, "end": 0.0}  # in shares of it
    hits, failures, held, turns = Counter(), [], 0, itertools.cycle(latest)
    for number in range(2 * args.kills):
        here, of_this, place, text = folder / f"killed-{number}", [], "", None
        while text is None:
            plan = None
            if hits.total() < args.kills and place != "end":  # a run that was killed at its end is left to finish
                place = next(turns)
                plan = {"place": place, "signal": draw.choice((signal.SIGKILL, signal.SIGTERM))}
                plan |= {"after": draw.uniform(0, latest[place] * seconds), "delay": 10 ** draw.uniform(-4, -0.7)}
            outcome, hit = run(script, here, plan), here / "hit"
            ends = (-plan["signal"], 128 + plan["signal"]) if plan else ()
            if hit.exists() and outcome.status in ends and "Traceback" not in outcome.err:
                of_this.append(f"{hit.read_text()} {signal.Signals(plan['signal']).name}")
                hits[of_this[-1]] += 1
                hit.unlink()
            else:
                text = difference(whole, here) if outcome.status == 0 else str(outcome)
        if text:
            failures.append(f"run {number}, killed during {', '.join(of_this)}; then, with {plan}: {text}")
        else:
            held += len(of_this)
        if hits.total() >= args.kills:
            break
    else:
        failures.append(f"only {hits.total()} of {args.kills} kills hit a run")
    places = ", ".join(f"{count} {place}" for place, count in sorted(hits.items()))
    return [Row("killed and resumed", hits.total(), held, failures, f"{number + 1} runs; {places}")]


FULL = {  # what is written when the disk fills up -> its temporary file, which time it is opened, bytes that are left
    "checkpoint, no byte left": ("checkpoint.pt.tmp", 2, 0),
    "checkpoint, 64 kB left": ("checkpoint.pt.tmp", 2, 65_536),
    "picture, no byte left": (".png.tmp", 1, 0),
}


def disk(script: str, folder: Path, whole: Path, _: argparse.Namespace) -> list[Row]:
    """Fill the disk at each moment of `FULL`, look at what is left, make room and resume."""
    rows = []
    for what, (name, opening, left) in FULL.items():
        here, text = folder / what.replace(" ", "-"), ""
        here.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", here], capture_output=True)
        if mounted.returncode:
            rows.append(Row(f"full disk: {what}", 0, 0, [], "skipped: nothing can be mounted here"))
            continue
        try:
            outcome = run(script, here, {"file": name, "opening": opening, "left": left})
            if outcome.status != 1 or not outcome.is_one_line() or not (here / "filler").exists():
                raise ValueError(outcome)
            torch.load(here / "runs" / "run" / "checkpoint.pt", weights_only=True)
            (here / "filler").unlink()
            outcome = run(script, here)
            text = difference(whole, here) if outcome.status == 0 else f"resumed: {outcome}"
        except Exception as error:  # what is left of the run may be anything
            text = f"{type(error).__name__}: {error}"
        finally:
            subprocess.run(["umount", here], check=True)
        rows.append(Row(f"full disk: {what}", 1, int(not text), [text] if text else []))
    return rows


def ask(script: types.ModuleType, arguments: list[str], folder: Path, seconds: int) -> Outcome:
    """Call a script's `main`, as its command line does, in a fork of this process, which saves the imports.

    A run that got as far as to lock its folder is stopped `seconds` later; any is after a minute.
    """

    def stop_later(event: str, details: tuple) -> None:
        if event == "open" and str(details[0]).endswith("/lock"):
            signal.alarm(seconds)

    outputs = [folder.with_name(f"{folder.name}-{stream}") for stream in ("out", "err")]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            for number, path in enumerate(outputs, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            signal.alarm(60)
            resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
            sys.addaudithook(stop_later)
            sys.argv = [script.__file__, *arguments]
            script.main(tyro.cli(script.Args))
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(status, *(path.read_text(errors="replace") for path in outputs))


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """All files, with size and time, and folders, but what is collected into data/."""
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in ("data", "hook")]
    stats = [(str(path), path.is_file(), path.stat()) for path in paths]
    return {(name, is_file * stat.st_size, is_file * stat.st_mtime_ns) for name, is_file, stat in stats}


def members(path: Path) -> dict[str, bytes]:
    """The files in a zip file; none if it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}
    except Exception:  # a damaged one raises nearly anything
        return {}


def damage(script: str, folder: Path, _: Path, args: argparse.Namespace) -> list[Row]:
    """Cut a checkpoint at 20 places, change a byte at 20 others, and try to resume."""
    here, draw, module = folder / "damaged", random.Random(f"{args.seed} {script}"), importlib.import_module(script)
    stopped = run(script, here, {"signal": signal.SIGTERM, "place": "evaluation", "after": 0, "delay": 0})
    path = here / "runs" / "run" / "checkpoint.pt"
    if not path.exists():
        return [Row("checkpoint damaged", 1, 0, [f"there is none: {stopped}"])]
    whole, intact = path.read_bytes(), members(path)
    cut = {f"cut to {size}": whole[:size] for size in (round(i * (len(whole) - 1) / 19) for i in range(20))}
    changed: dict[str, bytes] = {}
    while len(changed) < 20:
        place = draw.randrange(len(whole))
        content = whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :]
        path.write_bytes(content)
        if members(path) != intact:  # else it is padding or a date, which nothing reads
            changed[f"byte {place} changed"] = content
    rows = []
    for what, damaged in (("checkpoint cut", cut), ("a byte of it changed", changed)):
        failures = []
        for name, content in damaged.items():
            path.write_bytes(content)
            before = listing(here)
            outcome = ask(module, [*flags(script), "--run-name", "run", "--resume"], here, 60)
            if outcome.status != 2 or not outcome.is_one_line() or listing(here) != before:
                failures.append(f"{name} of {len(whole)}: {outcome}")
        rows.append(Row(what, len(damaged), len(damaged) - len(failures), failures))
    return rows


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.one_of(
    st.sampled_from(["", "\udcff", "9" * 5_000, "nan", "inf", "-inf", "1e400", "1e39", "10**3", "0x1F", "1,000"]),
    st.integers(max_value=-1).map(str), st.integers(min_value=10**13).map(str), st.floats(max_value=-1e-6).map(str),
    TEXT,
)  # fmt: skip
ENVIRONMENTS = [
    "", "NoSuch-v0", "Platform-v99", "platform-v0", "no_package:Its-v0", "os:Platform-v0", "json:dumps",
    "CartPole-v1", "no-task", "dm_control/no-task-v0", "a/b/c-v0", "../x", "4p5b9x9", "sisl/none-v1", ":", "-v0",
]  # fmt: skip
FILES = [
    "", "missing", "missing.npz", "missing/missing.npz", "x" * 300, "\udcff", "/dev/null", ".", "text.npz/x",
    "empty.npz", "text.npz", "checkpoint.npz", "runs/taken", "runs/taken/eval.csv",
]  # fmt: skip
FOLDERS = ["text.npz", "text.npz/x", "/dev/null", "/proc/none", "x" * 300, "x/" * 3_000]
NAMES = ["..", ".", "a\nb", "\t", "\x7f", "x" * 201, "ü" * 101, "\udcff", "taken", "thesis"]
NAMES += ["../..", "/", "a/b", "..\\..", "/tmp", ""]  # plain names, after all
ALONE = ["--resume", "--no-such-flag", "--seed", "--no-no-cuda", "stray", "--cuda=maybe", "-1", ""]


def malformed(script: types.ModuleType) -> st.SearchStrategy[list[str]]:
    """One to three arguments, nearly always malformed ones."""
    groups = {"alone": [st.sampled_from(ALONE).map(lambda word: [word])]}  # each is drawn as often
    for name, kind in typing.get_type_hints(script.Args).items():
        flag = f"--{name.replace('_', '-')}="
        if name == "env_id":
            group, values = "environment", TEXT | st.sampled_from(ENVIRONMENTS)
        elif name == "run_name":
            group, values = "name", st.sampled_from(NAMES)
            groups["resumed"] = [values.map(lambda value: [f"--run-name={value}", "--resume"])]
        elif name in ("dataset", "data", "load"):
            group, values = "file", st.sampled_from(FILES)
        elif name in ("runs_dir", "data_dir"):
            group, values = "folder", st.sampled_from(FOLDERS)
        elif {int, float} & {kind, *typing.get_args(kind)}:
            group, values = "number", NUMBERS
        elif typing.get_origin(kind) is Literal or name in ("encoder_signal", "collect", "objective", "context"):
            group, values = "word", TEXT
        else:
            continue
        groups.setdefault(group, []).append(values.map(lambda value, flag=flag: [flag + value]))
    one = st.sampled_from(sorted(groups)).flatmap(lambda group: st.one_of(groups[group]))
    return st.lists(one, min_size=1, max_size=3).map(lambda drawn: list(itertools.chain(*drawn)))


def judge(outcome: Outcome, untouched: bool) -> str:
    """What malformed arguments led to; all but these three is a failure."""
    if outcome.status == 2 and untouched and outcome.is_one_line():
        return "in a line"
    if outcome.status == 2 and untouched and outcome.err.startswith("╭─") and "Traceback" not in outcome.err:
        return "in tyro's box"
    began = outcome.status == 0 or (outcome.status in (1, -signal.SIGALRM) and not untouched)
    return "accepted" if began and (not outcome.err or outcome.is_one_line()) else "failed"


def inputs(script: str, folder: Path, whole: Path, args: argparse.Namespace) -> list[Row]:
    """Call the script with malformed arguments, in a folder that has some files to stumble over."""
    here, module, counts, failures = folder / "inputs", importlib.import_module(script), Counter(), []

    def prepare() -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole, here)
        (here / "runs" / "run").rename(here / "runs" / "taken")
        for path, content in {"runs/thesis/thesis.tex": "mine", "empty.npz": "", "text.npz": "text"}.items():
            (here / path).parent.mkdir(exist_ok=True)
            (here / path).write_text(content)
        shutil.copy(here / "runs" / "taken" / "checkpoint.pt", here / "checkpoint.npz")

    def examine(arguments: list[str]) -> None:
        before = listing(here)
        outcome = ask(module, [*flags(script), *arguments], here, 2)
        untouched = listing(here) == before
        verdict = judge(outcome, untouched)
        counts[verdict] += 1
        if verdict == "failed":
            shown = [word if len(word) < 200 else f"{word[:20]}... ({len(word)} characters)" for word in arguments]
            failures.append(f"{shown}: {'' if untouched else 'files were changed; '}{outcome}")
        if not untouched:
            prepare()

    prepare()
    settings = {"database": None, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
    settings |= {"max_examples": args.inputs, "phases": [hypothesis.Phase.generate]}
    hypothesis.seed(args.seed)(hypothesis.settings(**settings)(hypothesis.given(malformed(module))(examine)))()
    held = counts["in a line"] + counts["in tyro's box"]
    note = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("in a line", "in tyro's box", "accepted"))
    return [Row("malformed arguments", counts.total() - counts["accepted"], held, failures, note)]


PARTS = {"kills": kills, "disk": disk, "damage": damage, "inputs": inputs}


def examine_script(script: str, args: argparse.Namespace) -> list[Row]:
    """All parts for one script."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # threads do not survive a fork
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a fork that is stopped leaves behind
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        hypothesis.configuration.set_hypothesis_home_dir(name)
        folder, whole = Path(name), Path(name) / "whole"
        outcome = run(script, whole)
        (whole / "ended").touch()
        if outcome.status != 0:
            return [Row("undisturbed", 1, 0, [str(outcome)])]
        return [row for part in args.only for row in PARTS[part](script, folder, whole, args)]


def main() -> None:
    """Examine the scripts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--kills", type=int, default=20, help="for each script")
    parser.add_argument("--inputs", type=int, default=200, help="for each script")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time")
    parser.add_argument("--seed", type=int, default=1, help="of moments, bytes and arguments")
    parser.add_argument("--write", type=Path, default=None, help="a file for the table, beside stdout")
    args = parser.parse_args()
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    table = [f"Commit {commit.stdout.strip() or 'unknown'}, seed {args.seed}.", ""]
    table += ["| script | what | tried | equal or refused | failed | |", "|---" * 6 + "|"]
    failures = []
    print(*table, sep="\n", flush=True)
    # A process for each script, so that a fork has one script's imports.
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for script, rows in zip(
            args.script, pool.map(examine_script, args.script, itertools.repeat(args)), strict=True
        ):
            for what, tried, held, failed, note in rows:
                table.append(f"| `{script}` | {what} | {tried} | {held} | {tried - held} | {note} |")
                print(table[-1], flush=True)
                failures += [f"{script}, {what}: {text}" for text in failed]
    print("", *failures, sep="\n")
    if args.write:
        args.write.write_text("\n".join(table) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
