"""The hybrid-action environments: equal to the original ones, and good Gymnasium citizens."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs  # noqa: E402, F401
from envs.goal import SCALE_HIGH, SCALE_LOW  # noqa: E402
from envs.hybrid import HybridEnv  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
ALL_ROWS = ROOT.parent / "shared" / "golden" / "hyar"

FILES = {  # golden file -> id, keyword arguments
    "platform": ("Platform-v0", {}),
    "goal": ("Goal-v0", {}),
    "hard_goal": ("HardGoal-v0", {}),
    "catch_point": ("CatchPoint-v0", {}),
    "hard_move_n4": ("HardMove-v0", {"n": 4}),
    "hard_move_n10": ("HardMove10-v0", {}),
    "simple_move": ("SimpleMove-v0", {}),
}
IDS = [
    "Platform-v0",
    "Goal-v0",
    "HardGoal-v0",
    "CatchPoint-v0",
    "HardMove-v0",
    "HardMove4-v0",
    "HardMove6-v0",
    "HardMove8-v0",
    "HardMove10-v0",
    "SimpleMove-v0",
]
PER_ACTION_IDS = IDS[:4]
SHARED_IDS = IDS[4:]


def make(env_id: str, **kwargs) -> HybridEnv:
    return gym.make(env_id, **kwargs).unwrapped


def array(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64)


# --- equality with the original implementations ---


class Stream:
    """Recorded raw draws in the place of an environment's noise."""

    def __init__(self, env: HybridEnv, draws: np.ndarray) -> None:
        self.draws, self.used = draws.astype(np.float64).tolist(), 0
        env._normal, env._uniform = self.normal, self.uniform

    def normal(self, sigma: float) -> float:
        self.used += 1
        return sigma * self.draws[self.used - 1]

    def uniform(self, low: float, high: float) -> float:
        self.used += 1
        return low + (high - low) * self.draws[self.used - 1]


def recorded_action(name: str, data: dict[str, np.ndarray], row: int) -> tuple[int, np.ndarray]:
    """Return a golden row's action, in the form with only the chosen action's parameters."""
    index = int(data["hard_action" if name == "hard_goal" else "action"][row])
    if name == "platform":
        return index, data["params"][row, index : index + 1]
    if name == "goal":
        return index, data["params"][row][((0, 1), (2,), (3,))[index],]
    if name == "hard_goal":
        return index, data["hard_params"][row, : 1 if index else 2]
    if name == "catch_point" and index == 1:
        return index, array()
    return index, data["param"][row : row + 1]


def in_full(env: HybridEnv, action: tuple[int, np.ndarray]) -> tuple:
    """Return the same action in the form that the action space samples."""
    index, chosen = action
    space = env.action_space[1]
    if isinstance(space, gym.spaces.Box):
        return action
    parameters = [box.sample() for box in space]
    parameters[index] = chosen
    return index, tuple(parameters)


def compare(name: str, path: Path, expected_rows: int | None) -> None:
    with np.load(path) as file:
        data = dict(file)
    rows = len(data["state"])
    assert expected_rows is None or rows == expected_rows
    env_id, kwargs = FILES[name]
    env = make(env_id, **kwargs)
    counters = [key for key in ("time", "valid_time", "ep_step") if key in data]
    # The original works in float32 for Hard Goal's parameters.
    tolerance = 2e-6 if name == "hard_goal" else 1e-9
    for row in range(rows):
        where = f"{name}, row {row}"
        draws = np.zeros(0)
        if "draws" in data:
            draws = data["draws"][slice(*data["draw_offsets"][row : row + 2])]
        stream = Stream(env, draws)
        env.set_state({key: data[key][row] for key in ("state", *counters)})
        if "obs" in data:
            assert np.abs(env._observe() - data["obs"][row]).max() < 1e-6, where
        action = recorded_action(name, data, row)
        observation, reward, terminated, truncated, info = env.step(in_full(env, action) if row % 2 else action)
        state = env.get_state()

        assert np.abs(state["state"] - data["next_state"][row]).max() <= tolerance, where
        assert abs(reward - data["reward"][row]) <= tolerance, where
        if "truncated" in data:
            assert (terminated, truncated) == (data["terminated"][row], data["truncated"][row]), where
        elif "next_time" in data:  # recorded before there was a difference between the two
            assert (terminated or truncated) == data["terminated"][row], where
            assert truncated == (data["next_time"][row] == 100), where
        else:
            assert (terminated, truncated) == (data["terminated"][row], False), where
        assert info["substeps"] == (data["substeps"][row] if "substeps" in data else 1), where
        assert stream.used == len(draws), where
        for key in counters:
            following = data[f"next_{key}"][row] if f"next_{key}" in data else data[key][row] + 1
            assert state[key] == following, where
        if "success" in data:
            assert info.get("is_success", False) == data["success"][row], where
        if "next_obs" in data:
            assert np.abs(observation - data["next_obs"][row]).max() < 1e-6, where
        if "next_obs17" in data and row < len(data["next_obs17"]):
            assert np.abs(observation - data["next_obs17"][row]).max() < 1e-6, where
            scaled = 2 * (observation - env.scale_low) / (env.scale_high - env.scale_low) - 1
            assert np.abs(scaled - data["next_obs17_scaled"][row]).max() < 1e-6, where


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    compare(name, GOLDEN / f"hyar_{name}.npz", 300)


@pytest.mark.skipif(not ALL_ROWS.is_dir(), reason="only 300 rows of each golden file are in the repository")
@pytest.mark.parametrize("name", FILES)
def test_golden_all_rows(name: str) -> None:
    compare(name, ALL_ROWS / f"{name}.npz", None)


@pytest.mark.parametrize("name", ["hard_move_n4", "hard_move_n10"])
def test_motions(name: str) -> None:
    env_id, kwargs = FILES[name]
    with np.load(GOLDEN / f"hyar_{name}.npz") as data:
        assert np.abs(np.array(make(env_id, **kwargs)._motions) - data["motions"]).max() < 1e-12


def test_goal_scale() -> None:
    with np.load(GOLDEN / "hyar_goal.npz") as data:
        assert np.abs(SCALE_LOW - data["obs17_low"]).max() < 1e-6
        assert np.abs(SCALE_HIGH - data["obs17_high"]).max() < 1e-6


def test_goal_starts_as_the_original() -> None:
    with np.load(GOLDEN / "hyar_goal.npz") as data:
        state, time = data["state"], data["time"]
    starts = state[(time == 0) & (state[:, 0] == 0) & (state[:, 2] == 0)]
    assert len(starts) > 100
    env = make("Goal-v0")
    for start in starts:
        env._uniform = lambda low, high, y=start[1]: y
        env._start()
        assert np.abs(env.get_state()["state"] - start).max() < 1e-9


# --- Gymnasium's rules ---


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
@pytest.mark.parametrize("env_id", IDS)
def test_check_env(env_id: str, render_mode: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A recommendation that parameters in an environment's own units can't follow.
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space")
        check_env(make(env_id, render_mode=render_mode))


@pytest.mark.parametrize("env_id", IDS)
def test_action_space(env_id: str) -> None:
    discrete, parameters = make(env_id).action_space
    if env_id in SHARED_IDS:
        assert isinstance(parameters, gym.spaces.Box) and parameters.shape == (1,)
        return
    assert len(parameters) == discrete.n
    assert all(box.dtype == np.float32 for box in parameters)
    shapes = [box.shape for box in parameters]
    assert (
        shapes
        == {
            "Platform-v0": [(1,)] * 3,
            "Goal-v0": [(2,), (1,), (1,)],
            "HardGoal-v0": [(2,)] + [(1,)] * 10,
            "CatchPoint-v0": [(1,), (0,)],
        }[env_id]
    )


def test_number_of_actuators() -> None:
    assert make("HardMove-v0").action_space[0].n == 16
    for n in (4, 6, 8, 10):
        assert make(f"HardMove{n}-v0").action_space[0].n == make("HardMove-v0", n=n).action_space[0].n == 2**n
    with pytest.raises(ValueError, match=r"1\.\.16"):
        gym.make("HardMove-v0", n=0)


def test_unknown_render_mode() -> None:
    with pytest.raises(ValueError, match="rgb_array"):
        type(make("Platform-v0"))(render_mode="human")


@pytest.mark.parametrize("env_id", IDS)
def test_observations_stay_in_their_space(env_id: str) -> None:
    """Under extreme parameters too; infos say how each episode ended."""
    env, rng = make(env_id), np.random.default_rng(1)
    env.action_space.seed(1)
    env.reset(seed=1)
    for step in range(1500):
        index, parameters = env.action_space.sample()
        if step % 3 == 0:  # to a corner of the parameter space, and beyond
            sign = rng.choice([-1e9, 1e9])
            parameters = sign + (parameters if env_id in SHARED_IDS else parameters[index])
        observation, reward, terminated, truncated, info = env.step((index, parameters))
        assert observation.dtype == np.float32 and observation in env.observation_space
        assert type(reward) is float and math.isfinite(reward)
        assert ("is_success" in info) == (terminated or truncated)
        assert not (terminated and truncated)
        if terminated or truncated:
            env.reset()


# --- seeds ---


def play(env: HybridEnv, seed: int, steps: int = 40) -> list:
    """Play with the same actions each time; goes on to the next episode at the end of one."""
    env.action_space.seed(5)
    seen = [env.reset(seed=seed)[0].tolist()]
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        seen.append([observation.tolist(), reward, terminated, truncated, info])
        if terminated or truncated:
            seen.append(env.reset()[0].tolist())
    return seen


@pytest.mark.parametrize("env_id", IDS)
def test_seeds(env_id: str) -> None:
    env = make(env_id)
    first = play(env, 3)
    assert play(env, 3) == first
    assert play(make(env_id), 3) == first
    assert play(env, 4) != first


@pytest.mark.parametrize("env_id", IDS)
def test_an_episode_is_replayed_from_its_seed(env_id: str) -> None:
    """Whatever was played before, and up to the middle of an episode: so that a run can be resumed."""
    env, other = make(env_id), make(env_id)
    play(other, 0, steps=7)
    env.reset(seed=12)
    actions = []
    over = False
    while not over and len(actions) < 12:
        actions.append(env.action_space.sample())
        *_, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    other.reset(seed=12)
    for action in actions:
        other.step(action)
    assert same_state(env, other)
    if not over:
        action = env.action_space.sample()
        assert str(env.step(action)) == str(other.step(action))


def test_noise_has_the_right_distribution() -> None:
    env = make("Platform-v0")
    env.reset(seed=0)
    normals = np.array([env._normal(2.0) for _ in range(20_000)])
    uniforms = np.array([env._uniform(-3.0, 5.0) for _ in range(20_000)])
    assert abs(normals.mean()) < 0.05 and abs(normals.std() - 2.0) < 0.05
    assert abs(uniforms.mean() - 1.0) < 0.07 and uniforms.min() >= -3.0 and uniforms.max() < 5.0
    assert len(np.unique(normals)) == len(np.unique(uniforms)) == 20_000


# --- state ---


def same_state(one: HybridEnv, other: HybridEnv) -> bool:
    first, second = one.get_state(), other.get_state()
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("env_id", IDS)
def test_state_round_trip_in_mid_episode(env_id: str) -> None:
    env, other = make(env_id), make(env_id)
    for seed in range(20):
        env.reset(seed=seed)
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            continue
        state = env.get_state()
        other.set_state(state)
        assert same_state(env, other)
        assert np.array_equal(env._observe(), other._observe())
        Stream(env, np.linspace(0.01, 0.99, 10_000))
        Stream(other, np.linspace(0.01, 0.99, 10_000))
        action = env.action_space.sample()
        assert str(env.step(action)) == str(other.step(action))
        assert same_state(env, other)
        other.set_state(state)  # what get_state returned did not change meanwhile
        assert not same_state(env, other)
        del env._normal, env._uniform, other._normal, other._uniform


def test_bad_states() -> None:
    env = make("Platform-v0")
    state = env.get_state()
    for bad, words in (
        ({**state, "velocity": 1}, "velocity"),
        ({"ep_step": 3}, "names"),
        ({"state": np.zeros(9)}, "10 finite"),
        ({"state": np.full(10, np.nan)}, "10 finite"),
    ):
        with pytest.raises(ValueError, match=words):
            env.set_state(bad)


# --- actions ---

GOOD = {
    "Platform-v0": (1, array(100)),
    "Goal-v0": (1, array(2)),
    "HardGoal-v0": (3, array(0.5)),
    "CatchPoint-v0": (0, array(0.5)),
}


@pytest.mark.parametrize("env_id", IDS)
def test_bad_actions(env_id: str) -> None:
    env = make(env_id)
    index, chosen = GOOD.get(env_id, (1, array(0.5)))
    size = env.action_space[0].n
    cases = [
        (None, "pair"),
        (3, "pair"),
        ((index,), "pair"),
        ((index, chosen, 0), "pair"),
        ((size, chosen), f"0..{size - 1}, got {size}"),
        ((-1, chosen), "got -1"),
        ((0.5, chosen), "integer"),
        ((None, chosen), "integer"),
        ((index, array(0, 0, 0)), r"shape \(1,\), got \(3,\)"),
        ((index, np.zeros((1, 1))), r"got \(1, 1\)"),
        ((index, np.array(0.5)), r"got \(\)"),
        ((index, array(np.nan)), "finite"),
        ((index, array(np.inf)), "finite"),
        ((index, np.array(["a"])), "numbers"),
    ]
    if env_id in PER_ACTION_IDS:
        full = in_full(env, (index, chosen))[1]
        cases += [
            ((index, full[:-1]), f"tuple of {size} arrays"),
            ((index, 0.5), f"tuple of {size} arrays"),
            ((index, tuple(np.zeros(7) for _ in full)), r"got \(7,\)"),
            ((index, tuple(array(np.nan) for _ in full)), "finite"),
        ]
    env.reset(seed=0)
    before = env.get_state()
    for action, words in cases:
        with pytest.raises(ValueError, match=words):
            env.step(action)
    assert all(np.array_equal(before[key], value) for key, value in env.get_state().items())
    env.step((index, chosen))


@pytest.mark.parametrize("env_id", IDS)
def test_forms_of_an_action(env_id: str) -> None:
    """Integers and arrays of several types, and both forms of the parameters, mean the same."""
    index, chosen = GOOD.get(env_id, (1, array(0.5)))
    results = []
    env = make(env_id)
    for form in (
        (index, chosen),
        [np.int64(index), chosen.astype(np.float32)],
        (np.array(index), chosen),
        in_full(env, (index, chosen)),
        (index, list(in_full(env, (index, chosen))[1])),
    ):
        env.reset(seed=1)
        results.append(str(env.step(form)))
    assert len(set(results)) == 1


@pytest.mark.parametrize("env_id", IDS)
def test_parameters_are_clipped(env_id: str) -> None:
    index, _ = GOOD.get(env_id, (1, None))
    env = make(env_id)
    low, high = env._parameter_bounds[index][0]
    for outside, bound in ((high + 1.0, high), (1e30, high), (low - 1.0, low), (-1e30, low)):
        results = []
        for value in (outside, bound):
            env.reset(seed=1)
            results.append(str(env.step((index, array(value)))))
        assert results[0] == results[1]


# --- the end of an episode ---


def last_step(env: HybridEnv, state: dict, action: tuple) -> tuple[bool, bool, dict, float]:
    env.set_state(state)
    _, reward, terminated, truncated, info = env.step(action)
    return terminated, truncated, info, reward


def test_platform_time_limit() -> None:
    env = make("Platform-v0")
    env.reset(seed=0)
    start = env.get_state()["state"]
    stand = (0, array(0))
    assert last_step(env, {"state": start, "ep_step": 198}, stand)[:2] == (False, False)
    terminated, truncated, info, _ = last_step(env, {"state": start, "ep_step": 199}, stand)
    assert (terminated, truncated, info) == (False, True, {"substeps": 20, "is_success": False})
    end = start.copy()
    end[0] = 1030.0
    terminated, truncated, info, reward = last_step(env, {"state": end, "ep_step": 199}, (0, array(30)))
    assert (terminated, truncated, info["is_success"]) == (True, False, True)
    assert reward == pytest.approx(5.0 / 1035.0)


def test_platform_deaths() -> None:
    env = make("Platform-v0")
    env.reset(seed=0)
    state = env.get_state()["state"]
    state[[0, 4]] = 225.0, 30.0  # off the edge, the enemy far away
    terminated, truncated, info, reward = last_step(env, {"state": state}, (0, array(30)))
    assert (terminated, truncated, info["is_success"]) == (True, False, False) and reward > 0
    state[[0, 4]] = 100.0, 125.0  # into the enemy
    terminated, _, info, _ = last_step(env, {"state": state}, (0, array(30)))
    assert terminated and info["substeps"] < 20


@pytest.mark.parametrize("env_id", ["Goal-v0", "HardGoal-v0"])
def test_goal_time_limit(env_id: str) -> None:
    env = make(env_id)
    env.reset(seed=0)
    start = env.get_state()["state"]
    terminated, truncated, info, reward = last_step(env, {"state": start, "time": 99}, GOOD[env_id])
    assert (terminated, truncated, info) == (False, True, {"substeps": 0, "is_success": False})
    assert np.array_equal(env.get_state()["state"], start) and env.get_state()["time"] == 100
    ball = start[10:12]
    nearest = min(max(ball[1], -7.01), 7.01)
    expected = 20 - ball[0] if nearest == ball[1] else math.dist(ball, (20, nearest))
    assert reward == pytest.approx(-expected)
    assert last_step(env, {"state": start, "time": 98}, GOOD[env_id])[1] is False


@pytest.mark.parametrize("env_id", ["CatchPoint-v0", *SHARED_IDS])
def test_point_mass_time_limit(env_id: str) -> None:
    env = make(env_id)
    limit = 25 if env_id == "CatchPoint-v0" else 30
    far, near = array(-1, -1, 0, 0, 1, 1), array(1, 1, 0, 0, 1, 1)
    stay = (1, array()) if env_id == "CatchPoint-v0" else (0, array(0))
    assert last_step(env, {"state": far, "ep_step": limit - 2}, stay)[:2] == (False, False)
    assert last_step(env, {"state": far, "ep_step": limit - 1}, stay)[:2] == (False, True)
    terminated, truncated, info, reward = last_step(env, {"state": near, "ep_step": limit - 1}, stay)
    assert (terminated, truncated, info["is_success"], reward) == (True, False, True, 20.0)


def test_catch_point_runs_out_of_tries() -> None:
    env = make("CatchPoint-v0")
    env.set_state({"state": array(-1, -1, 0, 0, 1, 1)})
    for tries in range(1, 12):
        _, reward, terminated, _, _ = env.step((1, array()))
        assert reward == -8.0 and not terminated and env.get_state()["valid_time"] == tries
    _, reward, terminated, truncated, info = env.step((0, array(0)))
    assert (reward, terminated, truncated, info["is_success"]) == (0.0, True, False, False)


def test_oddities_on_which_published_results_depend() -> None:
    goal, hard = make("Goal-v0"), make("HardGoal-v0")
    assert goal._target(0, [3.0, -9.0]) == (False, 3.0, 3.0)
    assert goal._target(1, [2.0]) == goal._target(2, [2.0]) == (True, 20.4, 2.0)
    for action in (3, 8):
        for parameter in (-1.0, 0.3, 1.0):
            assert hard._target(action, [parameter])[2] == pytest.approx(1.402)
    for action, low, high in ((1, -7.01, -4.206), (2, -4.206, -1.402), (4, 1.402, 4.206), (5, 4.206, 7.01)):
        assert hard._target(action, [1.0])[2] == pytest.approx(low)
        assert hard._target(action + 5, [-1.0])[2] == pytest.approx(high)


# --- levels of a random policy, near those measured in the original implementations ---


def random_policy(env: HybridEnv, episodes: int) -> tuple[float, float, float]:
    """Return the mean return, the rate of success and the mean length."""
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    total, successes, steps = 0.0, 0, 0
    for _ in range(episodes):
        env.reset()
        over = False
        while not over:
            index = int(rng.integers(len(env._parameter_bounds)))
            chosen = np.array([rng.uniform(low, high) for low, high in env._parameter_bounds[index]])
            _, reward, terminated, truncated, info = env.step((index, chosen))
            total += reward
            steps += 1
            over = terminated or truncated
        successes += info["is_success"]
    return total / episodes, successes / episodes, steps / episodes


def test_random_policy_on_platform() -> None:
    mean_return, _, length = random_policy(make("Platform-v0"), 3000)
    assert mean_return == pytest.approx(0.157, abs=0.01)
    assert length == pytest.approx(2.2, abs=0.15)


@pytest.mark.parametrize(("env_id", "mean_return"), [("Goal-v0", -8.1), ("HardGoal-v0", -7.5)])
def test_random_policy_on_goal(env_id: str, mean_return: float) -> None:
    measured, success, _ = random_policy(make(env_id), 3000)
    assert measured == pytest.approx(mean_return, abs=0.3)
    assert success < 0.003


@pytest.mark.parametrize("env_id", ["CatchPoint-v0", "HardMove4-v0", "HardMove10-v0", "SimpleMove-v0"])
def test_random_policy_on_point_mass(env_id: str) -> None:
    """All are within these bounds; 0.029 of the episodes begin near the landmark."""
    assert 0.035 < random_policy(make(env_id), 3000)[1] < 0.065


# --- pictures ---

MOVES: dict[str, Callable[[], tuple]] = {
    "Platform-v0": lambda: (0, array(20)),
    "Goal-v0": lambda: (0, array(4, 0)),
    "HardGoal-v0": lambda: (0, array(-0.8, 0)),
    "CatchPoint-v0": lambda: (0, array(0.5)),
}


@pytest.mark.parametrize("env_id", IDS)
def test_pictures(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array")
    assert env.metadata["render_fps"] > 0
    env.reset(seed=3)
    first = env.render()
    env.step(MOVES.get(env_id, lambda: (3, array(1)))())
    second = env.render()
    for picture in (first, second):
        assert picture.dtype == np.uint8 and picture.shape == first.shape
        assert picture.shape[0] % 16 == picture.shape[1] % 16 == 0  # for video encoders
        scene = picture[:-40]
        assert len(np.unique(scene.reshape(-1, 3), axis=0)) > 3
    assert (first[:-40] != second[:-40]).any(axis=-1).sum() > 50  # the scene changes, not only the caption
    assert np.array_equal(second, env.render())


@pytest.mark.parametrize("env_id", IDS)
def test_pictures_change_nothing_else(env_id: str) -> None:
    plain, drawn = make(env_id), make(env_id, render_mode="rgb_array")
    assert str(play(plain, 2, steps=10)) == str(play(drawn, 2, steps=10))
    assert plain.render_mode is None
    with pytest.warns(UserWarning, match="rgb_array"):
        assert plain.render() is None


def test_no_display_is_opened_and_pygame_comes_late() -> None:
    code = """
import sys, gymnasium, envs
made = [gymnasium.make(i, render_mode="rgb_array") for i in ("Platform-v0", "Goal-v0", "HardMove-v0")]
[(env.reset(seed=0), env.step(env.action_space.sample())) for env in made]
assert "pygame" not in sys.modules
[env.render() for env in made]
import pygame
assert not pygame.display.get_init()
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
