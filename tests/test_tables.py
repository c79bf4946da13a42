"""benchmark/tables.py: the tables of README and docs are those of the committed results."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import tables  # noqa: E402


@pytest.fixture
def copy(tmp_path):
    """A copy of README, docs and the table of speeds."""
    results = Path("benchmark") / "results"
    (tmp_path / results).mkdir(parents=True)
    for page in ("README.md", results / "speed.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def test_there_is_nothing_to_change(copy, capsys):
    tables.main(tables.Args(check=True, root=copy))
    assert capsys.readouterr().out == "all tables are up to date\n"


def test_every_table_is_on_a_page():
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert sorted(name for _, name, _ in tables.MARKED.findall(pages)) == sorted(tables.TABLES)


def test_a_changed_figure_is_found_and_mended(copy, capsys):
    page = copy / "docs" / "hyar_td3.md"
    right = page.read_text()
    page.write_text(right.replace("0.719", "0.791"))
    with pytest.raises(SystemExit) as exit_:
        tables.main(tables.Args(check=True, root=copy))
    assert exit_.value.code == 1 and capsys.readouterr().out == "not up to date: docs/hyar_td3.md\n"
    assert "0.791" in page.read_text()  # --check writes nothing
    tables.main(tables.Args(root=copy))
    start, end = (right.index(text) for text in ("<!-- table hyar-results", "<!-- end of table -->"))
    assert right[start:end] in page.read_text()


def test_another_result_gives_another_table(copy, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmark" / "results" / "hyar_td3", results / "hyar_td3")
    fresh = results / "hyar_td3" / "fresh" / "best_model.csv"
    fresh.write_text(fresh.read_text().replace("Goal-v0,1,2000,0.783", "Goal-v0,1,2000,0.983"))
    before = tables.hyar_fresh()
    monkeypatch.setattr(tables, "RESULTS", results)
    assert "0.775 ± 0.035" in before and "0.815 ± 0.100" in tables.hyar_fresh()


def test_deviations_are_sample_deviations():
    assert tables.mean_and_std([1.0, 3.0], 2) == "2.00 ± 1.41" and tables.mean_and_std([1.0], 2) == "1.00"


START, END = "<!-- table plas-long: python benchmark/tables.py -->\n", "<!-- end of table -->\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (START.replace("plas-long", "nothing") + END, "new.md has a table nothing, which is not one of scripts, hyar-"),
        (START + START + END, "new.md has a table mark that is misspelt or lacks its other mark"),
        (START.replace("python ", "") + END, "new.md has a table mark that is misspelt or lacks its other mark"),
        (END, "new.md has a table mark that is misspelt or lacks its other mark"),
    ],
)
def test_a_wrong_mark_is_refused_before_a_page_is_written(text, message, copy, capsys):
    stale = (copy / "README.md").read_text().replace("99.997", "99.998")
    (copy / "README.md").write_text(stale)
    (copy / "docs" / "new.md").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        tables.main(tables.Args(root=copy))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert (copy / "README.md").read_text() == stale and "99.998" in stale


def test_a_folder_without_a_readme_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        tables.main(tables.Args(root=tmp_path))
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: --root {tmp_path}: no README.md there\n"
