"""plas_pixels.py: which loss trains what, its data, learning, resuming, and bad input."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "plas_pixels.py"
sys.path.insert(0, str(ROOT))

sys.path.insert(0, str(ROOT / "benchmark"))

import plas_data  # noqa: E402
import speed  # noqa: E402

import plas_pixels  # noqa: E402
from plas_pixels import PLAS, SIGNALS, Args, Batch, Dataset, collect, evaluate, load, make_env  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
SMALL = {
    "collect_steps": 400, "num_filters": 4, "feature_dim": 8, "hidden_dim": 16, "batch_size": 8, "eval_episodes": 2,
    "eval_frequency": 20, "checkpoint_frequency": 10, "total_timesteps": 40,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Datasets are cached in the current folder."""
    monkeypatch.chdir(tmp_path)


def resolve(args: Args) -> Args:
    plas_pixels.check(args)
    return args


def played(env, name, steps, seed) -> dict[str, np.ndarray]:
    return collect(env, steps, seed, act=plas_data.behaviour(name, np.random.default_rng(seed), env))


@pytest.fixture(scope="module")
def env():
    return make_env(resolve(Args()))


@pytest.fixture(scope="module")
def columns(env):
    return played(env, "medium", 400, 0)


@pytest.fixture(scope="module", autouse=True)
def dataset(env, columns, tmp_path_factory) -> Path:
    """What the small runs learn from."""
    path = tmp_path_factory.mktemp("dataset") / "medium.npz"
    plas_pixels.write_columns(path, env, columns)
    SMALL["dataset"] = str(path)
    return path


def make_agent(env, seed=0, **changes) -> PLAS:
    torch.manual_seed(seed)
    return PLAS(resolve(Args(**{**SMALL, **changes})), env, CPU)


def make_batch(columns, size=8, frame_stack=1) -> Batch:
    dataset = Dataset(columns, frame_stack)
    index = torch.randperm(len(dataset.rows), generator=torch.Generator().manual_seed(1))[:size]
    batch = dataset.batch(index)
    discount = batch.discount.clone()
    discount[::3] = 0.0
    return batch._replace(discount=discount)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[bool]:
    return {not torch.equal(before[name], value) for name, value in module.state_dict().items()}


# --- Dot Hazard ---
def test_dot_hazard_follows_gymnasiums_rules():
    check_env(gym.make("DotHazard-v0").unwrapped, skip_render_check=True)


def test_dot_hazard_pays_for_the_goal_and_costs_in_the_hazard():
    env = gym.make("DotHazard-v0").unwrapped
    env.reset(seed=0)
    env.set_state({"state": np.array([0.5, 0.5, 0.9, 0.5, 0.2, 0.2])})
    assert env.step(np.zeros(2))[1] == 0.0
    env.set_state({"state": np.array([0.5, 0.5, 0.54, 0.5, 0.2, 0.2])})
    assert env.step(np.ones(2))[1] == 1.0
    assert np.allclose(env.get_state()["state"][:2], 0.58)
    env.set_state({"state": np.array([0.5, 0.5, 0.9, 0.9, 0.5, 0.4])})
    picture, reward, terminated, truncated, info = env.step(np.array([0.0, -5.0]))  # clipped to one step of 0.08
    assert reward == -1.0 and not terminated and not truncated
    assert np.allclose(info["state"], [0.5, 0.42, 0.9, 0.9, 0.5, 0.4])
    assert (
        picture[16, 14, 0] == 255 and picture[16, 14, 2] == 255 and picture[2, 25, 1] == 255 and not picture[0, 0].any()
    )
    for bad in (np.zeros(3), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="two finite numbers"):
            env.step(bad)


def test_the_experts_return_is_far_above_the_mediums_and_that_above_random(env):
    returns = {}
    for name in ("random", "medium", "expert"):
        data = played(env, name, 1_600, 1)
        returns[name] = Dataset(data, 1).returns.mean()
    assert returns["random"] < 2.0 < 8.0 < returns["medium"] < 18.0 < 22.0 < returns["expert"]


# --- the environment's wrapper ---
class NumberEnv(gym.Env):
    """Each picture shows the number of steps so far, each reward is the action; actions are in [2, 6]."""

    def __init__(self, length=5, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)
        self.action_space = gym.spaces.Box(2.0, 6.0, (1,), np.float64)
        self.render_mode, self.length = render_mode, length

    def picture(self):
        return np.full((12, 12, 3), self.count, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.picture(), {}

    def step(self, action):
        self.count += 1
        return self.picture(), float(action[0]), self.count == self.length, False, {}


class RenderedEnv(NumberEnv):
    """Observes a number, and draws."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.observation_space = gym.spaces.Box(0, 9, (1,))

    def picture(self):
        return np.array([self.count], np.float32)

    def render(self):
        return np.full((50, 30, 3), self.count, np.uint8)


class DiscreteEnv(NumberEnv):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)


class BlindEnv(NumberEnv):
    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = gym.spaces.Box(-1, 1, (4,))


for entry in (NumberEnv, RenderedEnv, DiscreteEnv, BlindEnv):
    gym.register(f"Plas{entry.__name__}-v0", entry)


def test_pictures_are_stacked_and_actions_scaled_and_repeated():
    env = make_env(resolve(Args(env_id="PlasNumberEnv-v0", frame_stack=3, action_repeat=2)))
    observation, _ = env.reset(seed=0)
    assert observation.shape == (9, 12, 12) and observation.max() == 0
    observation, reward, terminated, _, info = env.step(np.array([-1.0], np.float32))
    assert reward == 4.0 and observation[:, 0, 0].tolist() == [0] * 6 + [2] * 3 and info["state"][0] == 2
    observation, reward, _, _, _ = env.step(np.array([3.0], np.float32))  # outside: clipped to 6
    assert reward == 12.0 and observation[:, 0, 0].tolist() == [0] * 3 + [2] * 3 + [4] * 3
    observation, reward, terminated, _, _ = env.step(np.array([0.0], np.float32))
    assert reward == 4.0 and terminated  # the second repetition is never made
    assert env.render().shape == (264, 264, 3)


def test_other_observations_are_rendered_and_become_the_state():
    env = make_env(resolve(Args(env_id="PlasRenderedEnv-v0", image_size=20, frame_stack=1, action_repeat=1)))
    observation, info = env.reset(seed=0)
    assert observation.shape == (3, 20, 20) and info["state"].tolist() == [0.0]
    observation, *_, info = env.step(np.zeros(1, np.float32))
    assert (observation == 1).all() and info["state"].tolist() == [1.0]


# --- dataset ---
def numbered(lengths: list[int]) -> dict[str, np.ndarray]:
    """Episodes whose row m has a picture full of m, the action m / 100, the reward m and the discount m odd."""
    first = np.concatenate([np.arange(length + 1) == 0 for length in lengths])
    number = np.arange(len(first))
    return {
        "image": np.full((len(first), 4, 5, 3), number[:, None, None, None], np.uint8),
        "action": np.float32(number[:, None] / 100), "reward": np.float32(number),
        "discount": np.float32(number % 2), "is_first": first,
    }  # fmt: skip


def test_a_transition_is_the_row_before_and_the_row_itself():
    dataset = Dataset(numbered([3, 1, 2]), 3)
    assert dataset.rows.tolist() == [1, 2, 3, 5, 7, 8] and dataset.starts.tolist() == [0, 4, 6]
    batch = dataset.batch(torch.arange(6))
    assert batch.observation.shape == (6, 9, 4, 5) and batch.observation.dtype == torch.uint8
    seen, following = batch.observation[:, ::3, 0, 0].tolist(), batch.next_observation[:, ::3, 0, 0].tolist()
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [4, 4, 4], [6, 6, 6], [6, 6, 7]]
    assert following == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [4, 4, 5], [6, 6, 7], [6, 7, 8]]
    assert torch.allclose(batch.action[:, 0], dataset.rows / 100.0) and batch.reward.tolist() == dataset.rows.tolist()
    assert batch.discount.tolist() == (dataset.rows % 2).tolist()
    assert dataset.returns.tolist() == [6.0, 5.0, 15.0]


def test_rows_are_drawn_uniformly():
    torch.manual_seed(0)
    dataset = Dataset(numbered([3, 1, 2]), 1)
    counts = torch.bincount(dataset.sample(60_000, 0).reward.long(), minlength=9)[dataset.rows]
    assert ((counts - 10_000).abs() < 5 * 100).all()


def test_a_random_shift_is_a_padded_crop():
    columns = numbered([9])
    columns["image"] = np.random.default_rng(0).integers(0, 256, columns["image"].shape, dtype=np.uint8)
    dataset, index, shift = Dataset(columns, 2), torch.arange(8), 3
    plain = dataset.batch(index)
    torch.manual_seed(5)
    shifted = dataset.batch(index, shift)
    torch.manual_seed(5)
    offsets = torch.randint(-shift, shift + 1, (2, 2, 8, 1))
    pairs = (plain.observation, shifted.observation), (plain.next_observation, shifted.next_observation)
    for i, (before, after) in enumerate(pairs):
        padded = F.pad(before.float(), (shift,) * 4, mode="replicate")
        for n in range(8):
            down, right = (int(offsets[axis, i, n, 0]) + shift for axis in range(2))
            assert torch.equal(after[n].float(), padded[n, :, down : down + 4, right : right + 5])
    assert len({tuple(offsets[:, i, n, 0].tolist()) for i in range(2) for n in range(8)}) > 8


def env_of(height, width):
    """What a dataset is compared with."""
    space, actions = gym.spaces.Box(0, 255, (3, height, width), np.uint8), gym.spaces.Box(-1, 1, (1,))
    args = SimpleNamespace(frame_stack=1, action_repeat=2)
    return SimpleNamespace(observation_space=space, spec=None, action_space=actions, size=(height, width), args=args)


def test_a_folder_of_episodes_without_marks_is_read_as_one(tmp_path):
    """V-D4RL's layout: a file an episode, `is_terminal` instead of `discount`, no `is_first`."""
    whole = numbered([3, 2])
    whole["discount"] = np.float32([1, 1, 1, 1, 1, 1, 0])  # the second episode's end is the task's
    for name, rows in (("b", slice(4, 7)), ("a", slice(0, 4))):
        part = {key: value[rows] for key, value in whole.items() if key not in ("is_first", "discount")}
        part["reward"] = part["reward"].copy()
        part["reward"][0] = np.nan  # nothing led to the first picture
        np.savez(tmp_path / f"{name}.npz", **part, is_terminal=whole["discount"][rows] == 0.0)
    read, digest, _ = load(tmp_path, env_of(4, 5))
    expected = Dataset(whole, 1).batch(torch.arange(5))
    for ours, theirs in zip(read.batch(torch.arange(5)), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert read.returns.tolist() == [6.0, 11.0] and len(digest) == 64


def spoil(name, value):
    def change(columns):
        columns[name] = value(columns[name]) if callable(value) else value

    return change


def set_row(row, value):
    def change(values):
        values = values.copy()
        values[row] = value
        return values

    return change


MARKS = {"is_first": [1, 0, 0, 0, 1, 0, 0], "is_last": [0, 0, 0, 1, 0, 0, 1], "is_terminal": [0, 0, 0, 1, 0, 0, 0]}


def marked(**rows):
    """Two episodes with all marks, these rows' being turned into the opposite; `None` leaves a mark out."""

    def change(columns):
        columns["discount"] = np.ones(7, np.float32)
        columns["discount"][3] = 0.0
        for name, marks in MARKS.items():
            columns[name] = np.array(marks, bool)
            if name in rows and rows[name] is None:
                del columns[name]
            elif name in rows:
                columns[name][rows[name]] ^= True

    return change


def discounts(values):
    def change(columns):
        marked()(columns)
        columns["discount"] = values

    return change


BAD_DATA = {
    "missing": (lambda c: c.pop("reward"), "lacks reward"),
    "a number": (spoil("image", 3), "expected image (4, 5, 3) of uint8, got () of int64"),
    "scalar": (lambda c: c.update(discount=0.99), "expected discount (7,) of float32"),
    "words": (lambda c: c.update(reward=np.array(["a"] * 7)), "expected reward (7,) of float32"),
    "two rewards": (lambda c: c.update(reward=np.zeros((7, 2))), "got (7, 2) of float64"),
    "float images": (
        spoil("image", lambda v: v / 255.0),
        "of uint8, got (7, 4, 5, 3) of float64; image has the number of rows",
    ),
    "flat images": (spoil("image", lambda v: v[..., 0]), "expected image (7, 4, 5, 3) of uint8"),
    "fewer rows": (spoil("reward", lambda v: v[1:]), "expected reward (7,) of float32"),
    "no rows": (lambda c: c.update({name: values[:0] for name, values in c.items()}), "has no rows"),
    "flat actions": (spoil("action", lambda v: v[:, 0].repeat(2)), "expected action (7, 1) of float32"),
    "wide actions": (spoil("action", set_row(2, 1.5)), "1 of 5 rows of action are not numbers in [-1, 1]"),
    "nan actions": (spoil("action", set_row(2, np.nan)), "1 of 5 rows of action are not numbers in [-1, 1]"),
    "nan": (spoil("reward", set_row(3, np.inf)), "1 of 5 rows of reward are not finite numbers"),
    "too large": (spoil("reward", lambda v: v.astype(float) * 1e300), "rows of reward are not finite numbers"),
    "bytes": (
        spoil("action", lambda v: np.full(v.shape, -128, np.int8)),
        "5 of 5 rows of action are not numbers in [-1, 1]",
    ),
    "discounts": (spoil("discount", set_row(2, 5.0)), "1 of 5 rows of discount are not numbers in [0, 1]"),
    "nan discounts": (spoil("discount", set_row(2, np.nan)), "1 of 5 rows of discount are not numbers in [0, 1]"),
    "no start": (spoil("is_first", set_row(0, False)), "first row"),
    "half a mark": (spoil("is_first", lambda v: v * 0.5), "expected 0 and 1 in is_first"),
    "empty episode": (spoil("is_first", set_row(6, True)), "1 episodes have a length of 0"),
    "other size": (spoil("image", lambda v: v.repeat(2, 1)), "got (7, 8, 5, 3)"),
    "other actions": (spoil("action", lambda v: v.repeat(3, 1)), "got (7, 3) of float32"),
    "objects": (
        spoil("action", lambda v: v.astype(object)),
        "cannot be read (ValueError: Object arrays cannot be loaded",
    ),
    "other repeat": (spoil("action_repeat", 8), "was made with --action-repeat 8, but this run differs"),
    "other stack": (spoil("frame_stack", 3), "was made with --frame-stack 3, but this run differs"),
    "many repeats": (spoil("action_repeat", np.ones(7)), "cannot be read (ValueError: can only convert"),
    "a last row that is none": (marked(is_last=2), "is_first, is_last and is_terminal contradict each other"),
    "a last row unmarked": (marked(is_last=3), "contradict each other after row 3"),
    "a terminal row within": (marked(is_terminal=1), "contradict each other after row 1"),
    "a terminal row within, no first ones": (marked(is_terminal=1, is_first=None), "contradict each other after row 1"),
    "a start within": (marked(is_first=2), "contradict each other"),
    "a discount that goes on": (discounts(np.ones(7)), "discount and is_terminal contradict each other in row 3"),
    "a discount that ends": (discounts(np.float32([1, 1, 1, 0, 1, 1, 0])), "contradict each other in row 6"),
}


@pytest.mark.parametrize("left_out", [(), ("is_first",), ("is_last",), ("is_terminal",), ("is_first", "is_last")])
def test_episodes_end_by_any_of_the_marks(left_out, tmp_path):
    """Without is_first and is_last the terminal row is what ends an episode."""
    columns = numbered([3, 2])
    marked(**dict.fromkeys(left_out))(columns)
    np.savez(tmp_path / "data.npz", **columns)
    read, *_ = load(tmp_path / "data.npz", env_of(4, 5))
    assert read.starts.tolist() == [0, 4] and read.reward.tolist() == [1, 2, 3, 5, 6]
    assert read.discount.tolist() == [1, 1, 0, 1, 1] and read.returns.tolist() == [6.0, 11.0]


@pytest.mark.parametrize("change, part", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_refused_with_a_line(change, part, tmp_path):
    columns = numbered([3, 2])
    change(columns)
    np.savez(tmp_path / "data.npz", **columns)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "data.npz", env_of(4, 5))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_an_encrypted_file_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", **numbered([3]))
    content = (tmp_path / "data.npz").read_bytes()
    flags = content.index(b"PK\x01\x02") + 8  # of the first array, in the list of contents
    (tmp_path / "data.npz").write_bytes(content[:flags] + b"\x01" + content[flags + 1 :])
    with pytest.raises(ValueError, match=r"cannot be read \(RuntimeError: "):
        load(tmp_path / "data.npz", env_of(4, 5))


def test_a_truncated_file_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", **numbered([3]))
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is not an npz file|cannot be read"):
        load(tmp_path / "data.npz", env_of(4, 5))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_damaged_anywhere_is_refused_with_a_line(compressed, tmp_path):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "data.npz", **numbered([3]))
    content, generator = (tmp_path / "data.npz").read_bytes(), np.random.default_rng(0)
    refusals = 0
    for place in generator.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= int(generator.integers(1, 256))
        (tmp_path / "data.npz").write_bytes(damaged)
        try:
            load(tmp_path / "data.npz", env_of(4, 5))
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 60  # the others are in what nobody reads, such as dates


FOREIGN = {
    "v_d4rl_84px.hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100), "table.csv": b"image,action\n1,2\n", "empty.npz": b"",
    "array.npy": b"\x93NUMPY\x01\x00" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_called_what_they_are(name, tmp_path):
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match="is not an npz file; convert it to npz"):
        load(tmp_path / name, env_of(4, 5))


def test_hidden_files_of_a_folder_are_skipped(tmp_path):
    np.savez(tmp_path / "x.npz", **numbered([3]))
    (tmp_path / "._x.npz").write_bytes(b"what another system keeps beside a file")
    assert len(load(tmp_path, env_of(4, 5))[0].rows) == 3
    (tmp_path / "x.npz").rename(tmp_path / "x.hdf5")
    (tmp_path / "._image.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there is no npz file in .*; convert the data"):
        load(tmp_path, env_of(4, 5))


def test_data_in_d4rls_order_get_a_warning(tmp_path, capsys):
    columns = numbered([3, 2])
    np.savez(tmp_path / "data.npz", **columns)
    load(tmp_path / "data.npz", env_of(4, 5))
    assert not capsys.readouterr().err
    columns["action"][0] = 0.5  # as the last row of the first episode would be: nothing has led to this picture
    np.savez(tmp_path / "data.npz", **columns)
    load(tmp_path / "data.npz", env_of(4, 5))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "as in D4RL" in line


def save_folder(folder: Path, columns: dict[str, np.ndarray]) -> Path:
    """What the docs tell: an npy file for each array."""
    folder.mkdir()
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def test_the_pictures_of_a_folder_of_npy_files_stay_on_the_disk(tmp_path, capsys):
    columns = numbered([3, 2]) | {"action_repeat": 2}
    np.savez(tmp_path / "data.npz", **columns)
    expected = load(tmp_path / "data.npz", env_of(4, 5))[0].batch(torch.arange(5))
    assert not capsys.readouterr().out
    dataset, _, made_with = load(save_folder(tmp_path / "data", columns), env_of(4, 5))
    assert capsys.readouterr().out == f"{tmp_path / 'data'}: 0.00 GiB of npy files; their pictures stay on the disk\n"
    for ours, theirs in zip(dataset.batch(torch.arange(5)), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert dataset.mapped and made_with == {"action_repeat": 2}
    with open(tmp_path / "data" / "image.npy", "r+b") as file:  # what is written there is seen at once
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert dataset.batch(torch.tensor([4])).next_observation[0, 2, 3, 4] == 255
    assert dataset.images.untyped_storage().data_ptr() == dataset.to(CPU).images.untyped_storage().data_ptr()


def test_a_mapped_dataset_trains_as_the_same_npz_file_does(tmp_path, columns, dataset):
    folder = save_folder(tmp_path / "mapped", columns)
    for changes in ({}, {"random_shift": 2, "encoder_signal": "reconstruction"}):
        one = run(tmp_path, run_name=f"npz{len(changes)}", **changes)
        assert same(one, run(tmp_path, run_name=f"npy{len(changes)}", dataset=str(folder), **changes))


BAD_FOLDERS = {
    "missing": (lambda folder: (folder / "image.npy").unlink(), "lacks image; image, action and reward are needed"),
    "no marks": (lambda folder: (folder / "is_first.npy").unlink(), "lacks is_first, which is true in the first row"),
    "lengths": (
        lambda folder: np.save(folder / "reward.npy", np.zeros(9)),
        "expected reward (7,) of float32, got (9,)",
    ),
    "picture size": (lambda folder: np.save(folder / "image.npy", np.zeros((7, 9, 9, 3), np.uint8)), "(7, 9, 9, 3)"),
    "cut": (lambda folder: os.truncate(folder / "image.npy", 300), "cannot be read (ValueError: mmap length"),
    "no array": (lambda folder: (folder / "action.npy").write_bytes(b"1, 2"), "cannot be read (ValueError: "),
    "objects": (lambda folder: np.save(folder / "reward.npy", np.array([None] * 7)), "cannot be read (ValueError: "),
    "nan": (lambda folder: np.save(folder / "reward.npy", np.full(7, np.nan)), "5 of 5 rows of reward are not finite"),
    "other repeat": (lambda folder: np.save(folder / "action_repeat.npy", 8), "was made with --action-repeat 8"),
}


@pytest.mark.parametrize("change, part", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders_are_refused_with_a_line(change, part, tmp_path):
    folder = save_folder(tmp_path / "data", numbered([3, 2]))
    change(folder)
    with pytest.raises(ValueError) as error:
        load(folder, env_of(4, 5))
    assert part in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["reward", "image"])
def test_a_folder_without_a_file_ends_with_status_2(name, tmp_path, capsys, columns):
    (save_folder(tmp_path / "mapped", columns) / f"{name}.npy").unlink()
    assert f"mapped lacks {name}" in refused(capsys, tmp_path, dataset="mapped")


def test_data_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "data.npz", **(numbered([3]) | {"action": np.zeros((3 * 10**7, 1), np.float32)}))
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 2**13 if name == "SC_PHYS_PAGES" else real(name))  # 32 MiB
    with pytest.raises(ValueError, match=r"data.npz needs about 0.1 GiB of memory, and this machine has 0.0"):
        load(tmp_path / "data.npz", env_of(4, 5))


def test_data_of_an_agent_that_learns_more_slowly(tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(plas_data.TD3, "update", lambda self, step: updates.append((self.size, step)))
    options = {"env": "DotHazard-v0", "folder": tmp_path, "steps": 90, "random_steps": 60}
    plas_data.main(plas_data.Args(**options, update_every=7))
    assert updates == [(63, 9), (70, 10), (77, 11), (84, 12)]
    with pytest.raises(SystemExit):
        plas_data.main(plas_data.Args(**options | {"folder": tmp_path / "new"}, update_every=0))
    assert not (tmp_path / "new").exists()


# --- which loss trains what ---
def plain_gradients(agent: PLAS, batch: Batch, noise: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Each loss's gradient in the encoder that it would train, from a pass of its own."""
    target = agent.critic_target(batch, noise)
    losses = {
        "critic": (agent.critic_loss(agent.encoder(batch.observation), batch, target), agent.encoder),
        "vae": (agent.vae_loss(agent.vae_encoder(batch.observation), batch, noise["vae"])[0], agent.vae_encoder),
    }
    if agent.picture_decoder is not None:
        decoded = agent.picture_decoder(agent.encoder(batch.observation))
        losses["reconstruction"] = F.mse_loss(decoded, batch.observation / 255.0 - 0.5), agent.encoder
    return {name: torch.autograd.grad(loss, list(encoder.parameters())) for name, (loss, encoder) in losses.items()}


@pytest.mark.parametrize("policy", ["latent", "argmax"])
@pytest.mark.parametrize("name", SIGNALS)
def test_an_encoder_gets_the_gradient_of_its_own_losses_and_of_nothing_else(name, policy, env, columns):
    agent, batch = make_agent(env, encoder_signal=name, policy=policy), make_batch(columns)
    noise = agent.draw_noise(8)
    gradients = plain_gradients(agent, batch, noise)
    modules = {key: weights(module) for key, module in agent.named_children()}
    agent.update(batch, noise)
    changed = {key: moved(modules[key], module) for key, module in agent.named_children()}
    for encoder in {agent.encoder, agent.vae_encoder}:
        own = [g for loss, g in gradients.items() if loss in SIGNALS[name] and (
            encoder is (agent.vae_encoder if loss == "vae" else agent.encoder)
        )]  # fmt: skip
        for parameter, *parts in zip(encoder.parameters(), *own, strict=True):
            if own:
                assert torch.allclose(parameter.grad, sum(parts), rtol=1e-4, atol=1e-6 * float(sum(parts).abs().max()))
            else:
                assert parameter.grad is None
    assert changed["encoder"] == {bool(SIGNALS[name])}
    assert True in changed["critic"] and True in changed["vae"] and True in changed["target_critic"]
    assert (True in changed["policy"]) == (policy == "latent")
    assert ("vae_encoder" in changed) == (name == "separate") and True in changed.get("vae_encoder", {True})


@pytest.mark.parametrize("name", SIGNALS)
def test_the_policys_loss_moves_the_policy_alone(name, env, columns):
    agent, batch = make_agent(env, encoder_signal=name), make_batch(columns)
    before = {key: weights(module) for key, module in agent.named_children()}
    feature = agent.encoder(batch.observation).detach()
    agent.update_policy(feature, feature)
    changed = {key for key, module in agent.named_children() if True in moved(before[key], module)}
    assert changed == {"policy"}


def test_pretraining_leaves_critics_and_policy_and_an_encoder_that_is_not_the_vaes(env, columns):
    for name, expected in (("both", {"vae", "encoder"}), ("critic", {"vae"}), ("separate", {"vae", "vae_encoder"})):
        agent, batch = make_agent(env, encoder_signal=name), make_batch(columns)
        before = {key: weights(module) for key, module in agent.named_children()}
        agent.update(batch, pretraining=True)
        assert {key for key, module in agent.named_children() if True in moved(before[key], module)} == expected


@pytest.mark.parametrize("leaking", [False, True])
def test_the_notes_two_optimizers_train_the_encoder_by_the_vae_unless_zero_grad_comes_first(leaking, env, columns):
    """`critic_optimizer` holds the critic, `actorvae_optimizer` VAE and encoder, and each loss calls backward.

    If the second's `zero_grad` comes after the critic's backward, the critic's gradient in the encoder is thrown away,
    which is `vae`; if it comes before, that gradient leaks into the VAE's step, which is `both`.
    """
    ours = make_agent(env, encoder_signal="both" if leaking else "vae")
    theirs, batch = make_agent(env, encoder_signal="both"), make_batch(columns)
    theirs.load_state_dict(ours.state_dict())
    noise = ours.draw_noise(8)
    ours.update(batch, noise)
    critic_optimizer = torch.optim.Adam(theirs.critic.parameters(), lr=1e-3)
    actorvae_optimizer = torch.optim.Adam([*theirs.vae.parameters(), *theirs.encoder.parameters()], lr=1e-3)
    target, feature = theirs.critic_target(batch, noise), theirs.encoder(batch.observation)
    critic_loss, vae_loss = theirs.critic_loss(feature, batch, target), theirs.vae_loss(feature, batch, noise["vae"])[0]
    critic_optimizer.zero_grad()
    if leaking:
        actorvae_optimizer.zero_grad()
    critic_loss.backward(retain_graph=True)
    if not leaking:
        actorvae_optimizer.zero_grad()
    vae_loss.backward()
    critic_optimizer.step()
    actorvae_optimizer.step()
    for name in ("encoder", "critic", "vae"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            assert (a - b).abs().max() < 2e-5, name


@pytest.mark.parametrize("name", SIGNALS)
def test_one_pass_of_the_encoder_equals_a_pass_for_each_loss(name, env, columns):
    """The fast path against the plain one that its speed is measured by."""
    fast, dataset = make_agent(env, encoder_signal=name), Dataset(columns, 1)
    plain = speed.PlainPLAS(fast, env, dataset)
    before = weights(fast.critic)
    for step in range(3):
        index, noise = torch.arange(8) * 7 + step, fast.draw_noise(8)
        fast.update(dataset.batch(index), noise)
        plain.update(plain.batch(index), noise)
    assert moved(before, fast.critic) == {True}
    for key, module in fast.named_children():
        for ours, theirs in zip(module.parameters(), getattr(plain.agent, key).parameters(), strict=True):
            assert (ours - theirs).abs().max() < 1e-4, key


def test_layer_norm_follows_each_hidden_layer_of_critics_and_vae(env, columns):
    agent, plain, batch = make_agent(env, layer_norm=True), make_agent(env), make_batch(columns)
    for network in (agent.critic.q1, agent.critic.q2, agent.vae.encoder, agent.vae.decoder):
        kinds = [type(layer).__name__ for layer in network]
        assert kinds == ["Linear", "ReLU", "LayerNorm", "Linear", "ReLU", "LayerNorm", "Output"]
    norms = [name for name, part in agent.named_modules() if isinstance(part, torch.nn.LayerNorm)]
    assert {name.split(".")[0] for name in norms} == {"encoder", "critic", "vae", "target_critic"}
    agent.update(batch)
    for name in norms:
        if not name.startswith("target"):
            assert all(parameter.grad.abs().sum() > 0 for parameter in agent.get_submodule(name).parameters()), name
    weight, other = agent.vae.decoder[0].weight, make_agent(env, layer_norm=True).vae.decoder[0].weight
    assert not torch.equal(weight, other) and torch.equal(other, plain.vae.decoder[0].weight)  # drawn alike


def test_each_update_is_one_step_of_the_same_adam(env, columns):
    agent, batch = make_agent(env), make_batch(columns)
    assert set(agent.optimizers) == {"encoder", "critic", "vae", "policy"}
    for count in (1, 2, 3):
        agent.update(batch)
        assert {int(state["step"]) for o in agent.optimizers.values() for state in o.state.values()} == {count}


def test_the_target_is_the_formula(env, columns):
    for policy in ("latent", "argmax"):
        agent, batch = make_agent(env, policy=policy, encoder_signal="separate", candidates=3), make_batch(columns)
        noise = agent.draw_noise(8)
        target = agent.critic_target(batch, noise)
        for i in range(8):
            one = batch.next_observation[i : i + 1]
            feature, view, best = agent.encoder(one), agent.vae_encoder(one), []
            latents = [agent.target_policy(feature)]
            if policy == "argmax":
                latents = [noise["candidates"][i, j : j + 1].clamp(-0.5, 0.5) for j in range(3)]
            for latent in latents:
                q1, q2 = agent.target_critic(feature, agent.vae.decode(view, latent))[:, 0].tolist()
                best.append(0.75 * min(q1, q2) + 0.25 * max(q1, q2))
            expected = float(batch.reward[i]) + 0.9 * float(batch.discount[i]) * max(best)
            assert abs(expected - float(target[i])) < 1e-5


def test_bf16_changes_losses_and_gradients_by_rounding_only(env, columns):
    plain, rounded = make_agent(env), make_agent(env, bf16=True)
    batch, noise = make_batch(columns), plain.draw_noise(8)
    a, b = plain.update(batch, noise), rounded.update(batch, noise)
    assert all(abs(float(a[name] - b[name])) < 0.03 * (1.0 + abs(float(a[name]))) for name in a)
    for ours, theirs in zip(rounded.encoder.parameters(), plain.encoder.parameters(), strict=True):
        assert F.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0) > 0.8
    assert {value.dtype for value in rounded.encoder.state_dict().values()} == {torch.float32}
    rounded.critic.q1[-1].bias.data.fill_(500.0)  # where bfloat16's numbers are 2 apart
    action = torch.linspace(-1.0, 1.0, 50)[:, None].expand(-1, 2)
    with rounded.autocast():
        assert len(rounded.critic.first(torch.rand(1, 8).expand(50, -1), action).unique()) > 40


def test_gradient_statistics_draw_from_no_training_stream_and_tell_the_norms(env, columns):
    agent, batch = make_agent(env), make_batch(columns)
    state = torch.get_rng_state()
    noise = agent.draw_noise(8)
    torch.set_rng_state(state)
    gradients = {
        name: torch.cat([part.flatten() for part in parts])
        for name, parts in plain_gradients(agent, batch, noise).items()
    }
    result = plas_pixels.gradient_statistics(agent, batch)
    assert torch.equal(state, torch.get_rng_state())
    for name, gradient in gradients.items():
        assert result[f"encoder_gradient_{name}"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    cosine = F.cosine_similarity(gradients["critic"], gradients["vae"], 0)
    assert result["encoder_gradient_cosine"] == pytest.approx(float(cosine), abs=1e-4)
    separate = make_agent(env, encoder_signal="separate")
    assert "encoder_gradient_cosine" not in plas_pixels.gradient_statistics(separate, batch)


# --- evaluation ---
def test_evaluation_compares_values_with_what_followed():
    args = resolve(Args(env_id="PlasNumberEnv-v0", frame_stack=1, action_repeat=1, num_layers=1, gamma=0.5))
    environments = [make_env(args) for _ in range(2)]
    agent = PLAS(args, environments[0], CPU)
    calls = []

    def act(observation, generator):
        calls.append(len(observation))
        return np.full((len(observation), 1), -1.0, np.float32), observation[:, 0, 0, 0] * 2.0 + 1.0

    agent.act = act
    result = evaluate(agent, environments, 0)
    assert calls == [2] * 5 and result["episodic_return"] == 10.0 and result["episodic_length"] == 5.0
    truth = np.array([2 * (2 - 0.5 ** (4 - t)) for t in range(5)])  # each reward is 2, the fifth step ends it
    error = np.arange(5) * 2.0 + 1.0 - truth
    assert result["q_error"] == pytest.approx(np.square(error).mean())
    assert result["q_bias"] == pytest.approx(error.mean())
    assert result["q_correlation"] == pytest.approx(np.corrcoef(np.arange(5), truth)[0, 1])
    assert result["q_start_error"] == pytest.approx((1 - truth[0]) ** 2)


@pytest.mark.parametrize("gamma, seen, starts", [(0.5, 2, 1), (0.1, 5, 1), (0.9, 0, 0), (1.0, 0, 0), (0.0, 5, 1)])
def test_an_episode_cut_by_time_counts_where_its_future_was_seen(gamma, seen, starts, monkeypatch):
    """Five steps: with 0.5 the fourth from behind has seen 94 % of its future, with 0.9 none has seen enough."""

    class CutByTime(gym.Wrapper):
        def step(self, action):
            observation, reward, terminated, _, info = self.env.step(action)
            return observation, reward, False, terminated, info

    args = resolve(Args(env_id="PlasNumberEnv-v0", frame_stack=1, action_repeat=1, num_layers=1, gamma=gamma))
    cut = CutByTime(make_env(args))
    agent, counted, square = PLAS(args, cut.env, CPU), [], np.square
    monkeypatch.setattr(np, "square", lambda errors: (counted.append(len(errors)), square(errors))[1])
    agent.act = lambda observation, _: (np.zeros((1, 1), np.float32), np.zeros(1))
    result = evaluate(agent, [cut], 0)
    assert counted == [max(seen, 1), max(starts, 1)]  # one nan where there is none
    assert np.isnan(result["q_error"]) == (seen == 0) and np.isnan(result["q_start_error"]) == (starts == 0)


def test_videos_are_of_evaluation_episodes(env, tmp_path, monkeypatch):
    seeds = []
    reset = plas_pixels.PixelEnv.reset
    monkeypatch.setattr(
        plas_pixels.PixelEnv, "reset", lambda self, **named: (seeds.append(named["seed"]), reset(self, **named))[1]
    )
    args = resolve(Args(**SMALL, seed=5))
    paths = plas_pixels.record_videos(make_agent(env), args, tmp_path / "videos")
    assert [path.suffix for path in paths] == [".mp4"] * 3 and all(path.stat().st_size > 1_000 for path in paths)
    assert [seed for seed in seeds if seed] == [plas_pixels.episode_seed(5, i, stream=1) for i in range(3)]
    assert make_env(args).metadata["render_fps"] == 10


def test_evaluation_is_repeatable_and_touches_no_random_stream(env):
    for policy in ("latent", "argmax"):
        agent, environments = make_agent(env, policy=policy), [env]
        state = torch.get_rng_state()
        first = evaluate(agent, environments, 3)
        assert torch.equal(state, torch.get_rng_state())
        assert evaluate(agent, environments, 3) == first and evaluate(agent, environments, 4) != first


def test_the_best_of_the_candidates_is_chosen(env, columns, monkeypatch):
    monkeypatch.setattr(plas_pixels, "ACTING_CANDIDATES", 7)
    agent, batch = make_agent(env, policy="argmax"), make_batch(columns)
    action, value = agent.act(batch.observation.numpy(), torch.Generator().manual_seed(2))
    noise = torch.randn(8, 7, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        actions, features = agent.proposals(batch.observation, agent.policy, noise)
        values = agent.critic.first(features, actions).view(8, 7)
    assert np.allclose(value, values.max(1).values) and np.allclose(
        action, actions.view(8, 7, 2)[torch.arange(8), values.argmax(1)]
    )


def test_the_probe_finds_what_is_linear_in_the_features(env, columns):
    agent, rng = make_agent(env), np.random.default_rng(0)
    pictures = Dataset(columns, 1).batch(torch.arange(400)).observation.numpy()
    with torch.no_grad():
        features = agent.encoder(torch.from_numpy(pictures)).numpy()
    linear = features @ rng.normal(size=(8, 3))
    noise = np.concatenate((linear[:, :1], np.ones((400, 1)), rng.normal(size=(400, 1))), 1)
    assert plas_pixels.linear_probe(agent, pictures, linear) > 0.9
    assert 0.2 < plas_pixels.linear_probe(agent, pictures, noise) < 0.7  # one of the two that vary


# --- learning ---
@pytest.mark.parametrize("policy, steps", [("latent", 1_500), pytest.param("argmax", 2_500, marks=pytest.mark.slow)])
def test_learns_dot_hazard(policy, steps, env, monkeypatch):
    """Random actions return about -2, those of the data 13."""
    torch.manual_seed(0)
    monkeypatch.setattr(plas_pixels, "ACTING_CANDIDATES", 20)
    args = resolve(Args(policy=policy, eval_episodes=20))
    agent, dataset = PLAS(args, env, CPU), Dataset(played(env, "medium", 15_000, 0), 1)
    for _ in range(steps):
        agent.update(dataset.sample(64, 0))
    result = evaluate(agent, [make_env(args) for _ in range(20)], 1)

    assert result["episodic_return"] > 6.0


# --- runs ---
def run(tmp_path, **changes) -> Path:
    return plas_pixels.main(Args(**{**SMALL, "runs_dir": str(tmp_path / "runs"), **changes}))


def ending(folder: Path) -> tuple[str, dict]:
    return (folder / "eval.csv").read_text(), torch.load(folder / "model.pt", weights_only=True)


def same(a: Path, b: Path) -> bool:
    (rows, ours), (others, theirs) = ending(a), ending(b)
    return rows == others and all(torch.equal(ours["agent"][k], theirs["agent"][k]) for k in ours["agent"])


@pytest.fixture(scope="module", autouse=True)
def quick_probe():
    """The probe's pictures are the longest part of so small a run."""
    monkeypatch, real = pytest.MonkeyPatch(), plas_pixels.collect
    monkeypatch.setattr(plas_pixels, "collect", lambda env, steps, *rest, **named: real(
        env, min(steps, 400), *rest, **named
    ))  # fmt: skip
    yield
    monkeypatch.undo()


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Let a run get a signal in its `step`-th update."""
    real, count = PLAS.update, [0]

    def update(*args, **named):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return real(*args, **named)

    monkeypatch.setattr(PLAS, "update", update)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"encoder_signal": "separate", "policy": "argmax"}, {"encoder_signal": "reconstruction"},
        {"layer_norm": True},
    ],
)  # fmt: skip
def test_a_stopped_run_ends_as_if_never_stopped(changes, tmp_path, monkeypatch):
    whole = run(tmp_path, run_name="whole", random_shift=2, **changes)
    assert len((whole / "eval.csv").read_text().splitlines()) == 3
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, run_name="stopped", random_shift=2, **changes)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert same(whole, run(tmp_path, run_name="stopped", random_shift=2, resume=True, **changes))


def test_a_killed_run_ends_as_if_never_killed(tmp_path, monkeypatch):
    whole = run(tmp_path, run_name="whole")
    child = os.fork()
    if not child:  # the fork is killed in the middle of an update, after a checkpoint and an evaluation
        stop_at(monkeypatch, 27, signal.SIGKILL)
        run(tmp_path, run_name="killed")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert same(whole, run(tmp_path, run_name="killed", resume=True))


AGENT_KEYS = ["encoder", "vae_encoder", "critic", "vae", "policy", "target_critic", "target_policy"]
CHECKPOINT_KEYS = [
    "script", "arguments", "step", "eval_rows", "finished", "torch_rng", "cuda_rng", "agent", "dataset", "levels",
    "encoder_optimizer", "critic_optimizer", "vae_optimizer", "policy_optimizer",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, quick_probe) -> tuple[Path, Path]:
    """A folder with a whole run's outcome, and one with that of the same run, stopped in its 27th update."""
    folder, here = tmp_path_factory.mktemp("stopped"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        whole = run(folder, run_name="whole", encoder_signal="separate")
        stop_at(patch, 27, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(folder, run_name="run", encoder_signal="separate")
    os.chdir(here)
    return whole, folder


@pytest.mark.parametrize("key", [None, *CHECKPOINT_KEYS, *(f"agent/{key}" for key in AGENT_KEYS)])
def test_nothing_can_be_left_out_of_a_checkpoint(key, stopped, tmp_path, capsys):
    whole, folder = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert set(state) == set(CHECKPOINT_KEYS)
    assert {name.partition(".")[0] for name in state["agent"]} == set(AGENT_KEYS)
    part, _, inner = (key or "").rpartition("/")
    if part:
        del state["agent"][next(name for name in state["agent"] if name.startswith(f"{inner}."))]
    elif key:
        del state[key]
    torch.save(state, path)
    if key is None:
        assert same(whole, run(tmp_path, run_name="run", encoder_signal="separate", resume=True))
        return
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, run_name="run", encoder_signal="separate", resume=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "checkpoint.pt is damaged" in line and (part or inner in line)


def test_a_run_goes_on_with_its_own_dataset_only(tmp_path, monkeypatch, capsys, dataset):
    own = tmp_path / "own.npz"
    shutil.copy(dataset, own)
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path, run_name="stopped", dataset=str(own))
    columns = dict(np.load(own))
    columns["reward"][5] += 1.0
    np.savez(own, **columns)
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, run_name="stopped", dataset=str(own), resume=True)
    assert refused.value.code == 2 and "not the dataset" in capsys.readouterr().err


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch):
    whole = run(tmp_path, run_name="whole")
    for resume in (False, True):  # the resumed run's evaluation is interrupted, too
        with monkeypatch.context() as patch:
            real, calls = PLAS.act, []

            def act(self, observation, generator, calls=calls, real=real):
                calls.append(len(observation))
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(self, observation, generator)

            patch.setattr(PLAS, "act", act)
            with pytest.raises(SystemExit) as stopped:
                run(tmp_path, run_name="stopped", resume=resume)
        assert stopped.value.code == 128 + signal.SIGTERM and len(calls) == 3
        state = torch.load(tmp_path / "runs" / "stopped" / "checkpoint.pt", weights_only=True)
        assert state["step"] == 20 and state["eval_rows"] == []  # so that it is still due
    assert same(whole, run(tmp_path, run_name="stopped", resume=True))


def test_a_signal_before_the_first_step_stops_at_once(tmp_path, monkeypatch):
    whole = run(tmp_path, run_name="whole")
    real, episodes = plas_pixels.play, []

    def play(*args):
        episodes.append(1)
        if len(episodes) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(plas_pixels, "reference_levels", (lambda levels: lambda *rest: (
            patch.setattr(plas_pixels, "play", play), levels(*rest)
        )[1])(plas_pixels.reference_levels))  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, run_name="stopped")
    assert stopped.value.code == 128 + signal.SIGTERM and len(episodes) == 1
    assert not (tmp_path / "runs" / "stopped" / "checkpoint.pt").exists()
    assert same(whole, run(tmp_path, run_name="stopped", resume=True))


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_runs_and_leaves_its_pictures(name, tmp_path):
    folder = run(tmp_path, run_name=name, encoder_signal=name, total_timesteps=4, pretrain_steps=2)
    assert (folder / "learning_curve.png").stat().st_size > 1_000
    assert (folder / "reconstruction.png").exists() == (name == "reconstruction")
    names = (folder / "eval.csv").read_text().splitlines()[0].split(",")
    assert {"q_error", "q_bias", "q_correlation", "prior_action_error", "probe_r2", "behaviour_return"} <= set(names)


def refused(capsys, tmp_path, **changes) -> str:
    with pytest.raises(SystemExit) as error:
        run(tmp_path, **changes)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()
    return lines[0]


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"env_id": "DotHazzard-v0"}, "did you mean DotHazard-v0"),
        ({"env_id": "PlasDiscreteEnv-v0"}, "expected a Box action space"),
        ({"env_id": "PlasBlindEnv-v0"}, "cannot be drawn and played"),
        ({"num_layers": 8}, "too small for --num-layers 8"),
        ({"dataset": "nowhere.npz"}, "there is no dataset nowhere.npz"),
        ({"dataset": "new", "collect": "best"}, "expected random; benchmark/plas_data.py --collect"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"gamma": 1.5}, "--gamma 1.5: expected a number of at most 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"pretrain_steps": 40}, "--pretrain-steps 40 of --total-timesteps 40: critics and policy would learn nothing"),
        ({"random_shift": 28}, "--random-shift 28: expected less than the pictures' 28"),
        ({"resume": True}, "--resume needs the --run-name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_refused_with_a_line(changes, part, tmp_path, capsys):
    if "resume" in changes:  # looked for after the dataset
        with pytest.raises(SystemExit) as error:
            run(tmp_path, **changes)
        assert error.value.code == 2 and part in capsys.readouterr().err
    else:
        assert part in refused(capsys, tmp_path, **changes)


# --- what users' environments do (issue 24's kinds) ---
class PointEnv(RenderedEnv):
    """Sound: 5 steps, actions in [-1, 1]."""

    space = gym.spaces.Box(-1.0, 1.0, (1,))
    sent: list = []  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.action_space = self.space

    def step(self, action):
        self.sent.append(action)
        observation, _, terminated, truncated, info = super().step(np.asarray(action, float))
        return observation, self.reward(), terminated, truncated, info

    def reward(self):
        return 1.0


class WholeEnv(PointEnv):
    space = gym.spaces.Box(0, 4, (1,), np.int64)


class UnboundedEnv(PointEnv):
    space = gym.spaces.Box(-1e10, 1e10, (1,), np.float64)


class FourChannelsEnv(PointEnv):
    def render(self):
        return np.zeros((50, 30, 4), np.uint8)


class RewardArrayEnv(PointEnv):
    def reward(self):
        return np.array([1.0])


class OldStepEnv(PointEnv):
    def step(self, action):
        return super().step(action)[:4]


class OnePortEnv(PointEnv):
    made = 0

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        OnePortEnv.made += 1
        if OnePortEnv.made == 2:
            raise OSError("port 5000 is in use")


class NanEnv(PointEnv):
    """Its fourth step's reward is no number: the probe does not see it."""

    def reward(self):
        return float("nan") if self.count == 4 else 1.0


class EndlessEnv(PointEnv):
    def step(self, action):
        self.count = 0
        return super().step(action)

    def render(self):
        return np.zeros((4, 4, 3), np.uint8)


for entry in (
    PointEnv,
    WholeEnv,
    UnboundedEnv,
    FourChannelsEnv,
    RewardArrayEnv,
    OldStepEnv,
    OnePortEnv,
    NanEnv,
    EndlessEnv,
):
    gym.register(f"Odd{entry.__name__}-v0", entry)
ODD = {
    "image_size": 12, "num_layers": 1, "action_repeat": 1, "frame_stack": 1, "random_shift": 0, "total_timesteps": 4,
    "collect": "random", "collect_steps": 20, "dataset": "odd",
}  # fmt: skip


def test_whole_actions_are_rounded():
    env = make_env(resolve(Args(env_id="OddWholeEnv-v0", **ODD)))
    env.reset(seed=0)
    PointEnv.sent.clear()
    for action in (-1.0, -0.7, 0.0, 0.7, 0.8, 1.0):
        env.step(np.array([action], np.float32))
    assert [int(action[0]) for action in PointEnv.sent] == [0, 1, 2, 3, 4, 4]
    assert {action.dtype for action in PointEnv.sent} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    "name, part",
    [
        ("Unbounded", "expected a Box action space with bounds below 1e+06"),
        ("FourChannels", "expected a picture (height, width, 3) uint8, got (50, 30, 4)"),
        ("OldStep", "cannot be drawn and played"),
        ("OnePort", "could not make OddOnePortEnv-v0: OSError: port 5000 is in use"),
        ("Endless", "100,000 steps without an end, in the episode with reset seed"),
    ],
)
def test_an_odd_environment_is_refused_before_anything_is_created(name, part, tmp_path, capsys, monkeypatch):
    reset = plas_pixels.Door.reset

    def late(self, **named):  # so that 100,000 steps are soon over
        result = reset(self, **named)
        self.steps = 99_900
        return result

    monkeypatch.setattr(plas_pixels.Door, "reset", late)
    line = refused(capsys, tmp_path, **ODD, env_id=f"Odd{name}Env-v0")
    assert part in line and ("--max-episode-steps" in line) == (name == "Endless")
    assert not list(tmp_path.iterdir())


def test_an_endless_environment_can_be_cut_off(tmp_path):
    folder = run(tmp_path, **ODD, env_id="OddEndlessEnv-v0", max_episode_steps=7)
    assert "7.0" in (folder / "eval.csv").read_text().splitlines()[1].split(",")
    columns = np.load(tmp_path / "odd.npz")
    assert np.diff(columns["is_first"].nonzero()[0]).tolist() == [8, 8] and columns["discount"].all()


def test_a_reward_in_an_array_is_a_reward(tmp_path):
    folder = run(tmp_path, **ODD, env_id="OddRewardArrayEnv-v0", gamma=0.9)
    assert np.load(tmp_path / "odd.npz")["reward"].shape == (24,)
    assert (folder / "eval.csv").read_text().splitlines()[1].split(",")[1] == "5.0"


def test_a_reward_that_is_no_number_ends_a_run_with_a_line(tmp_path, capsys):
    run(tmp_path, **ODD, env_id="OddPointEnv-v0", run_name="point")
    columns = dict(np.load(tmp_path / "odd.npz"))
    np.savez(tmp_path / "odd.npz", **columns | {"env_id": "OddNanEnv-v0", "first_seed": 0})
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, **{**ODD, "collect": None}, env_id="OddNanEnv-v0", run_name="nan")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith("error: reward nan is not a finite number") and "in the episode with reset seed" in line


def test_a_file_that_is_there_is_named_and_compared(tmp_path, capsys, monkeypatch):
    run(tmp_path, **ODD, env_id="OddPointEnv-v0")
    assert "collecting 20 steps (random) into odd.npz" in capsys.readouterr().out
    run(tmp_path, **ODD, env_id="OddPointEnv-v0", seed=2)
    output = capsys.readouterr()
    assert "using odd.npz, collected by random; remove it to collect it anew" in output.out and not output.err
    monkeypatch.setattr(PointEnv, "reward", lambda self: 2.0)
    run(tmp_path, **ODD, env_id="OddPointEnv-v0", seed=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: OddPointEnv-v0 no longer reproduces odd.npz") and "remove that file" in line


def test_what_fails_after_the_training_is_a_warning(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "no such sign")

    monkeypatch.setattr(plas_pixels, "record_videos", fail)
    folder = run(tmp_path, run_name="videos", total_timesteps=4, capture_video=True)
    assert "warning: film failed (UnicodeEncodeError" in capsys.readouterr().out
    assert (folder / "model.pt").exists() and (folder / "learning_curve.png").exists()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, run_name="videos", total_timesteps=4, capture_video=True, resume=True)
    assert ended.value.code == 0 and "is finished" in capsys.readouterr().out


# --- files and sizes ---
@pytest.mark.parametrize("failing", ["write_atomically", "collect"])
def test_a_dataset_that_is_not_written_whole_is_not_there(failing, tmp_path, capsys, monkeypatch):
    if failing == "collect":

        def collecting(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(plas_pixels, "collect", collecting)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **ODD, env_id="OddPointEnv-v0")
    else:

        def full(path, _):
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(plas_pixels, "write_atomically", full)
        assert "cannot read or write odd.npz: No space left on device" in refused(
            capsys, tmp_path, **ODD, env_id="OddPointEnv-v0"
        )
    assert not list(tmp_path.iterdir())


def test_a_signal_while_collecting_leaves_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--env", "Pendulum-v1", "--dataset", "new", "--collect", "random"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in the background it is ignored
    with subprocess.Popen([*command, "--collect-steps", "100000"], cwd=tmp_path, **pipes, **listen) as process:
        assert process.stdout.readline().startswith("collecting")
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 130 and "Traceback" not in errors and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "locked"])
def test_a_dataset_that_cannot_be_looked_at_is_refused(name, tmp_path, capsys, monkeypatch):
    if name == "locked":
        (tmp_path / "locked").mkdir()

        def locked(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, dataset=name)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: cannot read or write {name}: ")


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"hidden_dim": 10**6}, "--hidden-dim"), ({"batch_size": 10**8}, "--batch-size"),
        ({"image_size": 10**6}, "--image-size"), ({"eval_episodes": 10**9}, "--eval-episodes"),
        ({"collect": "random", "collect_steps": 10**9}, "--collect-steps"), ({"frame_stack": 10**9}, "--frame-stack"),
        ({"policy": "argmax", "candidates": 10**9}, "--candidates"), ({"num_filters": 10**6}, "--num-filters"),
        ({"feature_dim": 10**8}, "--feature-dim"), ({"num_layers": 10**9}, "--num-layers"),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_memory_holds_are_refused(changes, flag, tmp_path, capsys):
    line = refused(capsys, tmp_path, **changes)
    assert flag in line and "GiB of memory, and this machine has" in line


@pytest.mark.parametrize("changes", [{"learning_rate": 1e39}, {"kl_weight": 1e39}, {"seed": 2**64}], ids=str)
def test_numbers_are_checked_as_what_they_become(changes, tmp_path, capsys):
    assert "a number of at most" in refused(capsys, tmp_path, **changes)


def test_data_of_another_task_are_refused(env, columns, tmp_path):
    np.savez(tmp_path / "data.npz", env_id="DotHazard-v0", **columns)
    assert len(load(tmp_path / "data.npz", env)[0].rows) == 400
    np.savez(tmp_path / "data.npz", env_id="DotOther-v0", **columns)
    with pytest.raises(ValueError, match="was made with --env-id DotOther-v0, but this run differs"):
        load(tmp_path / "data.npz", env)


def test_data_of_another_camera_are_refused(env, columns, tmp_path):
    """dm_control alone has several; what is collected, and what sac_ae_pixels.py saves, names its own."""
    plas_pixels.write_columns(tmp_path / "data.npz", env, columns)
    _, _, made_with = load(tmp_path / "data.npz", env)
    assert made_with["camera"] == env.args.camera == 0
    task = SimpleNamespace(size=env.size, args=replace(env.args), spec=SimpleNamespace(id="dm_control/a-v0"))
    made_with["env_id"] = "dm_control/a-v0"
    plas_pixels.check_settings(tmp_path / "data.npz", made_with, task)
    task.args.camera = 1
    with pytest.raises(ValueError, match=r"data\.npz was made with --camera 0, but this run differs"):
        plas_pixels.check_settings(tmp_path / "data.npz", made_with, task)
    del made_with["camera"]  # an older file does not say it
    plas_pixels.check_settings(tmp_path / "data.npz", made_with, task)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_collected(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(plas_pixels, "collect", lambda *_, **__: pytest.fail("collected"))
    line = refused(capsys, tmp_path, dataset="file/new.npz", collect="random")
    assert "cannot read or write file/new.npz" in line


def test_tasks_of_dm_control_have_short_names():
    for short, name, repeat in (
        ("finger-spin", "dm_control/finger-spin-v0", 2), ("cartpole-swingup", "dm_control/cartpole-swingup-v0", 8),
        ("dm_control/ball_in_cup-catch-v0", "dm_control/ball_in_cup-catch-v0", 4), ("Pendulum-v1", "Pendulum-v1", 2),
    ):  # fmt: skip
        args = resolve(Args(env_id=short))
        assert (args.env_id, args.action_repeat) == (name, repeat)
    assert resolve(Args(env_id="quadruped-walk")).camera == 2


def test_dm_control_that_cannot_be_imported_is_an_error_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    line = refused(capsys, tmp_path, env_id="finger-spin")
    assert "needs dm_control" in line and "try pip install 'shimmy[dm-control]'" in line


def test_an_unknown_signal_is_refused_by_the_command_line():
    command = [sys.executable, str(SCRIPT), "--encoder-signal", "q"]
    result = subprocess.run(command, capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: --encoder-signal q: expected one of critic, vae, both")


def test_everything_through_the_command_line(tmp_path):
    """A copy of the script alone, on a third party's environment, with video and tracking."""
    shutil.copy(SCRIPT, tmp_path / "mine.py")
    (tmp_path / "third_party.py").write_text(
        "import gymnasium as gym\ngym.register('Third-v0', 'gymnasium.envs.classic_control:PendulumEnv', "
        "max_episode_steps=12)\n"
    )
    command = [
        sys.executable, "mine.py", "--env", "third_party:Third-v0", "--dataset", "data/third", "--collect", "random",
        "--collect-steps", "60", "--total-timesteps", "4", "--eval-episodes", "1", "--image-size", "32",
        "--num-filters", "2", "--batch-size", "4", "--capture-video", "--track", "--run-name", "third",
    ]  # fmt: skip
    environment = {**os.environ, "WANDB_MODE": "offline", "SDL_VIDEODRIVER": "dummy"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "third"
    assert len(list((folder / "videos").glob("*.mp4"))) == 3 and (tmp_path / "data" / "third.npz").exists()
    assert json.loads((folder / "args.json").read_text())["arguments"]["batch_size"] == 4
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_networks_are_copied_into_targets_once(env):
    agent = make_agent(env)
    assert not moved(weights(agent.critic), agent.target_critic) - {False}
    assert not any(p.requires_grad for p in [*agent.target_critic.parameters(), *agent.target_policy.parameters()])
    assert copy.deepcopy(agent.encoder)(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape == (2, 8)
