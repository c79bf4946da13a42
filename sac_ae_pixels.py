"""SAC+AE: continuous control from pixels, with an autoencoder that shares the critic's encoder.

Soft actor-critic learns from stacked camera frames; its convolutional encoder is trained by the critic's loss and by
reconstructing the frames, and never by the actor's loss.

Paper: Yarats et al., "Improving Sample Efficiency in Model-Free Reinforcement Learning from Images", 2019,
https://arxiv.org/abs/1910.01741

    python sac_ae_pixels.py --env cartpole-swingup --total-timesteps 100000 --bf16
    python sac_ae_pixels.py --env ball_in_cup-catch --random-shift 4 --capture-video
    python sac_ae_pixels.py --env walker-walk --run-name mine --resume

Docs: docs/sac_ae_pixels.md
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "tensorboard==2.21.0",
#   "pillow==11.3.0", "gymnasium==1.4.0", "moviepy==2.2.1", "dm_control==1.0.50", "mujoco==3.17.0",
#   "shimmy[dm-control]==2.0.1", "pygame==2.6.1",
# ]
# ///

from __future__ import annotations

import contextlib
import copy
import ctypes
import difflib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import PIL.Image
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ModuleNotFoundError):  # not on Windows
    import fcntl


@dataclass
class Args:
    """Arguments of one run. Steps are environment steps (an action repeated k times counts k) unless noted."""

    exp_name: str = Path(__file__).stem
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, PyTorch uses deterministic algorithms only"""
    cuda: bool = True
    """if toggled, a GPU is used if there is one"""
    track: bool = False
    """if toggled, this experiment is tracked with Weights and Biases (WANDB_MODE=offline needs no key)"""
    wandb_project_name: str = "LatentRL"
    """the wandb project's name"""
    wandb_entity: str | None = None
    """the entity (team) of the wandb project"""
    capture_video: bool = False
    """if toggled, videos of evaluation episodes are written to the run folder's videos/"""
    runs_dir: str = "runs"
    """the folder in which run folders are created"""
    run_name: str | None = None
    """the run folder's name (if left out: environment, experiment, seed and time)"""
    resume: bool = False
    """if toggled, continue the run named by --run-name: from its checkpoint, or from the start if it has none"""
    checkpoint_frequency: int = 10_000
    """steps between checkpoints"""
    eval_frequency: int = 10_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation, always with the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "cartpole-swingup"
    """the environment: a dm_control task, or any Gymnasium id with a Box action space and rgb_array rendering"""
    total_timesteps: int | None = None
    """environment steps of the run (if left out: set per environment)"""
    max_episode_steps: int | None = None
    """steps after which an episode is truncated (if left out: the environment's own limit)"""
    action_repeat: int | None = None
    """how many environment steps an action is repeated for (if left out: set per environment)"""
    image_size: int = 84
    """height and width of a frame in pixels"""
    frame_stack: int = 3
    """frames in an observation"""
    camera: int | None = None
    """the camera of a dm_control task (if left out: 0; 2 for quadruped)"""
    buffer_size: int | None = None
    """number of newest transitions (agent steps) to sample from (if left out: all of the run's)"""
    save_replay: bool = False
    """if toggled, write replay.npz for plas_pixels.py, which needs as much disk space again as the frames"""
    learning_starts: int = 1_000
    """agent steps with random actions, after which that many updates are made at once"""
    batch_size: int = 128
    """transitions per update"""
    gamma: float = 0.99
    """the discount factor gamma"""
    learning_rate: float = 1e-3
    """learning rate of the actor, the critic, the encoder and the decoder"""
    alpha_learning_rate: float = 1e-4
    """learning rate of the temperature"""
    alpha: float = 0.1
    """initial temperature"""
    tau: float = 0.01
    """target smoothing coefficient of the Q functions"""
    encoder_tau: float = 0.05
    """target smoothing coefficient of the encoder"""
    policy_frequency: int = 2
    """updates of the critic per update of the actor and the temperature"""
    target_network_frequency: int = 2
    """updates of the critic per update of the targets"""
    feature_dim: int = 50
    """size of the latent that the encoder maps an observation to"""
    num_layers: int = 4
    """convolutional layers of the encoder and of the decoder"""
    num_filters: int = 32
    """filters of each convolutional layer"""
    hidden_dim: int = 1_024
    """width of the two hidden layers of the actor and of each Q function"""
    reconstruction: bool = True
    """if toggled off, there is no autoencoder: the critic alone trains the encoder (SAC:pixel)"""
    latent_weight: float = 1e-6
    """weight of the penalty on the latent in the autoencoder's loss"""
    decoder_weight_decay: float = 1e-7
    """weight decay of the decoder"""
    random_shift: int = 0
    """pixels by which each sampled observation is shifted at random, as DrQ does with 4 (0: not at all)"""
    residual_action: bool = False
    """if toggled, the policy sees the previous action and adds it to its mean before tanh, as ResAct does"""
    bf16: bool = False
    """if toggled, networks compute in bfloat16 (weights stay float32): faster if the processor supports it"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int]] = {  # the paper's; "" applies where nothing is listed above
    "finger-spin": {"action_repeat": 2, "total_timesteps": 1_000_000},
    "walker-walk": {"action_repeat": 2, "total_timesteps": 1_000_000},
    "ball_in_cup-catch": {"action_repeat": 4, "total_timesteps": 2_000_000},
    "cartpole-swingup": {"action_repeat": 8, "total_timesteps": 2_000_000},
    "reacher-easy": {"action_repeat": 4, "total_timesteps": 2_500_000},
    "cheetah-run": {"action_repeat": 4, "total_timesteps": 3_000_000},
    **{f"quadruped-{name}": {"camera": 2} for name in ("walk", "run", "escape", "fetch")},
    "": {"action_repeat": 1, "total_timesteps": 1_000_000, "camera": 0},
}


# Environment ---------------------------------------------------------------------------------------------------------
# --- same text in both pixel scripts: the environment as a camera sees it (home: sac_ae_pixels.py; see make sync) ---
class PixelEnv(gym.Wrapper):
    """An environment as an agent with a camera sees it.

    Observations are the newest frames (3 frame_stack, H, W) uint8, with an episode's first one repeated until there
    are enough; actions are (A,) float32 in [-1, 1]. An action is repeated, its rewards are summed. `info["state"]` is
    the true state (S,): the environment's own `info["state"]`, or the observation that the picture replaces.

    An environment whose observations are pictures (H, W, 3) uint8 keeps them; others are rendered at `image_size`.
    """

    render_mode = "rgb_array"

    def __init__(self, env: gym.Env, args: Args) -> None:
        """Wrap an environment with bounded Box actions."""
        super().__init__(gym.wrappers.RepeatAction(Door(env), args.action_repeat))
        self.args, self.box, seen = args, env.action_space, env.observation_space
        self.action_dim = math.prod(self.box.shape)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,))
        self.drawn = not (isinstance(seen, gym.spaces.Box) and seen.dtype == np.uint8 and seen.shape[2:] == (3,))
        self.size = (args.image_size, args.image_size) if self.drawn else seen.shape[:2]
        self.observation_space = gym.spaces.Box(0, 255, (3 * args.frame_stack, *self.size), np.uint8)
        self.draw = fast_camera(env, args) or self.env.render
        self.video_size: tuple[int, int] | None = None
        frames_per_second = env.metadata.get("render_fps") or 30
        self.metadata = {**env.metadata, "render_fps": max(1, round(frames_per_second / args.action_repeat))}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The first observation of an episode."""
        state, info = self.env.reset(seed=seed, options=options)
        self.observation = np.concatenate([self.frame(state)] * self.args.frame_stack)
        return self.observation, self.with_state(state, info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat one action (A,) in [-1, 1]."""
        low, high = self.box.low.astype(float), self.box.high.astype(float)
        scaled = low + (high - low) * (action.astype(float).reshape(self.box.shape) + 1.0) / 2.0
        if np.issubdtype(self.box.dtype, np.integer):
            scaled = np.rint(scaled)  # a cast alone would never give the upper bound
        scaled = scaled.clip(low, high).astype(self.box.dtype)
        state, reward, terminated, truncated, info = self.env.step(scaled)
        self.observation = np.concatenate((self.observation[3:], self.frame(state)))
        return self.observation, reward, terminated, truncated, self.with_state(state, info)

    def with_state(self, state: Any, info: dict[str, Any]) -> dict[str, Any]:
        """`info` with `state`, if there is one that can be flattened to a vector."""
        space = self.env.observation_space
        return {"state": gym.spaces.flatten(space, state), **info} if space.is_np_flattenable else info

    def frame(self, state: Any) -> np.ndarray:
        """The current frame (3, H, W) uint8. Raises RunError if it is not a picture."""
        return as_picture(self.draw() if self.drawn else state, self.size).transpose(2, 0, 1)

    def render(self) -> np.ndarray:
        """A picture for a video (H, W, 3) uint8: the environment's own, or else the agent's frame, enlarged."""
        self.video_size, picture = video_picture(self.env, self.observation[-3:], self.video_size)
        return picture


def make_env(args: Args, video: bool = False) -> PixelEnv:
    """Make the environment and play a step. Raises a one-line ValueError if that is not possible.

    With `video`, `render()` gives larger pictures than the agent sees, if the environment can render them.
    """
    env = PixelEnv(open_environment(args, max(256, args.image_size) if video else args.image_size), args)
    probe(env)
    return env


# --- end of the same text ---


# Networks ------------------------------------------------------------------------------------------------------------
def feature_map_size(size: tuple[int, int], num_layers: int) -> tuple[int, int]:
    """Height and width after the convolutions: the first has stride 2, all have a kernel of 3 and no padding.

    Raises ValueError if nothing is left.
    """
    height, width = ((side - 3) // 2 + 1 - 2 * (num_layers - 1) for side in size)
    if min(height, width) < 1:
        pictures = f"pictures of {size[0]} x {size[1]} are too small for --num-layers {num_layers}"
        raise ValueError(f"{pictures}: at least {4 * num_layers - 1} pixels expected, or fewer layers")
    return height, width


def initialise(module: nn.Module) -> None:
    """Orthogonal linear layers; convolutions that are orthogonal in their centre and 0 around it; no bias."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        nn.init.orthogonal_(module.weight.data[:, :, 1, 1], nn.init.calculate_gain("relu"))


# --- same text in both pixel scripts: layers (home: sac_ae_pixels.py; see make sync) ---
class Output(nn.Linear):
    """A linear layer that computes in float32 whatever autocast says: Q values need more than bfloat16's 8 bits."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs) float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    layers = nn.Linear(inputs, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True)
    return nn.Sequential(*layers, Output(hidden, outputs))


# --- end of the same text ---


class Encoder(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] -> latent (B, D) in (-1, 1); C = 9 for three frames, D = 50.

    Features are flattened with the channels last, which needs no copy in the fast memory format.
    """

    def __init__(self, channels: int, size: tuple[int, int], args: Args) -> None:
        """Convolutions, then one linear layer, LayerNorm and tanh."""
        super().__init__()
        filters, (height, width) = args.num_filters, feature_map_size(size, args.num_layers)
        self.convs = nn.ModuleList(
            nn.Conv2d(filters if i else channels, filters, 3, stride=1 if i else 2) for i in range(args.num_layers)
        )
        self.fc = nn.Linear(filters * height * width, args.feature_dim)
        self.ln = nn.LayerNorm(args.feature_dim)

    def features(self, pixels: Tensor) -> Tensor:
        """The convolutions' output (B, F) for pixels, F = rows x columns x filters."""
        hidden = pixels
        for conv in self.convs:
            hidden = F.relu(conv(hidden), inplace=True)
        return hidden.permute(0, 2, 3, 1).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        """Features (B, F) -> latent (B, D)."""
        return torch.tanh(self.ln(self.fc(features).float()))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels -> latent."""
        return self.head(self.features(pixels))


class Decoder(nn.Module):
    """Latent (B, D) -> reconstruction (B, C, H, W), the encoder's mirror; targets are in [-0.5, 0.5)."""

    def __init__(self, channels: int, size: tuple[int, int], args: Args) -> None:
        """A linear layer, then transposed convolutions, the last one with stride 2."""
        super().__init__()
        filters, layers = args.num_filters, args.num_layers
        self.shape = filters, *feature_map_size(size, layers)
        self.fc = nn.Linear(args.feature_dim, math.prod(self.shape))
        self.deconvs = nn.ModuleList(Deconvolution(filters, filters, 3) for _ in range(layers - 1))
        # Stride 2 drops the last row or column where their number is even: the padding restores it.
        padding = [1 - side % 2 for side in size]
        self.deconvs.append(Deconvolution(filters, channels, 3, stride=2, output_padding=padding))

    def forward(self, latent: Tensor) -> Tensor:
        """The reconstruction of each latent."""
        filters, height, width = self.shape
        hidden = F.relu(self.fc(latent), inplace=True).view(-1, height, width, filters).permute(0, 3, 1, 2)
        for deconv in self.deconvs[:-1]:
            hidden = F.relu(deconv(hidden), inplace=True)
        return self.deconvs[-1](hidden)


LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


def squashed_gaussian(output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A policy head's output (B, 2A) and standard normal noise (B, A) -> action (B, A), log-probability (B,), log std.

    The change of variables by tanh costs log(1 - action^2), kept finite by 1e-6 as in the original code: a form without
    that constant differs by more than 10 where actions saturate.
    """
    mean, log_std = output.chunk(2, 1)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1.0)
    action = torch.tanh(mean + noise * log_std.exp())
    log_probability = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_probability = log_probability - torch.log(F.relu(1.0 - action.square()) + 1e-6)
    return action, log_probability.sum(1), log_std


class Actor(nn.Module):
    """The policy: its encoder has the critic's convolutions and a head of its own.

    With `--residual-action` it chooses a change to the previous action, which it also sees (Liu, Peng, Tian, "Visual
    Reinforcement Learning with Residual Action", AAAI 2025, without that paper's difference of features).
    """

    def __init__(self, channels: int, size: tuple[int, int], action_dim: int, args: Args) -> None:
        """Two hidden layers between the latent and the 2A outputs, mean and raw log standard deviation."""
        super().__init__()
        self.residual = args.residual_action
        self.encoder = Encoder(channels, size, args)
        inputs = args.feature_dim + action_dim if self.residual else args.feature_dim
        self.trunk = mlp(inputs, args.hidden_dim, 2 * action_dim)

    def forward(self, features: Tensor, previous_action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled action (B, A), log-probability (B,) and log std (B, A), from features (B, F) and the previous action.

        With zero noise, it is the mean action.
        """
        latent = self.encoder.head(features)
        if not self.residual:
            return squashed_gaussian(self.trunk(latent), noise)
        change, log_std = self.trunk(torch.cat((latent, previous_action), 1)).chunk(2, 1)
        return squashed_gaussian(torch.cat((previous_action + change, log_std), 1), noise)

    def own_parameters(self) -> list[nn.Parameter]:
        """Everything but the tied convolutions, which the actor's loss must never move."""
        return [*self.encoder.fc.parameters(), *self.encoder.ln.parameters(), *self.trunk.parameters()]


class Critic(nn.Module):
    """An encoder and two Q functions of its latent and the action."""

    def __init__(self, channels: int, size: tuple[int, int], action_dim: int, args: Args) -> None:
        """Two hidden layers in each Q function."""
        super().__init__()
        self.encoder = Encoder(channels, size, args)
        self.q1 = mlp(args.feature_dim + action_dim, args.hidden_dim, 1)
        self.q2 = mlp(args.feature_dim + action_dim, args.hidden_dim, 1)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both values (B,), from features (B, F) and actions (B, A)."""
        inputs = torch.cat((self.encoder.head(features), action), 1)
        return self.q1(inputs)[:, 0], self.q2(inputs)[:, 0]


# Replay buffer -------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions: (B, C, H, W), (B, A), (B,), (B, C, H, W), (B,) float 0 or 1; observations are uint8 or scaled.

    The previous action (B, A) is that of the step before, 0 at an episode's start.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    previous_action: Tensor


class ReplayBuffer:
    """Transitions in order, each frame stored once, as uint8 in a memory-mapped file.

    An episode of T transitions has T + 1 rows in the file: its first frame, then what was seen after each transition.
    A stack is assembled when it is sampled: frames before the episode's start are copies of its first. There is room
    even if every episode has one step; the file is sparse where nothing was written.
    """

    def __init__(self, path: Path, steps: int, window: int, size: tuple[int, int], stack: int, action_dim: int) -> None:
        """Open or make the file for `steps` transitions, the newest `window` of which are sampled.

        Raises ValueError if the file was cut short.
        """
        self.path, self.window, self.stack = path, window, stack
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        shape = 2 * steps + 1, 3, *size
        found, expected = os.fstat(self.file).st_size, math.prod(shape)
        if found not in (0, expected):
            raise ValueError(f"{path} has {found:,} bytes instead of {expected:,}")
        os.ftruncate(self.file, expected)
        self.frames = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=shape))
        self.values = torch.zeros(steps, action_dim + 2)  # action, reward, terminated
        self.rows = torch.zeros(steps, 2, dtype=torch.int64)  # of the frame after it, and of its episode's first frame
        self.size, self.row, self.first = 0, 0, 0

    def write(self, frame: np.ndarray) -> None:
        """Write a frame to the current row. A store to mapped memory would kill the process if the disk is full."""
        if os.pwrite(self.file, frame.tobytes(), self.row * frame.size) != frame.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def start_episode(self, frame: np.ndarray) -> None:
        """Begin an episode with its first frame (3, H, W)."""
        self.first = self.row = int(self.rows[self.size - 1, 0]) + 1 if self.size else 0
        self.write(frame)

    def add(self, action: np.ndarray, reward: float, terminated: bool, next_frame: np.ndarray) -> None:
        """Append one transition of the current episode."""
        self.row += 1
        self.write(next_frame)
        self.values[self.size] = torch.tensor([*action.tolist(), reward, terminated])
        self.rows[self.size] = torch.tensor([self.row, self.first])
        self.size += 1

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        index = torch.randint(max(0, self.size - self.window), self.size, (batch_size,))
        return self.gather(index, device)

    def gather(self, index: Tensor, device: torch.device) -> Batch:
        """Transitions by their index (B,) since the run's start."""
        values, (row, first) = self.values[index].to(device), self.rows[index].T[:, :, None]
        rows = torch.maximum(row + torch.arange(-self.stack, 1), first)
        frames = self.frames.index_select(0, rows.flatten()).view(len(index), -1, *self.frames.shape[2:])
        frames = frames.to(device, memory_format=torch.channels_last)  # (B, 3 (stack + 1), H, W)
        previous_action = (self.values[index - 1, :-2] * (row > first + 1)).to(device)
        return Batch(frames[:, :-3], values[:, :-2], values[:, -2], frames[:, 3:], values[:, -1], previous_action)

    def previous_action(self) -> np.ndarray:
        """The newest action (A,) of the current episode, 0 at its start."""
        return (self.values[self.size - 1, :-2] * (self.row > self.first)).numpy()

    def current_episode(self) -> tuple[np.ndarray, np.ndarray]:
        """The actions (T, A) of the episode so far, and its newest observation (C, H, W)."""
        rows = torch.arange(self.row - self.stack + 1, self.row + 1).clamp_(min=self.first)
        actions = self.values[self.size - (self.row - self.first) : self.size, :-2]
        return actions.numpy(), self.frames[rows].flatten(0, 1).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the frames, which are on the disk when this returns."""
        os.fsync(self.file)
        values, rows = self.values[: self.size].clone(), self.rows[: self.size].clone()
        return {"size": self.size, "row": self.row, "first": self.first, "values": values, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the frames in the file."""
        self.size, self.row, self.first = state["size"], state["row"], state["first"]
        self.values[: self.size] = state["values"]
        self.rows[: self.size] = state["rows"]

    def close(self, keep: bool) -> None:
        """Close the file and remove it, unless it is to be kept."""
        os.close(self.file)
        if not keep:
            self.path.unlink()


# Agent ---------------------------------------------------------------------------------------------------------------
class Noise(NamedTuple):
    """What an update draws: (B, A) and (B, A) standard normal, (B, C, H, W) uint8 uniform (None without a decoder)."""

    target: Tensor
    actor: Tensor
    dither: Tensor | None


def reconstruction_target(observation: Tensor, dither: Tensor) -> Tensor:
    """uint8 pixels reduced to 5 bits, plus `dither` (uint8) / 256 of a quantization step, in [-0.5, 0.5)."""
    levels = (observation & 248).to(torch.int16) * 32 + dither  # 256 for each of the 32 steps
    return levels.float().mul_(1.0 / 8192.0).sub_(0.5)


def random_shift(images: Tensor, pad: int, offsets: Tensor | None = None) -> Tensor:
    """Shift each image (B, C, H, W) by up to `pad` pixels, repeating its border, as DrQ does.

    `offsets` (B, 2) in 0..2 pad are drawn here if they are not given.
    """
    if offsets is None:
        offsets = torch.randint(0, 2 * pad + 1, (len(images), 2), device=images.device)
    height, width = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows = (height + offsets[:, :1] - pad).clamp_(0, len(height) - 1)  # (B, H)
    columns = (width + offsets[:, 1:] - pad).clamp_(0, len(width) - 1)  # (B, W)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # channels last


def gradient_step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of these optimizers on `loss`; only their own parameters get gradients."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward(inputs=[p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
    for optimizer in optimizers:
        optimizer.step()


class SACAE(nn.Module):
    """Networks, optimizers and the updates; an update takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, size: tuple[int, int], action_dim: int, device: torch.device) -> None:
        """Build everything for pictures of this size (height, width); `args` has no None left (see `check`)."""
        super().__init__()
        self.args, self.size, self.action_dim, self.device = args, size, action_dim, device
        channels = 3 * args.frame_stack
        self.actor = Actor(channels, size, action_dim, args)
        self.critic = Critic(channels, size, action_dim, args)
        self.decoder = Decoder(channels, size, args)
        self.apply(initialise)
        self.actor.encoder.convs = self.critic.encoder.convs  # tied: the same tensors from now on, not copies
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.to(device, memory_format=torch.channels_last)

        def adam(parameters: Iterable[nn.Parameter], learning_rate: float, **options: Any) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, learning_rate, fused=True, **options)

        rate, decay = args.learning_rate, args.decoder_weight_decay
        self.optimizers = {
            "actor": adam(self.actor.own_parameters(), rate),
            "critic": adam(self.critic.parameters(), rate),
            "alpha": adam([self.log_alpha], args.alpha_learning_rate, betas=(0.5, 0.999)),
            # The encoder has two optimizers, each with moments of its own, as in the original code.
            "encoder": adam(self.critic.encoder.parameters(), rate),
            "decoder": adam(self.decoder.parameters(), rate, weight_decay=decay),
        }
        self.encoder_pair = [list(c.encoder.parameters()) for c in (self.target_critic, self.critic)]
        self.q_pair = [[*c.q1.parameters(), *c.q2.parameters()] for c in (self.target_critic, self.critic)]

    def autocast(self) -> torch.autocast:
        """The context that networks are called in: bfloat16 with `--bf16`, else float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def scale(self, observation: Tensor) -> Tensor:
        """Pixels uint8 -> [0, 1], in the precision that the networks compute in."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return observation.to(dtype, memory_format=torch.channels_last).div_(255.0)

    @torch.inference_mode()
    def act(self, observation: np.ndarray, previous_action: np.ndarray, sample: bool = False) -> np.ndarray:
        """Actions (N, A) for observations (N, C, H, W) uint8 and previous actions: mean actions, or sampled ones."""
        draw = torch.randn if sample else torch.zeros
        noise = draw(len(observation), self.action_dim, device=self.device)
        with self.autocast():
            features = self.critic.encoder.features(self.scale(torch.from_numpy(observation).to(self.device)))
            return self.actor(features, torch.from_numpy(previous_action).to(self.device), noise)[0].cpu().numpy()

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Targets (B,) of both Q functions: reward and the next state's soft value (equations 2 and 3)."""
        with self.autocast():
            features = self.critic.encoder.features(batch.next_observation)
            action, log_probability, _ = self.actor(features, batch.action, noise)  # here, the previous action
            target_features = self.target_critic.encoder.features(batch.next_observation)
            min_q = torch.minimum(*self.target_critic(target_features, action))
        value = min_q - self.log_alpha.exp() * log_probability
        return batch.reward + self.args.gamma * (1.0 - batch.terminated) * value

    def update_critic(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """One step of the encoder and both Q functions. `batch` is scaled, `noise` (B, A) samples the next action."""
        target = self.critic_target(batch, noise)
        with self.autocast():
            q1, q2 = self.critic(self.critic.encoder.features(batch.observation), batch.action)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        gradient_step(loss, self.optimizers["critic"])
        return {"critic": loss.detach(), "q_value": q1.detach().mean()}

    def update_actor(self, features: Tensor, previous_action: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One step of the actor on detached features (B, F), then one of the temperature on the same sample."""
        with self.autocast():
            action, log_probability, log_std = self.actor(features, previous_action, noise)
            min_q = torch.minimum(*self.critic(features, action))
        alpha = self.log_alpha.exp()
        loss = (alpha.detach() * log_probability - min_q).mean()
        gradient_step(loss, self.optimizers["actor"])
        # The target entropy is -|A|: the temperature falls while the policy's entropy is above it.
        alpha_loss = (alpha * (self.action_dim - log_probability).detach()).mean()
        gradient_step(alpha_loss, self.optimizers["alpha"])
        entropy = 0.5 * self.action_dim * (1.0 + math.log(2.0 * math.pi)) + log_std.detach().sum(1).mean()
        losses = {"actor": loss, "entropy": entropy, "alpha_loss": alpha_loss, "alpha": alpha}
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target critic towards the critic, its encoder faster than its Q functions."""
        torch._foreach_lerp_(*self.q_pair, self.args.tau)
        torch._foreach_lerp_(*self.encoder_pair, self.args.encoder_tau)

    def update_reconstruction(self, features: Tensor, observation: Tensor, dither: Tensor) -> dict[str, Tensor]:
        """One step of encoder and decoder (equation 4), on the convolutions' features (B, F) of uint8 observations."""
        target = reconstruction_target(observation, dither)
        with self.autocast():
            latent = self.critic.encoder.head(features)
            reconstruction = self.decoder(latent)
        error = F.mse_loss(reconstruction.float(), target)
        penalty = 0.5 * latent.square().sum(1).mean()
        loss = error + self.args.latent_weight * penalty
        gradient_step(loss, self.optimizers["encoder"], self.optimizers["decoder"])
        losses = {"autoencoder": loss, "reconstruction": error, "latent": penalty}
        return {name: value.detach() for name, value in losses.items()}

    def draw_noise(self, batch: Batch) -> Noise:
        """The noise of one update."""
        normal = torch.randn(2, *batch.action.shape, device=self.device)
        dither = random_bytes(batch.observation.shape, self.device) if self.args.reconstruction else None
        return Noise(*normal, dither)

    def update(self, batch: Batch, actor: bool, targets: bool, noise: Noise | None = None) -> dict[str, Tensor]:
        """One update of everything, in the original's order; of actor and targets only if asked for.

        The actor, its Q functions and the autoencoder all use the critic's new convolutions, so one pass serves them.
        """
        args, images = self.args, (batch.observation, batch.next_observation)
        if args.random_shift:
            images = [random_shift(each, args.random_shift) for each in images]
        else:  # they are slices of longer stacks, which are slower to compute with than copies
            images = [each.contiguous(memory_format=torch.channels_last) for each in images]
        noise = noise or self.draw_noise(batch)
        pixels, next_pixels = map(self.scale, images)
        losses = self.update_critic(batch._replace(observation=pixels, next_observation=next_pixels), noise.target)
        if actor or args.reconstruction:
            with torch.set_grad_enabled(args.reconstruction), self.autocast():
                features = self.critic.encoder.features(pixels)
        if actor:
            losses |= self.update_actor(features.detach(), batch.previous_action, noise.actor)
        if targets:
            self.update_targets()
        if args.reconstruction:
            losses |= self.update_reconstruction(features, images[0], noise.dither)
        return losses


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(agent: SACAE, envs: Iterable[gym.Env], seed: int) -> dict[str, float]:
    """Play one episode without noise in each environment (these may be the same one), one after the other.

    Episode i always has `episode_seed(seed, i, stream=1)`; training's random streams are not touched. Gives the mean
    `episodic_return`, `return_std`, the mean `episodic_length` in agent steps, and `success_rate`: nan if no episode
    reports success; if others do, one that does not counts as a failure.
    """
    returns, lengths, successes = [], [], []
    for i, env in enumerate(envs):
        observation, _ = env.reset(seed=episode_seed(seed, i, stream=1))
        action = np.zeros(agent.action_dim, np.float32)
        rewards, done = [], False
        while not done:
            action = agent.act(observation[None], action[None])[0]
            observation, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            done = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
        successes.append(info.get("is_success"))
    metrics = {"episodic_return": np.mean(returns), "return_std": np.std(returns), "episodic_length": np.mean(lengths)}
    told = any(success is not None for success in successes)
    metrics["success_rate"] = successes.count(True) / len(successes) if told else math.nan
    return {name: float(value) for name, value in metrics.items()}


# Main ----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        check(args)
        env, evaluation_env = make_env(args), make_env(args)
        replay_size = check_disk(args, env.size)
    except ValueError as error:
        usage_error(str(error))
    with Run(args) as run:
        device = set_up_torch(args)
        keep_freed_memory()
        repeat, last_step = args.action_repeat, agent_steps(args)
        run.say(f"{run.name}: {last_step:,} agent steps, each {repeat} environment steps; {replay_size}")
        agent = SACAE(args, env.size, env.action_dim, device)
        buffer = open_buffer(run, args, env)
        recent: deque[tuple[float, int]] = deque(maxlen=10)  # return and length of the last episodes
        losses: dict[str, Tensor] = {}
        agent_step = episode = updates_due = 0
        episode_return = 0.0

        def start_episode() -> np.ndarray:
            """The first observation of the current episode, whose frame is also put into the buffer."""
            observation, _ = env.reset(seed=episode_seed(args.seed, episode))
            buffer.start_episode(observation[-3:])
            return observation

        if run.checkpoint is None:
            observation = start_episode()
        else:
            state = run.checkpoint
            with run.restoring():
                agent_step, episode, updates_due = state["agent_step"], state["episode"], state["updates_due"]
                episode_return = state["episode_return"]
                recent.extend(state["recent"])
                agent.load_state_dict(state["agent"])
                for name, optimizer in agent.optimizers.items():
                    optimizer.load_state_dict(state["optimizers"][name])
                buffer.load_state_dict(state["buffer"])
                actions, saved_observation = buffer.current_episode()
            observation = replayed(env, episode_seed(args.seed, episode), actions)
            if not np.array_equal(observation, saved_observation):
                run.say(f"warning: episode {episode} does not replay to the saved observation; going on with the next")
                episode, episode_return = episode + 1, 0.0
                observation = start_episode()

        step = agent_step * repeat
        logged = step if run.checkpoint and not updates_due else -1

        def crossed(every: int) -> bool:
            """Whether the last agent step has reached a multiple of `every` environment steps."""
            return step // every > max(step - repeat, 0) // every

        def evaluate_agent() -> None:
            metrics = evaluate(agent, itertools.repeat(evaluation_env, args.eval_episodes), args.seed)
            if args.reconstruction:
                figure = draw_reconstructions(agent, buffer, f"{args.env_id}, step {step:,}")
                run.log_figure(step, "reconstruction", figure)
            if metrics["episodic_return"] >= max([row["episodic_return"] for row in run.eval_rows], default=-math.inf):
                run.save_model("best_model.pt", model_state(agent))
            run.log_evaluation(step, metrics)  # comes last: an evaluation without its row is done again

        while True:
            last, burst = agent_step == last_step, agent_step == args.learning_starts
            mean_return, mean_length = np.mean(recent or [(math.nan, math.nan)], 0)
            actor = burst or agent_step % args.policy_frequency == 0
            targets = burst or agent_step % args.target_network_frequency == 0
            # The checkpoint counts the updates still due in this step: a signal interrupts them, a resumed run goes on.
            while updates_due and not run.signal:
                updated = agent.update(buffer.sample(args.batch_size, device), actor, targets)
                losses |= {f"losses/{name}": value for name, value in updated.items()}
                updates_due -= 1
                if burst:
                    run.progress(step, f"{updates_due:,} updates to go")
            saving = crossed(args.checkpoint_frequency) or last
            due = (crossed(args.eval_frequency) or last) and not run.evaluated(step)
            if (crossed(1_000) or saving or due or run.signal) and step != logged:
                logged = step
                charts = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
                charts |= {"charts/episodes": episode, "charts/SPS": run.steps_per_second(step)}
                run.log(step, {**losses, **charts})  # losses are read here; one that is not finite ends the run
            if due:
                run.unless_stopped(evaluate_agent)
            stopping = bool(run.signal)  # a later signal stops the run in the next step, after its checkpoint
            if saving or stopping:
                optimizers = {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()}
                run.save_checkpoint(step, {
                    "agent": agent.state_dict(), "optimizers": optimizers, "buffer": buffer.state_dict(),
                    "agent_step": agent_step, "updates_due": updates_due, "episode": episode,
                    "episode_return": episode_return, "recent": list(recent),
                })  # fmt: skip
            if stopping and not (last and run.evaluated(step)):
                run.stop()
            if last:
                break

            if agent_step < args.learning_starts:
                action = torch.rand(env.action_dim).mul_(2.0).sub_(1.0).numpy()
            else:
                action = agent.act(observation[None], buffer.previous_action()[None], sample=True)[0]
            if not np.isfinite(action).all():  # diverged: name the loss, if one is not finite already
                run.log(step, losses)
                raise RunError(f"step {step}: the policy's action is {action}; try a smaller learning rate")
            observation, reward, terminated, truncated, _ = env.step(action)
            agent_step, step = agent_step + 1, step + repeat
            buffer.add(action, reward, terminated, observation[-3:])
            episode_return += reward
            if terminated or truncated:
                recent.append((episode_return, buffer.row - buffer.first))
                episode, episode_return = episode + 1, 0.0
                observation = start_episode()
            if agent_step >= args.learning_starts:  # at first all updates of the random steps, as in the original
                updates_due = args.learning_starts if agent_step == args.learning_starts else 1
            run.progress(step, f"return {mean_return:.3f}")

        run.save_model("model.pt", model_state(agent))
        final = {"agent": agent.state_dict()}
        if args.save_replay:
            final["buffer"] = buffer.state_dict()  # with frames.bin, all that replay.npz is made of
        run.finish(step, final, *extras(run, args, agent, buffer, env, step))
        buffer.close(keep=args.save_replay and not (run.folder / "replay.npz").exists())
        score = run.eval_rows[-1]
        about = f"last evaluation: return {score['episodic_return']:.1f} ± {score['return_std']:.1f}"
        run.say(f"{about}; see {run.folder}")
    return run.folder


# Nothing below is about the algorithm: checks of the input, pictures, the run folder. -------------------------------
def check(args: Args) -> None:
    """Fill in the environment's defaults, and check all numbers. Raises a one-line ValueError."""
    args.env_id = re.sub(r"^dm_control/([a-z]\w*-[a-z]\w*)-v0$", r"\1", args.env_id)  # the short form
    for name, value in {**DEFAULTS_BY_ENVIRONMENT[""], **DEFAULTS_BY_ENVIRONMENT.get(args.env_id, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    may_be_zero = "seed", "camera", "learning_starts", "random_shift"
    least = {name: 1 for name, value in asdict(args).items() if type(value) is int and name not in may_be_zero}
    least["alpha"] = float(np.finfo(np.float32).tiny)  # its logarithm is learnt
    check_numbers(args, least, {"gamma": 1, "tau": 1, "encoder_tau": 1, "random_shift": args.image_size})
    steps = agent_steps(args)
    if args.buffer_size is None:
        args.buffer_size = steps
    if steps < args.learning_starts:
        flags = f"--total-timesteps {args.total_timesteps} are {steps} agent steps, below --learning-starts"
        raise ValueError(f"{flags} {args.learning_starts}: nothing would be learnt; raise the first or lower the other")
    # At least 4x the weights (gradients, moments), a batch of pictures and features, a row per transition.
    side, filters, hidden = args.image_size, args.num_filters, args.hidden_dim
    feature_map = max(0, side // 2 - 2 * args.num_layers) ** 2
    weights = 9 * args.num_layers * filters**2 + 4 * filters * feature_map * args.feature_dim + 5 * hidden**2
    batch = args.batch_size * side**2 * (6 * args.frame_stack + args.num_layers * filters // 4)
    needed, memory = 16 * weights + 4 * batch + 32 * steps, machine_memory()
    if needed > memory:
        sizes = f"networks, batch and replay memory need at least {1e-9 * needed:,.0f} GB"
        raise ValueError(f"{sizes}, and this machine has {1e-9 * memory:.0f} GB; choose smaller sizes")


def check_disk(args: Args, size: tuple[int, int]) -> str:
    """Say how large the replay memory will be. Raises ValueError if pictures or disk are too small for a new run."""
    feature_map_size(size, args.num_layers)
    steps, folder = agent_steps(args), Path(args.runs_dir).absolute()
    gigabytes = 3e-9 * math.prod(size) * steps
    about = f"replay memory of {steps:,} frames of {size[0]}x{size[1]}: {gigabytes:,.2f} GB"
    if args.save_replay:
        about += ", and as much for replay.npz"
    with contextlib.suppress(OSError):  # `Run` says what is wrong with the folder
        begun = args.resume and (folder / re.sub(r"[/\\:]", "-", str(args.run_name))).exists()
        folder = next(path for path in (folder, *folder.parents) if path.exists())
        free = 1e-9 * shutil.disk_usage(folder).free
        needed = 1.01 * gigabytes * (1 + args.save_replay)  # an episode has one more frame than steps
        if not begun and needed > free:
            hint = "lower --total-timesteps or --image-size, leave out --save-replay, or choose another --runs-dir"
            raise ValueError(f"{about}, but {folder} has {free:.2f} GB left; {hint}")
    return f"{about} on the disk"


def agent_steps(args: Args) -> int:
    """Agent steps of the run, the last one begun within `total_timesteps`."""
    return math.ceil(args.total_timesteps / args.action_repeat)


def open_buffer(run: Run, args: Args, env: PixelEnv) -> ReplayBuffer:
    """The replay memory of a run. Exits 2 if a resumed run has lost it."""
    path = run.folder / "frames.bin"
    try:
        if run.checkpoint and not (path.exists() and path.stat().st_size):
            raise ValueError(f"{path} is missing")
        return ReplayBuffer(path, agent_steps(args), args.buffer_size, env.size, args.frame_stack, env.action_dim)
    except ValueError as error:
        usage_error(f"{error}; it holds the replay memory: restore it, or start with another --run-name")


def replayed(env: PixelEnv, seed: int, actions: np.ndarray) -> np.ndarray | None:
    """The observation after these actions in the episode with this seed; None if it ends earlier."""
    observation, _ = env.reset(seed=seed)
    for action in actions:
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            return None
    return observation


def model_state(agent: SACAE) -> dict[str, Any]:
    """What is needed to play and reconstruct: weights, and the sizes to rebuild `SACAE` with."""
    networks = {name: getattr(agent, name).state_dict() for name in ("actor", "critic", "decoder")}
    return {**networks, "size": list(agent.size), "action_dim": agent.action_dim}


def extras(
    run: Run, args: Args, agent: SACAE, buffer: ReplayBuffer, env: PixelEnv, step: int
) -> list[Callable[[], None]]:
    """What is made after training, in this order."""

    def learning_curve() -> None:
        run.log_figure(step, "learning_curve", draw_learning_curve(run.eval_rows, run.name))

    def videos() -> None:
        if args.capture_video:
            run.log_videos(step, record_videos(agent, args, run.folder / "videos", step))

    def replay() -> None:
        path = run.folder / "replay.npz"
        if args.save_replay and not path.exists():
            save_episodes(buffer, path, args, env.spec.id)

    return [learning_curve, videos, replay]


def save_episodes(buffer: ReplayBuffer, path: Path, args: Args, env_id: str) -> None:
    """Write all transitions to an npz file as plas_pixels.py reads them.

    As in V-D4RL, an episode of T transitions has T + 1 rows, and row t holds the picture (H, W, 3) and what led to
    it: the action and the reward of the whole action repeat. `is_terminal` is true where the task ended, not
    where the time limit or the run did.
    """
    rows = buffer.rows[: buffer.size, 0].numpy()
    count = rows[-1] + 1
    values, is_first = np.zeros((count, buffer.values.shape[1]), np.float32), np.ones(count, bool)
    values[rows], is_first[rows] = buffer.values[: buffer.size].numpy(), False
    columns = {
        "image": buffer.frames.numpy()[:count].transpose(0, 2, 3, 1), "action": values[:, :-2],
        "reward": values[:, -2], "is_first": is_first, "is_last": np.roll(is_first, -1),
        "is_terminal": values[:, -1] > 0.0, "action_repeat": args.action_repeat, "frame_stack": buffer.stack,
        "camera": args.camera, "env_id": env_id,
    }  # fmt: skip
    write_atomically(path, lambda file: np.savez(file, **columns))


def record_videos(agent: SACAE, args: Args, folder: Path, step: int) -> list[Path]:
    """Write mp4 videos of the first three evaluation episodes and return their paths."""
    recorder = gym.wrappers.RecordVideo(
        make_env(args, video=True), str(folder), episode_trigger=lambda _: True, name_prefix=f"step{step}"
    )
    evaluate(agent, itertools.repeat(recorder, 3), args.seed)
    recorder.close()
    return sorted(folder.glob(f"step{step}-*.mp4"))


def draw_reconstructions(agent: SACAE, buffer: ReplayBuffer, title: str) -> Figure:
    """The newest frame of six of the last 500 observations above what the autoencoder makes of it."""
    index = torch.linspace(max(0, buffer.size - 500), buffer.size - 1, 6).long()
    observations = buffer.gather(index, agent.device).observation
    figure = Figure(figsize=(1.5 * len(observations) + 1.0, 3.5), layout="constrained")  # no pyplot, no global state
    axes = figure.subplots(subplot_kw={"title": title})
    with torch.inference_mode(), agent.autocast():
        reconstruction = agent.decoder(agent.critic.encoder(agent.scale(observations))).float() + 0.5
    rows = [each[:, -3:].cpu().numpy() for each in (observations / 255.0, reconstruction.clamp(0.0, 1.0))]
    height, width = observations.shape[2:]
    axes.imshow(np.vstack([np.hstack(row.transpose(0, 2, 3, 1)) for row in rows]), interpolation="nearest")
    axes.set(yticks=[height / 2, height * 3 / 2], yticklabels=["observation", "reconstruction"])
    axes.set(xticks=width * np.arange(1, len(observations)) - 0.5, xticklabels=[])
    axes.grid(axis="x", color="black")  # between the pictures
    return figure


def draw_learning_curve(rows: list[dict[str, float]], title: str) -> Figure:
    """Evaluation return, with its deviation over episodes, over environment steps."""
    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes = figure.subplots(subplot_kw={"title": title})
    steps, mean, std = (np.array([row[name] for row in rows]) for name in ("step", "episodic_return", "return_std"))
    axes.plot(steps, mean, marker=".")
    axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="evaluation return")
    axes.locator_params(axis="x", nbins=5)  # so that numbers of six digits do not touch
    axes.grid(alpha=0.3)
    return figure


class BiasGradient(torch.autograd.Function):
    """Passes an output (B, C, H, W) on, and the sum of its gradient to the bias (C,), which it includes already."""

    @staticmethod
    def forward(context: Any, output: Tensor, bias: Tensor) -> Tensor:
        """The output itself, so that nothing is copied."""
        context.mark_dirty(output)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of output and bias."""
        return gradient, gradient.sum((0, 2, 3))


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution without oneDNN's bias gradient, which takes a third of its backward pass on CPUs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W'), as in PyTorch's own layer."""
        bias, padding = self.bias.detach(), self.output_padding
        output = F.conv_transpose2d(inputs, self.weight, bias, self.stride, output_padding=padding)
        return BiasGradient.apply(output, self.bias)


def random_bytes(shape: torch.Size, device: torch.device) -> Tensor:
    """Uniform uint8 with the channels (dimension 1) last in memory; eight bytes per draw save 4 % of an update."""
    batch, channels, height, width = shape
    draws = torch.empty(math.ceil(shape.numel() / 8), dtype=torch.int64, device=device).random_(-(2**63), None)
    return draws.view(torch.uint8)[: shape.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)


# --- same text in the scripts that act: door (home: hyar_td3.py; see make sync) ---
class Door(gym.Wrapper):
    """Ensures what an environment should return: finite float rewards, success under one name, episodes that end.

    Raises RunError, with the reset seed of the episode, where that is impossible.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of an episode, and its info."""
        self.steps, self.where = 0, f"in the episode with reset seed {seed}"
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; at an episode's last, `info` has `is_success` if the environment reports success in any form."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        reward = np.asarray(reward, np.float64)
        if reward.size != 1 or not abs(reward.item()) < 3.4e38:  # rejects nan, too; 3.4e38 is float32's limit
            raise RunError(f"reward {reward} is not a finite number in float32, {self.where}")
        if self.steps == 100_000 and not (terminated or truncated):
            raise RunError(f"100,000 steps without an end, {self.where}; try --max-episode-steps 1000")
        success = info.get("is_success", info.get("success"))
        if success is not None:
            info = {**info, "is_success": bool(np.asarray(success).all())}
        return observation, reward.item(), bool(terminated), bool(truncated), info


# --- end of the same text ---


# --- same text in both pixel scripts: drawing (home: sac_ae_pixels.py; see make sync) ---
INSTALL_OPENGL = "install it (Debian: apt-get install libegl1 libgl1-mesa-dri)"
UNBOUNDED = 1e6  # bounds beyond this, such as inf or float32's largest number, count as none


def choose_opengl() -> str | None:
    """Tell MuJoCo how to render without a display: EGL, else OSMesa. None if neither is there; only Linux needs one.

    Must come before MuJoCo is imported. If MUJOCO_GL is set already, it is left as it is.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without looking for a display
    # Software OpenGL would use all cores for each picture, and compete with the networks for them.
    os.environ.setdefault("LP_NUM_THREADS", str(torch.get_num_threads()))
    for name, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        if "MUJOCO_GL" not in os.environ:
            with contextlib.suppress(OSError):
                ctypes.CDLL(library)
                os.environ["MUJOCO_GL"] = name
    return os.environ.get("MUJOCO_GL")


def open_environment(args: Args, size: int) -> gym.Env:
    """The environment, which renders pictures of `size` if that can be set. Raises a one-line ValueError."""
    opengl, env_id, options = choose_opengl(), args.env_id, {}
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that --env mine:Name-v0 finds the user's mine.py
    task = re.fullmatch(r"[a-z]\w*-(?!v\d+$)[a-z]\w*", env_id)
    if task or env_id.startswith("dm_control/"):
        if opengl is None and sys.platform == "linux":
            raise ValueError(f"{env_id} needs OpenGL, and neither EGL nor OSMesa is here; {INSTALL_OPENGL}")
        try:
            import shimmy  # noqa: F401  (registers dm_control's tasks)
        except Exception as error:  # it is missing, or an OpenGL library is broken
            missing = isinstance(error, ImportError) and "GL" not in str(error)
            hint = "try pip install 'shimmy[dm-control]'" if missing else f"{INSTALL_OPENGL}, or set MUJOCO_GL=osmesa"
            raise ValueError(f"{env_id} needs dm_control ({type(error).__name__}: {error}); {hint}") from None
        env_id = f"dm_control/{env_id}-v0" if task else env_id
        options = {"render_kwargs": {"width": size, "height": size, "camera_id": args.camera}}
    try:
        # Unlike Gymnasium's checker, `probe` says in one line what does not fit.
        options |= {"render_mode": "rgb_array", "disable_env_checker": True}
        env = gym.make(env_id, max_episode_steps=args.max_episode_steps, **options)
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(env_id, gym.registry)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like cartpole-swingup or package:Name-v0"
        reason = str(error).partition(" Did you mean")[0].rstrip(".")
        raise ValueError(f"unknown environment {args.env_id} ({reason}); {hint}") from None
    except Exception as error:  # whatever a third-party environment raises, it concerns this id
        raise ValueError(f"could not make {args.env_id}: {type(error).__name__}: {error}") from None
    box = env.action_space
    bounded = isinstance(box, gym.spaces.Box) and (np.abs([box.low, box.high]) < UNBOUNDED).all()
    if not bounded or not math.prod(box.shape):
        expected = f"expected a Box action space with bounds below {UNBOUNDED:g}"
        raise ValueError(f"{expected}, but {args.env_id} has {box}")
    return env


def probe(env: PixelEnv) -> None:
    """Play a step, before anything is created for a run. Raises a one-line ValueError if that is not possible."""
    try:
        env.reset(seed=0)
        env.step(np.zeros(env.action_dim, np.float32))
    except Exception as error:
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        hint = f"; {INSTALL_OPENGL}" if "GL" in reason else ""
        raise ValueError(f"{env.args.env_id} cannot be drawn and played: {reason}{hint}") from None


def as_picture(image: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """A copy of a picture (H, W, 3) uint8, in `size` (height, width) if given. Raises RunError if it is not one."""
    found = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RunError(f"expected a picture (height, width, 3) uint8, got {found}")
    height, width = size or image.shape[:2]
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR))


def video_picture(env: gym.Env, seen: np.ndarray, size: tuple[int, int] | None) -> tuple[tuple[int, int], np.ndarray]:
    """The size of a video, set by its first picture, and a picture (height, width, 3) uint8 of that size.

    The picture is the environment's own, or `seen` (3, H, W) if it observes pictures and cannot render others.
    """
    picture = seen.transpose(1, 2, 0)
    if env.render_mode == "rgb_array":
        with contextlib.suppress(Exception):
            picture = as_picture(env.render())
    if size is None:
        times = math.ceil(256 / min(picture.shape[:2]))
        size = picture.shape[0] * times, picture.shape[1] * times
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, picture.shape[:2], strict=True))
    return size, picture[rows][:, columns]  # nearest neighbour, so that enlarged pictures stay sharp


def fast_camera(env: gym.Env, args: Args) -> Callable[[], np.ndarray] | None:
    """A function that renders a dm_control task as (S, S, 3), valid until its next call; None for other environments.

    It uses dm_control directly, which lets it keep a camera. With software OpenGL, most of the time goes into the
    shadow map and into an off-screen buffer that is larger than the picture. Both can be changed until the first
    picture is rendered; the buffer's size changes no pixel.
    """
    task, size, camera, drawn = env.unwrapped, args.image_size, None, None
    if type(task).__name__ != "DmControlCompatibilityV0":
        return None
    env.metadata = {**env.metadata, "render_fps": 1.0 / task.control_timestep()}
    has_cameras = any(len(space.shape) == 3 for space in env.observation_space.spaces.values())  # rendered at each step

    def draw() -> np.ndarray:
        nonlocal camera, drawn
        if drawn is not task.physics:  # some tasks make a new one for each episode
            from dm_control.mujoco.engine import Camera

            drawn, width = task.physics, task.render_kwargs.get("width", size)
            quality, buffer = drawn.model.vis.quality, drawn.model.vis.global_
            if not has_cameras:
                quality.shadowsize = min(512, quality.shadowsize)
                buffer.offwidth = buffer.offheight = width
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, width)
            camera = Camera(drawn, size, size, args.camera)
        return camera.render()

    return draw


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors' memory, up to 32 MiB each (its limit) and 2 GiB in all; no effect on other systems.

    Otherwise it returns a batch's memory to the system and gets it again, page by page, several times per update.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# --- end of the same text ---


# --- same text in every script: run block (home: hyar_td3.py; see make sync) ---
class RunError(ValueError):
    """Ends a run with one line instead of a traceback: its text is for the user."""


def usage_error(message: str) -> NoReturn:
    """Print one line about a user's mistake and exit with status 2; called before anything is created."""
    print("error:", *message.split(), file=sys.stderr)  # messages of other packages may have several lines
    raise SystemExit(2)


def check_numbers(args: Args, least: dict[str, float], most: dict[str, float]) -> None:
    """Raise ValueError for a number outside its bounds (at least 0 if `least` has none) or float32's range."""
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            limit = 2**63 - 1 if type(value) is int else float(np.finfo(np.float32).max)
            low, high = least.get(name, 0), most.get(name, limit)
            if not low <= value <= high:  # rejects nan, too
                bound = f"at most {high}" if value > high else f"at least {low}"
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number of {bound}")


def machine_memory() -> float:
    """The machine's memory in bytes; infinite on a system that does not report it, such as Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def set_up_torch(args: Args) -> torch.device:
    """Seed PyTorch, make it deterministic, and choose the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads uninitialized memory
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer down many times over
    return torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")


def episode_seed(seed: int, index: int, stream: int = 0) -> int:
    """The reset seed of one episode: a pure function, so that each can be replayed alone (stream 1: evaluation)."""
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary file, flush it to the disk, rename it: a reader sees the old file or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Run:
    """The run folder, what is written into it, and the signals that end a run. Use it in a `with` statement."""

    def __init__(self, args: Args) -> None:
        """Create `{runs_dir}/{run_name}`, or load its checkpoint with `--resume`. Exits 2 if that is not possible."""
        if args.resume and not args.run_name:
            usage_error("--resume needs the --run-name of the run to continue")
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.name = re.sub(r"[/\\:]", "-", name)
        if self.name in (".", "..") or not self.name.isprintable() or len(os.fsencode(self.name)) > 200:
            usage_error(f"--run-name {name[:50]!r}: expected a plain folder name of at most 200 bytes")
        self.settings = {k: v for k, v in asdict(args).items() if k not in ("resume", "runs_dir", "run_name")}
        self.eval_rows: list[dict[str, float]] = []
        self.signal, self.signal_time, self.at_once, self.wandb, self.checkpoint = 0, 0.0, False, None, None
        self.folder = Path(args.runs_dir) / self.name
        try:
            while not args.run_name and self.folder.exists():
                self.name += "_"  # another run began in the same second
                self.folder = Path(args.runs_dir) / self.name
            found = {path.name for path in self.folder.iterdir()} if args.resume and self.folder.exists() else set()
            if found and not found & {"args.json", "args.json.tmp", "checkpoint.pt", "lock"}:
                usage_error(f"{self.folder} exists but is not a run folder; choose another --run-name")
            self.folder.mkdir(parents=True, exist_ok=args.resume)
            self.take_lock()
            if args.resume:
                self.load_checkpoint()
            step = self.checkpoint["step"] if self.checkpoint else 0
            if not self.checkpoint:
                self.describe()
            # What a killed run wrote after its last checkpoint is purged: it is written again.
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if self.checkpoint else 0)
            if args.track:
                self.start_wandb(args)
        except FileExistsError:
            usage_error(f"{self.folder} exists; add --resume to continue it, or choose another --run-name")
        except (OSError, RecursionError) as error:  # a full or read-only disk, somebody else's folder, deep nesting
            reason = getattr(error, "strerror", None) or error
            usage_error(f"cannot use {self.folder}: {reason}; choose another --runs-dir")
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())
        self.started = self.shown = self.window_time = time.monotonic()
        self.window_step = step
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        self.unraisable_hook, sys.unraisablehook = sys.unraisablehook, self.on_unraisable
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print ± must not end a run

    def take_lock(self) -> None:
        """Keep other processes out of the run folder while this one lives. Exits 2 if one is there already."""
        self.lock = open(self.folder / "lock", "ab")  # noqa: SIM115  (open until the run is closed)
        try:  # not flock, which children inherit: one that outlives this process would keep the lock
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            usage_error(f"{self.folder} is in use by another process; end it first, or choose another --run-name")
        except (NameError, OSError) as error:  # Windows has no fcntl, some file systems have no locks
            print(f"warning: {self.folder} cannot be locked ({error}); do not start another run in it", file=sys.stderr)

    def describe(self) -> None:
        """Write `args.json` (arguments, command, commit, packages) and a copy of the script."""
        commit = None
        with contextlib.suppress(OSError):  # no git here
            git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
        packages = {package.name: package.version for package in importlib.metadata.distributions()}
        about = {"script": Path(__file__).stem, "arguments": self.settings, "command": sys.argv, "commit": commit}
        about |= {"python": sys.version.split()[0], "packages": packages}
        write_atomically(self.folder / "args.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        shutil.copy(__file__, self.folder / Path(__file__).name)

    def start_wandb(self, args: Args) -> None:
        """Track the run. Exits 2 if that is not possible; the folder stays, since it may hold an earlier run."""
        try:
            import wandb

            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, name=self.name, id=self.name,
                resume="allow", config=self.settings, dir=str(self.folder), save_code=True,
            )  # fmt: skip
        except ModuleNotFoundError:
            usage_error("--track needs wandb; try pip install wandb, or leave it out")
        except Exception as error:  # no key, a bad name, no network
            cure = "run `wandb login`" if "key" in str(error) or "log in" in str(error) else "change what it names"
            usage_error(f"wandb: {error}; {cure}, or set WANDB_MODE=offline, and add --run-name {self.name} --resume")
        wandb.define_metric("*", step_metric="global_step")
        self.wandb = wandb

    def on_signal(self, number: int, _: Any) -> None:
        """Remember the signal: the loop saves and stops after its current step. A second one ends the run at once."""
        now = time.monotonic()
        if self.signal and now - self.signal_time > 1.0:  # `timeout` sends its one signal twice
            os._exit(128 + number)
        self.signal, self.signal_time = self.signal or number, self.signal_time or now
        if self.at_once:
            raise KeyboardInterrupt

    def on_unraisable(self, what: Any) -> None:
        """Python swallows what is raised in a destructor: if it was a signal's interrupt, send the signal again."""
        if what.exc_type is KeyboardInterrupt and self.signal:
            threading.Timer(0.01, lambda: self.at_once and os.kill(os.getpid(), self.signal)).start()
        else:
            self.unraisable_hook(what)

    def unless_stopped(self, work: Callable[[], Any]) -> None:
        """Do `work`, which a signal ends at once: a resumed run does it again."""
        try:
            self.at_once = True
            if not self.signal:
                work()
        except KeyboardInterrupt:
            pass
        finally:
            self.at_once = False

    def say(self, text: str) -> None:
        """Print a line. A closed pipe (`| head`) stops the run as SIGTERM does."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            self.signal = self.signal or signal.SIGTERM

    def progress(self, step: int, text: str) -> None:
        """Move the bar; without a terminal, print a line every 10 seconds."""
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if now - self.shown > 10.0:
            self.shown = now
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.disable:
                self.say(f"{self.name}: step {step:,} of {self.bar.total:,}, {now - self.started:.0f} s, {text}")

    def steps_per_second(self, step: int) -> float:
        """Steps per second since the last call."""
        then, self.window_time = self.window_time, time.monotonic()
        steps, self.window_step = step - self.window_step, step
        return steps / max(self.window_time - then, 1e-9)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write scalars to TensorBoard and wandb. Raises RunError for a loss that is not finite."""
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                raise RunError(f"step {step}: {name} is {value}; try a smaller learning rate")
            self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({**metrics, "global_step": step})

    def evaluated(self, step: int) -> bool:
        """Whether this step has been evaluated; an interrupted evaluation does not count."""
        return any(row["step"] == step for row in self.eval_rows)

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log an evaluation and write `eval.csv` (without clock times, so that equal runs write equal files)."""
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.eval_rows.append({"step": step, **metrics})
        self.write_evaluations()

    def write_evaluations(self) -> None:
        """Write all evaluations so far to `eval.csv`."""
        rows = [row.values() for row in self.eval_rows]
        lines = [",".join(map(str, row)) + "\n" for row in [list(*self.eval_rows[:1]), *rows]]
        write_atomically(self.folder / "eval.csv", lambda file: file.write("".join(lines).encode()))

    def log_figure(self, step: int, name: str, figure: Figure) -> None:
        """Write a matplotlib figure to `{name}.png` in the run folder, TensorBoard and wandb (as images/{name})."""
        path = self.folder / f"{name}.png"
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
        self.writer.add_figure(f"images/{name}", figure, step)
        if self.wandb:
            self.wandb.log({f"images/{name}": self.wandb.Image(str(path)), "global_step": step})

    def log_videos(self, step: int, paths: list[Path]) -> None:
        """Also show videos of the run folder in wandb."""
        if self.wandb and paths:
            videos = [self.wandb.Video(str(path), format="mp4") for path in paths]
            self.wandb.log({"videos/evaluation": videos, "global_step": step})

    def save_model(self, name: str, state: dict[str, Any]) -> None:
        """Write only the weights, and the arguments from which the agent can be rebuilt."""
        content = {**state, "arguments": json.dumps(self.settings)}
        write_atomically(self.folder / name, lambda file: torch.save(content, file))

    def save_checkpoint(self, step: int, state: dict[str, Any], finished: bool = False) -> None:
        """Write `state` (tensors, numbers and strings only) and this block's own state to `checkpoint.pt`."""
        own = {
            "script": Path(__file__).stem, "arguments": json.dumps(self.settings), "step": step,
            "eval_rows": self.eval_rows, "finished": finished, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }  # fmt: skip
        path = self.folder / "checkpoint.pt"
        try:
            write_atomically(path, lambda file: torch.save({**own, **state}, file))
        except (OSError, RuntimeError) as error:  # the disk is full: the previous checkpoint is still intact
            raise RunError(f"step {step}: cannot write {path} ({error})") from None

    def load_checkpoint(self) -> None:
        """Read the folder's checkpoint, if there is one. Exits 2 if it is of another script or other arguments."""
        path, about = self.folder / "checkpoint.pt", self.folder / "args.json"
        finished = False
        try:
            if path.exists():
                if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
                    raise ValueError(damaged)
                self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                script, arguments = self.checkpoint["script"], dict(json.loads(self.checkpoint["arguments"]))
                self.eval_rows, finished, _ = (self.checkpoint[name] for name in ("eval_rows", "finished", "step"))
            elif about.exists():
                recorded = json.loads(about.read_text())
                script, arguments = recorded["script"], dict(recorded["arguments"])
            else:
                return  # killed before anything was written
        except Exception as error:  # a damaged file may raise nearly anything
            self.refuse_damaged(path if path.exists() else about, error)
        if script != Path(__file__).stem:
            usage_error(f"{self.folder} is a run of {script}.py; choose another --run-name for {Path(__file__).name}")
        changed = [k for k in {**arguments, **self.settings} if arguments.get(k) != self.settings.get(k)]
        if changed:
            listed = ", ".join(f"{k} was {arguments.get(k)}, now {self.settings.get(k)}" for k in changed)
            usage_error(f"--resume with changed arguments: {listed}; repeat the old ones, or choose another --run-name")
        if finished:
            print(f"{self.folder} is finished")
            raise SystemExit(0)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Any error in here is the checkpoint's fault: exits 2 with one line. Restores the random state."""
        try:
            yield
            torch.set_rng_state(self.checkpoint["torch_rng"])
            if self.checkpoint["cuda_rng"] is not None and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(self.checkpoint["cuda_rng"])
            self.write_evaluations()  # a killed run may have written more rows
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self.refuse_damaged(self.folder / "checkpoint.pt", error)

    def refuse_damaged(self, path: Path, error: Exception) -> NoReturn:
        """Exit 2: a file in the run folder is not as it was written."""
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        usage_error(f"{path} is damaged ({reason}); restore a copy, or start again with another --run-name")

    def stop(self) -> NoReturn:
        """End the run after a signal, with the status that a shell gives it (143 or 130)."""
        self.bar.close()
        print(f"stopped by signal {self.signal}; continue with --run-name {self.name} --resume", file=sys.stderr)
        raise SystemExit(128 + self.signal)

    def finish(self, step: int, state: dict[str, Any], *extras: Callable[[], Any]) -> None:
        """Do what comes after training, and mark the checkpoint as finished.

        If one of `extras` fails, that is a warning: training is done. A signal stops them; a resumed run begins here.
        """
        for extra in extras:
            try:
                self.unless_stopped(extra)
            except Exception as error:
                self.say(f"warning: {extra.__name__} failed ({type(error).__name__}: {error}); the models are saved")
            if self.signal:
                self.stop()
        self.save_checkpoint(step, state, finished=True)

    def __enter__(self) -> Run:
        """The run itself."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Close everything and restore the signal handlers. A RunError or a full disk ends in one line and status 1."""
        self.bar.close()
        with contextlib.suppress(OSError):  # the disk is full: what could not be written is lost here
            self.writer.close()
        if self.wandb:
            self.wandb.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self.unraisable_hook
        self.lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            error = RunError(f"cannot write to {self.folder}: {error.strerror}")
        if isinstance(error, RunError):
            path = self.folder / "checkpoint.pt"
            last = f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
            print("error:", *f"{error}; {last}".split(), file=sys.stderr)
            raise SystemExit(1) from None


# --- end of the same text ---


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:  # before there was a run to save
        raise SystemExit(130) from None
