"""No run is lost: what the run block does with folders that are there already, locks, odd names and damaged files."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def script() -> types.ModuleType:
    """One of five: test_house.py sees to it that the block is the same text in all."""
    return importlib.import_module("hyar_td3")


def arguments(script: types.ModuleType, folder: Path, **changes) -> object:
    return script.Args(**{"runs_dir": str(folder), "run_name": "run", "total_timesteps": 10} | changes)


def begun(script: types.ModuleType, folder: Path, **changes) -> Path:
    """The folder of a run that wrote a checkpoint and a best model, and was left."""
    with script.Run(arguments(script, folder, **changes)) as run:
        run.log_evaluation(5, {"episodic_return": 1.0})
        run.save_checkpoint(5, {"weights": torch.arange(10_000)})
        (run.folder / "best_model.pt").write_bytes(b"the best")
    return run.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class SignalInADestructor:
    """Sends SIGTERM when it is destroyed, where Python swallows exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.001)  # the handler runs in here


def test_a_signal_in_a_destructor_stops_the_work_too(script, tmp_path, capsys):
    def work() -> None:
        SignalInADestructor()
        time.sleep(10.0)

    hook = sys.unraisablehook
    with script.Run(arguments(script, tmp_path)) as run:
        began = time.monotonic()
        run.unless_stopped(work)
        assert run.signal == signal.SIGTERM and time.monotonic() - began < 5.0
    assert sys.unraisablehook == hook and "Traceback" not in capsys.readouterr().err


def test_a_runs_dir_that_is_too_deep_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, script, arguments(script, "/".join(2_000 * "a")), "cannot use", "choose another --runs-dir")
    assert not list(tmp_path.iterdir())


def refused(capsys, script: types.ModuleType, args: object, *parts: str) -> None:
    """Status 2, and one line with these parts."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        script.Run(args)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


# --- nothing of a user's is deleted or overwritten ---
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_failing_wandb_removes_nothing(checkpoint, script, tmp_path, capsys, monkeypatch):
    folder = begun(script, tmp_path)
    about = json.loads((folder / "args.json").read_text())
    about["arguments"]["track"] = True
    (folder / "args.json").write_text(json.dumps(about))
    if checkpoint:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | {"arguments": json.dumps(about["arguments"])}, folder / "checkpoint.pt")
    else:
        (folder / "checkpoint.pt").unlink()
    before = contents(folder)

    def init(**_) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    args = arguments(script, tmp_path, resume=True, track=True)
    refused(capsys, script, args, "wandb: no API key", "wandb login", "WANDB_MODE=offline")
    after = contents(folder)
    kept = {name for name in before if name != "args.json"}  # written anew where the run begins anew
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}


def test_a_bad_wandb_name_is_not_answered_with_a_login(tmp_path, capsys, monkeypatch):
    script = importlib.import_module("hyar_td3")

    def init(**_) -> None:
        raise RuntimeError("invalid project name a/b")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    refused(capsys, script, arguments(script, tmp_path, track=True), "invalid project name a/b; change what it names")


@pytest.mark.parametrize("name", ["..", ".", "", "a\nb", "a\0b", "x" * 201, "ü" * 101], ids=ascii)
def test_a_name_that_is_no_folder_name_is_refused(name, script, tmp_path, capsys):
    runs = tmp_path / "runs"
    args = arguments(script, runs, run_name=name)
    if name == "":  # not given: environment, experiment, seed and time
        with script.Run(args):
            pass
        assert len(list(runs.iterdir())) == 1
        return
    refused(capsys, script, args, "--run-name", "plain folder name")
    assert not runs.exists()


def test_no_name_leads_out_of_the_runs_folder(script, tmp_path):
    with script.Run(arguments(script, tmp_path / "runs", run_name="../../a:b\\c")) as run:
        pass
    assert run.folder == tmp_path / "runs" / "..-..-a-b-c"


def test_a_folder_that_is_no_run_is_left_alone(script, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    refused(capsys, script, arguments(script, tmp_path, resume=True), "is not a run folder")
    assert contents(tmp_path) == {"run/thesis.tex": b"mine"}


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import {name} as script
run = script.Run(script.Args(runs_dir=sys.argv[2], run_name="run", total_timesteps=10, resume=True))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_lives(script, tmp_path, capsys):
    folder = begun(script, tmp_path)
    command = [sys.executable, "-c", HOLDER.format(name=script.__name__), str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = contents(folder)
        refused(capsys, script, arguments(script, tmp_path, resume=True), "in use by another process")
        assert contents(folder) == before
        holder.kill()
    with script.Run(arguments(script, tmp_path, resume=True)):
        pass  # the lock has died with its process


def test_without_locks_a_run_goes_on_with_a_warning(script, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(script, "fcntl")
    with script.Run(arguments(script, tmp_path)):
        pass
    assert "cannot be locked" in capsys.readouterr().err


# --- no shell ---
def test_a_checkouts_path_is_no_command(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "a'; touch was-here; 'b"
    checkout.mkdir()
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    (checkout / f"{script.__name__}.py").write_bytes(Path(script.__file__).read_bytes())
    monkeypatch.setattr(script, "__file__", str(checkout / f"{script.__name__}.py"))
    with script.Run(arguments(script, tmp_path)) as run:
        pass
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert json.loads((run.folder / "args.json").read_text())["commit"] == commit
    assert not (tmp_path / "was-here").exists()


# --- what was damaged is noticed ---
@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_a_flipped_byte_in_a_checkpoint_is_noticed(where, script, tmp_path, capsys):
    path = begun(script, tmp_path) / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    refused(capsys, script, arguments(script, tmp_path, resume=True), "checkpoint.pt is damaged")


@pytest.mark.parametrize("key", ["script", "arguments", "eval_rows", "finished"])
def test_a_checkpoint_without_one_of_the_blocks_keys_is_refused(key, script, tmp_path, capsys):
    path = begun(script, tmp_path) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    refused(capsys, script, arguments(script, tmp_path, resume=True), "checkpoint.pt is damaged", key)


@pytest.mark.parametrize("settings", ["[1, 2]", "3", "null", '"text"', "{"])
def test_settings_that_are_no_dictionary_are_refused(settings, script, tmp_path, capsys):
    folder = begun(script, tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"arguments": settings}, folder / "checkpoint.pt")
    refused(capsys, script, arguments(script, tmp_path, resume=True), "checkpoint.pt is damaged")
    (folder / "checkpoint.pt").unlink()
    (folder / "args.json").write_text(f'{{"script": "{script.__name__}", "arguments": {settings}}}')
    refused(capsys, script, arguments(script, tmp_path, resume=True), "args.json is damaged")


# --- how a run ends ---
@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    assert handlers == {number: signal.getsignal(number) for number in handlers}  # given back


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_and_stops_what_can_be_done_again(number, script, tmp_path, capsys):
    done = []

    def work() -> None:
        done.append("begun")
        os.kill(os.getpid(), number)
        done.append("ended")

    with pytest.raises(SystemExit) as ended, script.Run(arguments(script, tmp_path)) as run:
        os.kill(os.getpid(), 0)
        assert run.signal == 0
        run.unless_stopped(work)
        assert done == ["begun"] and run.signal == number
        run.unless_stopped(work)  # not begun any more
        assert done == ["begun"]
        run.stop()
    assert ended.value.code == 128 + number
    assert "continue with --run-name run --resume" in capsys.readouterr().err


STUBBORN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import {name} as script
with script.Run(script.Args(runs_dir=sys.argv[2], run_name="run", total_timesteps=10)) as run:
    print("begun", flush=True)
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)], ids=str)
def test_a_second_signal_ends_a_run_at_once(numbers, tmp_path):
    """An environment that hangs never sees the first."""
    command = [sys.executable, "-c", STUBBORN.format(name="hyar_td3"), str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(numbers[0])
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(numbers[1])
        assert process.wait(10) == 128 + numbers[1]
        assert b"Traceback" not in process.stderr.read()


def test_a_reader_that_goes_away_stops_a_run(tmp_path):
    text = "from pathlib import Path\nimport sys\nsys.path.insert(0, sys.argv[1])\nimport hyar_td3 as script\n"
    text += "with script.Run(script.Args(runs_dir=sys.argv[2], run_name='run', total_timesteps=10)) as run:\n"
    text += "    while not run.signal:\n        run.say('a line')\n    run.stop()\n"
    command = [sys.executable, "-c", text, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGTERM
        (line,) = process.stderr.read().decode().splitlines()
        assert line.startswith("stopped by signal 15; continue with --run-name run --resume")


def test_what_comes_after_training_may_fail(script, tmp_path, capsys):
    made = []

    def pictures() -> None:
        raise UnicodeEncodeError("ascii", "±", 0, 1, "no sign for it")

    def videos() -> None:
        made.append("videos")

    with script.Run(arguments(script, tmp_path)) as run:
        run.finish(10, {}, pictures, videos)
    assert made == ["videos"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: pictures failed (UnicodeEncodeError: ")
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["finished"]


def test_a_signal_while_pictures_are_made_leaves_the_run_unfinished(script, tmp_path):
    with pytest.raises(SystemExit) as ended, script.Run(arguments(script, tmp_path)) as run:
        run.save_checkpoint(10, {})
        run.finish(10, {}, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ended.value.code == 143
    assert not torch.load(run.folder / "checkpoint.pt", weights_only=True)["finished"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_line(number, script, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, script.Run(arguments(script, tmp_path)) as run:
        run.save_checkpoint(10, {})
        raise OSError(number, os.strerror(number))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write to {run.folder}: {os.strerror(number)}; the last checkpoint is ")


def test_other_errors_keep_their_traceback(script, tmp_path):
    with pytest.raises(ZeroDivisionError), script.Run(arguments(script, tmp_path)):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("value", ["read-only", "a file"])
def test_a_runs_folder_that_cannot_be_used_is_one_line(value, script, tmp_path, capsys, monkeypatch):
    if value == "a file":
        (tmp_path / "runs").write_text("mine")
    else:
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    refused(capsys, script, arguments(script, tmp_path / "runs"), "cannot use", "choose another --runs-dir")


def test_two_runs_in_one_second_have_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "time", lambda: 1_000.0)
    names = set()
    for _ in range(3):
        with script.Run(arguments(script, tmp_path, run_name=None)) as run:
            names.add(run.name)
    assert len(names) == 3


def test_a_restarted_run_doubles_no_point(tmp_path):
    """Neither one from a checkpoint, nor one that was killed before its first."""
    script = importlib.import_module("hyar_td3")
    for resume, steps in ((False, (0, 1, 2)), (True, (0, 1, 2, 3)), (True, (3, 4))):
        with script.Run(arguments(script, tmp_path, resume=resume)) as run:
            for step in steps:
                run.log(step, {"charts/x": step})
                if steps == (0, 1, 2, 3) and step == 2:
                    run.save_checkpoint(step, {})
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("charts/x")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 2**64}, "--seed 18446744073709551616: expected a number of at most 9223372036854775807"),
        ({"seed": -1}, "--seed -1: expected a number of at least 0"),
        ({"eval_episodes": 0}, "--eval-episodes 0: expected a number of at least 1"),
    ],
)
def test_numbers_out_of_bounds_are_refused(changes, part, script):
    args = arguments(script, Path(), **{"seed": 1} | changes)
    with pytest.raises(ValueError, match=part):
        script.check_numbers(args, {"eval_episodes": 1}, {})


@pytest.mark.parametrize("value", [1e39, math.nan, math.inf, -1e39, 1.5])
def test_numbers_are_checked_as_what_they_become(value):
    """1e39 is a number for Python, and infinite for a network."""
    script = importlib.import_module("hyar_td3")
    with pytest.raises(ValueError, match="--gamma"):
        script.check_numbers(arguments(script, Path(), gamma=value), {}, {"gamma": 1.0})
    script.check_numbers(arguments(script, Path(), gamma=1.0), {}, {"gamma": 1.0})


def test_the_memory_of_a_system_that_does_not_tell_is_unlimited(script, monkeypatch):
    assert 2**28 < script.machine_memory() < math.inf
    monkeypatch.delattr(os, "sysconf")
    assert script.machine_memory() == math.inf
