"""No run is lost: what the run block does with folders that are there already, locks, odd names and damaged files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ["hyar_td3", "sac_ae_pixels", "plas_pixels", "pretrain_vae_moa", "world_model_test"]


@pytest.fixture(params=NAMES)
def script(request) -> types.ModuleType:
    return importlib.import_module(request.param)


def arguments(script: types.ModuleType, folder: Path, **changes) -> object:
    return script.Args(**{"runs_dir": str(folder), "run_name": "run", "total_timesteps": 10} | changes)


def begun(script: types.ModuleType, folder: Path, **changes) -> Path:
    """The folder of a run that wrote a checkpoint and a best model, and was left."""
    run = script.Run(arguments(script, folder, **changes))
    run.eval_rows = [{"step": 5, "episodic_return": 1.0}]
    run.write_evaluations()
    run.save_checkpoint(5, {"weights": torch.arange(10_000)})
    (run.folder / "best_model.pt").write_bytes(b"the best")
    run.close()
    return run.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    refused(capsys, script, arguments(script, tmp_path, track=True), "invalid project name a/b; change the name")


@pytest.mark.parametrize("name", ["..", ".", "", "a\nb", "a\0b", "x" * 201, "ü" * 101], ids=ascii)
def test_a_name_that_is_no_folder_name_is_refused(name, script, tmp_path, capsys):
    runs = tmp_path / "runs"
    args = arguments(script, runs, run_name=name)
    if name == "":  # not given: environment, experiment, seed and time
        script.Run(args).close()
        assert len(list(runs.iterdir())) == 1
        return
    refused(capsys, script, args, "--run-name", "plain folder name")
    assert not runs.exists()


def test_no_name_leads_out_of_the_runs_folder(script, tmp_path):
    run = script.Run(arguments(script, tmp_path / "runs", run_name="../../a:b\\c"))
    run.close()
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
    script.Run(arguments(script, tmp_path, resume=True)).close()  # the lock has died with its process


def test_without_locks_a_run_goes_on_with_a_warning(script, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(script, "fcntl")
    script.Run(arguments(script, tmp_path)).close()
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
    run = script.Run(arguments(script, tmp_path))
    run.close()
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
