"""What all scripts have in common, and that what is written about them is true."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import texts as texts_of_scripts  # noqa: E402

NAMES = ["hyar_td3", "sac_ae_pixels", "plas_pixels", "pretrain_vae_moa", "world_model_test"]
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
COMMON_ARGUMENTS = [
    "exp_name", "seed", "torch_deterministic", "cuda", "track", "wandb_project_name", "wandb_entity", "capture_video",
    "runs_dir", "run_name", "resume", "checkpoint_frequency", "eval_frequency", "eval_episodes",
]  # fmt: skip
SPECIFIC = "# Algorithm specific arguments"

each_script = pytest.mark.parametrize("name", SCRIPTS)


def tracked_files() -> list[Path]:
    """The repository's files; where there is no git, all that look like it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".venv", "runs", "__pycache__"} & set(path.parts)]
    return [path for path in paths if path.is_file()]


def texts() -> dict[str, str]:
    """All files that are text, by their path in the repository."""
    result = {}
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            result[path.relative_to(ROOT).as_posix()] = content.decode()
    return result


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def between(text: str, start: str, end: str) -> str:
    """The one part of a text between two marks that each occur once."""
    assert text.count(start) == 1 and text.count(end) == 1, (start, end)
    return text[text.index(start) + len(start) : text.index(end)]


# --- common text ---
def common_arguments(name: str) -> str:
    """The common group; how often and how long is evaluated is each paper's own."""
    text = between(source(name), "class Args:\n", SPECIFIC)
    text = text[text.index("    exp_name") :]  # after the class's docstring
    own = r"((?:exp_name: str|checkpoint_frequency: int|eval_frequency: int|eval_episodes: int) = ).*"
    return re.sub(own, r"\1...", text)


@each_script
def test_arguments_begin_with_the_same_group(name):
    assert common_arguments(name) == common_arguments(SCRIPTS[0])


@each_script
def test_the_common_group_is_complete_and_in_order(name):
    fields = list(importlib.import_module(name).Args.__dataclass_fields__)
    assert fields[: len(COMMON_ARGUMENTS)] == COMMON_ARGUMENTS
    assert re.findall(r"^    (\w+):", common_arguments(name), re.MULTILINE) == COMMON_ARGUMENTS


@each_script
def test_every_argument_has_its_help(name):
    (arguments,) = [node for node in ast.parse(source(name)).body if getattr(node, "name", "") == "Args"]
    body = arguments.body[1:]  # after the class's own docstring
    assert len(body) == 2 * len(importlib.import_module(name).Args.__dataclass_fields__)
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text, ast.Expr) and len(ast.literal_eval(text.value)) > 10, field.target.id


@each_script
def test_marked_texts_are_those_of_their_homes(name):
    """Run `make sync` after an edit of a text in its home."""
    marked = texts_of_scripts.marked_texts(source(name))
    assert "run block" in marked
    for text_name, (home, text) in marked.items():
        assert text == texts_of_scripts.marked_texts((ROOT / home).read_text())[text_name][1], f"{text_name}: make sync"


def test_what_is_meant_to_be_the_same_is_marked():
    names = {name: set(texts_of_scripts.marked_texts(source(name))) for name in SCRIPTS}
    assert all("door" in names[name] for name in ("hyar_td3", "sac_ae_pixels", "plas_pixels"))
    assert names["sac_ae_pixels"] == names["plas_pixels"] > {"run block", "door"}


@each_script
def test_one_line_parts_the_algorithm_from_the_rest(name):
    assert source(name).splitlines().count(texts_of_scripts.THE_LINE) == 1
    above, below = source(name).split(texts_of_scripts.THE_LINE)
    assert "\ndef main(args: Args) -> Path:\n" in above and "\ndef check(args: Args)" in below
    assert "class Run:" in below


@pytest.mark.parametrize("edited", ["home", "copy", "both", None])
def test_sync_copies_from_the_home_and_never_over_an_edited_copy(edited, tmp_path, monkeypatch, capsys):
    mark = "# --- same text in every script: run block (home: hyar_td3.py; see make sync) ---\n{}\n"
    mark += "# --- end of the same text ---\n"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for script in texts_of_scripts.SCRIPTS:
        (tmp_path / script).write_text(f"before = 1\n{mark.format('x = 1')}after = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    if edited in ("home", "both"):
        (tmp_path / "hyar_td3.py").write_text(mark.format("x = 2"))
    if edited in ("copy", "both"):
        (tmp_path / "plas_pixels.py").write_text(mark.format("x = 3"))
    monkeypatch.setattr(texts_of_scripts, "ROOT", tmp_path)
    before = {path: path.read_text() for path in tmp_path.glob("*.py")}
    if edited in ("copy", "both"):
        with pytest.raises(SystemExit, match=r"plas_pixels\.py: run block was edited here"):
            texts_of_scripts.sync()
        assert {path: path.read_text() for path in tmp_path.glob("*.py")} == before
        return
    texts_of_scripts.sync()
    expected = "x = 2" if edited == "home" else "x = 1"
    assert all(mark.format(expected) in path.read_text() for path in tmp_path.glob("*.py"))
    assert (tmp_path / "plas_pixels.py").read_text().startswith("before = 1\n")


@each_script
def test_a_script_stands_alone(name):
    """It imports no other script and nothing of the repository but `envs`, and lives without that."""
    tree = ast.parse(source(name))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    tops = {module.split(".")[0] for module in imported}
    ours = {path.stem if path.suffix == ".py" else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert not tops & (ours | set(NAMES) | {"benchmark", "tests"}) - {"envs"}
    unguarded = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in unguarded if re.search(r"\benvs\b", line)]
    assert {"torch", "tyro"} <= tops


@each_script
def test_a_script_ends_as_all_do(name):
    end = """

if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:  # before there was a run to save
        raise SystemExit(130) from None
"""
    assert source(name).endswith(end)


@each_script
def test_a_lone_copy_says_what_it_needs(name):
    """Its PEP 723 header has the pins of requirements.txt, and a package for each module that is imported."""
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(name), re.MULTILINE).group(1)
    settings = tomllib.loads("".join(line[2:] + "\n" for line in header.splitlines()))
    assert settings["requires-python"] == ">=3.11"
    assert set(settings["dependencies"]) <= {line.split()[0] for line in (ROOT / "requirements.txt").open()}
    named = {re.split(r"[=\[]", pin)[0].lower() for pin in settings["dependencies"]}
    tree = ast.parse(source(name))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"envs", "wandb"}
    assert tops - {"PIL"} <= named and "pillow" in named


# --- what is written about the scripts ---
@functools.cache
def flags(name: str) -> frozenset[str]:
    """All flags of a script, as its --help shows them."""
    run = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return frozenset(re.findall(r"--[a-z][\w-]*", run.stdout))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each `python <script>.py ...` of a text: the script's name and what follows."""
    text = text.replace("\\\n", " ")
    found = []
    for name, rest in re.findall(r"python3? (?:\S*/)?(\w+)\.py((?: [^\n`|;&#>]*)?)", text):
        if name in SCRIPTS:
            found.append((name, re.sub(r"[\"']", "", rest).split()))
    return found


def described() -> dict[str, str]:
    """The files that tell people what to type, and the scripts' docstrings."""
    result = {
        path: text
        for path, text in texts().items()
        if path in ("README.md", "Makefile") or (path.startswith(("docs/", "benchmark/")) and not path.endswith(".csv"))
    }
    return result | {f"{name}.py": ast.get_docstring(ast.parse(source(name))) or "" for name in SCRIPTS}


def test_every_flag_of_every_written_command_exists():
    seen = 0
    for path, text in described().items():
        for name, words in commands(text):
            for word in words:
                if word.startswith("--"):
                    flag = word.split("=")[0].rstrip(".,:)")
                    assert flag in flags(name), f"{path}: python {name}.py has no {flag}"
                    seen += 1
    assert seen >= 3


OTHER_PROGRAMS = re.compile(
    r"\b(sbatch|srun|pip|apt|apt-get|git|xargs|wandb|pytest|ruff|plot\.py|speed\.py|evaluate\.py|moa\.py|plas_data\.py)\b"
)


@each_script
def test_every_flag_that_its_page_names_exists(name):
    page = ROOT / "docs" / f"{name}.md"
    if not page.exists():
        pytest.skip("no page yet")
    for line in page.read_text().splitlines():
        if not OTHER_PROGRAMS.search(line):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
                assert flag in flags(name), f"{page.name}: {flag}"


COMMON = ROOT / "docs" / "common.md"
SECTIONS = (
    "Quick start", "What it does", "Options", "Use your own", "Metrics", "Results", "What we learnt",
    "Differences from the original", "Speed",
)  # fmt: skip


@each_script
def test_every_option_is_on_its_page_or_on_the_common_one(name):
    table = "".join(line for line in COMMON.read_text().splitlines() if line.startswith("| `--"))
    page = (ROOT / "docs" / f"{name}.md").read_text()
    options = page[page.index("## Options") : page.index("## Use your own")]
    for field in dataclasses.fields(importlib.import_module(name).Args):
        flag = "--env" if field.name == "env_id" else f"--{field.name.replace('_', '-')}"
        either = (flag, flag.replace("--", "--no-", 1))
        assert any(f"`{word}" in table + options for word in either), f"{name}.md: {flag}"


@each_script
def test_a_page_has_the_usual_sections_in_order_and_is_short(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(headings) == len(SECTIONS)
    assert all(found.startswith(wanted) for found, wanted in zip(headings, SECTIONS, strict=True))
    assert len(page.splitlines()) <= 150


def test_links_and_pictures_of_the_pages_exist():
    seen = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                seen += 1
    assert seen > 40


@each_script
def test_the_commands_of_the_docstring_parse(name):
    docstring = ast.get_docstring(ast.parse(source(name))) or ""
    found = commands(docstring)
    assert len(found) >= 3
    for script, words in found:
        assert script == name
        tyro.cli(importlib.import_module(name).Args, args=words)


def test_the_flags_that_are_looked_for_are_found():
    """Otherwise the tests above would be empty."""
    text = (
        "run `python hyar_td3.py --env A-v0 \\\n  --seed 3` or\n$ .venv/bin/python ./hyar_td3.py --resume | tee --no\n"
    )
    assert commands(text) == [("hyar_td3", ["--env", "A-v0", "--seed", "3"]), ("hyar_td3", ["--resume"])]
    assert "--env" in flags("hyar_td3") and "--no-such-flag" not in flags("hyar_td3")
    assert all(f"--{name.replace('_', '-')}" in flags("hyar_td3") for name in COMMON_ARGUMENTS)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmark").glob("*.sh")), ids=lambda path: path.name)
def test_every_job_of_a_benchmark_is_a_command_that_parses(path, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "RUNS": "somewhere"}
    listed = subprocess.run(["bash", str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert listed.returncode == 0 and not listed.stderr
    assert not list(tmp_path.iterdir())  # it prints, and does nothing else
    jobs = listed.stdout.splitlines()
    if path.stem == "plas_pixels":  # begins with what makes its data
        for _ in range(2):
            python, script, *words = shlex.split(jobs.pop(0))
            assert (python, script) == ("python", "benchmark/plas_data.py")
            folder = tyro.cli(importlib.import_module("benchmark.plas_data").Args, args=words).folder
            assert folder.parts[0] == "somewhere" and any(f"--dataset {folder}/medium.npz" in job for job in jobs)
    assert jobs
    run_names = []
    for job in jobs:
        python, script, *words = shlex.split(job)
        assert python == "python" and script == f"{path.stem}.py" and path.stem in SCRIPTS
        args = tyro.cli(importlib.import_module(path.stem).Args, args=words)
        assert args.resume and args.runs_dir == "somewhere"
        run_names.append(args.run_name)
    assert all(run_names) and len(set(run_names)) == len(run_names)  # so that running the list again finishes it


# --- files ---
def test_all_python_is_that_of_3_11():
    sources = {path: text for path, text in texts().items() if path.endswith(".py")}
    assert {f"{name}.py" for name in SCRIPTS} <= set(sources)
    for path, text in sources.items():
        ast.parse(text, path, feature_version=(3, 11))


def test_no_file_names_a_folder_of_one_machine():
    machine = re.compile(
        "|".join((r"(?<![\w.])/wo" + r"rk/", r"(?<![\w.])/ro" + r"ot\b", "/tmp/ve" + "nv", "/ho" + "me/"))
    )
    for path, text in texts().items():
        found = machine.search(text)
        assert not found, f"{path}: {found.group()}"
    assert machine.search("cd /wo" + "rk/main")


def test_scripts_are_in_the_readme():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    for name in SCRIPTS:
        assert f"{name}.py" in readme.read_text()


@each_script
def test_a_scripts_page_is_where_its_docstring_says(name):
    (page,) = re.findall(r"docs/\w+\.md", ast.get_docstring(ast.parse(source(name))))
    assert page == f"docs/{name}.md"
    if (ROOT / "docs").exists():
        assert (ROOT / page).exists()


# --- memory ---
FAULTS = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[1])
import plas_pixels as script
glibc = ctypes.CDLL(None)
glibc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        batches = [ctypes.c_void_p(glibc.malloc(20_000_000)) for _ in range(4)]
        for batch in batches:
            ctypes.memset(batch, 1, 20_000_000)
        for batch in batches:
            glibc.free(batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), print(faults()), script.keep_freed_memory(), faults(), print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept():
    """Four batches of pictures are 19,500 pages, which glibc gives back and gets again if it is not told."""
    run = subprocess.run([sys.executable, "-c", FAULTS, ROOT], capture_output=True, text=True, timeout=300, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert given_back > 50_000
    assert kept < 500
