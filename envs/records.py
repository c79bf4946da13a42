"""Records of games: what is in the file, how it is checked, read and written; for any PettingZoo parallel game.

A record is one array per field (`FIELDS`) and what is known about all of it in `meta`, which is JSON. A row is what one
living player saw and did at one step; rows are in the order episode, agent, t. Nothing is ever unpickled.

    record = read_records(Path("data/games.npz"))      # or, to read less: read_records(path, ["obs", "action", "t"])
    record.arrays["obs"], record.meta["strategies"]
    save_records(Path("data/mine.npz"), make_records(arrays, meta))    # casts, checks, and writes
    columns = read_arrays(Path("plain.npz"))           # any other npz, with the same one-line errors
    record = cached_records(Path("data/games.npz"), 10_000, play)      # play(rows) -> arrays, meta: only if needed
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
NOUNS = {  # what a letter of a shape counts
    "N": "rows", "E": "episodes", "n": "players", "A": "actions", "K": "strategies", "C": "planes",
    "H": "lines", "W": "columns",
}  # fmt: skip


class Field(NamedTuple):
    """What an array must be: its type, its axes (a letter of `NOUNS` each), and its least and greatest value.

    A letter as the greatest value means that axis's size minus one.
    """

    dtype: type[np.generic]
    axes: str
    least: float | None = None
    most: float | str | None = None
    required: bool = True


FIELDS = {
    "obs": Field(np.uint8, "NCHW"),  # ego first, in games whose planes are players
    "action": Field(np.int8, "N", 0, "A"),
    "action_mask": Field(np.bool_, "NA"),  # the legal actions
    "t": Field(np.int16, "N", 0),  # steps before this one
    "episode": Field(np.int32, "N", 0, "E"),
    "agent": Field(np.int8, "N", 0, "n"),
    "reward": Field(np.float32, "N"),
    "terminated": Field(np.bool_, "N"),
    "truncated": Field(np.bool_, "N"),
    "prev_actions": Field(np.int8, "Nn", -1, "A"),  # the players' last actions, ego first; -1: none, or gone
    "joint_action": Field(np.int8, "Nn", -1, "A"),  # the players' actions, ego first; -1: gone
    "rewards": Field(np.float32, "Nn"),  # ego first
    "next_obs": Field(np.uint8, "NCHW"),
    "strategy": Field(np.int8, "N", -1, "K"),  # index into meta["strategies"]; -1: unknown
    "policy_probs": Field(np.float32, "NKA", 0, 1, required=False),  # what each strategy would have done
    "roster": Field(np.int8, "En", -1, "K"),  # the strategy of each player
    "episode_seed": Field(np.int64, "E"),
    "split": Field(np.int8, "E", 0, 2),  # index into SPLITS
}


def is_name_list(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_object(value: Any) -> bool:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def is_scale(value: Any) -> bool:
    """Whether something can be divided by it."""
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


META: dict[str, tuple[Callable[[Any], bool], str]] = {  # what may be in meta -> what it must be
    "env_kwargs": (is_object, "an object"),
    "sha256": (is_object, "an object"),
    "strategies": (is_name_list, "a list of names"),
    "action_names": (is_name_list, "a list of names"),
    "channel_names": (is_name_list, "a list of names"),
    "observation_scale": (is_scale, "a positive number"),
}

Arrays = dict[str, np.ndarray]


class Record(NamedTuple):
    """One array per field (`FIELDS`), and what is known about all of it (JSON)."""

    arrays: Arrays
    meta: dict[str, Any]


# Reading and writing --------------------------------------------------------------------------------------------------
def read_arrays(path: Path, names: Iterable[str] | None = None) -> Arrays:
    """The arrays of any npz file, or those with these names that it has. Never unpickles anything.

    Raises a one-line ValueError that says what is wrong with the file.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError
        with open(path, "rb") as file:
            start = file.read(8)
        if start[:6] == b"\x93NUMPY":
            raise ValueError(f"dataset {path} is a single array; expected an .npz file with one array per field")
        if start and start[:2] != b"PK":
            kind = "an HDF5 file" if start == b"\x89HDF\r\n\x1a\n" else "no .npz file"
            raise ValueError(f"dataset {path} is {kind}; convert it to npz, with one array per field")
        with np.load(path, allow_pickle=False) as file:
            wanted = file.files if names is None else [name for name in names if name in file.files]
            return {name: file[name] for name in wanted}
    except FileNotFoundError:
        raise ValueError(f"there is no dataset {path}") from None
    except PermissionError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError as error:
        raise ValueError(f"dataset {path} does not fit into memory: {error}") from None
    except Exception as error:  # a damaged file raises nearly anything
        if str(error).startswith(f"dataset {path}"):
            raise
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            reason = "arrays of Python objects, which can run code when they are read, are never unpickled"
            raise ValueError(f"dataset {path}: {reason}; write arrays of numbers") from None
        raise ValueError(f"dataset {path} is truncated or damaged ({type(error).__name__}: {error})") from None


def read_meta(path: Path) -> dict[str, Any]:
    """A record's `meta`, checked (`META`). Raises a one-line ValueError."""
    found = read_arrays(path, ["meta"])
    if "meta" not in found:
        raise ValueError(f"dataset {path}: no field meta; see envs/records.py for the format")
    try:
        meta = json.loads(str(found["meta"]))
    except (ValueError, RecursionError):
        raise ValueError(f"dataset {path}: meta is not JSON; write it with envs/records.py") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        wanted = f"expected version {FORMAT_VERSION}; collect it anew"
        raise ValueError(f"dataset {path}: format version {str(version)[:50]}, {wanted}")
    return meta


def read_records(path: Path, fields: Iterable[str] | None = None) -> Record:
    """Read a record, or some of its fields, and check it (`check_records`, and the hash of each array).

    Raises a one-line ValueError that says what is wrong with the file.
    """
    meta = read_meta(path)
    wanted = list(FIELDS) if fields is None else [name for name in FIELDS if name in set(fields)]
    arrays = read_arrays(path, wanted)
    missing = [name for name in wanted if name not in arrays and FIELDS[name].required]
    if missing:
        raise ValueError(f"dataset {path}: no field {', '.join(missing)}")
    try:
        check_meta(meta)
        for name, values in arrays.items():
            if meta.get("sha256", {}).get(name) != sha256(values):
                raise ValueError(f"the content of {name} does not have the hash that was recorded for it")
        check_records(Record(arrays, meta))
    except ValueError as error:
        raise ValueError(f"dataset {path}: {error}") from None
    return Record(arrays, meta)


def make_records(arrays: Arrays, meta: dict[str, Any]) -> Record:
    """A checked record of arrays that may have other types than those of `FIELDS`; ValueError as `check_records`."""
    given = {name: np.asarray(arrays[name]) for name in FIELDS if name in arrays}
    with np.errstate(invalid="ignore", over="ignore"):  # what its type cannot hold is rejected below
        made = {name: values.astype(FIELDS[name].dtype, copy=False) for name, values in given.items()}
    for name, values in made.items():
        if values.dtype.kind in "iu" and values is not given[name] and (values != given[name]).any():
            raise ValueError(f"{name} holds values that {values.dtype} cannot; scale or round them first")
    record = Record(made, meta)
    check_records(record)
    return record


def save_records(path: Path, record: Record) -> None:
    """Write a record: to a temporary file first, so that there is never half a record under this name."""
    commit = None
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    meta = {
        **record.meta, "format_version": FORMAT_VERSION, "commit": commit,
        "sha256": {name: sha256(values) for name, values in record.arrays.items()},
        "packages": {name: importlib.metadata.version(name) for name in ("numpy", "pettingzoo")},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **record.arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # the disk is full, or somebody pressed Ctrl-C


def cached_records(
    path: Path, rows: int, play: Callable[[int], tuple[Arrays, dict[str, Any]]], fields: Iterable[str] | None = None
) -> Record:
    """The records in `path`; without such a file, those that `play(rows)` plays now, which are then kept there.

    A file is used only if its first game is what is played now. Prints which file it is, and how to make it anew.
    Raises a one-line ValueError.
    """
    try:
        if path.exists():
            record = read_records(path, fields)
            check_first_game(path, record, play)
            print(f"these are the games in {path}; remove it to have them played anew")
            return record
        folder = next(folder for folder in path.parents if folder.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):  # before anything is played
            raise PermissionError(errno.EACCES, f"{folder} cannot be written to")
        record = make_records(*play(rows))
        save_records(path, record)
        print(f"{rows:,} rows of {len(record.arrays['split']):,} games collected, kept in {path}")
        return read_records(path, fields)  # exactly what there will be the next time
    except OSError as error:
        raise ValueError(f"cannot use {path}: {error.strerror or error}; choose another folder") from None


def check_first_game(path: Path, record: Record, play: Callable[[int], tuple[Arrays, dict[str, Any]]]) -> None:
    """Raise ValueError if the first game of a record is not what is played now: its code or its sizes have changed.

    Of a game that does not depend on its seed alone, only the shapes can be compared.
    """
    names = [name for name in record.arrays if FIELDS[name].axes.startswith("N")]
    rows = int((record.arrays["episode"] == 0).sum())

    def told(meta: dict[str, Any]) -> str:
        names = ("env_kwargs", "strategies", "action_names", "observation_scale", "observation_bounded")
        return json.dumps([meta.get(name) for name in names])

    def same(one: Arrays, other: Arrays) -> bool:
        return all(np.array_equal(one[name], other[name]) for name in names if name in other and name in one)

    (now, meta), then = play(rows), {name: record.arrays[name][:rows] for name in names}
    if not meta.get("observation_bounded", True):
        names = [name for name in names if name not in ("obs", "next_obs")]  # scaled by what occurs in all games
    fits = told(meta) == told(record.meta) and all(now[name].shape == then[name].shape for name in names if name in now)
    if not fits or not (same(now, then) or not same(now, play(rows)[0])):
        cure = "remove the file to have them played anew, or choose another folder"
        raise ValueError(f"{path} holds games that {meta.get('env_id', 'this game')} does not play now; {cure}")


def sha256(values: np.ndarray) -> str:
    """The hash of an array's type, shape and content."""
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


# Checks ---------------------------------------------------------------------------------------------------------------
def check_meta(meta: dict[str, Any]) -> None:
    """Check the kinds of what is in `meta` (`META`), and the time limit; ValueError says what."""
    for name, (fits, wanted) in META.items():
        if name in meta and meta[name] is not None and not fits(meta[name]):
            raise ValueError(f"meta: {name} is {str(meta[name])[:50]}; expected {wanted}")
    limit = (meta.get("env_kwargs") or {}).get("max_cycles")
    if limit is not None and not (type(limit) is int and limit >= 1):
        raise ValueError(f"meta: max_cycles is {str(limit)[:50]}; expected a whole number of at least 1")


def check_records(record: Record) -> None:
    """Check types, shapes, values, order, splits, and that no action is forbidden by its own mask.

    Missing fields are not an error. Raises a one-line ValueError.
    """
    arrays, meta = record
    check_meta(meta)
    sizes = {"K": len(meta.get("strategies") or [])}
    for name, values in arrays.items():
        field = FIELDS[name]
        if values.dtype != field.dtype or values.ndim != len(field.axes):
            wanted = f"{np.dtype(field.dtype)} with {len(field.axes)} dimensions"
            raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; expected {wanted}")
        for axis, size in zip(field.axes, values.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has {size:,} {NOUNS[axis]}, other fields {sizes[axis]:,}")
            if size == 0:
                raise ValueError(f"{name} has no {NOUNS[axis]}")
    for name, values in arrays.items():
        field = FIELDS[name]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} holds values that are not finite")
        # Strategies that have no names can have the number 0.
        most = max(sizes.get(field.most, 1 << 62), 1) - 1 if isinstance(field.most, str) else field.most
        least, most = -math.inf if field.least is None else field.least, math.inf if most is None else most
        if not least <= values.min() <= values.max() <= most:
            raise ValueError(f"{name} from {values.min()} to {values.max()}, expected {least} to {most}")
    check_order(arrays)
    if {"action", "action_mask"} <= set(arrays):
        action, mask = arrays["action"].astype(np.int64), arrays["action_mask"]
        forbidden = int((~mask[np.arange(len(action)), action]).sum())
        if forbidden:
            raise ValueError(
                f"{forbidden:,} of {len(action):,} actions are forbidden by their own mask; "
                "a mask that was sliced from the wrong columns looks like that"
            )
    if "policy_probs" in arrays:
        if "strategy" in arrays and arrays["strategy"].min() < 0:
            raise ValueError("policy_probs without the strategy of each row; leave them out, or write the strategies")
        if (np.abs(arrays["policy_probs"].sum(2, dtype=np.float64) - 1.0) > 1e-3).any():
            raise ValueError("policy_probs of a row and a strategy that do not add up to 1")


def check_order(arrays: Arrays) -> None:
    """Check that rows are in the order episode, agent, t, and that each split has some; ValueError says what."""
    if {"episode", "agent", "t"} <= set(arrays):
        episode, agent, t = (arrays[name].astype(np.int64) for name in ("episode", "agent", "t"))
        if (np.diff((episode * 1_000 + agent) * 100_000 + t) <= 0).any():
            raise ValueError("rows are not in the order episode, agent, t")
    if {"episode", "split"} <= set(arrays):
        for number, name in enumerate(SPLITS):
            if not (arrays["split"][arrays["episode"]] == number).any():
                raise ValueError(f"the {name} split has no rows; splits are by episode, at least 3 are needed")


# Seeds and splits of a record's games ---------------------------------------------------------------------------------
def episode_seeds(seed: int, first: int, count: int) -> np.ndarray:
    """Seeds of games `first`, `first + 1`, ... of a record (count,): pure functions of the record's seed."""
    return np.array([np.random.SeedSequence([seed, 0, i]).generate_state(1)[0] for i in range(first, first + count)])


def split_episodes(episodes: int, seed: int) -> np.ndarray:
    """Each episode's split (E,): 80 % train, 10 % validation, 10 % test, shuffled; with 3 or more, none is empty."""
    held_out = max(1, round(episodes / 10))
    split = np.zeros(episodes, np.int8)
    order = np.random.default_rng([seed, 1]).permutation(episodes)
    split[order[:held_out]], split[order[held_out : 2 * held_out]] = 2, 1
    return split
