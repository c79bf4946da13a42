"""Texts that are the same in several scripts, and how long the scripts are.

    python tests/texts.py sync      copy each such text from its home into the other scripts (make sync)
    python tests/texts.py lengths   lines above the line, of the run block, of the file; lines in common (make lint)

Such a text stands between `# --- same text in ...: NAME (home: FILE; see make sync) ---` and
`# --- end of the same text ---`.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["hyar_td3.py", "sac_ae_pixels.py", "plas_pixels.py", "pretrain_vae_moa.py", "world_model_test.py"]
THE_LINE = "# Nothing below is about the algorithm: checks of the input, pictures, the run folder. " + 31 * "-"
START = r"# --- same text in [^:\n]*: ([^(\n]+) \(home: (\w+\.py); see make sync\) ---\n"
MARKED = re.compile(START + r"(.*?)# --- end of the same text ---\n", re.DOTALL)


def marked_texts(source: str) -> dict[str, tuple[str, str]]:
    """The home and the text of each marked part of a script, by its name."""
    return {name: (home, text) for name, home, text in MARKED.findall(source)}


def committed(script: str) -> str:
    """The script as it was committed last; nothing where there is no git."""
    shown = subprocess.run(["git", "show", f"HEAD:{script}"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else ""


def sync() -> None:
    """Copy each text from its home. Exits with status 1, and changes nothing, where a copy was edited."""
    sources = {script: (ROOT / script).read_text() for script in SCRIPTS}
    edited, synced = [], dict(sources)
    for script, source in sources.items():
        for name, (home, text) in marked_texts(source).items():
            wanted = marked_texts(sources[home])[name][1]
            if text not in (wanted, marked_texts(committed(home)).get(name, ("", wanted))[1]):
                edited.append(f"{script}: {name} was edited here; edit it in {home}, its home, and run make sync")
            synced[script] = synced[script].replace(text, wanted)
    if edited:
        sys.exit("\n".join(edited))
    for script, source in synced.items():
        if source != sources[script]:
            (ROOT / script).write_text(source)
            print(f"{script}: brought up to date")


def lengths() -> None:
    """Print the lines of each script, and for each pair the share of the shorter's lines that the other has, too."""
    outside: dict[str, Counter[str]] = {}
    print(f"{'lines':22} {'above':>6} {'block':>6} {'whole':>6}")
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        block = marked_texts(source)["run block"][1]
        above = source.partition(THE_LINE)[0].count("\n")
        print(f"{script:22} {above:6} {block.count(chr(10)):6} {source.count(chr(10)):6}")
        outside[script] = Counter(line for line in source.replace(block, "").splitlines() if line.strip())
    print("lines in common, outside of the run block:")
    for one, other in itertools.combinations(SCRIPTS, 2):
        share = (outside[one] & outside[other]).total() / min(outside[one].total(), outside[other].total())
        print(f"  {one:20} {other:20} {100 * share:3.0f} %")


if __name__ == "__main__":
    {"sync": sync, "lengths": lengths}[sys.argv[1]]()
