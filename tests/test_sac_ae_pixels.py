"""sac_ae_pixels.py: the original's numbers, what each update may move, replay, learning, resuming, bad input."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "sac_ae_pixels.py"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import plot  # noqa: E402
import speed  # noqa: E402

import plas_pixels  # noqa: E402
import sac_ae_pixels  # noqa: E402
from sac_ae_pixels import SACAE, Args, Batch, Noise, ReplayBuffer, episode_seed, make_env  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")


def resolve(args: Args) -> Args:
    """The arguments with what depends on the environment."""
    sac_ae_pixels.check(args)
    return args


def agent_for(args: Args, action_dim: int) -> SACAE:
    return SACAE(resolve(args), (args.image_size, args.image_size), action_dim, CPU)


def everything(agent: SACAE) -> dict:
    """Networks and optimizers, as a checkpoint has them."""
    return {"agent": agent.state_dict(), "optimizers": {k: v.state_dict() for k, v in agent.optimizers.items()}}


def restore(agent: SACAE, state: dict) -> None:
    agent.load_state_dict(state["agent"])
    for name, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])


# --- the original's numbers ---
GOLDEN = ["L2", "L4"]


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(ROOT / "tests" / "golden" / f"sac_ae_{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def networks(agent: SACAE) -> dict[str, nn.Parameter]:
    """Our parameters by the golden data's names."""
    named = {}

    def layers(prefix: str, network: nn.Sequential) -> None:
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linear):
            named[f"{prefix}.{i}.weight"], named[f"{prefix}.{i}.bias"] = layer.weight, layer.bias

    for name, critic in (("critic", agent.critic), ("target", agent.target_critic)):
        for i, conv in enumerate(critic.encoder.convs):
            named |= {f"{name}.encoder.conv{i}.{part}": value for part, value in conv.named_parameters()}
        layers(f"{name}.Q1", critic.q1)
        layers(f"{name}.Q2", critic.q2)
    for name, network in (("critic", agent.critic), ("target", agent.target_critic), ("actor", agent.actor)):
        for part in ("fc", "ln"):
            module = getattr(network.encoder, part)
            named |= {f"{name}.encoder.{part}.{key}": value for key, value in module.named_parameters()}
    layers("actor.trunk", agent.actor.trunk)
    named |= {f"decoder.fc.{key}": value for key, value in agent.decoder.fc.named_parameters()}
    for i, deconv in enumerate(agent.decoder.deconvs):
        named |= {f"decoder.deconv{i}.{key}": value for key, value in deconv.named_parameters()}
    return named


def ours(agent: SACAE, name: str, value: Tensor) -> Tensor:
    """A golden array in our order: features are flattened as (row, column, filter), not (filter, row, column)."""
    shape = agent.decoder.shape
    if name.endswith("encoder.fc.weight"):
        return value.view(-1, *shape).permute(0, 2, 3, 1).flatten(1)
    if name == "decoder.fc.weight":
        return value.view(*shape, -1).permute(1, 2, 0, 3).flatten(0, 2)
    if name == "decoder.fc.bias":
        return value.view(shape).permute(1, 2, 0).flatten()
    return value


def golden_agent(name: str, **changes) -> tuple[SACAE, Batch, Noise]:
    """An agent with the original's weights, the batch (uint8, as it is sampled) and the noise."""
    data = golden(name)
    cfg = {key[4:]: int(value) for key, value in data.items() if key.startswith("cfg/")}
    sizes = {key: cfg[key] for key in ("num_filters", "num_layers", "feature_dim", "hidden_dim")}
    agent = agent_for(Args(env_id="PixelToy-v0", **sizes, **changes), cfg["action_dim"])
    named = networks(agent)
    assert set(named) == {key[5:] for key in data if key.startswith("init/")} - {"log_alpha"}
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(ours(agent, key, data[f"init/{key}"]))
        agent.log_alpha.copy_(data["init/log_alpha"])
    batch = Batch(
        data["batch/obs"], data["batch/action"], data["batch/reward"][:, 0], data["batch/next_obs"],
        1.0 - data["batch/not_done"][:, 0], torch.zeros_like(data["batch/action"]),
    )  # fmt: skip
    return agent, batch, Noise(data["noise/eps_target"], data["noise/eps_actor"], data["noise/dither_u8"])


def scaled(agent: SACAE, batch: Batch) -> Batch:
    return batch._replace(
        observation=agent.scale(batch.observation), next_observation=agent.scale(batch.next_observation)
    )


def assert_near(value: Tensor, expected: Tensor, relative: float, absolute: float = 1e-7) -> None:
    value, expected = value.detach().double().flatten(), expected.double().flatten()
    assert value.shape == expected.shape
    worst = (value - expected).abs().max()
    assert torch.allclose(value, expected, rtol=relative, atol=absolute), f"off by {worst}"


@pytest.mark.parametrize("name", GOLDEN)
def test_forward_values_are_the_originals(name):
    data = golden(name)
    agent, uint8_batch, noise = golden_agent(name)
    batch = scaled(agent, uint8_batch)
    with torch.no_grad():
        features = agent.critic.encoder.features(batch.next_observation)
        mean_action, _, _ = agent.actor(features, batch.previous_action, torch.zeros_like(noise.target))
        assert_near(mean_action, data["fwd/next_tanh_mu"], 1e-5, 1e-6)
        action, log_probability, log_std = agent.actor(features, batch.previous_action, noise.target)
        assert_near(action, data["fwd/next_pi"], 1e-5, 1e-6)
        assert_near(log_probability, data["fwd/next_log_pi"], 1e-5, 1e-5)
        assert_near(log_std, data["fwd/next_log_std"], 1e-5)
        values = agent.target_critic(agent.target_critic.encoder.features(batch.next_observation), action)
        for i in (0, 1):
            assert_near(values[i], data[f"fwd/target_q{i + 1}"], 1e-5, 1e-6)
        assert_near(agent.critic_target(batch, noise.target), data["fwd/target_Q"], 1e-5, 1e-6)
        latent = agent.critic.encoder(batch.observation)
        assert_near(latent, data["fwd/latent"], 1e-5, 1e-6)
        for i, value in enumerate(agent.critic(agent.critic.encoder.features(batch.observation), batch.action)):
            assert_near(value, data[f"fwd/q{i + 1}"], 1e-5, 1e-6)
        assert_near(agent.decoder(latent)[0], data["fwd/rec_obs0"], 1e-5, 1e-6)
    target = sac_ae_pixels.reconstruction_target(uint8_batch.observation, noise.dither)
    assert torch.equal(target[0], data["fwd/rec_target0"].view_as(target[0]))


LOSSES = {"critic": "critic", "actor": "actor", "actor_entropy": "entropy", "alpha": "alpha_loss", "ae": "autoencoder"}


def assert_losses(losses: dict[str, Tensor], data: dict[str, Tensor], update: int, relative: float) -> None:
    seen = 0
    for theirs, name in LOSSES.items():
        if f"loss{update}/{theirs}" in data:
            assert_near(losses[name], data[f"loss{update}/{theirs}"], relative, 1e-6 if theirs == "alpha" else 1e-7)
            seen += 1
    assert seen == (5 if update % 2 == 0 else 2) and len(losses) == (9 if update % 2 == 0 else 5)


@pytest.fixture
def gradients(monkeypatch) -> list[dict[int, Tensor]]:
    """What each gradient step hands to its optimizers, by the parameter's identity."""
    steps, gradient_step = [], sac_ae_pixels.gradient_step

    def recorded(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        gradient_step(loss, *optimizers)
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        steps.append({id(p): p.grad.clone() for p in parameters})

    monkeypatch.setattr(sac_ae_pixels, "gradient_step", recorded)
    return steps


@pytest.mark.parametrize("name", GOLDEN)
def test_one_update_is_the_originals(name, gradients):
    data = golden(name)
    agent, batch, noise = golden_agent(name)
    losses = agent.update(batch, True, True, noise)
    assert_losses(losses, data, 0, 1e-5)
    named = networks(agent)
    compared = 0
    for step, part in zip(gradients, ("critic", "actor", "alpha", "ae"), strict=True):
        expected = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(f"grad_{part}/")}
        assert len(step) == len(expected)
        for key, value in expected.items():
            gradient = step[id(agent.log_alpha if key == "log_alpha" else named[key])]
            value = ours(agent, key, value)
            assert (gradient - value).abs().max() <= 3e-5 * value.abs().max(), (part, key)
            compared += 1
    assert compared > 40
    for key, parameter in {**named, "log_alpha": agent.log_alpha}.items():
        difference = (parameter.detach() - ours(agent, key, data[f"after/{key}"])).abs()
        assert (difference <= 2e-5).double().mean() >= 0.9999, key
        assert not torch.equal(parameter.detach(), ours(agent, key, data[f"init/{key}"]).to(parameter.dtype)), key


@pytest.mark.parametrize("name", GOLDEN)
def test_four_updates_are_the_originals(name):
    data = golden(name)
    agent, batch, noise = golden_agent(name)
    for i in range(4):
        assert_losses(agent.update(batch, i % 2 == 0, i % 2 == 0, noise), data, i, 1e-4)
    assert_near(agent.log_alpha, data["after4/log_alpha"], 1e-6)
    nets = agent.critic, agent.target_critic, agent.actor, agent.decoder
    sums = torch.stack([sum(p.detach().abs().sum() for p in net.parameters()) for net in nets])
    assert_near(sums, data["after4/abs_sum"], 1e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_bf16_is_near(name):
    data = golden(name)
    agent, batch, noise = golden_agent(name, bf16=True)
    losses = agent.update(batch, True, True, noise)
    for theirs, ours_ in (("critic", "critic"), ("actor_entropy", "entropy"), ("ae", "autoencoder")):
        assert_near(losses[ours_], data[f"loss0/{theirs}"], 3e-2)
    assert all(p.dtype == torch.float32 for p in networks(agent).values())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_the_policys_head_is_the_originals():
    data = golden("unit")
    raw, eps = data["policy/raw"], data["policy/eps"]
    action, log_probability, log_std = sac_ae_pixels.squashed_gaussian(raw, eps)
    assert_near(log_std, data["policy/log_std"], 1e-5)
    assert_near(action, data["policy/pi"], 1e-5, 1e-6)
    assert_near(torch.tanh(raw.chunk(2, 1)[0]), data["policy/tanh_mu"], 1e-5, 1e-7)
    expected = data["policy/log_pi"][:, 0]
    assert_near(log_probability[:6], expected[:6], 0.0, 1e-3)  # saturated
    assert_near(log_probability[6:], expected[6:], 1e-5, 1e-5)
    assert expected[:6].abs().max() > 10.0


def test_the_reconstruction_target_is_the_originals():
    data = golden("unit")
    target = sac_ae_pixels.reconstruction_target(data["target/obs"], data["target/dither_u8"])
    assert_near(target, data["target/out"], 1e-5)
    assert target.min() >= -0.5 and target.max() < 0.5


def test_the_temperature_goes_as_the_originals():
    data = golden("unit")
    action_dim = int(data["alpha/action_dim"])
    agent, _, _ = golden_agent("L2", alpha_learning_rate=float(data["alpha/lr"]))
    agent.action_dim = action_dim
    with torch.no_grad():
        agent.log_alpha.copy_(data["alpha/init"])
    features = torch.zeros(data["alpha/log_pi"].shape[1], agent.critic.encoder.fc.in_features)
    for i, log_pi in enumerate(data["alpha/log_pi"][:, :, 0]):

        def sampled(*_, log_pi=log_pi):
            raw = agent.actor.trunk(agent.actor.encoder.head(features))
            return raw[:, :1], log_pi.float() + 0.0 * raw.sum(1), raw[:, 1:]

        agent.actor.forward = sampled
        agent.update_actor(features, *torch.zeros(2, len(features), 1))
        assert_near(agent.log_alpha.grad, data["alpha/grad"][i], 1e-5, 1e-6)
        assert_near(agent.log_alpha, data["alpha/log_alpha_after"][i], 0.0, 1e-6)


# --- toy environments ---
class ToyEnv(gym.Env):
    """A picture of 20x20 pixels with two stripes, one where the agent is, one where it should go; 7 steps."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 5}
    made = 0  # counts instances: a test sets it to 0, so that `main` makes its training environment as number 0
    resets = 0  # what an environment that cannot be repeated depends on
    hook: ClassVar[Callable[[ToyEnv], None] | None] = None  # called at the start of each step
    seeds: ClassVar[list[int]] = []  # reset seeds of the training environment
    actions: ClassVar[list] = []  # what the training environment was given
    early = 0  # the length of an episode, if it is not the usual one

    def __init__(self, length=7, truncate=True, repeatable=True, break_at=None, size=20, render_mode=None):
        self.observation_space = Box(-1, 1, (2,))
        self.action_space = Box(np.float32([-2, 0]), np.float32([2, 10]))
        self.length, self.truncate, self.repeatable, self.size = length, truncate, repeatable, size
        self.render_mode, self.break_at = render_mode, break_at
        self.number, self.total = ToyEnv.made, 0
        ToyEnv.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken, self.position, self.over = 0, 0.0, False
        self.target = self.np_random.uniform(-1, 1)
        if not self.repeatable:
            ToyEnv.resets += 1
            self.target = -0.9 + 0.2 * (ToyEnv.resets % 10)
        if self.number == 0:
            ToyEnv.seeds.append(seed)
        return np.float32([self.position, self.target]), {}

    def step(self, action):
        assert self.action_space.contains(action) and not self.over, action
        self.total += 1
        if ToyEnv.hook:
            ToyEnv.hook(self)
        if self.number == 0:
            ToyEnv.actions.append(action.copy())
        self.position = float(np.clip(self.position + 0.35 * action[0] / 2.0, -1, 1))
        self.taken += 1
        reward = 1.0 - abs(self.position - self.target) - 0.001 * float(action[1])
        if self.break_at and self.number == 0 and self.total == self.break_at[0]:
            reward = self.break_at[1]
        over = self.over = self.taken == (ToyEnv.early or self.length)
        observation = np.float32([self.position, self.target])
        return observation, reward, over and not self.truncate, over and self.truncate, {}

    def render(self):
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        picture[:, round((self.position + 1) / 2 * (self.size - 1)), 0] = 255
        picture[:, round((self.target + 1) / 2 * (self.size - 1)), 1] = 255
        picture[self.taken % self.size, :, 2] = 255
        return picture


class PointEnv(ToyEnv):
    """One step: the reward is 1 minus the distance of the action to a drawn point."""

    def __init__(self, render_mode=None):
        super().__init__(length=1, truncate=False, size=32, render_mode=render_mode)
        self.action_space = Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-0.8, 0.8, 2)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0 - float(np.linalg.norm(action - self.point)), True, False, {}

    def render(self):
        picture = np.full((32, 32, 3), 40, np.uint8)
        x, y = np.round((self.point + 1) / 2 * 31).astype(int)
        picture[y - 2 : y + 3, x - 2 : x + 3] = (250, 180, 60)
        return picture


class BareEnv(gym.Env):
    """Has spaces, and need not have more, as it should be refused."""

    def __init__(self, action_space=None, error=None, picture=None, render_mode=None):
        if error:
            raise error
        self.render_mode, self.picture, self.metadata = render_mode, picture, {"render_modes": ["rgb_array"]}
        self.observation_space, self.action_space = Box(-1, 1, (2,)), action_space or Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def render(self):
        if isinstance(self.picture, Exception):
            raise self.picture
        return self.picture


class BlindEnv(BareEnv):
    """Cannot be drawn."""

    def __init__(self):
        super().__init__()
        self.metadata = {"render_modes": []}


gym.register("PixelToy-v0", ToyEnv)
gym.register("PixelToyTerminating-v0", ToyEnv, kwargs={"truncate": False})
gym.register("PixelToyUnrepeatable-v0", ToyEnv, kwargs={"repeatable": False})
gym.register("PixelToyLarge-v0", ToyEnv, kwargs={"size": 64})
gym.register("PixelPoint-v0", PointEnv)
gym.register("PixelToyBlind-v0", BlindEnv)
gym.register("PixelToyDiscrete-v0", functools.partial(BareEnv, action_space=Discrete(3)))
gym.register("PixelToyUnbounded-v0", functools.partial(BareEnv, action_space=Box(-np.inf, np.inf, (2,))))
gym.register("PixelToyNoActions-v0", functools.partial(BareEnv, action_space=Box(-1, 1, (0,))))
gym.register("PixelToyNoPicture-v0", functools.partial(BareEnv, picture=None))
gym.register("PixelToyGray-v0", functools.partial(BareEnv, picture=np.zeros((20, 20), np.uint8)))
gym.register("PixelToyFails-v0", functools.partial(BareEnv, error=RuntimeError("no such\nthing")))
gym.register("PixelToyNoGL-v0", functools.partial(BareEnv, picture=RuntimeError("an OpenGL context\nis missing")))


class OddEnv(ToyEnv):
    """The toy with something that users' environments have."""

    def __init__(self, kind, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.kind = kind
        if kind == "whole actions":
            self.action_space = Box(0, 4, (2,), np.int64)
        if kind == "nearly unbounded":
            self.action_space = Box(-1e10, 1e10, (2,), np.float64)
        if "observed" in kind:
            self.observation_space = Box(0, 255, (16, 21, 3), np.uint8)
        if kind == "one only" and self.number == 1:
            raise OSError("the port is in use")

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed, options=options)
        return (self.seen() if "observed" in self.kind else observation), {}

    def seen(self):
        return np.pad(ToyEnv.render(self)[:16], ((0, 0), (0, 1), (0, 0)))

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        number = self.total if self.number == 1 else 0  # of the evaluation's environment
        if self.kind == "old step":
            return observation, reward, terminated, info
        if "observed" in self.kind:
            observation = self.seen()
        if self.kind == "harmless":
            observation, reward = observation[None].tolist(), np.array([[reward]])
        if self.kind == "endless":
            truncated = False
            self.over = False
        if self.kind == "large reward" and self.number == 0 and self.total == 75:
            reward = 1e39
        if self.kind == "nan in evaluation" and number == 20:
            reward = math.nan
        if self.kind == "success at times" and truncated and self.target > 0:
            info = {"success": np.array([True])}
        return observation, reward, terminated, truncated, None if self.kind == "no info" else info

    def render(self):
        picture = super().render()
        if self.kind == "four channels":
            return np.concatenate((picture, picture[:, :, :1]), 2)
        if self.kind == "floats":
            return picture / 255.0
        if self.kind == "growing":
            return np.pad(picture, ((0, 2 * (self.taken % 3)), (0, 0), (0, 0)))
        return picture[:, :, 0] if self.kind == "observed, drawn gray" else picture


ODD = {
    name: f"PixelOdd{i}-v0"
    for i, name in enumerate((
        "whole actions", "nearly unbounded", "observed", "observed, drawn gray", "one only", "old step", "harmless",
        "endless", "large reward", "nan in evaluation", "success at times", "no info", "four channels", "floats",
        "growing",
    ))
}  # fmt: skip
for kind, env_id in ODD.items():
    gym.register(env_id, OddEnv, kwargs={"kind": kind})

PROBE = sac_ae_pixels.probe


def uncounted(env: sac_ae_pixels.PixelEnv) -> None:
    """The probe before a run, without a trace in what the toys count."""
    hook, ToyEnv.hook = ToyEnv.hook, None
    PROBE(env)
    ToyEnv.hook, env.unwrapped.total = hook, 0
    ToyEnv.actions.clear()


sac_ae_pixels.probe = uncounted

SMALL = {"image_size": 16, "num_layers": 2, "num_filters": 3, "feature_dim": 6, "hidden_dim": 12, "batch_size": 8}
TINY = {
    **SMALL, "env_id": "PixelToy-v0", "action_repeat": 2, "total_timesteps": 150, "learning_starts": 10,
    "eval_episodes": 2, "eval_frequency": 40, "checkpoint_frequency": 30, "run_name": "run",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ToyEnv.made, ToyEnv.hook = 0, None
    ToyEnv.seeds.clear()
    ToyEnv.actions.clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    ToyEnv.hook = None
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is most of a tiny run's time; the smoke test looks at real pictures."""
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))


def tiny(tmp_path: Path, **changes) -> Args:
    return Args(**{**TINY, "runs_dir": str(tmp_path), **changes})


def small_agent(seed=0, action_dim=2, **changes) -> SACAE:
    torch.manual_seed(seed)
    return agent_for(Args(**{**SMALL, "env_id": "PixelToy-v0", **changes}), action_dim)


def random_batch(agent: SACAE, size=8, seed=1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    args = agent.args
    shape = size, 3 * (args.frame_stack + 1), args.image_size, args.image_size
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    frames = frames.contiguous(memory_format=torch.channels_last)
    action = torch.rand(size, agent.action_dim, generator=generator) * 2.0 - 1.0
    reward, terminated = torch.randn(size, generator=generator), torch.rand(size, generator=generator) < 0.3
    previous_action = torch.rand(size, agent.action_dim, generator=generator) * 2.0 - 1.0
    return Batch(frames[:, :-3], action, reward, frames[:, 3:], terminated.float(), previous_action)


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


def differences(one: dict, other: dict) -> list[str]:
    def same(name: str) -> bool:
        a, b = one.get(name), other.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):  # nan is nan
            return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape
        return a == b

    return [name for name in {**one, **other} if not same(name)]


# --- environments ---
def test_a_frame_is_what_the_environment_draws(tmp_path):
    env = make_env(resolve(tiny(tmp_path, image_size=20, frame_stack=1)))
    frame, _ = env.reset(seed=3)
    assert frame.shape == (3, 20, 20) and frame.dtype == np.uint8 and env.observation_space.contains(frame)
    assert np.array_equal(frame.transpose(1, 2, 0), env.unwrapped.render())
    assert not np.array_equal(env.reset(seed=4)[0], frame) and np.array_equal(env.reset(seed=3)[0], frame)


def test_a_larger_picture_is_made_smaller(tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id="PixelToyLarge-v0", image_size=16, frame_stack=1)))
    frame, _ = env.reset(seed=3)
    whole = env.unwrapped.render()
    assert frame.shape == (3, 16, 16)
    assert np.allclose(frame.mean((1, 2)), whole.mean((0, 1)), atol=1.5)  # averaged, not picked out
    where = frame[0].mean(0).argmax(), whole[:, :, 0].mean(0).argmax() // 4
    assert abs(int(where[0]) - int(where[1])) <= 1


@pytest.mark.parametrize("stack", [1, 2, 4])
def test_an_observation_is_the_newest_frames(stack, tmp_path):
    env = make_env(resolve(tiny(tmp_path, frame_stack=stack)))
    single = make_env(resolve(tiny(tmp_path, frame_stack=1)))
    for seed in (3, 4):  # the second episode knows nothing of the first
        frames = [single.reset(seed=seed)[0]] * stack
        observation, _ = env.reset(seed=seed)
        for i in range(4):
            assert observation.shape == (3 * stack, 16, 16) and env.observation_space.contains(observation)
            assert np.array_equal(observation, np.concatenate(frames[-stack:]))
            kept = observation.copy()
            following, *_ = env.step(np.float32([i / 4, 0.0]))
            frames.append(single.step(np.float32([i / 4, 0.0]))[0])
            assert np.array_equal(observation, kept) and not np.array_equal(following, kept)
            observation = following


def test_an_action_is_scaled_and_repeated(tmp_path):
    env = make_env(resolve(tiny(tmp_path)))
    env.reset(seed=3)
    ToyEnv.actions.clear()
    env.unwrapped.number = 0
    _, reward, terminated, truncated, _ = env.step(np.float32([0.5, -1.0]))
    assert [action.tolist() for action in ToyEnv.actions] == [[1.0, 0.0]] * 2
    expected = sum(1.0 - abs(0.175 * i - env.unwrapped.target) for i in (1, 2))
    assert reward == pytest.approx(expected) and not (terminated or truncated)
    for _ in range(3):
        _, reward, terminated, truncated, _ = env.step(np.float32([-1.0, 1.0]))
    assert truncated and not terminated and env.unwrapped.taken == 7  # the last action is done once only
    assert ToyEnv.actions[-1].tolist() == [-2.0, 10.0]


@pytest.mark.parametrize(
    ("action", "sent"), [(-1.0, 0), (-0.8, 0), (-0.7, 1), (0.0, 2), (0.74, 3), (0.76, 4), (1.0, 4)]
)
def test_whole_actions_are_rounded(action, sent, tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id=ODD["whole actions"], action_repeat=1)))
    env.reset(seed=3)
    env.unwrapped.number = 0
    ToyEnv.actions.clear()
    env.step(np.float32([action, 0.0]))
    assert ToyEnv.actions[0].tolist() == [sent, 2] and ToyEnv.actions[0].dtype == np.int64


@pytest.mark.parametrize("kind", ["observed", "observed, drawn gray"])
def test_pictures_that_are_observed_are_kept(kind, tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id=ODD[kind], frame_stack=1)))
    frame, info = env.reset(seed=3)
    assert env.size == (16, 21) and frame.shape == (3, 16, 21) and env.observation_space.contains(frame)
    assert np.array_equal(frame.transpose(1, 2, 0), env.unwrapped.seen())
    assert info["state"].shape == (16 * 21 * 3,)
    shape = (260, 260, 3) if kind == "observed" else (256, 336, 3)  # what it draws, or what is seen
    assert env.render().shape == shape and env.render().dtype == np.uint8


def test_the_state_is_in_info(tmp_path):
    env = make_env(resolve(tiny(tmp_path)))
    _, info = env.reset(seed=3)
    assert np.array_equal(info["state"], np.float32([0.0, env.unwrapped.target]))
    *_, info = env.step(np.float32([1.0, 0.0]))
    assert np.array_equal(info["state"], np.float32([env.unwrapped.position, env.unwrapped.target]))


def test_what_is_harmless_is_converted(tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id=ODD["harmless"])))
    env.reset(seed=3)
    _, reward, terminated, _, info = env.step(np.float32([0.5, -1.0]))
    assert type(reward) is float and type(terminated) is bool and info["state"].shape == (2,)


def test_a_module_beside_the_user_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "toy", ToyEnv, raising=False)
    (tmp_path / "beside_the_user.py").write_text("import gymnasium, sys\ngymnasium.register('Beside-v0', sys.toy)\n")
    try:
        assert make_env(resolve(tiny(tmp_path, env_id="beside_the_user:Beside-v0"))).size == (16, 16)
    finally:
        gym.registry.pop("Beside-v0", None)


def test_episodes_can_be_cut_off(tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id=ODD["endless"], max_episode_steps=9)))
    env.reset(seed=3)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)] and env.unwrapped.taken == 9


# --- networks ---
@pytest.mark.parametrize("size", [7, 15, 16, 33, 84, 85])
@pytest.mark.parametrize("layers", [2, 4, 6])
def test_the_decoder_gives_back_the_images_size(size, layers):
    if size < 4 * layers - 1:
        with pytest.raises(ValueError, match="too small"):
            sac_ae_pixels.feature_map_size((size, size), layers)
        return
    agent = small_agent(image_size=size, num_layers=layers)
    pixels = torch.rand(2, 9, size, size)
    latent = agent.critic.encoder(pixels)
    assert latent.shape == (2, 6) and latent.abs().max() < 1.0
    assert agent.decoder(latent).shape == pixels.shape


def test_pictures_need_not_be_square():
    torch.manual_seed(0)
    args = resolve(Args(**SMALL, env_id="PixelToy-v0", random_shift=2))
    agent = SACAE(args, (16, 25), 2, CPU)
    frames = torch.randint(0, 256, (8, 12, 16, 25), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    rest = torch.rand(8, 2), torch.rand(8), torch.zeros(8), torch.zeros(8, 2)
    losses = agent.update(Batch(frames[:, :-3], *rest[:2], frames[:, 3:], *rest[2:]), True, True)
    assert all(value.isfinite() for value in losses.values()) and len(losses) == 9
    assert agent.decoder(agent.critic.encoder(torch.rand(2, 9, 16, 25))).shape == (2, 9, 16, 25)


def test_sizes_are_the_papers():
    agent = agent_for(Args(env_id="walker-walk"), 6)

    def count(*parameters) -> int:
        return sum(p.numel() for p in parameters)

    assert agent.decoder.shape == (32, 35, 35)
    assert count(*agent.critic.encoder.parameters()) == 1_990_518
    assert count(*agent.critic.q1.parameters()) == count(*agent.critic.q2.parameters()) == 1_108_993
    assert count(*agent.actor.trunk.parameters()) == 1_114_124
    assert count(*agent.decoder.parameters()) == 2_029_545


def test_initial_weights_are_orthogonal_and_only_in_the_centre():
    agent = small_agent(num_filters=5)
    for conv in [*agent.critic.encoder.convs, *agent.decoder.deconvs]:
        weight = conv.weight.detach().clone()
        centre = weight[:, :, 1, 1].clone()
        weight[:, :, 1, 1] = 0.0
        assert not weight.any() and not conv.bias.any()
        gram = centre @ centre.T if len(centre) <= centre.shape[1] else centre.T @ centre
        assert torch.allclose(gram, 2.0 * torch.eye(len(gram)), atol=1e-5)
    for layer in (agent.critic.encoder.fc, agent.actor.encoder.fc, agent.critic.q1[0], agent.actor.trunk[4]):
        weight = layer.weight.detach()
        gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5) and not layer.bias.any()
    assert torch.equal(agent.target_critic.q1[0].weight, agent.critic.q1[0].weight)


def test_convolutions_are_tied_and_heads_are_not():
    agent = small_agent()
    for one, other in zip(agent.actor.encoder.convs, agent.critic.encoder.convs, strict=True):
        assert one.weight is other.weight and one.bias is other.bias
    for one, other in zip(agent.target_critic.encoder.convs, agent.critic.encoder.convs, strict=True):
        assert one.weight is not other.weight and torch.equal(one.weight, other.weight)
    assert agent.actor.encoder.fc.weight is not agent.critic.encoder.fc.weight
    assert agent.actor.encoder.ln.weight is not agent.critic.encoder.ln.weight
    before = agent.actor.encoder.convs[0].weight.detach().clone()
    for i in range(3):
        agent.update(random_batch(agent, seed=i), i % 2 == 0, i % 2 == 0)
    assert not torch.equal(agent.actor.encoder.convs[0].weight, before)
    assert torch.equal(agent.actor.encoder.convs[0].weight, agent.critic.encoder.convs[0].weight)
    other = small_agent(seed=5)
    restore(other, copy.deepcopy(everything(agent)))
    assert other.actor.encoder.convs[0].weight is other.critic.encoder.convs[0].weight
    assert not differences(tensors(everything(other)), tensors(everything(agent)))


# --- what each update may move ---
PARTS = {
    "critic.encoder.convs": lambda agent: agent.critic.encoder.convs,
    "critic.encoder.fc": lambda agent: agent.critic.encoder.fc,
    "critic.encoder.ln": lambda agent: agent.critic.encoder.ln,
    "critic.q1": lambda agent: agent.critic.q1,
    "critic.q2": lambda agent: agent.critic.q2,
    "actor.encoder.fc": lambda agent: agent.actor.encoder.fc,
    "actor.encoder.ln": lambda agent: agent.actor.encoder.ln,
    "actor.trunk": lambda agent: agent.actor.trunk,
    "decoder": lambda agent: agent.decoder,
    "target_critic.encoder": lambda agent: agent.target_critic.encoder,
    "target_critic.q1": lambda agent: agent.target_critic.q1,
    "target_critic.q2": lambda agent: agent.target_critic.q2,
}
ENCODER = {"critic.encoder.convs", "critic.encoder.fc", "critic.encoder.ln"}


def snapshot(agent: SACAE) -> dict[str, list[Tensor]]:
    parts = {name: [p.detach().clone() for p in part(agent).parameters()] for name, part in PARTS.items()}
    return parts | {"log_alpha": [agent.log_alpha.detach().clone()]}


def moved(before: dict[str, list[Tensor]], agent: SACAE) -> set[str]:
    after = snapshot(agent)
    return {name for name in after if any(map(lambda a, b: not torch.equal(a, b), before[name], after[name]))}


def features_of(agent: SACAE, batch: Batch) -> Tensor:
    return agent.critic.encoder.features(agent.scale(batch.observation))


def test_each_update_moves_what_it_should_and_nothing_else():
    agent = small_agent()
    batch, noise = random_batch(agent), agent.draw_noise(random_batch(agent))
    assert set(PARTS) | {"log_alpha"} == set(snapshot(agent))

    before = snapshot(agent)
    agent.update_critic(scaled(agent, batch), noise.target)
    assert moved(before, agent) == {*ENCODER, "critic.q1", "critic.q2"}

    before = snapshot(agent)
    agent.update_actor(features_of(agent, batch).detach(), batch.previous_action, noise.actor)
    assert moved(before, agent) == {"actor.encoder.fc", "actor.encoder.ln", "actor.trunk", "log_alpha"}

    before = snapshot(agent)
    agent.update_reconstruction(features_of(agent, batch), batch.observation, noise.dither)
    assert moved(before, agent) == {*ENCODER, "decoder"}

    before = snapshot(agent)
    agent.update_targets()
    assert moved(before, agent) == {"target_critic.encoder", "target_critic.q1", "target_critic.q2"}


def test_the_actors_loss_does_not_reach_the_convolutions_even_if_it_could():
    """With features that carry gradients the actor still moves its own parameters only."""
    agent = small_agent()
    batch, noise = random_batch(agent), agent.draw_noise(random_batch(agent))
    before = snapshot(agent)
    agent.update_actor(features_of(agent, batch), batch.previous_action, noise.actor)
    assert not ENCODER & moved(before, agent)
    assert all(p.grad is None for p in agent.critic.parameters())


def test_without_reconstruction_the_critic_alone_trains_the_encoder():
    agent = small_agent(reconstruction=False)
    batch = random_batch(agent)
    before = snapshot(agent)
    losses = agent.update(batch, True, True)
    assert moved(before, agent) == set(PARTS) - {"decoder"} | {"log_alpha"}
    assert "autoencoder" not in losses and {"critic", "actor"} <= set(losses)
    assert not agent.optimizers["encoder"].state and not agent.optimizers["decoder"].state
    assert set(agent.update(batch, False, False)) == {"critic", "q_value"}


def test_bf16_tells_large_values_of_near_actions_apart():
    agent = small_agent(bf16=True)
    agent.critic.q1[-1].bias.data.fill_(500.0)  # where bfloat16's numbers are 2 apart
    latent, action = torch.rand(1, agent.args.feature_dim).expand(50, -1), torch.linspace(-1.0, 1.0, 50)
    inputs = torch.cat((latent, action[:, None].expand(-1, agent.action_dim)), 1)
    with agent.autocast():
        values = agent.critic.q1(inputs)
    assert values.dtype == torch.float32 and len(values.unique()) > 40
    features, nothing = torch.rand(3, agent.actor.encoder.fc.in_features), torch.zeros(3, 2)
    assert agent.actor(features, nothing, nothing)[0].dtype == torch.float32


def test_actor_and_targets_can_wait():
    agent = small_agent()
    before = snapshot(agent)
    agent.update(random_batch(agent), False, False)
    assert moved(before, agent) == {*ENCODER, "critic.q1", "critic.q2", "decoder"}
    before = snapshot(agent)
    agent.update(random_batch(agent), True, False)
    assert not any("target" in name for name in moved(before, agent))


def test_targets_follow_at_their_rates():
    agent = small_agent()
    agent.update(random_batch(agent), False, False)
    before = copy.deepcopy(agent.target_critic)
    agent.update_targets()
    for name, rate in (("encoder", 0.05), ("q1", 0.01), ("q2", 0.01)):
        old, online, new = (
            torch.cat([p.detach().flatten() for p in getattr(critic, name).parameters()])
            for critic in (before, agent.critic, agent.target_critic)
        )
        assert not torch.equal(old, online)
        assert torch.allclose(new, old + rate * (online - old), atol=1e-7)


def test_optimizers_are_made_once_and_the_encoder_has_two():
    agent = small_agent()
    optimizers = dict(agent.optimizers)
    for i in range(4):
        agent.update(random_batch(agent, seed=i), i % 2 == 0, i % 2 == 0)
    for name, optimizer in optimizers.items():
        assert agent.optimizers[name] is optimizer
        steps = {int(state["step"]) for state in optimizer.state.values()}
        assert steps == ({2} if name in ("actor", "alpha") else {4})
    conv = agent.critic.encoder.convs[0].weight
    ones, others = (agent.optimizers[name].state[conv] for name in ("critic", "encoder"))
    assert not torch.equal(ones["exp_avg"], others["exp_avg"])
    assert all(id(conv) != id(p) for group in agent.optimizers["actor"].param_groups for p in group["params"])


def test_a_terminal_step_has_no_next_value_and_a_time_limit_has():
    agent = small_agent()
    batch = scaled(agent, random_batch(agent))
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    ended = agent.critic_target(batch._replace(terminated=torch.ones(8)), noise)
    assert torch.equal(ended, batch.reward)
    going_on = agent.critic_target(batch._replace(terminated=torch.zeros(8)), noise)
    assert (going_on - batch.reward).abs().min() > 1e-4


def test_one_pass_for_actor_and_autoencoder_gives_the_same_weights():
    """The fast path shares the convolutions' pass after the critic's step; separate passes give the same numbers."""
    batch, results = random_batch(small_agent()), []
    noise = small_agent().draw_noise(batch)
    for shared in (True, False):
        agent = small_agent()
        for _ in range(3):
            if shared:
                agent.update(batch, True, True, noise)
                continue
            agent.update_critic(scaled(agent, batch), noise.target)
            agent.update_actor(features_of(agent, batch).detach(), batch.previous_action, noise.actor)
            agent.update_targets()
            agent.update_reconstruction(features_of(agent, batch), batch.observation, noise.dither)
        results.append(tensors(everything(agent)))
    assert not differences(*results)


@pytest.mark.parametrize("name", GOLDEN)
def test_memory_formats_do_not_matter(name):
    """Channels last, as weights and sampled frames are, against plain contiguous memory."""
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        agent, batch, noise = golden_agent(name)
        for module in (agent.actor, agent.critic, agent.target_critic, agent.decoder):
            module.to(memory_format=memory_format)
        frames = {
            part: getattr(batch, part).contiguous(memory_format=memory_format)
            for part in ("observation", "next_observation")
        }
        losses = agent.update(batch._replace(**frames), True, True, noise)
        results.append((losses, snapshot(agent)))
    (losses, parts), (other_losses, other_parts) = results
    for key, value in losses.items():
        assert_near(value, other_losses[key], 1e-5)
    for key, part in parts.items():
        for one, other in zip(part, other_parts[key], strict=True):
            assert ((one - other).abs() < 2e-5).double().mean() >= 0.999, key


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}])
def test_deconvolutions_are_transposed_convolutions(options, bf16):
    """Value and gradients, with an activation in place behind them, as the decoder has it."""
    torch.manual_seed(0)
    layer = sac_ae_pixels.Deconvolution(8, 5, 3, **options)
    inputs = torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for forward in (layer, lambda inputs: nn.ConvTranspose2d.forward(layer, inputs)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = F.relu(forward(inputs), inplace=True)
        loss = outputs.float().square().mean()
        results.append((outputs, *torch.autograd.grad(loss, (inputs, layer.weight, layer.bias))))
    assert results[0][3].abs().min() > 1e-3 and results[0][3].dtype == torch.float32
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7 if bf16 else 1e-5, atol=1e-6)


# --- residual actions ---
def residual_agent() -> tuple[SACAE, Batch, Noise]:
    agent = small_agent(residual_action=True)
    batch = random_batch(agent)
    return agent, batch, agent.draw_noise(batch)


def test_a_residual_policy_adds_its_output_to_the_action_before():
    agent, batch, noise = residual_agent()
    features, previous = features_of(agent, batch).detach(), batch.previous_action
    action, _, log_std = agent.actor(features, previous, noise.actor)
    output = agent.actor.trunk(torch.cat((agent.actor.encoder.head(features), previous), 1))
    assert torch.allclose(action, torch.tanh(previous + output[:, :2] + log_std.exp() * noise.actor), atol=1e-6)
    raw = torch.tanh(output[:, 2:])
    assert torch.allclose(log_std, -4.0 + 6.0 * raw, atol=1e-6)
    with torch.no_grad():
        agent.actor.trunk[-1].weight.zero_()
    pictures, nothing = batch.observation.numpy(), np.zeros((8, 2), np.float32)
    assert np.allclose(agent.act(pictures, previous.numpy()), np.tanh(previous.numpy()), atol=1e-6)
    assert not agent.act(pictures, nothing).any()  # an episode's first action


def test_a_residual_policys_log_probability_is_that_of_its_actions():
    """The noise's density by the volume that it is stretched to, from differences of actions."""
    agent, batch, noise = residual_agent()
    features, previous = features_of(agent, batch).detach(), 0.8 * batch.previous_action

    def actions(shift: float) -> Tensor:
        return agent.actor(features, previous, noise.actor + shift)[0].detach().double()

    stretch = (actions(0.02) - actions(-0.02)) / 0.04
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise.actor.double())
    log_probability = agent.actor(features, previous, noise.actor)[1]
    assert_near(log_probability, (normal - stretch.log()).sum(1), 0.0, 5e-3)
    plain = agent.actor(features, torch.zeros_like(previous), noise.actor)[1]
    assert (plain - log_probability).abs().max() > 0.1


def test_the_actors_loss_moves_the_weights_that_read_the_action_before_and_no_data():
    agent, batch, noise = residual_agent()
    batch.previous_action.requires_grad_()
    batch.action.requires_grad_()
    weight = agent.actor.trunk[0].weight
    before, all_before = weight.detach().clone(), snapshot(agent)
    agent.update_critic(scaled(agent, batch), noise.target)
    assert torch.equal(weight, before)
    assert moved(all_before, agent) == {*ENCODER, "critic.q1", "critic.q2"}
    all_before = snapshot(agent)
    agent.update_actor(features_of(agent, batch).detach(), batch.previous_action, noise.actor)
    assert weight.shape[1] == agent.args.feature_dim + 2 and (weight != before)[:, -2:].any(0).all()
    assert moved(all_before, agent) == {"actor.encoder.fc", "actor.encoder.ln", "actor.trunk", "log_alpha"}
    assert batch.previous_action.grad is None and batch.action.grad is None


def test_the_action_before_the_next_observation_is_the_transitions_own():
    agent, uint8_batch, noise = residual_agent()
    batch = scaled(agent, uint8_batch)._replace(terminated=torch.zeros(8))
    target = agent.critic_target(batch, noise.target)
    with torch.no_grad():
        features = agent.critic.encoder.features(batch.next_observation)
        action, log_probability, _ = agent.actor(features, batch.action, noise.target)
        target_features = agent.target_critic.encoder.features(batch.next_observation)
        min_q = torch.minimum(*agent.target_critic(target_features, action))
    assert_near(target, batch.reward + 0.99 * (min_q - 0.1 * log_probability), 1e-5)
    assert torch.equal(agent.critic_target(batch._replace(previous_action=-batch.action), noise.target), target)
    assert not torch.allclose(agent.critic_target(batch._replace(action=-batch.action), noise.target), target)


def test_an_update_shows_the_policy_the_batchs_previous_action():
    results = []
    for sign in (1.0, -1.0):
        agent, batch, noise = residual_agent()
        agent.update(batch._replace(previous_action=sign * batch.previous_action), True, True, noise)
        results.append(snapshot(agent))
    one, other = results
    differing = {name for name in one if not all(map(torch.equal, one[name], other[name]))}
    assert differing == {"actor.encoder.fc", "actor.encoder.ln", "actor.trunk"}  # log_alpha's first step is +- its rate


def test_without_residual_actions_the_action_before_is_not_seen():
    agent = small_agent()
    batch, noise = random_batch(agent), agent.draw_noise(random_batch(agent))
    features = features_of(agent, batch).detach()
    results = [agent.actor(features, previous, noise.actor) for previous in (batch.previous_action, batch.action)]
    assert all(map(torch.equal, *results)) and agent.actor.trunk[0].in_features == agent.args.feature_dim


# --- noise and augmentation ---
def test_dither_is_uniform_and_differs_between_draws():
    torch.manual_seed(0)
    one, other = (sac_ae_pixels.random_bytes(torch.Size((16, 9, 33, 33)), CPU) for _ in range(2))
    assert one.shape == (16, 9, 33, 33) and one.dtype == torch.uint8
    assert one.is_contiguous(memory_format=torch.channels_last)
    counts = torch.bincount(one.flatten().int(), minlength=256).double()
    expected = one.numel() / 256
    assert ((counts - expected).square() / expected).sum() < 256 + 6 * math.sqrt(2 * 256)  # chi-squared
    assert 0.003 < (one == other).double().mean() < 0.005
    values = one.double().flatten()
    assert abs(float(torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1])) < 0.02


def test_random_shift_shifts_and_repeats_the_border():
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    offsets = torch.tensor([[0, 4], [3, 1]])
    shifted = sac_ae_pixels.random_shift(images, 2, offsets)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    for i, (dy, dx) in enumerate(offsets.tolist()):
        assert torch.equal(shifted[i], padded[i, :, dy : dy + 6, dx : dx + 6])
    assert torch.equal(sac_ae_pixels.random_shift(images, 2, torch.full((2, 2), 2)), images)
    assert shifted.is_contiguous(memory_format=torch.channels_last)


def test_random_shift_draws_all_offsets():
    torch.manual_seed(0)
    images = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5).expand(2_000, 3, 5, 5)
    shifted = sac_ae_pixels.random_shift(images, 1)
    centres = shifted[:, 0, 2, 2]
    assert set(centres.tolist()) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert torch.bincount(centres.int()).max() < 2_000 / 9 * 1.4
    assert torch.equal(shifted[:, 0], shifted[:, 2])


def test_an_update_shifts_both_observations_apart(monkeypatch):
    agent, seen = small_agent(random_shift=4), []
    shift = sac_ae_pixels.random_shift

    def recorded(images, pad):
        seen.append((images, pad, shift(images, pad)))
        return seen[-1][2]

    monkeypatch.setattr(sac_ae_pixels, "random_shift", recorded)
    target = sac_ae_pixels.reconstruction_target
    monkeypatch.setattr(sac_ae_pixels, "reconstruction_target", lambda obs, u: seen.append(obs) or target(obs, u))
    batch = random_batch(agent)
    agent.update(batch, True, True)
    (first, pad, shifted), (second, _, _), reconstructed = seen
    assert pad == 4 and first is batch.observation and second is batch.next_observation
    assert reconstructed is shifted  # what is reconstructed is what was seen


# --- replay ---
def frame_of(number: int, size=4) -> np.ndarray:
    """A frame that carries its own number."""
    frame = np.full((3, size, size), number % 251, np.uint8)
    frame[0, 0, 0], frame[1, 0, 0] = number % 256, number // 256
    return frame


def number_of(frames: Tensor) -> list[int]:
    """The numbers of stacked frames (3 n, S, S)."""
    return [int(frames[3 * i, 0, 0]) + 256 * int(frames[3 * i + 1, 0, 0]) for i in range(len(frames) // 3)]


def filled(path: Path, lengths: list[int], steps: int, window=1_000_000, stack=3) -> tuple[ReplayBuffer, list]:
    """A buffer after episodes of these lengths, and what each transition should be."""
    buffer, expected, number = ReplayBuffer(path, steps, window, (4, 4), stack, 2), [], 0
    for length in lengths:
        seen, before = [number] * stack, [0, 0]
        buffer.start_episode(frame_of(number))
        for t in range(length):
            number += 1
            following = [*seen[1:], number]
            action, reward = np.float32([number, -number]), number / 2
            buffer.add(action, reward, t == length - 1, frame_of(number))
            expected.append((seen, [number, -number], reward, following, float(t == length - 1), before))
            seen, before = following, [number, -number]
        number += 1
    return buffer, expected


def read(buffer: ReplayBuffer, index: Tensor) -> list:
    batch = buffer.gather(index, CPU)
    return [
        (number_of(o), a.tolist(), float(r), number_of(n), float(d), p.tolist())
        for o, a, r, n, d, p in zip(*batch, strict=True)
    ]


@pytest.mark.parametrize("stack", [1, 3, 4])
def test_every_transition_comes_back_with_its_stacks(stack, tmp_path):
    lengths = [5, 1, 2, 9, 3, 1, 1, 12]
    buffer, expected = filled(tmp_path / "frames", lengths, sum(lengths), stack=stack)
    assert read(buffer, torch.arange(len(expected))) == expected
    batch = buffer.gather(torch.arange(4), CPU)
    assert batch.observation.dtype == torch.uint8 and batch.observation.shape == (4, 3 * stack, 4, 4)


def test_sampling_is_uniform_over_the_newest_transitions(tmp_path):
    torch.manual_seed(0)
    buffer, expected = filled(tmp_path / "frames", [4, 1, 7, 30], 42, window=25)
    drawn = np.concatenate([buffer.sample(500, CPU).action[:, 0].numpy().astype(int) for _ in range(20)])
    counts = np.unique(drawn, return_counts=True)
    assert counts[0].tolist() == [int(row[1][0]) for row in expected[-25:]]
    deviation = (counts[1] - 400) ** 2 / 400
    assert deviation.sum() < 24 + 6 * math.sqrt(48)
    few, _ = filled(tmp_path / "few", [2], 25)
    assert set(few.sample(100, CPU).action[:, 0].tolist()) == {1.0, 2.0}


def test_the_oldest_that_is_sampled_has_the_action_before_it(tmp_path):
    torch.manual_seed(0)
    buffer, _ = filled(tmp_path / "frames", [4, 30], 34, window=5)
    batch = buffer.sample(200, CPU)
    assert set(batch.previous_action[:, 0].tolist()) == {30.0, 31.0, 32.0, 33.0, 34.0}
    assert torch.equal(batch.previous_action, batch.action - torch.tensor([1.0, -1.0]))
    assert not batch.previous_action.requires_grad


def test_frames_are_stored_once(tmp_path):
    lengths = [250] * 4
    buffer = ReplayBuffer(tmp_path / "frames", 1_000, 1_000, (84, 84), 3, 6)
    for length in lengths:
        buffer.start_episode(np.ones((3, 84, 84), np.uint8))
        for _ in range(length):
            buffer.add(np.zeros(6, np.float32), 0.0, False, np.ones((3, 84, 84), np.uint8))
    used = 512 * (tmp_path / "frames").stat().st_blocks
    assert used < 1.01 * 1_004 * 3 * 84 * 84  # 21 kB a transition, not 127
    buffer.close(keep=False)
    assert not (tmp_path / "frames").exists()


def test_a_buffer_goes_on_where_it_was_saved(tmp_path):
    buffer, expected = filled(tmp_path / "frames", [5, 8], 30)
    state = copy.deepcopy(buffer.state_dict())
    buffer.add(np.zeros(2, np.float32), 7.0, False, frame_of(99))  # after the checkpoint: lost with the process
    buffer.close(keep=True)
    again = ReplayBuffer(tmp_path / "frames", 30, 30, (4, 4), 3, 2)
    again.load_state_dict(state)
    assert read(again, torch.arange(again.size)) == expected
    again.start_episode(frame_of(300))
    again.add(np.float32([1, 2]), 3.0, False, frame_of(301))
    last = ([300] * 3, [1, 2], 3.0, [300, 300, 301], 0.0, [0, 0])
    assert read(again, torch.arange(again.size)) == [*expected, last]


def test_an_episode_that_begins_after_the_last_transition_overwrites_nothing(tmp_path):
    buffer, expected = filled(tmp_path / "frames", [1] * 6, 6, stack=2)
    for number in (900, 901, 902):  # one that is begun again, as after a resume, takes no more room
        buffer.start_episode(frame_of(number))
    assert read(buffer, torch.arange(6)) == expected
    assert buffer.row == 12 == len(buffer.frames) - 1
    assert number_of(torch.from_numpy(buffer.current_episode()[1])) == [902, 902]


def test_the_current_episode_is_what_has_been_done_and_seen(tmp_path):
    buffer, _ = filled(tmp_path / "frames", [5, 2], 10)
    assert not ReplayBuffer(tmp_path / "empty", 10, 10, (4, 4), 3, 2).previous_action().any()
    buffer.start_episode(frame_of(900))
    assert np.array_equal(buffer.previous_action(), np.float32([0, 0]))
    for number in (901, 902):
        buffer.add(np.float32([number, 0.1]), 0.0, False, frame_of(number))
        actions, observation = buffer.current_episode()
        assert np.array_equal(buffer.previous_action(), np.float32([number, 0.1]))
    assert np.array_equal(actions, np.float32([[901, 0.1], [902, 0.1]]))
    assert number_of(torch.from_numpy(observation)) == [900, 901, 902]


# --- replay as a dataset ---
def as_dataset(path: Path, size: int, stack: int, action_dim: int, action_repeat: int) -> plas_pixels.Dataset:
    """What plas_pixels.py reads from a file, in an environment of these sizes."""
    env = SimpleNamespace(
        observation_space=Box(0, 255, (3 * stack, size, size), np.uint8), action_space=Box(-1, 1, (action_dim,)),
        size=(size, size), args=SimpleNamespace(frame_stack=stack, action_repeat=action_repeat), spec=None,
    )  # fmt: skip
    return plas_pixels.load(path, env)[0]


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("unfinished", [0, 2])
def test_a_saved_replay_holds_every_transition_with_its_stacks(stack, unfinished, tmp_path):
    lengths = [5, 1, 2, 700, 3, 1, 1, 600]
    buffer, expected = filled(tmp_path / "frames", lengths, sum(lengths) + unfinished, stack=stack)
    for number in (10_000, 10_001, 10_002)[: unfinished + 1]:  # the run ends with an episode's start, or within it
        if number == 10_000:
            buffer.start_episode(frame_of(number))
        else:
            buffer.add(np.float32([number, -number]), number / 2, False, frame_of(number))
    buffer.values[:, :-2] /= 20_000.0  # actions are in [-1, 1]
    sac_ae_pixels.save_episodes(buffer, tmp_path / "replay.npz", Args(action_repeat=4, camera=1), "PixelToy-v0")
    dataset = as_dataset(tmp_path / "replay.npz", 4, stack, 2, 4)
    batch, held = dataset.batch(torch.arange(buffer.size)), buffer.gather(torch.arange(buffer.size), CPU)
    assert len(dataset.rows) == buffer.size == sum(lengths) + unfinished
    assert len(dataset.starts) == len(lengths) + bool(unfinished)
    held = held._replace(terminated=1.0 - held.terminated)
    for ours, theirs in zip(batch, held[:5], strict=True):
        assert torch.equal(ours, theirs)
    for i, (seen, _, reward, following, terminated, _) in enumerate(expected):
        assert number_of(batch.observation[i]) == seen and number_of(batch.next_observation[i]) == following
        assert float(batch.reward[i]) == reward and float(batch.discount[i]) == 1.0 - terminated
    with np.load(tmp_path / "replay.npz") as file:
        ends = file["is_last"].nonzero()[0]
        assert (ends == np.cumsum(lengths + [unfinished] * bool(unfinished)) + np.arange(len(ends))).all()
        assert file["is_terminal"][ends].tolist() == [True] * len(lengths) + [False] * bool(unfinished)
        assert file["is_terminal"].sum() == len(lengths) and file["image"].dtype == np.uint8


@pytest.mark.parametrize("env_id", ["PixelToy-v0", "PixelToyTerminating-v0"])
def test_a_runs_replay_is_a_dataset_that_plas_trains_on(env_id, tmp_path, no_pictures, capsys, monkeypatch):
    kept, close = [], ReplayBuffer.close
    monkeypatch.setattr(ReplayBuffer, "close", lambda self, keep: kept.append(self) or close(self, keep))
    folder = sac_ae_pixels.main(tiny(tmp_path, env_id=env_id, save_replay=True))
    assert "16x16: 0.00 GB, and as much for replay.npz" in capsys.readouterr().out
    (buffer,) = kept
    batch, held = (
        as_dataset(folder / "replay.npz", 16, 3, 2, 2).batch(torch.arange(75)), buffer.gather(torch.arange(75), CPU)
    )  # fmt: skip
    for ours, theirs in zip(batch, held._replace(terminated=1.0 - held.terminated)[:5], strict=True):
        assert torch.equal(ours, theirs)
    ends = torch.arange(75) % 4 == 3  # 7 environment steps, two at a time; the last episode is cut after 3
    assert torch.equal(batch.discount == 0.0, ends & (env_id == "PixelToyTerminating-v0"))
    common = {
        "env_id": env_id, "dataset": str(folder / "replay.npz"), "action_repeat": 2, "frame_stack": 3, "num_layers": 2,
        "num_filters": 3, "hidden_dim": 12, "batch_size": 8, "eval_episodes": 2, "total_timesteps": 2,
        "runs_dir": str(tmp_path / "plas"),
    }  # fmt: skip
    for wrong, words in (
        ({"image_size": 20}, ["expected image (94, 20, 20, 3)", "got (94, 16, 16, 3)", "--image-size"]),
        ({"image_size": 16, "action_repeat": 4}, ["replay.npz was made with --action-repeat 2"]),
        ({"image_size": 16, "frame_stack": 2}, ["replay.npz was made with --frame-stack 3"]),
        ({"image_size": 16, "env_id": "PixelToyUnrepeatable-v0"}, [f"replay.npz was made with --env-id {env_id}"]),
    ):
        with pytest.raises(SystemExit) as error:
            plas_pixels.main(plas_pixels.Args(**{**common, **wrong}))
        assert error.value.code == 2 and not (tmp_path / "plas").exists()
        assert_one_line(capsys, *words)
    trained = plas_pixels.main(plas_pixels.Args(**common, image_size=16))
    assert [row["step"] for row in evaluations(trained)] == [2]
    assert "75 transitions of 19 episodes" in capsys.readouterr().out


def test_both_pixel_scripts_see_the_same_pictures(tmp_path):
    """So a policy that is learnt from the replay is evaluated on what it has learnt from."""
    ours = make_env(resolve(tiny(tmp_path, frame_stack=3)))
    settings = plas_pixels.Args(env_id="PixelToy-v0", image_size=16, action_repeat=2, frame_stack=3)
    plas_pixels.check(settings)
    theirs = plas_pixels.make_env(settings)
    assert np.array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for i in range(4):
        action = np.float32([0.3, i / 2 - 1.0])
        frame, reward, *ends, _ = ours.step(action)
        same, their_reward, *their_ends, _ = theirs.step(action)
        assert np.array_equal(frame, same) and reward == pytest.approx(their_reward) and ends == their_ends


def test_the_disk_must_hold_the_saved_replay_too(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1.5 * 75 * 3 * 16 * 16))
    refused(capsys, tmp_path, "and as much for replay.npz", "leave out --save-replay", save_replay=True)
    sac_ae_pixels.check_disk(resolve(tiny(tmp_path)), (16, 16))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("Unable to allocate 9 GiB")])
def test_too_little_room_at_the_end_is_an_error_and_not_a_crash(error, tmp_path, no_pictures, capsys, monkeypatch):
    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        assert exit_status(tiny(tmp_path, save_replay=True)) == 0
    captured = capsys.readouterr()
    assert "warning: replay failed" in captured.out and error.args[-1] in captured.out and not captured.err
    assert not (tmp_path / "run" / "replay.npz").exists() and (tmp_path / "run" / "frames.bin").exists()
    assert exit_status(tiny(tmp_path, save_replay=True, resume=True)) == 0
    assert "finished" in capsys.readouterr().out


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, no_pictures, capsys, monkeypatch):
    pwrite, written = os.pwrite, []

    def full(file, data, offset):
        written.append(len(data))
        if len(written) > 30:
            raise OSError(28, "No space left on device")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert exit_status(tiny(tmp_path)) == 1
    assert_one_line(capsys, "cannot write to", "No space left")


# --- learning ---
POINT = {
    "env_id": "PixelPoint-v0", "image_size": 32, "num_layers": 2, "num_filters": 8, "hidden_dim": 128, "batch_size": 64,
    "alpha_learning_rate": 1e-3, "learning_starts": 100, "total_timesteps": 300, "eval_frequency": 300,
    "eval_episodes": 50, "checkpoint_frequency": 1_000, "run_name": "run",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"bf16": True, "random_shift": 2}, marks=pytest.mark.slow)], ids=str
)
def test_learns_to_point_at_what_it_sees(changes, tmp_path, no_pictures):
    """1 minus the distance: a random action gets 0.1, the picture's middle 0.4."""
    folder = sac_ae_pixels.main(Args(**{**POINT, **changes}, runs_dir=str(tmp_path)))
    assert evaluations(folder)[-1]["episodic_return"] > 0.7


class SlideEnv(gym.Env):
    """A point on a line, shown in white: the reward is where it is, and only the time limit ends an episode."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.taken = self.np_random.uniform(-0.9, -0.1), 0
        return np.float32([self.place]), {}

    def step(self, action):
        self.place, self.taken = float(np.clip(self.place + 0.35 * action[0], -1, 1)), self.taken + 1
        return np.float32([self.place]), self.place, False, self.taken == 8, {}

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        x = round((self.place + 1) * 13)
        picture[13:18, x : x + 5] = 255
        return picture


def test_learns_to_slide_through_the_time_limit(tmp_path, no_pictures):
    """Each step's reward depends on the steps before: without a value of what follows nothing is learnt but the last.

    A policy that goes right at once gets 5.0 to 7.5 of 8, standing still -4 on average.
    """
    gym.register("PixelSlide-v0", SlideEnv)
    try:
        slide = {**POINT, "env_id": "PixelSlide-v0", "total_timesteps": 800, "eval_frequency": 800, "eval_episodes": 10}
        folder = sac_ae_pixels.main(Args(**slide, runs_dir=str(tmp_path)))
    finally:
        del gym.registry["PixelSlide-v0"]
    assert evaluations(folder)[-1]["episodic_return"] > 3.0


def test_an_agent_that_has_not_learnt_does_not_point(tmp_path):
    env = make_env(resolve(Args(**POINT, runs_dir=str(tmp_path))))
    agent = small_agent(**{k: POINT[k] for k in POINT if k in SMALL})
    metrics = sac_ae_pixels.evaluate(agent, [env] * 50, 1)
    assert metrics["episodic_return"] < 0.5 and metrics["episodic_length"] == 1.0


# --- runs ---
def exit_status(args: Args) -> int:
    """Run `main` here and return the status that the process would have ended with."""
    ToyEnv.made = 0
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    status = 0
    try:
        sac_ae_pixels.main(args)
    except SystemExit as end:
        status = end.code
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]  # given back
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


def terminate_self(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


def at_training_step(step: int, act: Callable[[], None]) -> None:
    """Have `act` called during this environment step of the training environment."""

    def hook(env: ToyEnv) -> None:
        if env.number == 0 and env.total == step:
            act()

    ToyEnv.hook = hook


def at_call(act: Callable[[], None], owner, name: str, number: int, when=lambda *_, **__: True, after=False) -> None:
    """Have `act` called at the `number`-th call of a function, of those that `when` picks."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        result = function(*args, **kwargs) if after else None
        calls.extend([1] * bool(when(*args, **kwargs)))
        if len(calls) == number and when(*args, **kwargs):
            act()
        return result if after else function(*args, **kwargs)

    setattr(owner, name, call)


def evaluations(folder: Path) -> list[dict[str, float]]:
    header, *rows = ((folder / "eval.csv").read_text()).splitlines()
    return [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]


def outcome(folder: Path) -> dict[str, Tensor | bytes]:
    """What two equal runs have in common: weights, best weights, the finished checkpoint and eval.csv."""
    result = {"eval.csv": (folder / "eval.csv").read_bytes()}
    for file in ("model.pt", "best_model.pt", "checkpoint.pt"):
        result |= tensors(torch.load(folder / file, weights_only=True), file)
    if (folder / "replay.npz").exists():
        result["replay.npz"] = (folder / "replay.npz").read_bytes()
    return result


RING = {"buffer_size": 20}  # wraps three times
VARIANTS = {"whole": {}, "ring": RING, "replay": {"save_replay": True}, "residual": {"residual_action": True}}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, dict]:
    """The outcomes of runs that were never stopped."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        blank = Image.new("RGB", (8, 8))
        patch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))
        for name, changes in VARIANTS.items():
            folder = tmp_path_factory.mktemp(name)
            assert exit_status(tiny(folder, **changes)) == 0
            result[name] = outcome(folder / "run")
    return result


def test_a_run_leaves_what_it_should(tmp_path, no_pictures, capsys):
    assert exit_status(tiny(tmp_path)) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name} - {"lock"}
    assert names == {
        "args.json", "best_model.pt", "checkpoint.pt", "eval.csv", "learning_curve.png", "model.pt",
        "reconstruction.png", "sac_ae_pixels.py",
    }  # fmt: skip
    rows = evaluations(folder)
    assert [row["step"] for row in rows] == [40, 80, 120, 150]  # environment steps
    assert set(rows[0]) == {"step", "episodic_return", "return_std", "episodic_length", "success_rate"}
    assert all(math.isnan(row["success_rate"]) for row in rows)  # the toy does not tell
    assert rows[0]["episodic_length"] == 4.0  # agent steps: 7 environment steps, two at a time
    assert len(ToyEnv.actions) == sum(2 if i % 4 < 3 else 1 for i in range(75))
    first = [episode_seed(1, i) for i in range(3)]
    assert ToyEnv.seeds[1:4] == first  # after the one that looks whether it can be drawn
    captured = capsys.readouterr()
    assert "75 agent steps, each 2 environment steps" in captured.out and "last evaluation" in captured.out
    assert "replay memory of 75 frames of 16x16" in captured.out
    logged = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert {"charts/episodic_return", "losses/critic", "losses/autoencoder", "eval/episodic_return"} <= set(
        logged.Tags()["scalars"]
    )
    assert [event.step for event in logged.Scalars("eval/episodic_return")] == [40, 80, 120, 150]


def test_updates_are_as_many_as_the_originals(tmp_path, no_pictures, monkeypatch):
    """After the random steps as many updates as those, all with actor and targets, then one a step, every second."""
    calls, update = [], SACAE.update

    def recorded(self, batch, actor, targets, noise=None):
        calls.append((len(ToyEnv.actions), actor, targets))
        return update(self, batch, actor, targets, noise)

    monkeypatch.setattr(SACAE, "update", recorded)
    sac_ae_pixels.main(tiny(tmp_path, total_timesteps=40, target_network_frequency=3))
    assert len(calls) == 10 + 10
    taken = np.cumsum([2 if i % 4 < 3 else 1 for i in range(20)]).tolist()  # environment steps after each agent step
    assert [call[0] for call in calls] == [taken[9]] * 10 + taken[10:]
    assert [call[1] for call in calls] == [True] * 10 + [i % 2 == 0 for i in range(11, 21)]
    assert [call[2] for call in calls] == [True] * 10 + [i % 3 == 0 for i in range(11, 21)]


def test_the_first_actions_are_random_and_then_the_policys(tmp_path, no_pictures, monkeypatch):
    asked, act = [], SACAE.act

    def recorded(self, observation, previous_action, sample=False):
        asked.extend([len(ToyEnv.actions)] * sample)
        return act(self, observation, previous_action, sample)

    monkeypatch.setattr(SACAE, "act", recorded)
    sac_ae_pixels.main(tiny(tmp_path, total_timesteps=40))
    assert len(asked) == 10 and asked[0] == 18  # after ten agent steps
    random = np.array(ToyEnv.actions[:18])
    assert (np.ptp(random, axis=0) > [2, 4]).all() and (random >= [-2, 0]).all() and (random <= [2, 10]).all()


def test_the_policy_sees_its_action_before_and_0_at_an_episodes_start(tmp_path, no_pictures, monkeypatch):
    act, asked, kept = SACAE.act, {True: [], False: []}, []

    def recorded(self, observation, previous_action, sample=False):
        action = act(self, observation, previous_action, sample)
        asked[sample].append((previous_action[0].tolist(), action[0].tolist()))
        return action

    monkeypatch.setattr(SACAE, "act", recorded)
    monkeypatch.setattr(ReplayBuffer, "close", lambda self, keep: kept.append(self))
    sac_ae_pixels.main(tiny(tmp_path, residual_action=True))
    batch = kept[0].gather(torch.arange(75), CPU)
    taken = batch.action.tolist()
    expected = [[0.0, 0.0] if i % 4 == 0 else taken[i - 1] for i in range(75)]  # episodes of four agent steps
    assert batch.previous_action.tolist() == expected
    assert asked[True] == list(zip(expected[10:], taken[10:], strict=True))  # after ten random actions
    assert len(asked[False]) == 4 * 2 * 4  # evaluations, episodes, steps
    for i, (previous_action, action) in enumerate(asked[False]):
        assert previous_action == ([0.0, 0.0] if i % 4 == 0 else asked[False][i - 1][1]) != action


def test_a_step_of_training_reaches_the_buffer_as_it_was(tmp_path, no_pictures, monkeypatch):
    kept = []
    close = ReplayBuffer.close
    monkeypatch.setattr(ReplayBuffer, "close", lambda self, keep: kept.append(self) or close(self, keep))
    sac_ae_pixels.main(tiny(tmp_path, env_id="PixelToyTerminating-v0"))
    (buffer,) = kept
    assert buffer.size == 75
    batch = buffer.gather(torch.arange(8), CPU)
    assert batch.terminated.tolist() == [0, 0, 0, 1] * 2
    assert torch.equal(batch.observation[1], batch.next_observation[0])
    assert torch.equal(batch.observation[4][:3], batch.observation[4][6:])  # an episode's first stack
    assert not torch.equal(batch.next_observation[3], batch.observation[4])  # the last frame is not the next first
    env = make_env(resolve(tiny(tmp_path, env_id="PixelToyTerminating-v0", frame_stack=1)))
    frame = env.reset(seed=episode_seed(1, 0))[0]
    assert np.array_equal(batch.observation[0][:3].numpy(), frame)
    for t in range(4):
        frame, reward, *_ = env.step(batch.action[t].numpy())
        assert np.array_equal(batch.next_observation[t][6:].numpy(), frame)
        assert float(batch.reward[t]) == pytest.approx(reward, abs=1e-6)


def test_time_limits_are_not_stored_as_ends(tmp_path, no_pictures, monkeypatch):
    kept = []
    monkeypatch.setattr(ReplayBuffer, "close", lambda self, keep: kept.append(self))
    sac_ae_pixels.main(tiny(tmp_path))
    assert not kept[0].gather(torch.arange(75), CPU).terminated.any()


def test_equal_seeds_give_equal_runs_and_others_do_not(references, tmp_path, no_pictures):
    assert exit_status(tiny(tmp_path)) == 0
    assert not differences(outcome(tmp_path / "run"), references["whole"])
    assert exit_status(tiny(tmp_path, run_name="other", seed=2)) == 0
    changed = differences(outcome(tmp_path / "other"), references["whole"])
    assert "eval.csv" in changed and len(changed) > 50


def test_evaluation_and_checkpoints_do_not_disturb_training(references, tmp_path, no_pictures):
    args = tiny(tmp_path, eval_frequency=1_000, checkpoint_frequency=1_000)
    assert exit_status(args) == 0
    weights = [tensors(torch.load(tmp_path / "run" / "model.pt", weights_only=True), "model.pt")]
    assert not [name for name in weights[0] if differences({name: weights[0][name]}, {name: references["whole"][name]})]


@pytest.mark.parametrize("kind", ["growing", "observed, drawn gray"])
def test_odd_pictures_are_trained_on_and_filmed(kind, tmp_path, no_pictures, capsys):
    args = tiny(tmp_path, env_id=ODD[kind], total_timesteps=40, capture_video=True, save_replay=True)
    assert exit_status(args) == 0
    assert "warning" not in capsys.readouterr().out
    assert len(list((tmp_path / "run" / "videos").glob("step40-*.mp4"))) == 3
    with np.load(tmp_path / "run" / "replay.npz") as file:
        assert file["image"].shape[1:] == ((16, 21, 3) if "observed" in kind else (16, 16, 3))


def test_a_video_that_fails_is_a_warning(tmp_path, no_pictures, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such codec")

    monkeypatch.setattr(sac_ae_pixels, "record_videos", fails)
    assert exit_status(tiny(tmp_path, total_timesteps=40, capture_video=True)) == 0
    assert "warning: videos failed (RuntimeError: no such codec)" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["finished"]


# --- resuming ---
STOPS = {  # name -> what to arm before the run
    "in mid-episode": lambda act: at_training_step(87, act),
    "before the first checkpoint": lambda act: at_training_step(9, act),
    "among the first updates": lambda act: at_call(act, SACAE, "update", 4),
    "in a gradient step": lambda act: at_call(act, SACAE, "update_targets", 25),
    "in the middle of an evaluation": lambda act: at_call(
        act, ToyEnv, "render", 15, lambda env: env.number == 1 and len(ToyEnv.seeds) > 15
    ),
    "in the last step's evaluation": lambda act: at_call(act, sac_ae_pixels, "evaluate", 4),
    "after eval.csv was written": lambda act: at_call(act, sac_ae_pixels.Run, "log_evaluation", 2, after=True),
    "while a picture is drawn": lambda act: at_call(act, Figure, "savefig", 2),
}
KILLS = STOPS | {
    "before anything is written": lambda act: at_call(act, sac_ae_pixels, "write_atomically", 1),
    "while args.json is written": lambda act: at_call(act, os, "fsync", 1),
    "in the middle of writing a frame": lambda act: at_call(act, os, "pwrite", 60),
    "in the middle of writing a checkpoint": lambda act: at_call(half_a_save, torch, "save", 4),
    "before a checkpoint is renamed": lambda act: at_call(act, os, "replace", 2, goes_to_checkpoint),
    "after a checkpoint was renamed": lambda act: at_call(act, os, "replace", 2, goes_to_checkpoint, after=True),
    "when the last step is done": lambda act: at_call(act, sac_ae_pixels, "draw_learning_curve", 1),
    "before the frames are removed": lambda act: at_call(act, ReplayBuffer, "close", 1),
}
REPLAY_STOPS = {
    "while the replay is written": lambda act: at_call(act, np.lib.format, "write_array", 4),
    "before the replay is renamed": lambda act: at_call(act, os, "replace", 1, goes_to_replay),
    "after the replay was renamed": lambda act: at_call(act, os, "replace", 1, goes_to_replay, after=True),
}
KILLS |= REPLAY_STOPS


def goes_to_replay(source, target, *_, **__) -> bool:
    return str(target).endswith("replay.npz")


def goes_to_checkpoint(source, target, *_, **__) -> bool:
    return str(target).endswith("checkpoint.pt")


def half_a_save() -> None:
    for path in Path.cwd().rglob("*.tmp"):
        path.write_bytes(b"PK\x03\x04 not the whole")
    kill_self()


@pytest.mark.parametrize(
    ("where", "variant"),
    [
        *((where, "whole") for where in KILLS if where not in REPLAY_STOPS),
        *((where, "replay") for where in REPLAY_STOPS),
        ("in mid-episode", "ring"),
        ("in mid-episode", "residual"),
        ("in a gradient step", "ring"),
        ("before a checkpoint is renamed", "ring"),
    ],
)
def test_a_killed_run_ends_as_if_never_killed(where, variant, references, tmp_path, no_pictures, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = functools.partial(tiny, tmp_path, **VARIANTS[variant])

    def start() -> int:
        KILLS[where](kill_self)
        return exit_status(args())

    assert in_a_fork(start) == -signal.SIGKILL
    assert exit_status(args(resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), references[variant])
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert not (tmp_path / "run" / "frames.bin").exists() or where == "before the frames are removed"


@pytest.mark.parametrize("where", [name for name in STOPS if name != "while a picture is drawn"])
def test_a_terminated_run_saves_and_goes_on(where, references, tmp_path, no_pictures, capsys):
    def start() -> int:
        STOPS[where](terminate_self)
        return exit_status(tiny(tmp_path))

    assert in_a_fork(start) == 143
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert where != "among the first updates" or state["updates_due"] > 0
    if where == "in the middle of an evaluation":
        assert state["step"] in (40, 80, 120, 150) and all(row["step"] < state["step"] for row in state["eval_rows"])
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), references["whole"])


@pytest.mark.parametrize("where", ["when the last step is done", "while the replay is written"])
def test_a_run_that_is_terminated_at_its_end_has_its_replay_when_it_goes_on(
    where, references, tmp_path, no_pictures, capsys
):
    """A signal ends the writing, and a run that goes on writes it anew."""

    def start() -> int:
        KILLS[where](terminate_self)
        return exit_status(tiny(tmp_path, save_replay=True))

    assert in_a_fork(start) == 143
    assert not (tmp_path / "run" / "replay.npz").exists()
    assert (tmp_path / "run" / "frames.bin").exists()
    assert exit_status(tiny(tmp_path, save_replay=True, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), references["replay"])


def test_a_run_can_be_stopped_many_times(references, tmp_path, no_pictures, capsys):
    for step in (3, 40, 25, 1, 30):  # of the process, which begins with what it plays again
        at_training_step(step, terminate_self)
        assert exit_status(tiny(tmp_path, resume=True)) == 143
    ToyEnv.hook = None
    assert exit_status(tiny(tmp_path, resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), references["whole"])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a run that was stopped in mid-episode."""
    folder = tmp_path_factory.mktemp("interrupted")
    at_training_step(87, terminate_self)
    assert exit_status(tiny(folder)) == 143
    ToyEnv.hook = None
    return folder / "run"


@pytest.fixture
def checkpoint(interrupted, tmp_path) -> Path:
    """The checkpoint of a copy of that run, in `tmp_path`/run."""
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run" / "checkpoint.pt"


def change(checkpoint: Path, by: Callable[[dict], object]) -> None:
    torch.save(by(torch.load(checkpoint, weights_only=True)), checkpoint)


CHECKPOINT_KEYS = [
    "script", "arguments", "step", "eval_rows", "finished", "torch_rng", "cuda_rng", "agent", "optimizers", "buffer",
    "agent_step", "updates_due", "episode", "episode_return", "recent",
]  # fmt: skip
AGENT_KEYS = ["actor", "critic", "target_critic", "decoder", "log_alpha"]
OPTIMIZER_KEYS = ["actor", "critic", "alpha", "encoder", "decoder"]
BUFFER_KEYS = ["size", "row", "first", "values", "rows"]


def test_the_tests_know_all_of_a_checkpoint(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    assert set(state) == set(CHECKPOINT_KEYS)
    assert {name.partition(".")[0] for name in state["agent"]} == set(AGENT_KEYS)
    assert set(state["optimizers"]) == set(OPTIMIZER_KEYS)
    assert set(state["buffer"]) == set(BUFFER_KEYS)


def resumed_outcome(tmp_path: Path) -> dict | None:
    """The outcome of resuming, None if that fails."""
    try:
        status = exit_status(tiny(tmp_path, resume=True))
    except Exception:
        return None
    return outcome(tmp_path / "run") if status == 0 else None


def test_checkpoint_and_frames_are_enough(checkpoint, references, tmp_path, no_pictures):
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("checkpoint.pt", "best_model.pt", "frames.bin"):
            path.unlink()
    assert not differences(resumed_outcome(tmp_path), references["whole"])


@pytest.mark.parametrize(
    "key",
    [
        *CHECKPOINT_KEYS,
        *("agent/log_alpha", "agent/actor.trunk.0.bias", "agent/target_critic.encoder.ln.weight"),
        *(f"optimizers/{key}" for key in OPTIMIZER_KEYS),
        *(f"buffer/{key}" for key in BUFFER_KEYS),
    ],
)
def test_nothing_can_be_left_out_of_a_checkpoint(key, checkpoint, tmp_path, no_pictures, capsys):
    part, _, inner = key.rpartition("/")

    def without(state: dict) -> dict:
        del (state[part] if part else state)[inner]
        return state

    change(checkpoint, without)
    capsys.readouterr()
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "checkpoint.pt is damaged", "SACAE" if part == "agent" else inner)


def fresh_part(part: str, name: str):
    """What a checkpoint of an agent that has learnt nothing has there."""
    return everything(small_agent(1))[part][name]


FRESH = {  # what the start of a run would have in the place of each field that learning depends on
    "agent_step": lambda state: state | {"agent_step": state["agent_step"] - 1},
    "episode": lambda state: state | {"episode": 0},
    "updates_due": lambda state: state | {"updates_due": 1 - state["updates_due"]},
    "eval_rows": lambda state: state | {"eval_rows": []},
    "torch_rng": lambda state: state | {"torch_rng": torch.Generator().manual_seed(1).get_state()},
    **{
        f"agent/{name}": lambda state, name=name: (
            state
            | {"agent": {k: fresh_part("agent", k) if k.startswith(name) else v for k, v in state["agent"].items()}}
        )
        for name in AGENT_KEYS
    },
    **{
        f"optimizers/{name}": lambda state, name=name: (
            state | {"optimizers": state["optimizers"] | {name: fresh_part("optimizers", name)}}
        )
        for name in OPTIMIZER_KEYS
    },
    **{
        f"buffer/{name}": lambda state, name=name: (
            state | {"buffer": state["buffer"] | {name: state["buffer"][name] * 0}}
        )
        for name in BUFFER_KEYS
    },
}


@pytest.mark.parametrize("key", FRESH)
def test_each_field_of_a_checkpoint_is_used(key, checkpoint, references, tmp_path, no_pictures):
    """A value as at the start of a run, in the place of the saved one, makes a difference."""
    change(checkpoint, FRESH[key])
    result = resumed_outcome(tmp_path)
    assert result is None or differences(result, references["whole"])


def test_a_checkpoint_holds_nothing_that_could_run(checkpoint, tmp_path, no_pictures, capsys):
    def types(value) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types(part) for part in (*value.keys(), *value.values())), set())
        return set().union(*map(types, value), set()) if isinstance(value, list | tuple) else {type(value)}

    assert types(torch.load(checkpoint, weights_only=True)) <= {Tensor, int, float, bool, str, type(None)}


@pytest.mark.parametrize("early", [0, 2])
def test_an_episode_that_does_not_replay_is_left(early, tmp_path, no_pictures, capsys, monkeypatch):
    """It may also end before the actions do."""
    at_training_step(87, terminate_self)
    assert exit_status(tiny(tmp_path, env_id="PixelToyUnrepeatable-v0")) == 143
    ToyEnv.hook = None
    monkeypatch.setattr(ToyEnv, "early", early)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    episode = state["episode"]
    assert state["buffer"]["row"] - state["buffer"]["first"] == 2
    capsys.readouterr()
    assert exit_status(tiny(tmp_path, env_id="PixelToyUnrepeatable-v0", resume=True)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "does not replay" in line]
    assert len(lines) == 1 and f"episode {episode} " in lines[0]


def test_frames_that_are_missing_are_noticed(checkpoint, tmp_path, capsys):
    (tmp_path / "run" / "frames.bin").unlink()
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "frames.bin is missing", "--run-name")


@pytest.mark.parametrize("keep", [0, 1_000, -1])
def test_frames_that_were_cut_short_are_noticed(keep, checkpoint, tmp_path, capsys):
    """An interrupted copy must not be made longer again, with zeros that are trained on."""
    path = tmp_path / "run" / "frames.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert exit_status(tiny(tmp_path, resume=True)) == 2
    assert_one_line(capsys, "frames.bin", "--run-name")
    assert path.read_bytes() == whole[:keep]


def test_a_finished_run_is_left_as_it_is(tmp_path, no_pictures, capsys):
    assert exit_status(tiny(tmp_path, total_timesteps=30)) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert exit_status(tiny(tmp_path, total_timesteps=30, resume=True)) == 0
    assert "finished" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


# --- bad input ---
def assert_one_line(capsys, *parts: str) -> str:
    """stderr is one line that starts with "error:" and has these parts; return it."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def refused(capsys, tmp_path: Path, *parts: str, **changes) -> str:
    """`main` ends with status 2 and one line, and creates nothing; return that line."""
    runs = tmp_path / "runs"
    assert exit_status(Args(**{**TINY, "run_name": None, "runs_dir": str(runs), **changes})) == 2
    assert not runs.exists()
    return assert_one_line(capsys, *parts)


@pytest.mark.parametrize(
    ("env_id", "parts"),
    [
        ("PixelToyDiscrete-v0", ["expected a Box action space", "Discrete(3)"]),
        ("CartPole-v1", ["expected a Box action space"]),
        ("PixelToyUnbounded-v0", ["expected a Box action space with bounds", "Box(-inf, inf"]),
        ("PixelToyNoActions-v0", ["expected a Box action space with bounds", "(0,)"]),
        ("PixelToyBlind-v0", ["PixelToyBlind-v0", "rgb_array"]),
        ("PixelToyNoPicture-v0", ["cannot be drawn", "NoneType"]),
        ("PixelToyGray-v0", ["cannot be drawn", "a picture"]),
        ("PixelToyFails-v0", ["could not make PixelToyFails-v0", "no such thing"]),
        ("PixelToyNoGL-v0", ["cannot be drawn", "libegl1"]),
        ("Pendulun-v1", ["unknown environment Pendulun-v1", "did you mean Pendulum-v1"]),
        ("qqqqqqqqqqqqqqqq-v0", ["unknown environment", "ids look like"]),
        ("no_such_package:Name-v0", ["no_such_package"]),
        ("", ["could not make", "Malformed"]),
    ],
)
def test_environments_that_do_not_fit_are_refused(env_id, parts, tmp_path, capsys):
    refused(capsys, tmp_path, *parts, env_id=env_id)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("nearly unbounded", ["expected a Box action space with bounds below 1e+06", "10000000000"]),
        ("one only", ["could not make", "the port is in use"]),
        ("old step", ["cannot be drawn and played", "expected 5"]),
        ("no info", ["cannot be drawn and played", "NoneType"]),
        ("four channels", ["expected a picture (height, width, 3) uint8, got (20, 20, 4) uint8"]),
        ("floats", ["expected a picture (height, width, 3) uint8, got (20, 20, 3) float64"]),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_created(kind, parts, tmp_path, capsys):
    refused(capsys, tmp_path, *parts, env_id=ODD[kind])


def test_an_episode_without_an_end_is_an_error(tmp_path, capsys):
    words = "100,000 steps without an end", "--max-episode-steps"
    refused(capsys, tmp_path, *words, env_id=ODD["endless"], action_repeat=200_000, total_timesteps=10**8)


@pytest.mark.parametrize(
    ("name", "value", "gigabytes"),
    [("image_size", 100_000, "GB"), ("hidden_dim", 10**6, "80,000 GB"), ("batch_size", 10**9, "GB")],
)
def test_sizes_that_no_memory_holds_are_refused(name, value, gigabytes, tmp_path, capsys):
    refused(capsys, tmp_path, "need at least", gigabytes, "choose smaller sizes", **{name: value})


@pytest.mark.parametrize("kind", ["large reward", "nan in evaluation"])
def test_rewards_that_no_float32_holds_end_the_run(kind, tmp_path, no_pictures, capsys):
    assert exit_status(tiny(tmp_path, env_id=ODD[kind])) == 1
    assert_one_line(capsys, "reward", "not a finite number", "checkpoint.pt")
    assert not (tmp_path / "run" / "model.pt").exists()


def test_success_is_counted_where_it_is_told(tmp_path):
    env = make_env(resolve(tiny(tmp_path, env_id=ODD["success at times"])))
    seeds = [episode_seed(1, i, stream=1) for i in range(12)]
    expected = np.mean([env.reset(seed=seed) and env.unwrapped.target > 0 for seed in seeds])
    assert 0.0 < expected < 1.0
    assert sac_ae_pixels.evaluate(small_agent(), [env] * 12, 1)["success_rate"] == expected


BAD_VALUES = [
    {"total_timesteps": 0}, {"total_timesteps": -5}, {"batch_size": 0}, {"buffer_size": -1}, {"eval_episodes": 0},
    {"eval_frequency": 0}, {"checkpoint_frequency": 0}, {"action_repeat": 0}, {"policy_frequency": 0},
    {"target_network_frequency": 0}, {"image_size": 0}, {"frame_stack": 0}, {"num_layers": 0}, {"num_filters": -1},
    {"feature_dim": 0}, {"hidden_dim": 0}, {"learning_starts": -1}, {"learning_rate": -1e-3}, {"gamma": 1.5},
    {"alpha_learning_rate": float("nan")}, {"gamma": -0.1}, {"tau": 2.0}, {"encoder_tau": 1.1}, {"alpha": 0.0},
    {"latent_weight": float("inf")}, {"decoder_weight_decay": -1.0}, {"random_shift": -1}, {"random_shift": 17},
    {"seed": -1}, {"camera": -2}, {"learning_rate": 1e39}, {"max_episode_steps": 0},
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [item for changes in BAD_VALUES for item in changes.items()])
def test_bad_values_are_refused(name, value, tmp_path, capsys):
    refused(capsys, tmp_path, f"--{name.replace('_', '-')} {value:g}", **{name: value})


def test_a_seed_that_no_generator_takes_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, f"--seed {2**64}", f"{2**63 - 1}", seed=2**64)


@pytest.mark.parametrize(("layers", "least"), [(2, 7), (4, 15), (6, 23)])
def test_an_image_too_small_for_the_layers_is_refused(layers, least, tmp_path, capsys):
    changes = {"image_size": least - 1, "num_layers": layers}
    size = f"pictures of {least - 1} x {least - 1} are too small for --num-layers {layers}"
    refused(capsys, tmp_path, size, f"at least {least} pixels", **changes)
    assert min(sac_ae_pixels.feature_map_size((least, least), layers)) >= 1


def test_a_run_that_would_not_learn_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "--total-timesteps 18", "9 agent steps", "--learning-starts 10", total_timesteps=18)


def test_a_replay_memory_larger_than_the_disk_is_refused(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000_000))
    changes = {"image_size": 84, "total_timesteps": 6_000_000}
    refused(
        capsys, tmp_path, "3,000,000 frames of 84x84: 63.50 GB", "has 50.00 GB left", "--total-timesteps", **changes
    )
    args = resolve(tiny(tmp_path, **{**changes, "total_timesteps": 2_000_000}))
    assert "1,000,000 frames" in sac_ae_pixels.check_disk(args, (84, 84))


def test_a_run_that_has_its_frames_needs_no_more_disk(tmp_path, no_pictures, capsys, monkeypatch):
    at_training_step(87, terminate_self)
    assert exit_status(tiny(tmp_path)) == 143
    ToyEnv.hook = None
    usage, frames = shutil.disk_usage(tmp_path), 75 * 3 * 16 * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=frames - 10_000))
    assert exit_status(tiny(tmp_path, run_name="another")) == 2
    for _ in range(2):  # to its end, and once more when it is finished
        assert exit_status(tiny(tmp_path, resume=True)) == 0


def test_no_opengl_is_refused_with_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(sac_ae_pixels.ctypes, "CDLL", missing)
    line = refused(capsys, tmp_path, "OpenGL", "apt-get install libegl1", env_id="cartpole-swingup", image_size=16)
    assert "EGL" in line and "OSMesa" in line
    make_env(resolve(tiny(tmp_path)))  # what needs no OpenGL does not ask for it


def test_an_opengl_that_does_not_work_is_refused_with_what_to_install(tmp_path, capsys, monkeypatch):
    """The library is there, but no driver: dm_control says so when it is imported."""

    class Broken:
        def find_spec(self, name, *_):
            if name == "shimmy":
                raise ImportError("Cannot initialize a headless EGL display.")

    monkeypatch.delitem(sys.modules, "shimmy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(sac_ae_pixels, "choose_opengl", lambda: "egl")
    line = refused(capsys, tmp_path, "headless EGL", "apt-get install", env_id="cartpole-swingup", image_size=16)
    assert "MUJOCO_GL=osmesa" in line and "pip install" not in line


def test_osmesa_is_taken_where_there_is_no_egl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def only_osmesa(name):
        if "EGL" in name:
            raise OSError(name)

    monkeypatch.setattr(sac_ae_pixels.ctypes, "CDLL", only_osmesa)
    assert sac_ae_pixels.choose_opengl() == "osmesa" == os.environ["MUJOCO_GL"]
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert sac_ae_pixels.choose_opengl() == "glfw"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reward_that_is_not_finite_ends_the_run(value, tmp_path, no_pictures, capsys):
    gym.register("PixelToyNan-v0", ToyEnv, kwargs={"break_at": (75, value)})
    try:
        assert exit_status(tiny(tmp_path, env_id="PixelToyNan-v0")) == 1
    finally:
        del gym.registry["PixelToyNan-v0"]
    assert_one_line(capsys, "reward", "not a finite number", str(ToyEnv.seeds[-1]), "checkpoint.pt")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 60


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, no_pictures, capsys):
    assert exit_status(tiny(tmp_path, learning_rate=1e20)) == 1
    assert_one_line(capsys, "losses/", "try a smaller learning rate")


def test_an_existing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert exit_status(tiny(tmp_path)) == 2
    assert_one_line(capsys, "exists", "--resume", "--run-name")


def test_changed_arguments_are_refused_and_named(checkpoint, tmp_path, capsys):
    assert exit_status(tiny(tmp_path, resume=True, learning_rate=1e-2, frame_stack=2)) == 2
    assert_one_line(capsys, "learning_rate was 0.001, now 0.01", "frame_stack was 3, now 2")


def test_short_and_long_names_are_one(tmp_path):
    assert resolve(Args(env_id="dm_control/walker-walk-v0")) == resolve(Args(env_id="walker-walk"))
    repeats = {"cartpole-swingup": 8, "reacher-easy": 4, "cheetah-run": 4, "ball_in_cup-catch": 4, "finger-spin": 2}
    for name, repeat in {**repeats, "walker-walk": 2, "Pendulum-v1": 1}.items():
        assert resolve(Args(env_id=name)).action_repeat == repeat
    assert resolve(Args(env_id="walker-walk", action_repeat=5)).action_repeat == 5
    for other in ("dm_control/stack_2_bricks_features-v0", "dm_control/CmuHumanoidRunGaps-v0", "their/Thing-v0"):
        assert resolve(Args(env_id=other)).env_id == other  # have no short form


# --- benchmark ---
@pytest.mark.parametrize("name", GOLDEN)
def test_the_plain_update_gives_the_fast_ones_weights(name):
    """What the speed is measured against does the same; it meets the original's numbers too."""
    data = golden(name)
    agent, batch, noise = golden_agent(name)
    plain = speed.PlainSACAE(agent)
    for i in range(3):
        agent.update(batch, i % 2 == 0, i % 2 == 0, noise)
        plain.update(batch, i % 2 == 0, noise)
        if i == 0:
            for (key, fast), slow in zip(networks(agent).items(), networks(plain).values(), strict=True):
                expected = data[f"after/{key}"]
                near = (slow.detach() - expected).abs() <= 2e-5
                assert near.double().mean() >= 0.9999 and fast.numel() == slow.numel(), key
    for (key, fast), slow in zip(networks(agent).items(), networks(plain).values(), strict=True):
        near = (fast.detach() - ours(agent, key, slow.detach())).abs() <= 1e-4
        assert near.double().mean() >= 0.999, key
    assert_near(plain.log_alpha, agent.log_alpha.detach(), 1e-6)


def test_operations_are_those_that_pytorch_counts():
    agent = small_agent(num_layers=4, image_size=33, batch_size=5)
    batch = random_batch(agent, 5)
    with FlopCounterMode(display=False) as counter:
        for i in range(2):
            agent.update(batch, i == 0, i == 0)
    assert 2.0 * speed.operations_per_pixel_update(agent) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_speed_prints_and_writes_its_figures(tmp_path, capsys):
    speed.main(
        speed.Args(
            "sac_ae_pixels", rounds=1, pixel_environments=("Pendulum-v1",), pixel_steps=2, pixel_batch_size=2,
            image_size=16, memory=False, json=tmp_path / "speed.json",
        )
    )  # fmt: skip
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert [row["updates"] for row in figures["rows"]] == [
        pytest.approx(1.0 / figures["updates"][kind]["seconds"]) for kind in ("fast", "bf16")
    ]
    updates = figures["updates"]
    assert updates["fast"]["ratio"] == pytest.approx(updates["plain"]["seconds"] / updates["fast"]["seconds"])
    assert 0.0 < updates["plain"]["roofline_share"] < 1.0 and figures["environments"]["Pendulum-v1"]["fast"] > 0.0
    printed = capsys.readouterr().out
    for words in ("ms an agent step", "times plain", "of the roofline", "in bfloat16"):
        assert words in printed


def make_run(runs: Path, name: str, env_id: str, seed: int, returns: list[float]) -> None:
    folder = runs / name
    folder.mkdir(parents=True)
    arguments = {"env_id": env_id, "seed": seed, "total_timesteps": 10_000 * len(returns), "eval_episodes": 10}
    (folder / "args.json").write_text(json.dumps({"script": "sac_ae_pixels", "arguments": arguments}))
    rows = [f"{10_000 * (i + 1)},{value},1.0,125.0\n" for i, value in enumerate(returns)]
    (folder / "eval.csv").write_text("step,episodic_return,return_std,episodic_length\n" + "".join(rows))


def test_the_results_table_has_the_last_evaluation_beside_the_papers(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed, value in ((1, 320.4), (2, 280.0)):
        make_run(runs, f"sac_ae_pixels__cartpole-swingup__{seed}", "cartpole-swingup", seed, [10.0, 20.0, value])
    make_run(runs, "sac_ae_pixels-random-shift__cartpole-swingup__1", "cartpole-swingup", 1, [10.0, 700.0])
    make_run(runs, "sac_ae_pixels__Pendulum-v1__1", "Pendulum-v1", 1, [-1000.0, -150.0])
    make_run(runs, "sac_ae_pixels__theirs__1", "their/Thing-v1", 1, [1.0])
    plot.main(plot.Args("sac_ae_pixels", runs=runs, results=results))
    folder = results / "sac_ae_pixels"
    cartpole, *others = (folder / "table.md").read_text().splitlines()[2:]
    assert [cell.strip() for cell in cartpole.strip("|").split("|")] == [
        "cartpole-swingup", "return", "311 ± 11", "759", "300 ± 29", "2", "30,000", "10", "320 (1), 280 (2)",
    ]  # fmt: skip
    assert any("| Pendulum-v1 | return | – | – | -150 |" in line for line in others)
    (line,) = (folder / "ablations.md").read_text().splitlines()[2:]
    # Beside the unchanged run at the same step.
    assert "| random-shift | 700 | – | 20 | +680 | – | 1 | 20,000 | 700 (1) |" in line
    assert {path.name for path in folder.glob("*.png")} == {
        "cartpole-swingup.png", "cartpole-swingup__ablations.png", "Pendulum-v1.png", "their-Thing-v1.png",
    }  # fmt: skip
    before = (folder / "table.md").read_text()
    plot.main(plot.Args("sac_ae_pixels", runs=tmp_path / "none", results=results))  # from the CSV files alone
    assert (folder / "table.md").read_text() == before


def test_every_job_is_what_its_name_says():
    listed = subprocess.run(
        ["bash", ROOT / "benchmark" / "sac_ae_pixels.sh"], capture_output=True, text=True, check=True
    )
    environments, lines = set(), listed.stdout.splitlines()
    assert len(set(lines)) == len(lines)
    for line in lines:
        words = line.split()
        args = resolve(tyro.cli(Args, args=words[2:]))
        prefix, env_id, seed = args.run_name.split("__")
        assert (env_id, int(seed)) == (args.env_id, args.seed)
        name = prefix.removeprefix("sac_ae_pixels").removeprefix("-")
        pendulum = env_id == "Pendulum-v1"
        assert args.bf16 == (not pendulum or name == "bf16")
        shifted = name in ("shift-alone", "residual", "newcomer")
        assert args.random_shift == 4 * (shifted or name == "random-shift")
        assert args.reconstruction == (not shifted and name != "no-reconstruction")
        assert args.residual_action == (name in ("residual", "residual-alone"))
        assert pendulum or args.image_size == (64 if name == "newcomer" else 84)
        assert args.total_timesteps == (20_000 if pendulum else 100_000)
        assert sac_ae_pixels.agent_steps(args) * args.action_repeat == args.total_timesteps
        environments.add(env_id)
    assert environments == {*plot.PUBLISHED["sac_ae_pixels"], "Pendulum-v1"}


# --- the command line, dm_control ---
ENVIRONMENT = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


def command(*words: str, cwd: Path = ROOT, script: str | Path = SCRIPT) -> subprocess.CompletedProcess:
    run = [sys.executable, str(script), *map(str, words)]
    return subprocess.run(run, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


PENDULUM = [
    "--image-size", "16", "--num-layers", "2", "--num-filters", "3", "--hidden-dim", "12", "--feature-dim", "6",
    "--batch-size", "8", "--action-repeat", "4", "--total-timesteps", "300", "--learning-starts", "20",
    "--eval-episodes", "1", "--eval-frequency", "150",
]  # fmt: skip


def test_a_copy_alone_trains_films_and_tracks(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "sac_ae_pixels.py")
    words = "--env", "Pendulum-v1", *PENDULUM, "--run-name", "a b", "--track", "--capture-video"
    result = command(*words, script="sac_ae_pixels.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "a b"
    assert len(list((folder / "videos").glob("step300-*.mp4"))) == 3
    assert list(folder.glob("wandb/offline-run-*"))
    for name in ("reconstruction", "learning_curve"):
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).astype(int)
        assert min(picture.shape[:2]) > 200 and np.ptp(picture, axis=(0, 1)).min() > 100
    logged = EventAccumulator(str(folder)).Reload()
    assert logged.Tags()["images"] == ["images/reconstruction", "images/learning_curve"]
    about = json.loads((folder / "args.json").read_text())
    assert about["arguments"]["image_size"] == 16


def opengl_is_there() -> bool:
    """In a process of its own, since it loads libraries for good."""
    code = "import sys, sac_ae_pixels; sys.exit(sac_ae_pixels.choose_opengl() is None)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT).returncode == 0


@pytest.fixture(scope="module")
def opengl() -> None:
    if not opengl_is_there():
        pytest.skip("no OpenGL here")


DM_CONTROL = """
import sys, json
import numpy as np
sys.path.insert(0, {root!r})
import sac_ae_pixels as script
args = script.Args(env_id="cartpole-swingup", frame_stack=1)
script.check(args)
env = script.make_env(args)
script.fast_camera = lambda env, args: None  # as the task draws itself
original = script.make_env(args)
frames = []
for each in (env, original):
    each.reset(seed=5)
    steps = [each.step(np.float32([0.5])) for _ in range(10)]
    frames.append(steps[-1][0])
    rewards = [step[1] for step in steps]
again = env.reset(seed=5)[0]
for _ in range(10):
    again = env.step(np.float32([0.5]))[0]
length, over = 0, False
env.reset(seed=6)
while not over:
    _, _, terminated, over, _ = env.step(np.float32([0.0]))
    length += 1
plain = original.unwrapped._env.physics.render(84, 84, camera_id=0).transpose(2, 0, 1)
print(json.dumps({{
    "shape": frames[0].shape, "same": bool((again == frames[0]).all()), "length": length,
    "terminated": bool(terminated), "differing": float((frames[0] != frames[1]).any(0).mean()),
    "spread": float(frames[0].std()), "quality": [int(e.unwrapped._env.physics.model.vis.quality.shadowsize)
    for e in (env, original)], "plain": bool((plain == frames[1]).all()), "rewards": rewards}}))
"""


def test_dm_control_is_seen_as_it_draws(opengl):
    code = DM_CONTROL.format(root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["shape"] == [3, 84, 84] and seen["spread"] > 10.0
    assert seen["same"] and seen["length"] == 125 and not seen["terminated"]
    assert seen["quality"] == [512, 2048] or seen["quality"][0] == 512 < seen["quality"][1]
    assert seen["differing"] < 0.005 and seen["plain"]
    assert max(seen["rewards"]) <= 8.0


@pytest.mark.parametrize("env_id", ["cartpole-swngup", "dm_control/cartpole-swngup-v0"])
def test_an_unknown_task_is_refused_with_the_nearest(env_id, opengl, tmp_path):
    result = command("--env", env_id, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 2 and not (tmp_path / "runs").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: unknown environment {env_id.removeprefix('dm_control/').removesuffix('-v0')}")
    assert "did you mean dm_control/cartpole-swingup-v0" in line


@pytest.mark.slow
def test_a_task_of_dm_control_is_killed_and_goes_on(opengl, tmp_path):
    """As a user would: SIGKILL in mid-episode, and the end is that of a run that was left alone."""
    words = [
        "--env", "cartpole-swingup", *PENDULUM[:12], "--total-timesteps", "480", "--learning-starts", "20",
        "--eval-episodes", "1", "--eval-frequency", "480", "--checkpoint-frequency", "80", "--runs-dir", tmp_path,
    ]  # fmt: skip
    assert command(*words, "--run-name", "alone").returncode == 0
    run = [sys.executable, str(SCRIPT), *map(str, words), "--run-name", "killed", "--resume"]
    process = subprocess.Popen(run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = tmp_path / "killed" / "checkpoint.pt"
    while process.poll() is None:
        if path.exists() and torch.load(path, weights_only=True)["step"] >= 240:
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert command(*words, "--run-name", "killed", "--resume").returncode == 0
    assert not differences(outcome(tmp_path / "killed"), outcome(tmp_path / "alone"))


def test_help_shows_every_argument():
    result = command("--help")
    assert result.returncode == 0
    for name in Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout


def test_importing_the_script_draws_nothing_and_opens_nothing(tmp_path):
    code = (
        "import sys, random, numpy, torch\n"
        "before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()\n"
        "import sac_ae_pixels\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()\n"
        "assert before[1] == numpy.random.get_state()[1].tolist()\n"
        "slow = {'wandb', 'matplotlib.pyplot', 'moviepy', 'pygame', 'shimmy', 'dm_control', 'mujoco'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
