"""envs/records.py: what is written is read again, and what cannot be a record of games is refused with one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from envs import stag_hunt  # noqa: E402
from envs.records import Record, check_records, make_records, read_arrays, read_records, save_records  # noqa: E402


@pytest.fixture(scope="module")
def data() -> Record:
    return stag_hunt.collect(6_000, seed=3)


def test_a_file_gives_back_what_was_written(data, tmp_path):
    path = tmp_path / "new folder" / "games.npz"
    save_records(path, data)
    assert [p.name for p in path.parent.iterdir()] == ["games.npz"]  # no temporary file stays
    loaded = read_records(path)
    assert set(loaded.arrays) == set(data.arrays)
    for name, values in data.arrays.items():
        assert loaded.arrays[name].dtype == values.dtype and (loaded.arrays[name] == values).all()
    assert {**data.meta, "format_version": 1}.items() <= loaded.meta.items()
    assert set(read_records(path, ["action", "t"]).arrays) == {"action", "t"}


def spoil(path, data, **changes):
    """Write a file whose hashes fit, but whose content may not."""
    arrays = {**data.arrays, **{name: values for name, values in changes.items() if name != "meta"}}
    save_records(path, Record({k: v for k, v in arrays.items() if v is not None}, data.meta))


def rewrite(path, **changes):
    """Change fields of a file and leave its hashes as they are."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez_compressed(path, **{**content, **changes})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"strategy": lambda v: v + 5}, "strategy from 5 to 6, expected -1 to 1"),
        ({"strategy": lambda v: np.where(v == 1, -1, v)}, "without the strategy of each row"),
        (
            {"policy_probs": lambda v: v[:, :, 1:]},
            "policy_probs has 6 actions, other fields 7",
        ),
    ],
)
def test_strategies_that_do_not_fit_are_refused(changes, part, data):
    arrays = {**data.arrays, **{name: change(data.arrays[name]) for name, change in changes.items()}}
    arrays["strategy"] = arrays["strategy"].astype(np.int8)
    with pytest.raises(ValueError, match=part):
        check_records(Record(arrays, data.meta))


def test_a_record_names_where_it_comes_from(data, tmp_path):
    save_records(tmp_path / "games.npz", data)
    meta = read_records(tmp_path / "games.npz").meta
    assert meta["packages"]["numpy"] == np.__version__ and set(meta["packages"]) == {"numpy", "pettingzoo"}
    assert meta["commit"] is None or len(meta["commit"]) == 40


def test_forbidden_actions_are_counted(data, tmp_path):
    wrong = np.roll(data.arrays["action_mask"], 1, axis=1)  # sliced from the wrong columns
    forbidden = int((~wrong[np.arange(6_000), data.arrays["action"]]).sum())
    assert forbidden > 500
    spoil(tmp_path / "x.npz", data, action_mask=wrong)
    with pytest.raises(ValueError, match=f"{forbidden:,} of 6,000 actions are forbidden .* wrong columns"):
        read_records(tmp_path / "x.npz")


def test_damaged_files_are_refused_with_one_line(data, tmp_path):
    path = tmp_path / "x.npz"

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            read_records(path)
        assert "\n" not in str(error.value) and "x.npz" in str(error.value)

    refused("there is no dataset")
    save_records(path, data)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        refused("truncated or damaged|Cannot load|dataset")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    refused("truncated or damaged")
    path.write_bytes(b"not a record at all")
    refused("no .npz file; convert it to npz")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    refused("an HDF5 file; convert it to npz")
    np.save(path.with_suffix(".npy"), np.arange(3))
    path.with_suffix(".npy").rename(path)
    refused("a single array")
    np.savez(path, obs=np.zeros(3))
    refused("no field meta")
    path.write_bytes(whole)
    rewrite(path, meta=np.array(json.dumps({**data.meta, "format_version": 99})))
    refused("format version 99, expected version 1")
    path.write_bytes(whole)
    rewrite(path, action=(data.arrays["action"] + 1) % 7)
    refused("content of action does not have the hash")
    path.write_bytes(whole)
    rewrite(path, action=data.arrays["action"].astype(object))
    refused("never unpickled")
    for changes, match in (
        ({"action": None}, "no field action"),
        ({"t": data.arrays["t"][:-1]}, "t has 5,999 rows, other fields 6,000"),
        ({"t": data.arrays["t"][::-1].copy()}, "not in the order"),
        ({"obs": data.arrays["obs"].astype(np.float32)}, "obs is float32"),
        ({"split": np.zeros_like(data.arrays["split"])}, "validation split has no rows"),
        ({"split": data.arrays["split"][:-1], "roster": data.arrays["roster"][:-1],
          "episode_seed": data.arrays["episode_seed"][:-1]}, "episode from 0 to"),
        ({"action": data.arrays["action"] - 1}, "action from -1 to 5, expected 0 to 6"),
    ):  # fmt: skip
        spoil(path, data, **changes)
        refused(match)


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "x.npz", meta=np.array([Evil()], dtype=object), action=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="never unpickled"):
        read_records(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


def test_arrays_of_other_types_become_a_checked_record():
    data = stag_hunt.collect(200, seed=3)
    wide = {name: values.astype(np.int64) for name, values in data.arrays.items() if values.dtype != np.float32}
    made = make_records(wide, data.meta)
    assert all(np.array_equal(values, data.arrays[name]) for name, values in made.arrays.items())
    assert all(values.dtype == data.arrays[name].dtype for name, values in made.arrays.items())
    with pytest.raises(ValueError, match="forbidden"):
        make_records({**wide, "action_mask": 1 - wide["action_mask"]}, data.meta)


@pytest.mark.parametrize(("name", "change", "part"), [
    ("agent", lambda v: v + 1, "agent from 1 to 4, expected 0 to 3"),
    ("prev_actions", lambda v: np.where(v < 0, 99, v), "prev_actions from 0 to 99, expected -1 to 6"),
    ("obs", lambda v: v * 0.5, "obs holds values that uint8 cannot"),
    ("action", lambda v: v.astype(int) + 256, "action holds values that int8 cannot"),
])  # fmt: skip
def test_numbers_that_a_record_cannot_hold_are_refused(name, change, part, data):
    with pytest.raises(ValueError, match=part):
        make_records({**data.arrays, name: change(data.arrays[name])}, data.meta)


@pytest.mark.parametrize(("name", "change", "part"), [
    ("policy_probs", lambda v: np.where(v > 0.9, np.nan, v), "policy_probs holds values that are not finite"),
    ("policy_probs", lambda v: v * 0.5, "do not add up to 1"),
    ("rewards", lambda v: v.astype(np.float64) + 1e39, "rewards holds values that are not finite"),
    ("joint_action", lambda v: np.where(v < 0, -2, v), "joint_action from -2"),
    ("t", lambda v: v - 1, "t from -1"),
    ("split", lambda v: v + 1, "split from 1 to 3, expected 0 to 2"),
    ("obs", lambda v: v[:, :, :0], "obs has no lines"),
    ("next_obs", lambda v: v[:, :6], "next_obs has 6 planes, other fields 7"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(name, change, part, data):
    with pytest.raises(ValueError, match=part):
        make_records({**data.arrays, name: change(data.arrays[name])}, data.meta)


@pytest.mark.parametrize(("meta", "part"), [
    ("{not json", "meta is not JSON"),
    ("[" * 100_000, "meta is not JSON"),
    ("[1]", "format version None"),
    ({"strategies": 2}, "meta: strategies is 2; expected a list of names"),
    ({"sha256": ["x"]}, "meta: sha256 is"),
    ({"observation_scale": 0}, "meta: observation_scale is 0; expected a positive number"),
    ({"observation_scale": float("nan")}, "meta: observation_scale is nan"),
    ({"env_kwargs": [3]}, "meta: env_kwargs is"),
    ({"env_kwargs": {"max_cycles": -3}}, "meta: max_cycles is -3; expected a whole number of at least 1"),
    ({"env_kwargs": {"max_cycles": "18"}}, "meta: max_cycles is 18; expected a whole number"),
])  # fmt: skip
def test_a_damaged_meta_is_refused(meta, part, data, tmp_path):
    path = tmp_path / "x.npz"
    save_records(path, data)
    whole = read_records(path, ["t"]).meta
    rewrite(path, meta=np.array(meta if isinstance(meta, str) else json.dumps({**whole, **meta})))
    with pytest.raises(ValueError, match=part) as error:
        read_records(path, ["t", "action"])
    assert "x.npz" in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_locked_are_one_line(data, tmp_path, monkeypatch):
    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", locked)
    with pytest.raises(ValueError, match=r"cannot read .*Permission denied"):
        read_records(tmp_path / "x.npz")


def test_what_could_not_be_written_leaves_nothing(data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save_records(tmp_path / "x.npz", data)
    assert not list(tmp_path.iterdir())


def test_any_npz_can_be_read(tmp_path):
    np.savez(tmp_path / "plain.npz", a=np.arange(3), b=np.eye(2))
    assert set(read_arrays(tmp_path / "plain.npz")) == {"a", "b"}
    assert set(read_arrays(tmp_path / "plain.npz", "bc")) == {"b"}
