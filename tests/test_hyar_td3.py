"""hyar_td3.py: its updates against plain formulas, what each may move, learning, resuming, and bad input."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "hyar_td3.py"
sys.path.insert(0, str(ROOT))

import hyar_td3  # noqa: E402
from hyar_td3 import Args, Batch, HyARTD3, HybridEnv, ReplayBuffer, TwinCritic, episode_seed  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


# --- toy environments ---
class ToyEnv(gym.Env):
    """Each step shows which action is wanted and which parameter value, and pays for how near the action came.

    Action 0 has one parameter in [0, 10], action 1 two, in [-1, 1] and [-2, 2], of which the second counts.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 5}
    made = 0  # counts instances: a test sets it to 0, so that `main` makes its training environment as number 0
    hook: ClassVar[Callable[[ToyEnv], None] | None] = None  # called at the start of each step
    seeds: ClassVar[list[int]] = []  # reset seeds of the training environment
    actions: ClassVar[list] = []  # what the training environment was given
    early = 0  # the length of an episode, if it is not the usual one

    def __init__(
        self, length=2, truncate=False, unbounded=False, repeatable=True, break_at=None, breaks=0, render_mode=None
    ):
        bound = np.array([1, np.inf if unbounded else 1, 1, 1], np.float32)
        self.observation_space = Box(-bound, bound)
        self.action_space = Tuple((
            Discrete(2), Tuple((Box(0, 10, (1,)), Box(np.float32([-1, -2]), np.float32([1, 2]))))
        ))  # fmt: skip
        self.length, self.truncate, self.unbounded, self.repeatable = length, truncate, unbounded, repeatable
        self.render_mode, self.break_at, self.breaks = render_mode, break_at, breaks  # `breaks`: which instance
        self.number, self.total = ToyEnv.made, 0
        self.counting = True  # but not in the probe, which resets with seed 0
        ToyEnv.made += 1

    def observe(self):
        target = 300 + 50 * self.target if self.unbounded else self.target
        return np.array([2 * self.wanted - 1, target, self.taken / self.length, self.last], np.float32)

    def draw(self):
        self.wanted, self.target = int(self.np_random.integers(2)), self.np_random.uniform(-1, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken, self.last, self.over = 0, 0.0, False
        if not self.repeatable:
            self.last = np.random.default_rng().uniform(-1, 1)
        self.draw()
        observation = self.observe()
        self.counting = seed != 0
        if self.number == 0 and self.counting:
            ToyEnv.seeds.append(seed)
            if self.break_at and self.break_at[0] == "reset" and len(ToyEnv.seeds) == self.break_at[1]:
                observation[1] = np.nan
        return observation, {}

    def normalised(self, k, parameters):
        return (parameters[0][0] - 5) / 5 if k == 0 else parameters[1][1] / 2

    def step(self, action):
        assert self.action_space.contains(action) and not self.over, action
        self.total += self.counting
        if ToyEnv.hook and self.counting:
            ToyEnv.hook(self)
        k, parameters = action
        x = self.normalised(k, parameters)
        if self.number == 0 and self.counting:
            ToyEnv.actions.append((k, np.array(parameters[k] if isinstance(parameters, tuple) else parameters)))
        reward = 1.0 - abs(x - self.target) if k == self.wanted else 0.0
        self.taken, self.last = self.taken + 1, float(self.last + x) / 2
        self.draw()
        over = self.over = self.taken == (self.early or self.length)
        observation = self.observe()
        if self.break_at and self.number == self.breaks and self.total == self.break_at[1]:
            if self.break_at[0] == "reward":
                reward = self.break_at[2]
            elif self.break_at[0] == "observation":
                observation[2] = self.break_at[2]
        info = {"is_success": reward > 0.8} if over else {}
        return observation, reward, over and not self.truncate, over and self.truncate, info

    def render(self):
        return np.full((64, 64, 3), 40 * self.taken % 256, np.uint8)


class SharedToyEnv(ToyEnv):
    """The form with one Box for all actions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = Tuple((Discrete(2, start=3), Box(np.float32([0, -1]), np.float32([10, 1]))))

    def normalised(self, k, parameters):
        return (parameters[0] - 5) / 5

    def step(self, action):
        assert action[0] in (3, 4)
        return super().step(action)


class ParameterlessToyEnv(ToyEnv):
    """The form in which an action has no parameter."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = Tuple((Discrete(2), Tuple((Box(0, 10, (1,)), Box(0, 1, (0,))))))

    def normalised(self, k, parameters):
        return (parameters[0][0] - 5) / 5 if k == 0 else 0.0


class MatrixToyEnv(ToyEnv):
    """Parameters and observation are matrices."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = Box(-1, 1, (2, 2))
        self.action_space = Tuple((Discrete(2), Tuple((Box(0, 10, (1,)), Box(-1, 1, (2, 2))))))

    def normalised(self, k, parameters):
        return (parameters[0][0] - 5) / 5 if k == 0 else parameters[1][1, 1]

    def observe(self):
        return super().observe().reshape(2, 2)


class BareToyEnv(ToyEnv):
    """A constructor without arguments, as many have that nobody ever rendered; not even `render_mode`."""

    metadata: ClassVar = {"render_modes": []}

    def __init__(self):
        super().__init__()


class InPlaceToyEnv(ToyEnv):
    """Returns the same array each time, written over, as environments do that keep their state in one."""

    def observe(self):
        if not hasattr(self, "buffer"):
            self.buffer = np.zeros(4, np.float32)
        self.buffer[:] = super().observe()
        return self.buffer


class OddEnv(ToyEnv):
    """Changes what is returned: `of_step` the five values of a step, `of_reset` an observation and an info."""

    of_step: ClassVar[Callable] = staticmethod(lambda *values: values)
    of_reset: ClassVar[Callable] = staticmethod(lambda *values: values)

    def __init__(self, **kwargs):
        super().__init__(length=7, truncate=True, unbounded=True, **kwargs)

    def reset(self, **kwargs):
        return OddEnv.of_reset(*super().reset(**kwargs))

    def step(self, action):
        return OddEnv.of_step(*super().step(action))


class SpacesEnv(gym.Env):
    """Has spaces, and need not have more, as it should be refused for them."""

    def __init__(self, observation_space=None, action_space=None, error=None, render_mode=None):
        if error:
            raise error
        box = Box(-1, 1, (2,))
        self.observation_space = observation_space or box
        self.action_space = action_space or Tuple((Discrete(2), Tuple((box, box))))


gym.register("Toy-v0", entry_point=ToyEnv)
gym.register("ToyLong-v0", entry_point=ToyEnv, kwargs={"length": 7, "truncate": True, "unbounded": True})
gym.register("ToyShared-v0", entry_point=SharedToyEnv)
gym.register("ToyParameterless-v0", entry_point=ParameterlessToyEnv)
gym.register("ToyMatrix-v0", entry_point=MatrixToyEnv)
gym.register("ToyBare-v0", entry_point=BareToyEnv)
gym.register("ToyInPlace-v0", InPlaceToyEnv, kwargs={"length": 7, "truncate": True, "unbounded": True})
gym.register("ToyOdd-v0", OddEnv)
gym.register("ToyUnrepeatable-v0", entry_point=ToyEnv, kwargs={"length": 7, "repeatable": False})
BOX2 = Box(-1, 1, (2,))
REFUSED_SPACES = {  # id -> action space, observation space, what the message has to say
    "Unbounded-v0": (Tuple((Discrete(2), Tuple((BOX2, Box(-1, np.inf, (1,)))))), None, "action 1"),
    "UnboundedByFloat-v0": (
        Tuple((Discrete(1), Tuple((Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,)),)))),
        None,
        "action 0",
    ),
    "UnboundedShared-v0": (Tuple((Discrete(2), Box(-np.inf, 1, (1,)))), None, "expected bounded parameters"),
    "UnboundedMany-v0": (
        Tuple((Discrete(1), Box(-np.arange(40, dtype=np.float32) - 0.123, np.full(40, np.inf, np.float32)))),
        None,
        "expected bounded parameters",
    ),
    "TooFewBoxes-v0": (Tuple((Discrete(3), Tuple((BOX2, BOX2)))), None, "3 actions"),
    "ThreeParts-v0": (Tuple((Discrete(2), BOX2, BOX2)), None, "expected Tuple(Discrete"),
    "Swapped-v0": (Tuple((BOX2, Discrete(2))), None, "expected Tuple(Discrete"),
    "OneOf-v0": (Tuple((Discrete(2), gym.spaces.OneOf((BOX2, BOX2)))), None, "one Box for each"),
    "NestedDiscrete-v0": (Tuple((Discrete(1), Tuple((Discrete(2),)))), None, "one Box for each"),
    "MultiDiscrete-v0": (MultiDiscrete([2, 2]), None, "expected Tuple(Discrete"),
    "NoParameters-v0": (Tuple((Discrete(2), Tuple((Box(0, 1, (0,)), Box(0, 1, (0,)))))), None, "DQN"),
    "DictObservation-v0": (None, Dict({"a": BOX2}), "expected a Box observation"),
}
for _name, (_actions, _observations, _) in REFUSED_SPACES.items():
    gym.register(_name, functools.partial(SpacesEnv, action_space=_actions, observation_space=_observations))
gym.register("FailsSilently-v0", entry_point=SpacesEnv, kwargs={"error": NotImplementedError()})
gym.register("FailsLoudly-v0", entry_point=SpacesEnv, kwargs={"error": RuntimeError("no display\nsecond line")})

TINY = {
    "total_timesteps": 150, "learning_starts": 20, "batch_size": 16, "random_episodes": 15, "vae_pretrain_steps": 10,
    "vae_batch_size": 16, "vae_update_episodes": 2, "exploration_noise_episodes": 10, "eval_episodes": 2,
    "eval_frequency": 40, "checkpoint_frequency": 30, "discrete_latent_dim": 3, "parameter_latent_dim": 4,
    "run_name": "run",
}  # fmt: skip
CONSTANTS = {name: getattr(hyar_td3, name) for name in (
    "LATENT_RANGE_ROWS", "STATE_ERROR_ROWS", "VAE_UPDATE_START", "EXPLORATION_NOISE_START"
)}  # fmt: skip
hyar_td3.LATENT_RANGE_ROWS, hyar_td3.VAE_UPDATE_START = 100, 3  # so that a tiny run gets there


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ToyEnv.made, ToyEnv.hook = 0, None
    ToyEnv.seeds.clear()
    ToyEnv.actions.clear()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    ToyEnv.hook = None
    torch.set_default_dtype(torch.float32)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is most of a tiny run's time; the smoke test looks at real pictures."""
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: None)


@pytest.fixture
def double():
    """Everything in 64 bits, so that a comparison with a plain formula is about the formula, not about rounding."""
    torch.set_default_dtype(torch.float64)


def tiny(tmp_path: Path, **changes) -> Args:
    return Args(**{**TINY, "env_id": "ToyLong-v0", "runs_dir": str(tmp_path), **changes})


def exit_status(args: Args) -> int:
    """Run `main` here and return the status that the process would have ended with."""
    ToyEnv.made = 0
    handlers = [signal.getsignal(number) for number in SIGNALS]
    status = 0
    try:
        hyar_td3.main(args)
    except SystemExit as end:
        status = end.code
    assert handlers == [signal.getsignal(number) for number in SIGNALS]  # given back
    return status


def in_a_fork(play: Callable[[], int]) -> int:
    """Run it in a process of its own, that may be killed, and return its exit status (minus the signal's number)."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = play()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_training_step(step: int, play: Callable[[], None]) -> None:
    """Have `play` called during this step (counting the random phase) of the training environment."""

    def hook(env: ToyEnv) -> None:
        if env.number == 0 and env.total == step:
            play()

    ToyEnv.hook = hook


RANDOM_STEPS = TINY["random_episodes"] * 7  # of ToyLong-v0


def tensors(value, name="") -> dict[str, Tensor]:
    """All tensors and numbers of a nested state, by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, bool | int | float):
        return {name: torch.tensor(value)}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in tensors(part, f"{name}/{key}").items()}
    return {}


def evaluations(folder: Path) -> list[dict[str, float]]:
    header, *rows = ((folder / "eval.csv").read_text()).splitlines()
    return [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]


def outcome(folder: Path) -> dict[str, Tensor | bytes]:
    """What two equal runs have in common: weights, best weights, the finished checkpoint and eval.csv."""
    result = {"eval.csv": (folder / "eval.csv").read_bytes()}
    for file in ("model.pt", "best_model.pt", "checkpoint.pt"):
        result |= tensors(torch.load(folder / file, weights_only=True), file)
    return result


def differences(one: dict, other: dict) -> list[str]:
    def same(name: str) -> bool:
        a, b = one.get(name), other.get(name)
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    return [name for name in {**one, **other} if not same(name)]


def make_args(env_id="Platform-v0", **changes) -> Args:
    """Arguments without None, as a run has them."""
    args = Args(env_id=env_id, **changes)
    hyar_td3.check(args)
    return args


def make_env(env_id="Platform-v0") -> HybridEnv:
    return hyar_td3.make_env(Args(env_id=env_id))


def make_agent(env_id="Platform-v0", seed=0, **changes) -> HyARTD3:
    torch.manual_seed(seed)
    return HyARTD3(make_args(env_id, **changes), make_env(env_id), CPU)


def observation_dim(agent: HyARTD3) -> int:
    return agent.actor[0].in_features


def random_batch(agent: HyARTD3, size: int, seed=1) -> Batch:
    """Rows as a buffer holds them: parameters padded with zeros, latent actions partly out of date."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2.0 * torch.rand(shape, generator=generator) - 1.0

    num_actions, parameter_dim = agent.mask.shape
    k = torch.randint(num_actions, (size,), generator=generator)
    observation = uniform(size, observation_dim(agent))
    latent_action = uniform(size, agent.latent_action_dim)
    embedding = agent.vae.discrete_embedding().detach()[k] + 0.02 * uniform(size, agent.embedding_dim)
    latent_action[::2, : agent.embedding_dim] = embedding[::2]
    x = uniform(size, parameter_dim) * agent.mask[k]
    next_observation = observation + 0.3 * uniform(size, observation_dim(agent))
    terminated = (torch.rand(size, generator=generator) < 0.3).to(observation.dtype)
    return Batch(observation, latent_action, x, k, next_observation, uniform(size), terminated)


def snapshot(agent: HyARTD3) -> dict[str, Tensor]:
    return copy.deepcopy(tensors({name: part.state_dict() for name, part in agent.named_children()}))


def moved(before: dict[str, Tensor], agent: HyARTD3) -> set[str]:
    """Names of the networks that are no longer what they were."""
    return {name.split("/")[1] for name in differences(before, snapshot(agent))}


def array(value: Tensor | np.ndarray) -> np.ndarray:
    return torch.as_tensor(value).detach().numpy().astype(np.float64)


# --- forms of environments ---
FORMS = ["Toy-v0", "ToyShared-v0", "ToyParameterless-v0", "ToyMatrix-v0", "ToyBare-v0"]


@pytest.mark.parametrize("env_id", [*FORMS, "Platform-v0", "Goal-v0", "CatchPoint-v0", "HardMove4-v0"])
def test_actions_reach_the_environment_in_its_own_form(env_id):
    env = make_env(env_id)
    second = env.action_space[1]
    boxes = [second] * env.num_actions if isinstance(second, Box) else list(second)
    assert env.num_actions == env.action_space[0].n
    assert env.mask.sum(1).tolist() == [math.prod(box.shape) for box in boxes]
    assert env.mask.shape == (env.num_actions, env.parameter_dim)
    generator = np.random.default_rng(0)
    for k, box in enumerate(boxes):
        assert env.mask[k].tolist() == [float(p < math.prod(box.shape)) for p in range(env.parameter_dim)]
        low, high = box.low.reshape(-1).astype(float), box.high.reshape(-1).astype(float)
        for x in (*generator.uniform(-1, 1, (20, env.parameter_dim)), -np.ones(env.parameter_dim)):
            action = env.to_space(k, x.astype(np.float32))
            assert env.action_space.contains(action)
            assert action[0] == env.action_space[0].start + k
            own = action[1] if isinstance(second, Box) else action[1][k]
            expected = [low[p] + (high[p] - low[p]) * (x[p] + 1) / 2 for p in range(len(low))]
            np.testing.assert_allclose(own.reshape(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("env_id", FORMS)
def test_trains_on_each_form(env_id, tmp_path, no_pictures):
    folder = hyar_td3.main(tiny(tmp_path, env_id=env_id, total_timesteps=100))
    assert len((folder / "eval.csv").read_text().splitlines()) == 1 + 3  # steps 40, 80, 100
    assert {int(k) for k, _ in ToyEnv.actions} == ({3, 4} if env_id == "ToyShared-v0" else {0, 1})
    parameters = np.concatenate([x.reshape(-1) for _, x in ToyEnv.actions])
    assert np.ptp(parameters) > 0.9 * 10.0  # the random phase covers the widest Box, [0, 10]
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in tensors(weights).values())


def test_what_the_buffer_holds_is_what_was_played(tmp_path, no_pictures):
    """Indices, parameters, rewards and ends of all rows, in the order in which the environment saw them."""
    hyar_td3.main(tiny(tmp_path, env_id="Toy-v0", total_timesteps=31, checkpoint_frequency=30))
    played = [(int(k), x) for k, x in ToyEnv.actions]
    # The finished checkpoint holds no rows; that of step 30 does.
    ToyEnv.made, ToyEnv.seeds[:], ToyEnv.actions[:] = 0, [], []
    at_training_step(TINY["random_episodes"] * 2 + 31, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit_status(tiny(tmp_path, env_id="Toy-v0", total_timesteps=40, run_name="stopped")) == 143
    state = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    rows = state["rows"].numpy()
    assert len(rows) == TINY["random_episodes"] * 2 + 31
    assert state["random_size"] == TINY["random_episodes"] * 2
    x, k, terminated = rows[:, 4 + 7 : 4 + 9], rows[:, 4 + 9].astype(int), rows[:, -1]
    low, high = np.array([[0, 0], [-1, -2]]), np.array([[10, 0], [1, 2]])
    assert len(played) >= len(rows) - 1
    for i, (action, own) in enumerate(ToyEnv.actions):
        assert k[i] == action
        np.testing.assert_allclose(own, (low + (high - low) * (x[i] + 1) / 2)[action][: len(own)], atol=1e-5)
    assert (x[k == 0, 1] == 0).all() and np.abs(x[k == 1, 1]).max() > 0.5  # padding, and no padding
    assert terminated.tolist() == [0.0, 1.0] * (len(rows) // 2) + [0.0] * (len(rows) % 2)
    random_rows = rows[: state["random_size"]]
    assert np.abs(random_rows[:, 4:11]).max() == 0  # the random phase has no latent actions


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_time_limit_is_stored_as_an_end_only_if_it_is_told_so(bootstrap, tmp_path, no_pictures):
    at_training_step(RANDOM_STEPS + 50, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit_status(tiny(tmp_path, bootstrap_at_limit=bootstrap)) == 143
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["episode"] == 7 and len(state["rows"]) == RANDOM_STEPS + 50
    ends = state["rows"][RANDOM_STEPS:, -1]  # the critics read no row of the random phase
    assert int(ends.sum()) == (0 if bootstrap else 7)
    assert not state["rows"][:RANDOM_STEPS, -1].any()


def test_unbounded_observations_are_scaled_by_the_random_phase_and_frozen(tmp_path, no_pictures):
    folder = hyar_td3.main(tiny(tmp_path))
    # Observations that an action was taken in, of the random phase alone.
    env, observations, generator = gym.make("ToyLong-v0"), [], np.random.default_rng(0)
    for seed in ToyEnv.seeds[: TINY["random_episodes"]]:
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            observations.append(observation)
            k = int(generator.integers(2))
            observation, _, terminated, truncated, _ = env.step((k, (np.float32([5]), np.float32([0, 0]))))
            over = terminated or truncated
    targets = np.array(observations)[:, 1]  # independent of the actions
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["center"].tolist() == pytest.approx([0.0, targets.mean(), 0.0, 0.0], abs=1e-3)
    assert saved["width"].tolist() == pytest.approx([1.0, targets.std(), 1.0, 1.0], abs=1e-3)


def test_the_observation_scale_is_exact_for_large_numbers_and_1_for_what_never_moved():
    """A flag that random play never raises must not be blown up to millions when it is raised."""
    scale, generator = make_env("ToyLong-v0").scale, np.random.default_rng(0)
    scale.unbounded[:] = True
    columns = (
        1e5 + generator.normal(size=20_000),
        generator.normal(5, 3, 20_000),
        np.zeros(20_000),
        np.full(20_000, 0.1),
    )
    observations = np.stack(columns, 1).astype(np.float32)
    scale.fit(observations)
    exact = observations.astype(np.float64)
    np.testing.assert_allclose(scale.center, exact.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scale.width, [*exact.std(0)[:2], 1, 1], rtol=1e-3)
    assert np.abs(scale(np.float32([1e5, 5, 1, 0.1]))).max() < 2


def test_an_environment_may_return_the_same_array_each_time(reference, tmp_path, no_pictures):
    result = outcome(hyar_td3.main(tiny(tmp_path, env_id="ToyInPlace-v0")))
    assert not [name for name in differences(result, reference) if not name.startswith("checkpoint.pt/eval")]


@pytest.mark.parametrize("env_id", ["ToyLong-v0", "Platform-v0"])
def test_a_saved_model_can_be_used_alone(env_id, tmp_path, no_pictures):
    """`model.pt` and its arguments give the last row of eval.csv again."""
    folder = hyar_td3.main(tiny(tmp_path, env_id=env_id))
    content = torch.load(folder / "model.pt", weights_only=True)
    args, env = Args(**json.loads(content.pop("arguments"))), make_env(env_id)
    torch.manual_seed(999)
    agent = HyARTD3(args, env, CPU)
    agent.load_state_dict(content["agent"])
    env.scale.center, env.scale.width = content["center"].numpy(), content["width"].numpy()
    environments = [hyar_td3.make_env(args, env.scale) for _ in range(args.eval_episodes)]
    metrics = hyar_td3.evaluate(agent, environments, args.seed)
    last = evaluations(folder)[-1]
    assert all(last[name] == value for name, value in metrics.items() if not math.isnan(value))


# --- which loss moves which parameter ---
def test_only_the_vae_update_moves_the_vae_and_its_embedding():
    agent = make_agent()
    batch, before = random_batch(agent, 64), snapshot(agent)
    agent.update_vae(batch)
    assert moved(before, agent) == {"vae"}
    assert agent.vae.embedding_table.grad.abs().max() > 0
    table = before["/vae/embedding_table"]
    assert (agent.vae.embedding_table != table).all(1).sum() == 3  # the batch has all three actions
    changed = {name for name in differences(before, snapshot(agent)) if name.startswith("/vae/")}
    buffers = {f"/vae/{name}" for name, _ in agent.vae.named_buffers()}
    assert changed == {f"/vae/{name}" for name, _ in agent.vae.named_parameters()}
    assert not changed & buffers


@pytest.mark.parametrize("relabel", [True, False])
def test_reinforcement_learning_never_moves_the_vae(relabel):
    agent = make_agent(relabel=relabel)
    batch = random_batch(agent, 256)
    agent.update_latent_range(batch)
    before = snapshot(agent)
    for _ in range(3):
        agent.update(batch)
    assert not moved(before, agent) & {"vae"}
    assert all(parameter.grad is None for parameter in agent.vae.parameters())
    assert {"actor", "critic", "target_actor", "target_critic"} <= moved(before, agent)
    assert not agent.optimizers["vae"].state


def test_the_critic_update_moves_the_critic_alone():
    agent = make_agent()
    batch, before = random_batch(agent, 64), snapshot(agent)
    noise = torch.randn(64, agent.latent_action_dim)
    (latent_action, _), target = agent.relabel(batch, noise), agent.critic_target(batch, noise)
    assert not latent_action.requires_grad and not target.requires_grad
    assert not moved(before, agent)  # a target is no update
    agent.update_critic(batch.observation, latent_action, target)
    assert moved(before, agent) == {"critic"}
    changed = {name for name in differences(before, snapshot(agent))}
    assert changed == {f"/critic/{name}" for name, _ in agent.critic.named_parameters()}


def test_the_actor_update_moves_the_actor_and_the_targets_follow():
    agent = make_agent(tau=0.1)
    batch = random_batch(agent, 64)
    target = agent.critic_target(batch, torch.randn(64, agent.latent_action_dim))
    agent.update_critic(batch.observation, batch.latent_action, target)  # now the targets have somewhere to go
    gradients = [parameter.grad.clone() for parameter in agent.critic.parameters()]
    before = snapshot(agent)
    agent.update_actor(batch.observation)
    assert moved(before, agent) == {"actor"}
    agent.update_targets()
    assert moved(before, agent) == {"actor", "average_actor", "target_actor", "target_critic"}
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.critic.parameters(), gradients, strict=True))
    after = snapshot(agent)
    for target, online in (("target_actor", "actor"), ("target_critic", "critic")):
        for name, parameter in getattr(agent, online).named_parameters():
            old = before[f"/{target}/{name}"]
            expected = old + 0.1 * (parameter.detach() - old)
            torch.testing.assert_close(after[f"/{target}/{name}"], expected, rtol=0, atol=1e-7)
    assert all(parameter.grad is None for parameter in (*agent.target_actor.parameters(), *agent.vae.parameters()))


def test_one_hot_has_no_embedding_to_train():
    agent = make_agent("Goal-v0", discrete_embedding="one-hot")
    assert agent.embedding_dim == 3
    assert "embedding_table" not in dict(agent.vae.named_parameters())
    assert "embedding_table" in dict(make_agent("Goal-v0").vae.named_parameters())
    agent.update_vae(random_batch(agent, 64))
    assert torch.equal(agent.vae.discrete_embedding(), torch.eye(3))


# --- optimizers live as long as the run ---
def step_counts(agent: HyARTD3) -> dict[str, set[int]]:
    return {
        name: {int(state["step"]) for state in optimizer.state.values()} for name, optimizer in agent.optimizers.items()
    }


def test_each_update_is_one_step_of_the_same_adam():
    agent = make_agent(policy_frequency=2)
    batch = random_batch(agent, 64)
    optimizers = dict(agent.optimizers)
    for n in range(1, 5):
        agent.update_vae(batch)
        agent.update(batch)
        assert step_counts(agent) == {"vae": {n}, "critic": {2 * n}, "actor": {n}}
    assert optimizers == agent.optimizers
    assert {type(optimizer) for optimizer in optimizers.values()} == {torch.optim.Adam}


def test_adams_moments_survive_a_new_learning_rate():
    agent = make_agent(vae_learning_rate=1e-3)
    batch, parameter = random_batch(agent, 64), agent.vae.state_head[0].weight
    optimizer = agent.optimizers["vae"]
    agent.update_vae(batch)
    for rate in (7.5e-4, 5e-4, 0.0):
        (group,) = optimizer.param_groups
        group["lr"] = rate
        old, value = optimizer.state[parameter]["exp_avg"].clone(), parameter.detach().clone()
        agent.update_vae(batch)
        assert group["lr"] == rate
        expected = 0.9 * old + 0.1 * parameter.grad
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected, rtol=1e-4, atol=1e-9)
        assert torch.equal(value, parameter) == (rate == 0.0)
        assert (parameter - value).abs().max() <= 1.5 * rate
    assert step_counts(agent)["vae"] == {4}


def test_a_rebuilt_adam_is_always_at_its_first_step():
    agent = make_agent(rebuild_vae_optimizer=True)
    batch = random_batch(agent, 64)
    for _ in range(3):
        before = agent.vae.state_head[0].bias.detach().clone()
        agent.update_vae(batch)
        assert step_counts(agent)["vae"] == {1}
        # Such a step is the learning rate times the gradient's sign.
        change, gradient = agent.vae.state_head[0].bias.detach() - before, agent.vae.state_head[0].bias.grad
        large = gradient.abs() > 1e-6
        assert large.any()
        torch.testing.assert_close(change[large], -1e-4 * gradient[large].sign(), rtol=0.02, atol=0)


def test_continued_optimizers_come_from_the_checkpoint():
    """What `main` saves and restores carries moments and counters."""
    agent, other = make_agent(seed=0), make_agent(seed=1)
    batch = random_batch(agent, 64)
    for _ in range(3):
        agent.update_vae(batch)
        agent.update(batch, torch.zeros(64, 2 * agent.latent_action_dim))
    other.load_state_dict(agent.state_dict())
    other.actor_updates = agent.actor_updates
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(agent.optimizers[name].state_dict()))
    assert step_counts(other) == step_counts(agent)
    for one in (agent, other):
        one.update_vae(batch, noise=torch.zeros(64, 6))
        one.update(batch, torch.zeros(64, 2 * agent.latent_action_dim))
    assert not differences(snapshot(agent), snapshot(other))


# --- the same numbers as plain formulas (facts, section 2) ---
def plain_layer(x: list, layer: nn.Linear) -> np.ndarray:
    return array(layer.weight) @ np.asarray(x) + array(layer.bias)


def plain_relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def plain_embedding(vae, k: int) -> np.ndarray:
    table = array(vae.embedding_table)[k]
    return table if vae.kind == "one-hot" else np.tanh(table)


def plain_encode(vae, s, e, x) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of one row's latent."""
    condition = plain_relu(plain_layer([*s, *e], vae.encoder_condition))
    hidden = condition * plain_relu(plain_layer(x, vae.encoder_parameters))
    for layer in vae.encoder_hidden:
        if isinstance(layer, nn.Linear):
            hidden = plain_relu(plain_layer(hidden, layer))
    heads = plain_layer(hidden, vae.encoder_heads)
    mean, log_std = heads[: len(heads) // 2], heads[len(heads) // 2 :]
    return mean, np.exp(np.clip(log_std, -4, 15))


def plain_decode(vae, s, e, z) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and state change of one row's latent."""
    condition = plain_relu(plain_layer([*s, *e], vae.decoder_condition))
    hidden = condition * plain_relu(plain_layer(z, vae.decoder_latent))
    for layer in vae.decoder_hidden:
        if isinstance(layer, nn.Linear):
            hidden = plain_relu(plain_layer(hidden, layer))
    x = np.tanh(plain_layer(hidden, vae.parameter_head))
    delta = np.tanh(plain_layer(plain_relu(plain_layer(hidden, vae.state_head[0])), vae.state_head[2]))
    return x, delta


def plain_scale(agent: HyARTD3) -> tuple[np.ndarray, np.ndarray]:
    low, high = array(agent.vae.latent_low), array(agent.vae.latent_high)
    half = (high - low) / 2
    return half, high - half


def sharpen(agent: HyARTD3, factor=3.0) -> HyARTD3:
    """Larger weights, so that no output is nearly constant and no two formulas agree by being near to zero."""
    with torch.no_grad():
        for parameter in (*agent.vae.parameters(), *agent.actor.parameters(), *agent.critic.parameters()):
            parameter *= factor if parameter.dim() > 1 else 1.0
        for target, online in ((agent.target_actor, agent.actor), (agent.target_critic, agent.critic)):
            for a, b in zip(target.parameters(), online.parameters(), strict=True):
                a.copy_(b + 0.05 * torch.randn_like(b))
        if agent.vae.kind == "learned":
            agent.vae.embedding_table /= factor
    return agent


SETUPS = [("Platform-v0", {}), ("Goal-v0", {}), ("CatchPoint-v0", {}), ("Goal-v0", {"discrete_embedding": "one-hot"})]
setups = pytest.mark.parametrize(("env_id", "changes"), SETUPS, ids=["platform", "goal", "catch", "one-hot"])


@setups
def test_vae_forward_and_loss_equal_the_formulas(env_id, changes, double):
    agent = sharpen(make_agent(env_id, parameter_weight=2.0, **changes))
    vae, batch = agent.vae, random_batch(agent, 24)
    noise = torch.randn(24, agent.latent_dim)
    x, delta, mean, std = (array(value) for value in vae(batch.observation, batch.k, batch.x, noise))
    parameter_errors, state_errors, divergences = [], [], []
    for i in range(24):
        s, k = array(batch.observation[i]), int(batch.k[i])
        e = plain_embedding(vae, k)
        row_mean, row_std = plain_encode(vae, s, e, array(batch.x[i]))
        row_x, row_delta = plain_decode(vae, s, e, row_mean + row_std * array(noise[i]))
        for ours, plain in ((mean, row_mean), (std, row_std), (x, row_x), (delta, row_delta)):
            np.testing.assert_allclose(ours[i], plain, rtol=1e-5, atol=1e-5)
        parameter_errors.append((row_x - array(batch.x[i])) ** 2)
        state_errors.append((row_delta - array(batch.next_observation[i] - batch.observation[i])) ** 2)
        normal = torch.distributions.Normal(torch.tensor(row_mean), torch.tensor(row_std))
        standard = torch.distributions.Normal(torch.zeros(agent.latent_dim), torch.ones(agent.latent_dim))
        divergences.append(array(torch.distributions.kl_divergence(normal, standard)))
    losses = {name: float(value) for name, value in agent.update_vae(batch, noise=noise).items()}
    parameter, state, kl = (float(np.mean(errors)) for errors in (parameter_errors, state_errors, divergences))
    assert losses["vae_parameter"] == pytest.approx(parameter, rel=1e-5)
    assert losses["vae_state"] == pytest.approx(state, rel=1e-5)
    assert losses["vae_kl"] == pytest.approx(kl, rel=1e-5)
    assert losses["vae"] == pytest.approx(state + 2.0 * parameter + 0.5 * kl, rel=1e-5)
    assert np.abs(x).max() <= 1 and np.ptp(x) > 0.1 and np.ptp(delta) > 0.1  # so the comparison was about something


def test_the_log_standard_deviation_is_clamped(double):
    agent = make_agent()
    with torch.no_grad():
        agent.vae.encoder_heads.bias[agent.latent_dim :] = torch.tensor([-50.0, -4.5, 0.0, 1.0, 14.0, 50.0])
        agent.vae.encoder_heads.weight.zero_()
    batch = random_batch(agent, 3)
    *_, std = agent.vae(batch.observation, batch.k, batch.x, torch.zeros(3, 6))
    np.testing.assert_allclose(np.log(array(std)), [[-4, -4, 0, 1, 14, 15]] * 3)


def test_the_vae_learns_by_the_gradient_of_that_loss(double):
    """One step of Adam on the loss as written above gives the same weights."""
    agent, plain = make_agent(vae_learning_rate=1e-2), make_agent(vae_learning_rate=1e-2)
    batch, noise = random_batch(agent, 32), torch.randn(32, 6)
    agent.update_vae(batch, noise=noise)
    vae = plain.vae
    table = torch.tanh(vae.embedding_table)[batch.k]
    mean, std = vae.encode(batch.observation, table, batch.x)
    hidden = vae.decode(batch.observation, table, mean + std * noise)
    parameter_loss = (torch.tanh(vae.parameter_head(hidden)) - batch.x).square().mean()
    state_loss = (torch.tanh(vae.state_head(hidden)) - (batch.next_observation - batch.observation)).square().mean()
    posterior = torch.distributions.Normal(mean, std)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    (state_loss + 2.0 * parameter_loss + 0.5 * kl).backward()
    torch.optim.Adam(vae.parameters(), lr=1e-2).step()
    for (name, ours), theirs in zip(agent.vae.named_parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=name)


def plain_nearest(vae, e: np.ndarray) -> int:
    """Index of the embedding at the smallest Euclidean distance."""
    distances = [np.sqrt(np.sum((plain_embedding(vae, k) - e) ** 2)) for k in range(len(vae.embedding_table))]
    return int(np.argmin(distances))


@setups
def test_decoding_a_latent_action_equals_the_formulas(env_id, changes, double):
    agent = sharpen(make_agent(env_id, **changes))
    agent.update_latent_range(random_batch(agent, 500))
    vae, batch = agent.vae, random_batch(agent, 40)
    embedding, z = batch.latent_action.split((agent.embedding_dim, agent.latent_dim), 1)
    half, middle = plain_scale(agent)
    nearest = vae.select_discrete_action(embedding)
    x = vae.select_parameter_action(batch.observation, batch.k, z)
    delta = vae.select_delta_state(batch.observation, batch.k, z)
    for i in range(40):
        assert int(nearest[i]) == plain_nearest(vae, array(embedding[i]))
        e = plain_embedding(vae, int(batch.k[i]))
        row_x, row_delta = plain_decode(vae, array(batch.observation[i]), e, array(z[i]) * half + middle)
        np.testing.assert_allclose(array(x[i]), row_x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(array(delta[i]), row_delta, rtol=1e-5, atol=1e-5)
    assert len(set(nearest.tolist())) > 1


def test_acting_equals_the_formulas(double):
    agent = sharpen(make_agent("CatchPoint-v0"))
    agent.update_latent_range(random_batch(agent, 500))
    observation = random_batch(agent, 40).observation
    latent_action, k, x = agent.act(observation.numpy())
    half, middle = plain_scale(agent)
    torch.testing.assert_close(torch.from_numpy(latent_action), agent.actor(observation).detach())
    for i in range(40):
        e, z = array(latent_action[i, :4]), array(latent_action[i, 4:])
        assert int(k[i]) == plain_nearest(agent.vae, e)
        own = plain_embedding(agent.vae, int(k[i]))
        row_x, _ = plain_decode(agent.vae, array(observation[i]), own, z * half + middle)
        np.testing.assert_allclose(array(x[i]), row_x if k[i] == 0 else 0.0 * row_x, atol=1e-5)  # 1 has no parameter
    assert set(k.tolist()) == {0, 1}


def test_exploration_noise_is_normal_and_clipped():
    agent = make_agent()
    observation = np.zeros((4_000, 9), np.float32)
    quiet, loud = agent.act(observation)[0], agent.act(observation, 0.1)[0]
    assert (loud - quiet).std() == pytest.approx(0.1, rel=0.05)
    assert np.abs(agent.act(observation, 2.0)[0]).max() == 1.0


def test_latent_and_policy_scale_are_inverse(double):
    agent = sharpen(make_agent())
    agent.update_latent_range(random_batch(agent, 500))
    half, middle = plain_scale(agent)
    z = 2.0 * torch.rand(50, 6) - 1.0
    latent = agent.vae.to_latent(z)
    np.testing.assert_allclose(array(latent), array(z) * half + middle, atol=1e-9)
    torch.testing.assert_close(agent.vae.to_policy(latent), z)
    corners = agent.vae.to_latent(torch.stack((-torch.ones(6), torch.ones(6))))
    assert torch.allclose(corners, torch.stack((agent.vae.latent_low, agent.vae.latent_high)))
    outside = agent.vae.to_policy(torch.stack((agent.vae.latent_low - 5.0, agent.vae.latent_high + 5.0)))
    assert torch.equal(outside, torch.stack((-torch.ones(6), torch.ones(6))))


@pytest.mark.parametrize("latent_dim", [1, 3, 6, 7])
@pytest.mark.parametrize("rows", [1, 49, 300, 1_100])
def test_the_latent_range_leaves_two_percent_on_each_side(latent_dim, rows, double, monkeypatch):
    agent = sharpen(make_agent(parameter_latent_dim=latent_dim))
    batch = random_batch(agent, rows)
    # So that latents are their means, which a plain loop knows too.
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    agent.update_latent_range(batch)
    latents, errors = [], []
    for i in range(rows):
        s, e = array(batch.observation[i]), plain_embedding(agent.vae, int(batch.k[i]))
        mean, _ = plain_encode(agent.vae, s, e, array(batch.x[i]))
        latents.append(mean)
        change = array(batch.next_observation[i]) - s
        errors.append(np.mean((plain_decode(agent.vae, s, e, mean)[1] - change) ** 2))
    border = int(rows * 2 / 100)
    ordered = np.partition(np.array(latents), sorted({border, rows - border - 1}), axis=0)
    np.testing.assert_allclose(array(agent.vae.latent_low), ordered[border], atol=1e-5)
    np.testing.assert_allclose(array(agent.vae.latent_high), ordered[rows - border - 1], atol=1e-5)
    assert float(agent.vae.state_error) == pytest.approx(np.mean(errors[: hyar_td3.STATE_ERROR_ROWS]), rel=1e-5)


def test_the_latent_range_is_of_sampled_latents():
    """Encoder heads without weights: all latents are standard normal, and 2 % of them lie above 2.054."""
    agent = make_agent()
    with torch.no_grad():
        agent.vae.encoder_heads.weight.zero_()
        agent.vae.encoder_heads.bias.zero_()
    agent.update_latent_range(random_batch(agent, 20_000))
    assert agent.vae.latent_high.tolist() == pytest.approx([2.054] * 6, abs=0.15)
    assert agent.vae.latent_low.tolist() == pytest.approx([-2.054] * 6, abs=0.15)


def plain_relabel(agent: HyARTD3, batch: Batch, i: int, noise: np.ndarray) -> tuple[np.ndarray, bool, bool]:
    """One row's latent action as the current VAE has it, and whether embedding and z were kept."""
    vae, d1 = agent.vae, agent.embedding_dim
    half, middle = plain_scale(agent)
    s, k, x = array(batch.observation[i]), int(batch.k[i]), array(batch.x[i])
    delta = array(batch.next_observation[i]) - s
    e, z = array(batch.latent_action[i, :d1]), array(batch.latent_action[i, d1:])
    own = plain_embedding(vae, k)
    kept_embedding = plain_nearest(vae, e) == k
    if not kept_embedding:
        e = np.clip(own + np.clip(0.1 * noise[:d1], -0.5, 0.5), -1, 1)
    error = np.mean((plain_decode(vae, s, own, z * half + middle)[1] - delta) ** 2)
    kept_z = bool(error < 5.0 * float(vae.state_error))
    if not kept_z:
        mean, std = plain_encode(vae, s, own, x)
        z = np.clip((mean + std * noise[d1:] - middle) / half, -1, 1)
    return np.concatenate((e, z)), kept_embedding, kept_z


def ready_to_relabel(env_id: str, **changes) -> tuple[HyARTD3, Batch]:
    """An agent, and a batch in which about half of the rows need a new z."""
    agent = sharpen(make_agent(env_id, **changes))
    agent.update_latent_range(random_batch(agent, 500))
    batch = random_batch(agent, 64)
    delta = batch.next_observation - batch.observation
    z = batch.latent_action[:, agent.embedding_dim :]
    errors = (agent.vae.select_delta_state(batch.observation, batch.k, z) - delta).square().mean(1)
    agent.vae.state_error.copy_(errors.detach().median() / 5.0 * 1.001)
    return agent, batch


@setups
def test_relabelling_equals_the_formulas(env_id, changes, double):
    agent, batch = ready_to_relabel(env_id, **changes)
    noise = 3.0 * torch.randn(64, agent.latent_action_dim)  # wide, so that the clips are met
    relabelled, kept = agent.relabel(batch, noise)
    rows = [plain_relabel(agent, batch, i, array(noise[i])) for i in range(64)]
    for i, (plain, _, _) in enumerate(rows):
        np.testing.assert_allclose(array(relabelled[i]), plain, rtol=1e-5, atol=1e-5)
    kept_embedding, kept_z = (np.mean([row[j] for row in rows]) for j in (1, 2))
    assert float(kept["kept_embedding"]) == pytest.approx(kept_embedding)
    assert float(kept["kept_latent"]) == pytest.approx(kept_z)
    assert 0.2 < kept_embedding < 1.0 and 0.3 < kept_z < 0.7


def test_the_range_is_applied_in_the_relabelling_check(double):
    """A z whose latent decodes to the very change that was seen is kept, and is not if it were read as a latent."""
    agent = sharpen(make_agent())
    agent.vae.latent_low.copy_(torch.linspace(-3.0, -1.0, 6))
    agent.vae.latent_high.copy_(torch.linspace(2.0, 4.0, 6))
    agent.vae.state_error.fill_(1e-9)
    batch = random_batch(agent, 16)
    half, middle = plain_scale(agent)
    z = array(batch.latent_action[:, agent.embedding_dim :])
    change = []
    for i in range(16):
        s, e = array(batch.observation[i]), plain_embedding(agent.vae, int(batch.k[i]))
        change.append(plain_decode(agent.vae, s, e, z[i] * half + middle)[1])
    batch = batch._replace(next_observation=batch.observation + torch.tensor(np.array(change)))
    assert float(agent.relabel(batch, torch.zeros(16, 12))[1]["kept_latent"]) == 1.0
    agent.vae.latent_high.add_(0.5)
    assert float(agent.relabel(batch, torch.zeros(16, 12))[1]["kept_latent"]) == 0.0


def test_the_check_can_leave_the_range_out_as_the_original_does(double):
    """A z that decodes, read as a latent, to the very change that was seen is kept with the switch off, and only so."""
    agent = sharpen(make_agent(relabel_in_latent_range=False))
    agent.vae.latent_low.fill_(-3.0)
    agent.vae.latent_high.fill_(2.0)
    agent.vae.state_error.fill_(1e-9)
    batch = random_batch(agent, 16)
    z = array(batch.latent_action[:, agent.embedding_dim :])
    change = []
    for i in range(16):
        s, e = array(batch.observation[i]), plain_embedding(agent.vae, int(batch.k[i]))
        change.append(plain_decode(agent.vae, s, e, z[i])[1])
    batch = batch._replace(next_observation=batch.observation + torch.tensor(np.array(change)))
    assert float(agent.relabel(batch, torch.zeros(16, 12))[1]["kept_latent"]) == 1.0
    agent.args.relabel_in_latent_range = True
    assert float(agent.relabel(batch, torch.zeros(16, 12))[1]["kept_latent"]) == 0.0


def test_without_relabelling_actions_stay_as_they_were(double, monkeypatch):
    agent, batch = ready_to_relabel("Goal-v0", relabel=False)
    given = []
    monkeypatch.setattr(agent, "update_critic", lambda _, latent_action, __: given.append(latent_action) or {})
    agent.update(batch)
    assert torch.equal(torch.cat(given), batch.latent_action)


def plain_actor(actor, s: np.ndarray) -> np.ndarray:
    first, second, third = (layer for layer in actor if isinstance(layer, nn.Linear))
    hidden = plain_relu(plain_layer(plain_relu(plain_layer(s, first)), second))
    return np.tanh(plain_layer(hidden, third))


def twins(critic: TwinCritic) -> list[nn.Sequential]:
    """The two critics as anyone would write them, with the same weights."""
    result = []
    for i in range(2):
        inputs = critic.weight1.shape[1]
        network = nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
        )  # fmt: skip
        with torch.no_grad():
            network[0].weight.copy_(critic.weight1[i].T)
            network[0].bias.copy_(critic.bias1[i, 0])
            network[2].weight.copy_(critic.weight2[i].T)
            network[2].bias.copy_(critic.bias2[i, 0])
            network[4].weight.copy_(critic.weight3[i])
            network[4].bias.copy_(critic.bias3[i])
        result.append(network)
    return result


def same_critics(critic: TwinCritic, networks: list[nn.Sequential], of=lambda parameter: parameter) -> None:
    """Compare weights, or whatever `of` takes from a parameter, of our critic and two plain ones."""
    for i, network in enumerate(networks):
        pairs = [
            (of(critic.weight1)[i].T, network[0].weight), (of(critic.bias1)[i, 0], network[0].bias),
            (of(critic.weight2)[i].T, network[2].weight), (of(critic.bias2)[i, 0], network[2].bias),
            (of(critic.weight3)[i], network[4].weight), (of(critic.bias3)[i], network[4].bias),
        ]  # fmt: skip
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, of(theirs), rtol=1e-5, atol=1e-7)


def test_twin_critic_equals_two_networks(double):
    agent = sharpen(make_agent())
    batch, networks = random_batch(agent, 32), twins(agent.critic)
    inputs = torch.cat((batch.observation, batch.latent_action), 1)
    values = agent.critic(batch.observation, batch.latent_action)
    plain = torch.stack([network(inputs)[:, 0] for network in networks])
    assert values.shape == (2, 32) and plain.std() > 0.01
    torch.testing.assert_close(values, plain)
    torch.testing.assert_close(agent.critic.first(batch.observation, batch.latent_action), plain[0])
    weights = torch.randn(2, 32)
    (values * weights).sum().backward()
    (plain * weights).sum().backward()
    same_critics(agent.critic, networks, of=lambda parameter: parameter.grad)


def test_twin_critic_is_drawn_as_two_networks_are():
    """Every layer's weights lie within the bound of PyTorch's own draw, and fill it; the twins differ."""
    critic = TwinCritic(9, 12)
    for fan_in, values in ((21, (critic.weight1, critic.bias1)), (256, (critic.weight2, critic.bias2, critic.weight3))):
        for value in values:
            assert 0.9 / math.sqrt(fan_in) < value.abs().max() <= 1.0 / math.sqrt(fan_in)
    one, other = critic(torch.ones(1, 9), torch.ones(1, 12))
    assert one != other


def plain_target(agent: HyARTD3, batch: Batch, i: int, noise: np.ndarray) -> float:
    """One row's target of clipped double Q-learning."""
    s = array(batch.next_observation[i])
    action = np.clip(plain_actor(agent.target_actor, s) + np.clip(0.1 * noise, -0.5, 0.5), -1, 1)
    values = [float(network(torch.tensor([[*s, *action]]))) for network in twins(agent.target_critic)]
    return float(batch.reward[i]) + 0.99 * (1.0 - float(batch.terminated[i])) * min(values)


@setups
def test_the_target_equals_the_formula(env_id, changes, double):
    agent, batch = ready_to_relabel(env_id, **changes)
    noise = 3.0 * torch.randn(64, agent.latent_action_dim)
    target = agent.critic_target(batch, noise)
    for i in range(64):
        assert float(target[i]) == pytest.approx(plain_target(agent, batch, i, array(noise[i])), abs=1e-5)
    over = batch.terminated > 0
    assert 5 < over.sum() < 60
    assert torch.equal(target[over], batch.reward[over])  # the bootstrap is cut, at the end of the world only


def plain_inverted(gradient: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Inverting gradients, entry by entry: what is left of the way to the bound that the gradient points to."""
    result = np.zeros_like(gradient)
    for i in range(gradient.shape[0]):
        for j in range(gradient.shape[1]):
            room = (1.0 - action[i, j]) / 2.0 if gradient[i, j] > 0 else (action[i, j] + 1.0) / 2.0
            result[i, j] = gradient[i, j] * room
    return result


@pytest.mark.parametrize("steep", [1.0, 1e5])
def test_the_actor_climbs_by_inverted_gradients(steep, double):
    """`steep` critics reach the gradient's norm limit of 10."""
    agent = sharpen(make_agent())
    with torch.no_grad():
        agent.critic.weight3 *= steep
    batch, plain = random_batch(agent, 32), sharpen(make_agent())
    plain.actor.load_state_dict(agent.actor.state_dict())
    network, old_targets = twins(agent.critic)[0], [target.clone() for target in agent.targets]
    action = plain.actor(batch.observation)
    leaf = action.detach().requires_grad_()
    value = network(torch.cat((batch.observation, leaf), 1)).mean()
    value.backward()
    inverted = plain_inverted(array(leaf.grad), array(action))
    action.backward(torch.tensor(-inverted))
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in plain.actor.parameters()))
    assert (norm > 10.0) == (steep > 1.0)
    for parameter in plain.actor.parameters():
        parameter.grad *= min(1.0, 10.0 / (norm + 1e-6))
    torch.optim.Adam(plain.actor.parameters(), lr=3e-4).step()
    losses = agent.update_actor(batch.observation)
    agent.update_targets()
    for ours, theirs in zip(agent.actor.parameters(), plain.actor.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert float(losses["actor"]) == pytest.approx(-float(value), rel=1e-6)
    for target, old, online in zip(agent.targets, old_targets, agent.online, strict=True):
        torch.testing.assert_close(target, 0.005 * online.detach() + 0.995 * old, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy_frequency", [1, 2, 3])
def test_update_equals_plain_sequential_updates(policy_frequency, double):
    """One large batch at once, against: relabel, target, critics, one batch after the other, then the actor."""
    changes = {"policy_frequency": policy_frequency, "learning_rate": 1e-3, "tau": 0.05}
    agent, _ = ready_to_relabel("Goal-v0", **changes)
    plain, _ = ready_to_relabel("Goal-v0", **changes)
    assert not differences(snapshot(agent), snapshot(plain))
    batch_size, width = 16, agent.latent_action_dim
    critics, targets = twins(plain.critic), twins(plain.target_critic)
    critic_optimizer = torch.optim.Adam([p for network in critics for p in network.parameters()], lr=1e-3)
    actor_optimizer = torch.optim.Adam(plain.actor.parameters(), lr=1e-3)
    for round_ in range(3):
        batch = random_batch(agent, policy_frequency * batch_size, seed=10 + round_)
        noise = torch.randn(len(batch.k), 2 * width)
        losses = agent.update(batch, noise)

        for part in range(policy_frequency):
            rows = range(part * batch_size, (part + 1) * batch_size)
            latent_action = [plain_relabel(plain, batch, i, array(noise[i, :width]))[0] for i in rows]
            target = []
            for i in rows:
                s = array(batch.next_observation[i])
                smoothing = np.clip(0.1 * array(noise[i, width:]), -0.5, 0.5)
                action = np.clip(plain_actor(plain.target_actor, s) + smoothing, -1, 1)
                value = min(float(network(torch.tensor([[*s, *action]]))) for network in targets)
                target.append(float(batch.reward[i]) + 0.99 * (1 - float(batch.terminated[i])) * value)
            inputs = torch.cat((batch.observation[rows], torch.tensor(np.array(latent_action))), 1)
            critic_loss = sum((n(inputs)[:, 0] - torch.tensor(target)).square().mean() for n in critics)
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
        assert float(losses["critic"]) == pytest.approx(float(critic_loss), rel=1e-6)

        action = plain.actor(batch.observation[rows])
        leaf = action.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critics[0](torch.cat((batch.observation[rows], leaf), 1)).mean(), leaf)
        actor_optimizer.zero_grad()
        action.backward(torch.tensor(-plain_inverted(array(gradient), array(leaf))))
        nn.utils.clip_grad_norm_(plain.actor.parameters(), 10.0)
        actor_optimizer.step()
        with torch.no_grad():
            pairs = [(plain.target_actor, plain.actor), *zip(targets, critics, strict=True)]
            for slow, fast in pairs:
                for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                    a += 0.05 * (b - a)
    same_critics(agent.critic, critics)
    same_critics(agent.target_critic, targets)
    for name in ("actor", "target_actor"):
        ours, theirs = getattr(agent, name), getattr(plain, name)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert (agent.actor[0].weight - make_agent("Goal-v0", **changes).actor[0].weight).abs().max() > 1e-3


def test_defaults_are_the_original_codes():
    args = Args()
    original = {
        "learning_rate": 3e-4, "vae_learning_rate": 1e-4, "gamma": 0.99, "tau": 0.005, "batch_size": 128,
        "vae_batch_size": 64, "policy_noise": 0.1, "noise_clip": 0.5, "policy_frequency": 2, "learning_starts": 128,
        "exploration_noise": 0.1, "exploration_noise_episodes": 1_000, "vae_pretrain_steps": 5_000,
        "parameter_weight": 2.0, "state_weight": 1.0, "kl_weight": 0.5, "latent_range_tail": 0.02, "relabel": True,
        "relabel_threshold": 5.0, "discrete_embedding": "learned", "rebuild_vae_optimizer": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in original} == original
    wanted = {"LATENT_RANGE_ROWS": 5_000, "STATE_ERROR_ROWS": 1_000, "VAE_UPDATE_START": 1_000}
    assert {**wanted, "EXPLORATION_NOISE_START": 1.0} == CONSTANTS


# steps, random episodes, buffer, d1, d2, episodes between VAE updates
ORIGINAL = {
    "Platform-v0": (200_000, 5_000, 100_000, 6, 6, 10), "Goal-v0": (300_000, 20_000, 100_000, 6, 6, 10),
    "HardGoal-v0": (300_000, 20_000, 100_000, 6, 6, 10), "CatchPoint-v0": (1_000_000, 5_000, 100_000, 4, 4, 10),
    "HardMove-v0": (1_000_000, 5_000, 1_000_000, 6, 6, 10), "HardMove8-v0": (1_000_000, 5_000, 1_000_000, 6, 6, 10),
    "HardMove10-v0": (1_000_000, 5_000, 1_000_000, 6, 6, 10), "SimpleMove-v0": (1_000_000, 5_000, 100_000, 6, 6, 100),
}  # fmt: skip
BY_ENVIRONMENT = (
    "total_timesteps", "random_episodes", "buffer_size", "discrete_latent_dim", "parameter_latent_dim",
    "vae_update_episodes",
)  # fmt: skip


@pytest.mark.parametrize("env_id", ORIGINAL)
def test_defaults_of_each_environment_are_the_original_codes(env_id):
    args = make_args(env_id)
    assert tuple(getattr(args, name) for name in BY_ENVIRONMENT) == ORIGINAL[env_id]


def test_a_named_value_is_not_overruled_by_the_environments_default():
    args = make_args("Goal-v0", total_timesteps=777, discrete_latent_dim=5)
    assert (args.total_timesteps, args.discrete_latent_dim, args.random_episodes) == (777, 5, 20_000)


# --- replay buffer ---
def test_rows_come_back_what_they_were():
    buffer, generator = ReplayBuffer(4, 5, 2), np.random.default_rng(0)
    rows = []
    buffer.rows = buffer.rows[:16]  # it grows as it fills
    for i in range(40):
        sizes = 4, 5, 2
        observation, latent_action, x = (generator.normal(size=size).astype(np.float32) for size in sizes)
        row = observation, latent_action, x, i % 3, observation + 1, float(i), i % 7 == 0
        buffer.add(*row)
        rows.append(row)
    assert buffer.size == 40
    batch = buffer.sample(0, 500, CPU)
    assert batch.k.dtype == torch.int64
    assert [tuple(value.shape) for value in batch] == [(500, 4), (500, 5), (500, 2), (500,), (500, 4), (500,), (500,)]
    for j in range(500):
        row = rows[int(batch.reward[j])]
        for value, expected in zip(batch, row, strict=True):
            np.testing.assert_array_equal(value[j].numpy(), np.float32(expected))
    assert set(batch.reward.tolist()) == set(range(40))


@pytest.mark.parametrize("low", [0, 12])
def test_rows_are_drawn_uniformly(low):
    torch.manual_seed(0)
    buffer = ReplayBuffer(1, 1, 1)
    for i in range(20):
        buffer.add(0.0, 0.0, 0.0, 0, 0.0, float(i), 0.0)
    draws = torch.cat([buffer.sample(low, 500, CPU).reward for _ in range(20)]).long()
    counts = torch.bincount(draws, minlength=20)[low:].double()
    assert counts.sum() == 10_000 and len(counts) == 20 - low
    expected = 10_000 / (20 - low)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = 20 - low - 1
    assert chi_square < freedom + 4.0 * math.sqrt(2.0 * freedom)


def test_the_vae_learns_from_all_rows_and_the_critics_from_the_newest_of_the_learning_phase(
    tmp_path, no_pictures, monkeypatch
):
    """Each row is known by its reward, which counts the steps of the training environment."""
    clock = SimpleNamespace(now=0)

    def counted_step(env, action, step=ToyEnv.step):
        observation, _, terminated, truncated, info = step(env, action)
        clock.now = env.total if env.number == 0 and env.counting else clock.now
        return observation, float(env.total), terminated, truncated, info

    seen = {"update": [], "update_vae": [], "update_latent_range": []}

    def recorded(name, method):
        def call(self, batch, *args, **kwargs):
            seen[name].append((clock.now, batch.reward.long().tolist()))
            return method(self, batch, *args, **kwargs)

        return call

    for name in seen:
        monkeypatch.setattr(HyARTD3, name, recorded(name, getattr(HyARTD3, name)))
    monkeypatch.setattr(ToyEnv, "step", counted_step)
    hyar_td3.main(tiny(tmp_path, buffer_size=40, batch_size=64))
    assert len(seen["update"]) == pytest.approx((150 - 19 + 150 // 7) / 2, abs=2)
    oldest = []
    for now, rows in seen["update"]:
        assert len(rows) == 2 * 64
        assert max(rows) <= now and min(rows) > max(RANDOM_STEPS, now - 40)
        oldest.append(min(rows) - max(RANDOM_STEPS, now - 40))
    assert np.mean(oldest) < 3 and np.mean([now - max(rows) for now, rows in seen["update"]]) < 3
    assert len(seen["update_vae"]) == TINY["vae_pretrain_steps"] + len([e for e in range(3, 22) if e % 2 == 0])
    for now, rows in seen["update_vae"] + seen["update_latent_range"]:
        assert max(rows) <= now and min(rows) < RANDOM_STEPS
    drawn = [row for _, rows in seen["update_latent_range"][-3:] for row in rows]
    assert min(drawn) < 20 and max(drawn) > RANDOM_STEPS + 100


# --- learning ---
def random_return(env_id: str, episodes=400) -> float:
    env, total = gym.make(env_id), 0.0
    env.action_space.seed(0)
    for seed in range(episodes):
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + reward, terminated or truncated
    return total / episodes


GOOD_TOY_RETURN = 1.5  # of at most 2


def test_learns_the_toy(tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(hyar_td3, "LATENT_RANGE_ROWS", 1_000)
    monkeypatch.setattr(hyar_td3, "VAE_UPDATE_START", 100)
    started = time.process_time()
    folder = hyar_td3.main(Args(
        env_id="Toy-v0", runs_dir=str(tmp_path), run_name="toy", total_timesteps=500, random_episodes=1_000,
        vae_pretrain_steps=500, vae_update_episodes=25, exploration_noise_episodes=100, eval_frequency=250,
        eval_episodes=50, learning_rate=1e-3, vae_learning_rate=1e-3, gamma=0.5, discrete_latent_dim=2,
        parameter_latent_dim=2,
    ))  # fmt: skip
    last = evaluations(folder)[-1]
    assert last["step"] == 500
    assert last["episodic_return"] > GOOD_TOY_RETURN
    assert last["success_rate"] > 0.5
    assert time.process_time() - started < 40


def test_a_random_policy_does_not_solve_the_toy():
    assert random_return("Toy-v0") < GOOD_TOY_RETURN / 3


@pytest.mark.slow
def test_learns_platform(tmp_path, monkeypatch):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(hyar_td3, name, value)
    assert random_return("Platform-v0") < 0.3
    folder = hyar_td3.main(Args(runs_dir=str(tmp_path), run_name="platform", total_timesteps=40_000))
    assert max(row["episodic_return"] for row in evaluations(folder)) >= 0.9


# --- evaluation ---
def test_evaluation_is_repeatable_and_touches_no_random_stream():
    agent = make_agent()
    environments = [make_env() for _ in range(4)]
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before, weights = torch.get_rng_state(), np.random.get_state()[1].copy(), snapshot(agent)
    first = hyar_td3.evaluate(agent, environments, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(6)
    second = hyar_td3.evaluate(agent, environments, seed=1)
    third = hyar_td3.evaluate(agent, [make_env() for _ in range(4)], seed=1)
    assert first == second == third
    assert not moved(weights, agent)
    assert first != hyar_td3.evaluate(agent, environments, seed=2)


def test_evaluation_adds_up_what_single_episodes_give():
    """Lock-step is no more than episodes one after the other, each on its own seed."""
    agent = make_agent("ToyLong-v0")
    center, width = np.float32([0, 300, 0, 0]), np.float32([1, 50, 1, 1])
    scale, returns = make_env("ToyLong-v0").scale, []
    scale.center, scale.width = center, width
    for i in range(3):
        env, form = gym.make("ToyLong-v0"), make_env("ToyLong-v0")
        observation, over, total = env.reset(seed=episode_seed(7, i, stream=1))[0], False, 0.0
        while not over:
            _, k, x = agent.act(((observation - center) / width)[None])
            observation, reward, terminated, truncated, info = env.step(form.to_space(int(k[0]), x[0]))
            total, over = total + reward, terminated or truncated
        returns.append((total, info["is_success"]))
    args = Args(env_id="ToyLong-v0")
    metrics = hyar_td3.evaluate(agent, [hyar_td3.make_env(args, scale) for _ in range(3)], seed=7)
    totals, successes = np.array(returns, float).T
    assert metrics["episodic_return"] == pytest.approx(totals.mean(), abs=1e-5)
    assert metrics["return_std"] == pytest.approx(totals.std(), abs=1e-5)
    assert metrics["success_rate"] == successes.mean()
    assert metrics["episodic_length"] == 7


def test_episode_seeds_differ_by_seed_stream_and_index():
    seeds = {episode_seed(seed, i, stream) for seed in range(10) for i in range(50) for stream in range(3)}
    assert len(seeds) == 10 * 50 * 3
    assert episode_seed(3, 4) == episode_seed(3, 4)


def test_every_training_episode_has_its_own_seed(tmp_path, no_pictures):
    hyar_td3.main(tiny(tmp_path, seed=5))
    episodes = TINY["random_episodes"] + 150 // 7 + 1
    assert ToyEnv.seeds == [episode_seed(5, i) for i in range(episodes)]


@pytest.mark.parametrize("changes", [{"eval_frequency": 13}, {"checkpoint_frequency": 7}, {"eval_episodes": 5}])
def test_evaluations_and_checkpoints_do_not_change_training(changes, reference, tmp_path, no_pictures):
    folder = hyar_td3.main(tiny(tmp_path, **changes))
    weights = tensors(torch.load(folder / "model.pt", weights_only=True), "model.pt")
    assert not differences(weights, {name: value for name, value in reference.items() if name.startswith("model.pt")})


# --- resuming ---
@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """The outcome of a run that was never stopped."""
    ToyEnv.made, ToyEnv.hook = 0, None
    return outcome(hyar_td3.main(tiny(tmp_path_factory.mktemp("reference"))))


def test_another_seed_ends_elsewhere(reference, tmp_path, no_pictures):
    """Otherwise the equalities below would be empty."""
    other = outcome(hyar_td3.main(tiny(tmp_path, seed=2)))
    assert {"eval.csv", "model.pt/agent/vae.embedding_table"} <= set(differences(reference, other))


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGTERM, 1), (signal.SIGTERM, 53), (signal.SIGTERM, 63), (signal.SIGINT, 74), (signal.SIGTERM, 120)],
)
def test_a_stopped_run_ends_as_if_never_stopped(number, step, reference, tmp_path, no_pictures, capsys):
    """Step 53 is amid an episode, 63 at an episode's end, 120 at an evaluation's and a checkpoint's."""
    at_training_step(RANDOM_STEPS + step, send(number))
    assert exit_status(tiny(tmp_path)) == 128 + number
    assert "--resume" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == step  # the step is finished, and no other begun
    assert state["episode_length"] == step % 7
    ToyEnv.hook = None
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), reference)


@pytest.mark.parametrize(("call", "step", "evaluations"), [(3, 40, 0), (10, 40, 0), (31, 120, 2), (45, 150, 3)])
def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(
    call, step, evaluations, reference, tmp_path, no_pictures
):
    """An evaluation is 7 steps of the actor and 7 of its average; that of the resumed run is interrupted, too."""
    for resume, last in ((False, call), (True, 3)):
        calls = []

        def hook(env: ToyEnv, calls: list = calls, last: int = last) -> None:
            calls.extend([env.taken] * (env.number == 1))
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGTERM)

        ToyEnv.made, ToyEnv.hook = 0, hook
        assert exit_status(tiny(tmp_path, resume=resume)) == 143
        state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert (state["step"], len(state["eval_rows"])) == (step, evaluations)
    ToyEnv.made, ToyEnv.hook = 0, None
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), reference)


def test_a_run_stopped_many_times_ends_as_if_never_stopped(reference, tmp_path, no_pictures):
    stops, status = 0, 143
    while status == 143 and stops < 20:
        at_training_step(17 + (RANDOM_STEPS if stops == 0 else 0), send(signal.SIGTERM))
        status = exit_status(tiny(tmp_path, resume=True))
        stops += status == 143
    assert status == 0 and stops > 8
    assert not differences(outcome(tmp_path / "run"), reference)


@pytest.mark.parametrize("phase", ["random", "pretraining"])
def test_a_run_stopped_before_it_learns_starts_over(phase, reference, tmp_path, no_pictures, monkeypatch):
    with monkeypatch.context() as patch:
        if phase == "random":
            at_training_step(50, send(signal.SIGTERM))
        else:
            method, calls = HyARTD3.update_vae, []

            def update_vae(*args, **kwargs):
                calls.append(1)
                if len(calls) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                return method(*args, **kwargs)

            patch.setattr(HyARTD3, "update_vae", update_vae)
        assert exit_status(tiny(tmp_path)) == 143
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    ToyEnv.hook = None
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), reference)


def kill_at_call(owner, name: str, number: int, when=lambda *_, **__: True, after=False) -> None:
    """Have the `number`-th call of a function, of those that `when` picks, be this process's end."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        result = function(*args, **kwargs) if after else None
        calls.extend([1] * bool(when(*args, **kwargs)))
        if len(calls) == number:
            kill_self()
        return result if after else function(*args, **kwargs)

    setattr(owner, name, call)


def is_checkpoint_file(descriptor: int) -> bool:
    return "checkpoint.pt" in str(Path(f"/proc/self/fd/{descriptor}").readlink())


def half_a_save(content, file, *args, **kwargs):
    file.write(b"PK\x03\x04 not the whole")
    file.flush()
    kill_self()


def kill_in_second_save() -> None:
    save, calls = torch.save, []

    def call(content, file, *args, **kwargs):
        calls.extend([1] * ("rows" in content))
        (half_a_save if len(calls) == 2 else save)(content, file, *args, **kwargs)

    torch.save = call


def goes_to_checkpoint(source, target, *_, **__) -> bool:
    return str(target).endswith("checkpoint.pt")


KILLS = {  # name -> what to arm in the process that will be killed, and whether a checkpoint is there afterwards
    "in mid-episode": (lambda: at_training_step(RANDOM_STEPS + 53, kill_self), 30),
    "before the first checkpoint": (lambda: at_training_step(RANDOM_STEPS + 11, kill_self), None),
    "before anything is written": (lambda: kill_at_call(hyar_td3, "write_atomically", 1), None),
    "while args.json is written": (lambda: kill_at_call(os, "fsync", 1), None),
    "in the random phase": (lambda: at_training_step(50, kill_self), None),
    "in pre-training": (lambda: kill_at_call(HyARTD3, "update_vae", 5), None),
    "in a gradient step": (lambda: kill_at_call(HyARTD3, "update_actor", 30), 60),
    "in the VAE's refresh": (lambda: kill_at_call(HyARTD3, "update_latent_range", 6), 60),
    "before the second evaluation": (lambda: kill_at_call(hyar_td3, "evaluate", 3), 60),
    "in the middle of an evaluation": (lambda: setattr(ToyEnv, "hook", kill_in_evaluation), 30),
    "after eval.csv was written": (lambda: kill_at_call(hyar_td3.Run, "log_evaluation", 2, after=True), 60),
    "in the middle of writing a checkpoint": (kill_in_second_save, 30),
    "before a checkpoint is flushed": (lambda: kill_at_call(os, "fsync", 2, is_checkpoint_file), 30),
    "before a checkpoint is renamed": (lambda: kill_at_call(os, "replace", 2, goes_to_checkpoint), 30),
    "after a checkpoint was renamed": (lambda: kill_at_call(os, "replace", 2, goes_to_checkpoint, after=True), 60),
    "when the last step is done": (lambda: kill_at_call(hyar_td3.Run, "save_model", 1, is_final_model), 150),
    "while the pictures are drawn": (lambda: kill_at_call(Figure, "savefig", 2), 150),
}


def kill_in_evaluation(env: ToyEnv) -> None:
    if env.number == 2 and env.taken == 3:
        kill_self()


def is_final_model(run: hyar_td3.Run, name: str, _: dict) -> bool:
    return name == "model.pt"


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_ends_as_if_never_killed(where, reference, tmp_path, no_pictures, capsys):
    arm, checkpoint_step = KILLS[where]

    def play() -> int:
        arm()
        return exit_status(tiny(tmp_path))

    assert in_a_fork(play) == -signal.SIGKILL
    path = tmp_path / "run" / "checkpoint.pt"
    assert path.exists() == (checkpoint_step is not None)
    if checkpoint_step is not None:
        assert torch.load(path, weights_only=True)["step"] == checkpoint_step
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), reference)
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a run that was stopped at step 74, in mid-episode."""
    folder = tmp_path_factory.mktemp("interrupted")
    at_training_step(RANDOM_STEPS + 74, send(signal.SIGTERM))
    assert exit_status(tiny(folder)) == 143
    ToyEnv.hook = None
    return folder / "run"


@pytest.fixture
def checkpoint(interrupted, tmp_path) -> Path:
    """The checkpoint of a copy of that run, in `tmp_path`/run."""
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run" / "checkpoint.pt"


def change(checkpoint: Path, by: Callable[[dict], Any]) -> None:
    """Write a checkpoint again, changed."""
    torch.save(by(torch.load(checkpoint, weights_only=True)), checkpoint)


def test_a_checkpoint_holds_nothing_that_could_run(checkpoint, tmp_path, no_pictures, capsys):
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 74 and state["episode_length"] == 4 and not state["finished"]

    def types(value) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types(part) for part in (*value.keys(), *value.values())), set())
        return set().union(*map(types, value), set()) if isinstance(value, list | tuple) else {type(value)}

    assert types(state) <= {Tensor, int, float, bool, str, type(None)}
    marker = tmp_path / "was here"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch '{marker}'",)

    change(checkpoint, lambda state: {**state, "step": Malicious()})
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert not marker.exists()
    assert_one_line(capsys, "damaged")


CHECKPOINT_KEYS = [
    "script", "arguments", "step", "eval_rows", "finished", "torch_rng", "cuda_rng", "episode", "updates_due",
    "episode_return", "episode_length", "observation", "recent", "agent", "actor_updates", "optimizers", "center",
    "width", "rows", "random_size",
]  # fmt: skip
AGENT_KEYS = [
    "actor", "average_actor", "critic", "target_actor", "target_critic", "vae", "mask", "initial_embedding",
]  # fmt: skip
OPTIMIZER_KEYS = ["actor", "critic", "vae"]


def of(key: str, state: dict) -> set[str]:
    """The entries of a module's state that belong to this part of it."""
    return {name for name in state if name == key or name.startswith(f"{key}.")}


def test_the_tests_know_all_of_a_checkpoint(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    assert set(state) == set(CHECKPOINT_KEYS)
    assert set(state["agent"]) == set().union(*(of(key, state["agent"]) for key in AGENT_KEYS))
    assert all(of(key, state["agent"]) for key in AGENT_KEYS)
    assert set(state["optimizers"]) == set(OPTIMIZER_KEYS)


def resumed_outcome(tmp_path: Path) -> dict | None:
    """The outcome of resuming, None if that fails."""
    try:
        status = exit_status(tiny(tmp_path, resume=True))
    except Exception:
        return None
    return outcome(tmp_path / "run") if status == 0 else None


def test_the_whole_checkpoint_is_enough(checkpoint, reference, tmp_path, no_pictures):
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("checkpoint.pt", "best_model.pt"):
            path.unlink()
    assert not differences(resumed_outcome(tmp_path), reference)


PARTS = [f"agent/{key}" for key in AGENT_KEYS] + [f"optimizers/{key}" for key in OPTIMIZER_KEYS]


@pytest.mark.parametrize("key", [*CHECKPOINT_KEYS, *PARTS])
def test_nothing_can_be_left_out_of_a_checkpoint(key, checkpoint, tmp_path, no_pictures, capsys):
    part, _, inner = key.rpartition("/")

    def without(state: dict) -> dict:
        part_of_state = state[part] if part else state
        for name in of(inner, part_of_state):
            del part_of_state[name]
        return state

    change(checkpoint, without)
    capsys.readouterr()
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "checkpoint.pt is damaged", inner if part != "agent" else "loading state_dict")


FRESH = {  # what the start of a run would have in the place of each field that learning depends on
    "step": lambda state: state | {"step": 73},
    "episode": lambda state: state | {"episode": 0},
    "updates_due": lambda state: state | {"updates_due": 1 - state["updates_due"]},
    "episode_length": lambda state: state | {"episode_length": 0},
    "actor_updates": lambda state: state | {"actor_updates": 0},
    "center": lambda state: state | {"center": torch.zeros(4)},
    "width": lambda state: state | {"width": torch.ones(4)},
    "eval_rows": lambda state: state | {"eval_rows": []},
    "torch_rng": lambda state: state | {"torch_rng": torch.Generator().manual_seed(1).get_state()},
    "rows": lambda state: state | {"rows": torch.zeros_like(state["rows"])},
    "random_size": lambda state: state | {"random_size": 0},
    **{
        f"agent/{key}": lambda state, key=key: state | {"agent": state["agent"] | fresh_part(key)}
        for key in AGENT_KEYS
        if key not in ("mask", "initial_embedding")  # the first is the environment's, the second for a metric alone
    },
    **{
        f"optimizers/{key}": lambda state, key=key: (
            state | {"optimizers": state["optimizers"] | {key: fresh_agent().optimizers[key].state_dict()}}
        )
        for key in OPTIMIZER_KEYS
    },
}


def fresh_agent() -> HyARTD3:
    return make_agent("ToyLong-v0", 1, discrete_latent_dim=3, parameter_latent_dim=4)


def fresh_part(key: str) -> dict[str, Tensor]:
    state = fresh_agent().state_dict()
    return {name: state[name] for name in of(key, state)}


@pytest.mark.parametrize("key", FRESH)
def test_each_field_of_a_checkpoint_is_used(key, checkpoint, reference, tmp_path, no_pictures):
    """A value as at the start of a run, in the place of the saved one, makes a difference."""
    change(checkpoint, FRESH[key])
    result = resumed_outcome(tmp_path)
    assert result is None or differences(result, reference)


def test_a_half_used_update_is_in_the_checkpoint(interrupted, tmp_path):
    """So that the tests above mean something: `updates_due` is not always 0."""
    dues = set()
    for step in (72, 73):
        ToyEnv.made = 0
        at_training_step(RANDOM_STEPS + step, send(signal.SIGTERM))
        assert exit_status(tiny(tmp_path, run_name=f"at {step}")) == 143
        dues.add(torch.load(tmp_path / f"at {step}" / "checkpoint.pt", weights_only=True)["updates_due"])
    assert dues == {0, 1}


@pytest.mark.parametrize("early", [0, 2])
def test_an_episode_that_does_not_replay_is_left(early, tmp_path, no_pictures, capsys, monkeypatch):
    """It may also end before the actions do."""
    changes = {"env_id": "ToyUnrepeatable-v0"}
    at_training_step(RANDOM_STEPS + 53, send(signal.SIGTERM))
    assert exit_status(tiny(tmp_path, **changes)) == 143
    ToyEnv.hook = None
    monkeypatch.setattr(ToyEnv, "early", early)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["episode_length"] > 2
    capsys.readouterr()
    ToyEnv.seeds.clear()
    assert exit_status(tiny(tmp_path, resume=True, **changes)) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in (captured.out + captured.err).splitlines() if "replay" in line]
    assert "episode 7" in line
    first = TINY["random_episodes"] + 7
    assert ToyEnv.seeds[:2] == [episode_seed(1, first), episode_seed(1, first + 1)]


def test_a_checkpoint_is_no_larger_than_what_it_holds(tmp_path, no_pictures):
    """A slice of the buffer must not bring the whole buffer along."""
    for name, steps in (("short", 150), ("long", 1_000_000)):
        ToyEnv.made = 0
        at_training_step(RANDOM_STEPS + 50, send(signal.SIGTERM))
        assert exit_status(tiny(tmp_path, run_name=name, total_timesteps=steps)) == 143
    sizes = [(tmp_path / name / "checkpoint.pt").stat().st_size for name in ("short", "long")]
    assert sizes[1] - sizes[0] < 100_000


def assert_one_line(capsys, *parts: str) -> str:
    """stderr is one line that starts with "error:" and has these parts; return it."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


@pytest.mark.parametrize("keep", [0, 10, 0.5, -10])
def test_a_truncated_checkpoint_is_refused(keep, checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    before = contents(tmp_path)
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "checkpoint.pt is damaged")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, torch.zeros(3), "text"], ids=str)
def test_a_file_that_is_no_checkpoint_is_refused(content, checkpoint, tmp_path, capsys):
    change(checkpoint, lambda _: content)
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "damaged")


def test_changed_arguments_are_refused_and_named(checkpoint, tmp_path, capsys):
    before = contents(tmp_path)
    assert exit_status(tiny(tmp_path, resume=True, learning_rate=1e-3, seed=4)) == 2
    line = assert_one_line(capsys, "learning_rate was 0.0003, now 0.001", "seed was 1, now 4")
    assert "batch_size" not in line
    assert contents(tmp_path) == before


def test_changed_arguments_are_refused_before_the_first_checkpoint_too(tmp_path, no_pictures, capsys):
    at_training_step(50, send(signal.SIGTERM))
    assert exit_status(tiny(tmp_path)) == 143
    capsys.readouterr()
    assert exit_status(tiny(tmp_path, resume=True, gamma=0.5)) == 2
    assert_one_line(capsys, "gamma was 0.99, now 0.5")


def test_another_scripts_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    change(checkpoint, lambda state: {**state, "script": "sac_ae_pixels"})
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "sac_ae_pixels")


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """All files, with when and what was written."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(tmp_path, no_pictures, capsys, monkeypatch):
    hyar_td3.main(tiny(tmp_path, total_timesteps=30))
    files = contents(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(HyARTD3, "__init__", None)  # so that nothing can be built
    assert exit_status(tiny(tmp_path, total_timesteps=30, resume=True)) == 0
    captured = capsys.readouterr()
    assert "finished" in captured.out and not captured.err
    assert contents(tmp_path) == files


def test_a_run_may_be_moved_to_another_folder(interrupted, reference, tmp_path, no_pictures):
    """Neither the run's name nor where it lies is part of its arguments."""
    shutil.copytree(interrupted, tmp_path / "elsewhere" / "renamed")
    assert exit_status(tiny(tmp_path / "elsewhere", run_name="renamed", resume=True)) == 0
    assert not differences(outcome(tmp_path / "elsewhere" / "renamed"), reference)


# --- bad input ---
def refused(capsys, tmp_path: Path, *parts: str, **changes) -> str:
    """`main` ends with status 2 and one line, and creates nothing; return that line."""
    runs = tmp_path / "runs"
    assert exit_status(Args(**{"runs_dir": str(runs), **changes})) == 2
    assert not runs.exists()
    assert list(tmp_path.iterdir()) == []
    return assert_one_line(capsys, *parts)


@pytest.mark.parametrize(
    ("env_id", "near"), [("Platfrom-v0", "Platform-v0"), ("Gaol-v0", "Goal-v0"), ("HardMoev-v0", "HardMove-v0")]
)
def test_an_unknown_environment_is_refused_with_the_nearest_names(env_id, near, tmp_path, capsys):
    refused(capsys, tmp_path, "unknown environment", env_id, f"did you mean {near}", env_id=env_id)


@pytest.mark.parametrize("env_id", ["qqqqqqqqqqqq-v0", "no_such_package:Name-v0", "Platform-v9", "not an id", ""])
def test_a_hopeless_environment_is_refused(env_id, tmp_path, capsys):
    refused(capsys, tmp_path, env_id, env_id=env_id)


def test_continuous_and_discrete_actions_are_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "expected Tuple(Discrete", "sac_ae_pixels.py", env_id="Pendulum-v1")
    refused(capsys, tmp_path, "expected Tuple(Discrete", "got a Discrete", env_id="CartPole-v1")


@pytest.mark.parametrize("env_id", REFUSED_SPACES)
def test_other_spaces_are_refused(env_id, tmp_path, capsys):
    refused(capsys, tmp_path, REFUSED_SPACES[env_id][2], env_id=env_id)


def test_an_environment_that_cannot_be_made_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "FailsLoudly-v0", "no display", env_id="FailsLoudly-v0")
    refused(capsys, tmp_path, "FailsSilently-v0", "NotImplementedError", env_id="FailsSilently-v0")


def test_video_of_an_environment_that_cannot_be_rendered_is_refused(tmp_path, capsys):
    """At once, not after hours of training."""

    class Forgets(ToyEnv):  # its mode
        def __init__(self, render_mode=None):
            super().__init__()

    class Fails(ToyEnv):
        def render(self):
            raise RuntimeError("no pygame here")

    class Empty(ToyEnv):
        def render(self):
            return None

    cases = {"ToyForgets-v0": Forgets, "ToyFails-v0": Fails, "ToyEmpty-v0": Empty}
    for name, kind in cases.items():
        gym.register(name, kind)
    try:
        for name in ("ToyBare-v0", *cases):
            refused(capsys, tmp_path, name, env_id=name, capture_video=True, **{**TINY, "run_name": None})
    finally:
        for name in cases:
            del gym.registry[name]


BAD_VALUES = [
    {"total_timesteps": 0}, {"total_timesteps": -5}, {"batch_size": 0}, {"buffer_size": -1}, {"eval_episodes": 0},
    {"eval_frequency": 0}, {"checkpoint_frequency": 0}, {"random_episodes": 0}, {"policy_frequency": 0},
    {"vae_batch_size": -64}, {"discrete_latent_dim": 0}, {"parameter_latent_dim": -1}, {"vae_update_episodes": 0},
    {"exploration_noise_episodes": 0}, {"max_episode_steps": 0}, {"learning_starts": -1}, {"vae_pretrain_steps": -1},
    {"learning_rate": -1e-3}, {"vae_learning_rate": float("nan")}, {"gamma": 1.5}, {"gamma": -0.1}, {"tau": 2.0},
    {"policy_average": 5.0}, {"seed": 2**64}, {"learning_rate": 1e39}, {"policy_noise": 1e39},
    {"kl_weight": float("inf")}, {"noise_clip": -0.5}, {"latent_range_tail": 0.6}, {"seed": -1},
    {"exploration_noise": -0.1}, {"relabel_threshold": -1.0},
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [item for changes in BAD_VALUES for item in changes.items()])
def test_bad_values_are_refused(name, value, tmp_path, capsys):
    refused(capsys, tmp_path, f"--{name.replace('_', '-')} {value}", **{name: value})


def test_a_run_that_would_not_learn_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "--total-timesteps 100", "--learning-starts 128", total_timesteps=100)


def test_resume_without_a_name_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "--run-name", resume=True)


def test_an_existing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert exit_status(tiny(tmp_path)) == 2
    assert_one_line(capsys, "exists", "--resume", "--run-name")
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "not a run folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_runs_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert exit_status(tiny(tmp_path, runs_dir=str(tmp_path / "file"))) == 2
    assert_one_line(capsys, "cannot use", "--runs-dir")


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("step", [75, None])
def test_a_number_that_is_not_finite_ends_the_run(what, value, step, tmp_path, no_pictures, capsys):
    """In the learning phase (step 75, amid episode 10) or in the random phase (its tenth step)."""
    at = RANDOM_STEPS + step if step else 10
    gym.register("ToyNan-v0", ToyEnv, kwargs={"length": 7, "break_at": (what, at, value)})
    try:
        assert exit_status(tiny(tmp_path, env_id="ToyNan-v0")) == 1
    finally:
        del gym.registry["ToyNan-v0"]
    line = assert_one_line(capsys, what, "finite", f"in the episode with reset seed {ToyEnv.seeds[-1]}")
    assert ToyEnv.seeds[-1] == episode_seed(1, TINY["random_episodes"] + 10 if step else 1)
    path = tmp_path / "run" / "checkpoint.pt"
    assert path.exists() == bool(step)
    if step:
        assert "checkpoint.pt" in line
        state = torch.load(path, weights_only=True)
        assert state["step"] == 60
        assert all(value.isfinite().all() for value in tensors(state["agent"]).values())
        assert state["rows"].isfinite().all()


def test_a_full_disk_ends_the_run_with_the_last_checkpoint(tmp_path, no_pictures, capsys, monkeypatch):
    save, calls = torch.save, []

    def full(content, file, *args, **kwargs):
        calls.extend([1] * ("rows" in content))
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(content, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert exit_status(tiny(tmp_path)) == 1
    assert_one_line(capsys, "step 90: cannot write", "checkpoint.pt", "No space left", "the last checkpoint is")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 60
    assert exit_status(tiny(tmp_path, resume=True)) == 0


@pytest.mark.parametrize("changes, parts", [
    ({"total_timesteps": 20}, ("--total-timesteps 20", "ends before the first update")),
    ({"policy_frequency": 132}, ("--policy-frequency 132", "ends before the first update")),
    ({"discrete_embedding": "one-hot"}, ("--discrete-latent-dim", "one dimension per action", "leave it out")),
])  # fmt: skip
def test_runs_in_which_something_would_be_ignored_are_refused(changes, parts, tmp_path, capsys):
    assert exit_status(tiny(tmp_path, **changes)) == 2
    assert_one_line(capsys, *parts)
    assert not list(tmp_path.iterdir())


def test_whole_parameters_reach_both_bounds():
    env = HybridEnv(SpacesEnv(action_space=Tuple((Discrete(1), Tuple((Box(-1, 3, (1,), np.int32),))))))
    given = [int(env.to_space(0, np.float32([x]))[1][0][0]) for x in np.linspace(-1, 1, 17)]
    assert given == sorted(given) and set(given) == {-1, 0, 1, 2, 3} and given.count(1) == 3


def test_a_signal_stops_the_videos(tmp_path, no_pictures, monkeypatch):
    """The resumed run draws them anew; the first time, it stops within a step."""

    def stop(*_):
        if ToyEnv.made == 6:  # one to train, one to be tried, two to evaluate, two to be filmed
            os.kill(os.getpid(), signal.SIGTERM)

    ToyEnv.hook = stop
    assert exit_status(tiny(tmp_path, env_id="ToyLong-v0", capture_video=True)) == 143
    ToyEnv.hook, ToyEnv.made = None, 0
    assert not torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["finished"]
    assert exit_status(tiny(tmp_path, env_id="ToyLong-v0", capture_video=True, resume=True)) == 0
    assert len(list((tmp_path / "run" / "videos").glob("*.mp4"))) == 2  # as many as it evaluates


def test_tracking_without_wandb_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert exit_status(tiny(tmp_path, track=True)) == 2
    assert_one_line(capsys, "--track needs wandb", "pip install wandb")


@pytest.mark.parametrize("names", [("one",), ("a", "b"), lambda: None, None])
def test_names_of_actions_are_taken_if_there_are_enough(names, monkeypatch):
    monkeypatch.setattr(ToyEnv, "action_names", names, raising=False)
    env = make_env("Toy-v0")
    figure = hyar_td3.draw_latent_action_map(make_agent("Toy-v0"), env, np.zeros(4, np.float32))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    one, other = ("a", "b") if names == ("a", "b") else ("action 0", "action 1")
    assert titles == [f"{one}, parameter 0", f"{other}, parameter 0", f"{other}, parameter 1"]


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("at", [3, 7])
def test_a_number_that_is_not_finite_ends_an_evaluation(what, at, tmp_path, no_pictures, capsys):
    """In the second evaluation environment, amid its first episode or at its end."""
    gym.register("ToyNan-v0", ToyEnv, kwargs={"length": 7, "break_at": (what, at, math.nan), "breaks": 2})
    try:
        assert exit_status(tiny(tmp_path, env_id="ToyNan-v0")) == 1
    finally:
        del gym.registry["ToyNan-v0"]
    assert_one_line(capsys, what, "finite", f"in the episode with reset seed {episode_seed(1, 1, stream=1)}")


@pytest.mark.parametrize("episode", [3, TINY["random_episodes"] + 6])
def test_a_first_observation_that_is_not_finite_ends_the_run(episode, tmp_path, no_pictures, capsys):
    gym.register("ToyNan-v0", ToyEnv, kwargs={"length": 7, "break_at": ("reset", episode)})
    try:
        assert exit_status(tiny(tmp_path, env_id="ToyNan-v0")) == 1
    finally:
        del gym.registry["ToyNan-v0"]
    assert len(ToyEnv.seeds) == episode
    assert_one_line(capsys, "observation", "not finite", str(ToyEnv.seeds[-1]))


@pytest.mark.parametrize("changes", [{"learning_rate": 1e20}, {"vae_learning_rate": 1e20}], ids=str)
@pytest.mark.parametrize("env_id", ["ToyLong-v0", "Platform-v0"])
def test_a_loss_that_is_not_finite_ends_the_run(changes, env_id, tmp_path, no_pictures, capsys):
    assert exit_status(tiny(tmp_path, env_id=env_id, **changes)) == 1
    line = assert_one_line(capsys, "step", "losses/")
    assert "is nan" in line or "is inf" in line
    path = tmp_path / "run" / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        assert state["step"] < 150
        assert all(value.isfinite().all() for value in tensors(state["agent"]).values())


# --- environments as others write them ---
HARMLESS = {
    "arrays": (
        lambda o, *rest: (o[None], *rest),
        lambda o, r, te, tr, i: (o[None], np.array([r]), np.array([te]), tr, i),
    ),
    "lists": (lambda o, *rest: (o.tolist(), *rest), lambda o, r, te, tr, i: (o.tolist(), [r], te, tr, i)),
    "tensors": (
        lambda o, *rest: (torch.tensor(o), *rest),
        lambda o, r, te, tr, i: (torch.tensor(o), torch.tensor(r), torch.tensor(te), torch.tensor([tr]), i),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*WARN")
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_harmless_is_converted(kind, reference, tmp_path, no_pictures, monkeypatch):
    for name, function in zip(("of_reset", "of_step"), HARMLESS[kind], strict=True):
        monkeypatch.setattr(OddEnv, name, staticmethod(function))
    result = outcome(hyar_td3.main(tiny(tmp_path, env_id="ToyOdd-v0")))
    assert not [name for name in differences(result, reference) if name.endswith("csv") or "/agent/" in name]


REFUSED_VALUES = {  # name -> which function returns what, and what the message says
    "two rewards": ("of_step", lambda o, r, *rest: (o, [r, r], *rest), "reward [0. 0.]"),
    "no reward": ("of_step", lambda o, r, *rest: (o, None, *rest), "reward nan"),
    "a word": ("of_step", lambda o, r, *rest: (o, "much", *rest), "much"),
    "beyond float32": ("of_step", lambda o, r, *rest: (o, 1e39, *rest), "reward 1e+39 is not a finite number"),
    "infinite": ("of_step", lambda o, r, *rest: (o, -math.inf, *rest), "reward -inf is not a finite number"),
    "four values": ("of_step", lambda o, r, te, tr, i: (o, r, te or tr, i), "expected 5, got 4"),
    "a large observation": ("of_reset", lambda o, i: (np.array([0, 1e39, 0, 0]), i), "expected 4 finite numbers"),
    "another size": ("of_step", lambda o, *rest: (np.zeros(5, np.float32), *rest), "expected 4 finite numbers"),
    "no info": ("of_reset", lambda o, i: o, "does not work"),
}


@pytest.mark.filterwarnings("ignore:.*WARN")
@pytest.mark.parametrize("kind", REFUSED_VALUES)
def test_what_cannot_be_converted_is_refused_before_anything_is_created(kind, tmp_path, capsys, monkeypatch):
    name, function, part = REFUSED_VALUES[kind]
    monkeypatch.setattr(OddEnv, name, staticmethod(function))
    refused(capsys, tmp_path, "ToyOdd-v0", part, env_id="ToyOdd-v0", **TINY)


def test_a_second_instance_that_cannot_be_made_is_refused(tmp_path, capsys):
    """A simulator with one port."""

    class OnePort(ToyEnv):
        def __init__(self, render_mode=None):
            super().__init__()
            if self.number > 0:
                raise OSError("port 5555 is in use")

    gym.register("ToyOnePort-v0", OnePort)
    try:
        refused(capsys, tmp_path, "ToyOnePort-v0", "port 5555 is in use", env_id="ToyOnePort-v0", **TINY)
    finally:
        del gym.registry["ToyOnePort-v0"]


@pytest.mark.parametrize(("infos", "rate"), [
    ([{}, {}], math.nan),
    ([{"is_success": True}, {}], 0.5),
    ([{"is_success": np.array([True])}, {"is_success": np.array([False])}, {}, {}], 0.25),
    ([{"success": True}, {"success": torch.tensor(True)}, {"success": 0.0}], 2 / 3),
    ([{"is_success": False, "success": True}], 0.0),
])  # fmt: skip
def test_success_is_known_by_any_form_of_it(infos, rate, monkeypatch):
    environments = [make_env("ToyOdd-v0") for _ in infos]
    last = {id(env.unwrapped): info for env, info in zip(environments, infos, strict=True)}
    step = ToyEnv.step

    def told(env, action):
        *values, truncated, _ = step(env, action)
        return *values, truncated, last[id(env)] if truncated else {}

    monkeypatch.setattr(OddEnv, "step", told)
    found = hyar_td3.evaluate(make_agent("ToyOdd-v0"), environments, seed=1)["success_rate"]
    assert found == pytest.approx(rate, nan_ok=True)


def test_the_time_limit_can_be_chosen(tmp_path, no_pictures):
    gym.register("ToyEndless-v0", ToyEnv, kwargs={"length": 10**9})
    try:
        folder = hyar_td3.main(tiny(tmp_path, env_id="ToyEndless-v0", max_episode_steps=5, total_timesteps=60))
    finally:
        del gym.registry["ToyEndless-v0"]
    assert all(row["episodic_length"] == 5 for row in evaluations(folder))


@pytest.mark.parametrize("number", [0, 1])
def test_an_episode_without_an_end_ends_the_run(number, tmp_path, no_pictures, capsys, monkeypatch):
    """In the random phase and in an evaluation; so that it is quick, counting begins late."""
    gym.register("ToyEndless-v0", ToyEnv, kwargs={"length": 10**9})
    reset = hyar_td3.Door.reset

    def late(door, **options):
        result = reset(door, **options)
        if door.unwrapped.number == number:
            door.steps = 99_990
        return result

    monkeypatch.setattr(hyar_td3.Door, "reset", late)
    if number == 1:  # the training environment's episodes end
        monkeypatch.setattr(ToyEnv, "early", property(lambda env: 7 if env.number == 0 else 0))
    try:
        assert exit_status(tiny(tmp_path, env_id="ToyEndless-v0")) == 1
    finally:
        del gym.registry["ToyEndless-v0"]
    assert_one_line(capsys, "100,000 steps without an end", "reset seed", "--max-episode-steps")


def test_a_second_signal_ends_a_run_that_hangs(tmp_path):
    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)  # it does not stop before this step is done
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60.0)

    def play() -> int:
        at_training_step(50, hang)
        return exit_status(tiny(tmp_path))

    started = time.monotonic()
    assert in_a_fork(play) == 128 + signal.SIGINT
    assert time.monotonic() - started < 60.0


def test_pictures_that_cannot_be_made_are_a_warning(tmp_path, no_pictures, capsys, monkeypatch):
    """Not the loss of a training that is done: videos of pictures that grow, and a picture that fails."""
    monkeypatch.setattr(ToyEnv, "render", lambda self: np.zeros((64 + 2 * self.taken, 64, 3), np.uint8))
    monkeypatch.setattr(hyar_td3, "draw_latent_action_map", lambda *_: 1 / 0)
    folder = hyar_td3.main(tiny(tmp_path, capture_video=True, total_timesteps=40))
    printed = capsys.readouterr().out
    assert "warning: film failed" in printed and "warning: draw failed (ZeroDivisionError" in printed
    assert (folder / "model.pt").exists() and torch.load(folder / "checkpoint.pt", weights_only=True)["finished"]


def test_a_module_beside_the_user_is_found(tmp_path, monkeypatch):
    code = f"import gymnasium\nfrom {__name__} import ToyEnv\ngymnasium.register('Beside-v0', ToyEnv)\n"
    (tmp_path / "beside_me.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert make_env("beside_me:Beside-v0").num_actions == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("batch_size", 10**9), ("eval_episodes", 10**10), ("parameter_latent_dim", 10**9), ("random_episodes", 10**13)],
)
def test_sizes_that_no_memory_holds_are_refused(flag, value, tmp_path, capsys):
    refused(capsys, tmp_path, "GB of memory", f"lower --{flag.replace('_', '-')}", **{flag: value})


# --- the command line ---
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
}  # fmt: skip
PLATFORM = [
    "--total-timesteps", "400", "--random-episodes", "20", "--vae-pretrain-steps", "20", "--eval-episodes", "3",
    "--checkpoint-frequency", "100", "--eval-frequency", "100", "--no-cuda",
]  # fmt: skip


def command(*flags: str, script=SCRIPT, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(script), *flags], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def signalled(number: int, tmp_path: Path) -> int:
    """Start or resume the run `stopped`, send the signal after its next checkpoint; return its exit status."""
    path = tmp_path / "stopped" / "checkpoint.pt"
    old = path.stat().st_mtime_ns if path.exists() else 0
    flags = "--runs-dir", str(tmp_path), "--run-name", "stopped", "--resume", *PLATFORM
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns != old):
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


def test_signals_and_resuming_through_the_command_line(tmp_path):
    whole = command("--runs-dir", str(tmp_path), "--run-name", "whole", *PLATFORM)
    assert whole.returncode == 0, whole.stderr
    assert signalled(signal.SIGINT, tmp_path) == 130  # other signals, and kills, are tested in forks, which are faster
    state = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 400 and not state["finished"]
    flags = "--runs-dir", str(tmp_path), "--run-name", "stopped", "--resume", *PLATFORM
    last = command(*flags)
    assert last.returncode == 0, last.stderr
    one, other = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert not differences(one, other)
    steps = [row["step"] for row in evaluations(tmp_path / "whole")]
    assert steps == [100, 200, 300, 400]
    events = EventAccumulator(str(tmp_path / "stopped")).Reload()
    assert [event.step for event in events.Scalars("eval/episodic_return")] == steps  # nothing twice
    again = command(*flags)
    assert again.returncode == 0 and "finished" in again.stdout and not again.stderr


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--env Pendulum-v1", "sac_ae_pixels.py"),
        ("--env Platfrom-v0", "did you mean Platform-v0"),
        ("--env CatchPoint-v0 --total-timesteps 10", "--learning-starts"),
    ],
)
def test_bad_input_through_the_command_line(flags, part, tmp_path):
    result = command("--runs-dir", str(tmp_path / "runs"), *flags.split())
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and part in result.stderr
    assert not result.stdout and not (tmp_path / "runs").exists()


def test_everything_that_a_run_leaves_behind(tmp_path):
    """Also with wandb, offline, and with videos."""
    flags = "--env", "Platform-v0", "--seed", "3", "--run-name", "full", "--track", "--capture-video", *PLATFORM
    result = command(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "full"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing lies about, not even wandb's folder

    about = json.loads((folder / "args.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert about["commit"] == (head or None)
    assert about["command"][0].endswith("hyar_td3.py") and about["command"][1:] == list(flags)
    assert about["packages"]["torch"] == torch.__version__
    assert about["packages"]["gymnasium"] == gym.__version__
    assert about["arguments"]["seed"] == 3 and about["arguments"]["buffer_size"] == 100_000
    assert (folder / "hyar_td3.py").read_bytes() == SCRIPT.read_bytes()

    header, *rows = (folder / "eval.csv").read_text().splitlines()
    assert header.startswith("step,episodic_return")
    assert [row.split(",")[0] for row in rows] == ["100", "200", "300", "400"]
    for name in ("model.pt", "best_model.pt"):
        content = torch.load(folder / name, weights_only=True)
        assert json.loads(content["arguments"])["seed"] == 3
        assert {"actor.0.weight", "critic.weight1", "vae.embedding_table"} <= set(content["agent"])

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"charts/SPS", "charts/episodic_return", "eval/episodic_return", "eval/success_rate"} <= scalars
    assert {"losses/critic", "losses/actor", "losses/vae", "losses/vae_kl"} <= scalars
    recorded = [(event.step, event.value) for event in events.Scalars("eval/episodic_return")]
    assert recorded == [pytest.approx((int(row.split(",")[0]), float(row.split(",")[1]))) for row in rows]
    assert all(event.value > 0 for event in events.Scalars("charts/SPS"))

    pictures = ["latent_action_map", "learning_curve"]
    for name in pictures:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # not blank: lines, letters, colours
        assert (pixels < 250).any(2).mean() > 0.02
    assert {f"images/{name}" for name in pictures} <= set(events.Tags()["images"])

    videos = list((folder / "videos").glob("*.mp4"))
    assert videos and all(b"ftyp" in path.read_bytes()[:16] for path in videos)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


THIRD_PARTY = '''
"""An environment by someone who has never heard of us."""
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Tuple


class Theirs(gymnasium.Env):
    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2, 3), np.float64)
        self.action_space = Tuple((Discrete(3, start=1), Tuple((Box(0, 5, (3,)), Box(-9, 9, (0,)), Box(-1, 0, (1,))))))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.normal(100, 10, (2, 3)), 0
        return self.position.copy(), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"bad action {action}")
        k, parameters = action
        self.position[0, k - 1] += parameters[k - 1].sum()
        self.steps += 1
        return self.position.copy(), -1.0, self.position.max() > 130, self.steps == 9, {}


gymnasium.register("Theirs-v3", entry_point=Theirs)
'''


def test_a_copy_alone_trains_on_a_third_partys_environment(tmp_path):
    here = tmp_path / "it's mine"
    (here / "their_package").mkdir(parents=True)
    (here / "their_package" / "__init__.py").write_text(THIRD_PARTY)
    (here / "hyar_td3.py").write_bytes(SCRIPT.read_bytes())
    result = command("--env", "their_package:Theirs-v3", *PLATFORM, script="hyar_td3.py", cwd=here)
    assert result.returncode == 0, result.stderr
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("their_package-Theirs-v3__hyar_td3__1__")
    rows = (folder / "eval.csv").read_text().splitlines()
    assert len(rows) == 5 and math.isfinite(float(rows[-1].split(",")[1]))
    assert all(value.isfinite().all() for value in tensors(torch.load(folder / "model.pt", weights_only=True)).values())
    alone = command("--env", "Platform-v0", script="hyar_td3.py", cwd=here)
    assert alone.returncode == 2 and "unknown environment Platform-v0" in alone.stderr


def test_help_shows_every_argument():
    result = command("--help")
    assert result.returncode == 0
    for name in Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout


def test_importing_the_script_draws_nothing_and_opens_nothing(tmp_path):
    code = (
        "import sys, random, numpy, torch\n"
        "before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()\n"
        "import hyar_td3\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()\n"
        "assert before[1] == numpy.random.get_state()[1].tolist()\n"
        "assert not {'wandb', 'matplotlib.pyplot', 'moviepy', 'pygame'} & set(sys.modules), 'slow import'\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
