"""PLAS from pixels: offline reinforcement learning with a policy in the latent action space of a VAE.

A VAE of the dataset's actions keeps the policy close to the data. One encoder turns pictures into features for the
critics, the VAE and the policy; `--encoder-signal` sets the losses that train it, which matters a lot (see the docs).
`--policy argmax` takes the best of several sampled actions instead (BCQ without perturbation, EMaQ).

Papers: Zhou et al., "PLAS: Latent Action Space for Offline Reinforcement Learning", CoRL 2020,
https://arxiv.org/abs/2011.07213; Fujimoto et al., "Off-Policy Deep Reinforcement Learning without Exploration",
ICML 2019, https://arxiv.org/abs/1812.02900

    python plas_pixels.py --dataset medium --encoder-signal both
    python plas_pixels.py --dataset medium --encoder-signal critic --policy argmax
    python plas_pixels.py --env dm_control/cartpole-swingup-v0 --dataset data/cartpole --collect random

Docs: docs/plas_pixels.md
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
import hashlib
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
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn

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

with contextlib.suppress(ModuleNotFoundError):  # a copy of this file alone still runs on any other environment
    import envs  # noqa: F401  (registers DotHazard-v0)

with contextlib.suppress(ModuleNotFoundError):  # not on Windows
    import fcntl


@dataclass
class Args:
    """Arguments of one run."""

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
    checkpoint_frequency: int = 2_000
    """steps between checkpoints"""
    eval_frequency: int = 2_000
    """steps between evaluations"""
    eval_episodes: int = 20
    """episodes per evaluation, always with the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "DotHazard-v0"
    """the dataset's environment, for evaluation: it needs a Box action space, and to observe pictures or render them"""
    dataset: str = "medium"
    """an npz file, a folder of them, or a folder of npy files (read from disk); DotHazard-v0: random, medium, expert"""
    collect: str | None = None
    """random: collect --dataset with random actions if it is missing (benchmark/plas_data.py has better policies)"""
    collect_steps: int = 15_000
    """transitions to collect (agent steps: an action that is repeated counts once)"""
    total_timesteps: int = 10_000
    """gradient steps"""
    max_episode_steps: int | None = None
    """steps after which an episode is truncated (if left out: the environment's own limit)"""
    encoder_signal: str = "both"
    """what trains the encoder: critic, vae, both, separate (an encoder each), reconstruction (of pictures) or none"""
    policy: Literal["latent", "argmax"] = "latent"
    """a policy in the VAE's latent space (PLAS), or the best of several sampled actions (BCQ without perturbation)"""
    learning_rate: float = 1e-3
    """learning rate of the encoder, the critics and the VAE"""
    gamma: float | None = None
    """the discount factor gamma (if left out: set per environment)"""
    tau: float = 0.005
    """target smoothing coefficient"""
    batch_size: int | None = None
    """batch size (if left out: set per environment)"""
    soft_minimum: float = 0.75
    """weight of the smaller of the two target values; the larger one gets the rest (BCQ's lambda)"""
    max_latent_action: float = 2.0
    """bound of the latent policy's z (PLAS, section 4)"""
    candidates: int = 10
    """actions sampled for each next state with --policy argmax"""
    kl_weight: float = 0.5
    """weight of the VAE's KL divergence (mean over batch and dimensions) relative to the actions' squared error"""
    pretrain_steps: int = 0
    """initial gradient steps, which train the VAE (and its encoder, if its loss does) but neither critics nor policy"""
    image_size: int = 64
    """height and width of rendered pictures; observations that are pictures already keep their size"""
    camera: int | None = None
    """the camera of dm_control (if left out: 0; quadruped 2)"""
    action_repeat: int | None = None
    """environment steps for which an action is repeated (if left out: set per environment)"""
    frame_stack: int | None = None
    """number of newest pictures in an observation (if left out: set per environment)"""
    random_shift: int | None = None
    """largest random shift of pictures in training, in pixels (if left out: set per environment)"""
    num_layers: int | None = None
    """convolutions of the encoder (if left out: set per environment)"""
    num_filters: int | None = None
    """filters of each convolution (if left out: set per environment)"""
    feature_dim: int = 50
    """size of the encoder's output"""
    hidden_dim: int = 256
    """width of the two hidden layers of critics, VAE and policy"""
    layer_norm: bool = False
    """if toggled, LayerNorm follows each hidden layer of critics and VAE (ReBRAC, https://arxiv.org/abs/2305.09836)"""
    bf16: bool = False
    """if toggled, networks compute in bfloat16 (weights, losses and optimizers stay in float32)"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int | float]] = {  # "" applies where nothing is listed above
    "DotHazard": {
        "gamma": 0.9, "batch_size": 64, "action_repeat": 1, "frame_stack": 1, "random_shift": 0,
        "num_layers": 2, "num_filters": 16,
    },
    # As in SAC+AE's paper, the usual comparison on these tasks.
    "dm_control/cartpole": {"action_repeat": 8},
    **{f"dm_control/{name}": {"action_repeat": 4} for name in ("reacher", "cheetah", "ball_in_cup")},
    "dm_control/quadruped": {"camera": 2},
    "": {
        "gamma": 0.99, "batch_size": 128, "action_repeat": 2, "frame_stack": 3, "random_shift": 4,
        "num_layers": 4, "num_filters": 32, "camera": 0,
    },
}  # fmt: skip

SIGNALS: dict[str, frozenset[str]] = {  # the losses whose gradient reaches an encoder
    "critic": frozenset({"critic"}),  # DrQ+BC's choice
    "vae": frozenset({"vae"}),
    "both": frozenset({"critic", "vae"}),
    "separate": frozenset({"critic", "vae"}),
    "reconstruction": frozenset({"reconstruction"}),
    "none": frozenset(),
}


# Environment ---------------------------------------------------------------------------------------------------------
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
    """Pictures (B, C, H, W) uint8 -> features (B, F) in (-1, 1): SAC+AE's encoder, on centred pixels."""

    def __init__(self, channels: int, size: tuple[int, int], layers: int, filters: int, feature_dim: int) -> None:
        """3 x 3 convolutions, the first with stride 2. Raises ValueError if `size` is too small for the layers."""
        super().__init__()
        self.map = [(side - 3) // 2 + 1 - 2 * (layers - 1) for side in size]
        if min(self.map) < 1:
            raise ValueError(f"pictures of {size[0]} x {size[1]} are too small for --num-layers {layers}; take fewer")
        self.convs = nn.ModuleList([nn.Conv2d(channels, filters, 3, stride=2)])
        self.convs.extend(nn.Conv2d(filters, filters, 3) for _ in range(layers - 1))
        self.fc = nn.Linear(filters * math.prod(self.map), feature_dim)
        self.ln = nn.LayerNorm(feature_dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        """The features."""
        hidden = pictures / 255.0 - 0.5
        for conv in self.convs:
            hidden = F.relu(conv(hidden), inplace=True)
        return torch.tanh(self.ln(self.fc(hidden.flatten(1))).float())


class PictureDecoder(nn.Module):
    """Features (B, F) -> pictures (B, C, H, W) in about [-0.5, 0.5]: the encoder's mirror."""

    def __init__(self, encoder: Encoder, size: tuple[int, int]) -> None:
        """`encoder` gives the other sizes."""
        super().__init__()
        first, filters = encoder.convs[0].in_channels, encoder.convs[0].out_channels
        self.shape = filters, *encoder.map
        self.fc = nn.Linear(encoder.fc.out_features, math.prod(self.shape))
        self.deconvs = nn.ModuleList(nn.ConvTranspose2d(filters, filters, 3) for _ in encoder.convs[1:])
        odd = tuple(1 - side % 2 for side in size)  # an even side loses a pixel on the way in
        self.deconvs.append(nn.ConvTranspose2d(filters, first, 3, stride=2, output_padding=odd))
        self.to(memory_format=torch.channels_last)

    def forward(self, feature: Tensor) -> Tensor:
        """The pictures."""
        hidden = F.relu(self.fc(feature)).view(-1, *self.shape)
        for deconv in self.deconvs[:-1]:
            hidden = F.relu(deconv(hidden), inplace=True)
        return self.deconvs[-1](hidden).float()


def head(inputs: int, hidden: int, outputs: int, layer_norm: bool) -> nn.Sequential:
    """An `mlp`; with `layer_norm`, LayerNorm follows each hidden layer, as in ReBRAC's critics."""
    network = mlp(inputs, hidden, outputs)
    if not layer_norm:
        return network
    return nn.Sequential(*network[:2], nn.LayerNorm(hidden), *network[2:4], nn.LayerNorm(hidden), network[4])


class ActorVAE(nn.Module):
    """A VAE of the dataset's actions, given features: (B, F), (B, A) -> (B, A) (BCQ, section 5.1)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden: int, layer_norm: bool) -> None:
        """The latent has twice the action's size, as in BCQ's code."""
        super().__init__()
        self.latent_dim = 2 * action_dim
        self.encoder = head(feature_dim + action_dim, hidden, 2 * self.latent_dim, layer_norm)
        self.decoder = head(feature_dim + self.latent_dim, hidden, action_dim, layer_norm)

    def decode(self, feature: Tensor, latent: Tensor) -> Tensor:
        """Actions (B, A) in (-1, 1)."""
        return torch.tanh(self.decoder(torch.cat((feature, latent), 1)))

    def forward(self, feature: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructed actions (B, A), mean and standard deviation (B, L); `noise` (B, L) is standard normal."""
        mean, log_std = self.encoder(torch.cat((feature, action), 1)).chunk(2, 1)
        std = log_std.clamp(-4.0, 15.0).exp()
        return self.decode(feature, mean + std * noise), mean, std


class LatentPolicy(nn.Module):
    """The policy (B, F) -> z (B, L), bounded to where the VAE's prior has most of its mass (PLAS, section 4)."""

    def __init__(self, feature_dim: int, latent_dim: int, hidden: int, bound: float) -> None:
        """`bound` is the largest absolute value of z."""
        super().__init__()
        self.bound = bound
        self.network = mlp(feature_dim, hidden, latent_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """The latent action of each state."""
        return self.bound * torch.tanh(self.network(feature))


class Critic(nn.Module):
    """Two Q functions of features (B, F) and actions (B, A)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden: int, layer_norm: bool) -> None:
        """Each has two hidden layers."""
        super().__init__()
        self.q1 = head(feature_dim + action_dim, hidden, 1, layer_norm)
        self.q2 = head(feature_dim + action_dim, hidden, 1, layer_norm)

    def forward(self, feature: Tensor, action: Tensor) -> Tensor:
        """Both values (2, B)."""
        inputs = torch.cat((feature, action), 1)
        return torch.stack((self.q1(inputs)[:, 0], self.q2(inputs)[:, 0]))

    def first(self, feature: Tensor, action: Tensor) -> Tensor:
        """The first value alone (B,), which the policy maximizes."""
        return self.q1(torch.cat((feature, action), 1))[:, 0]


# Dataset -------------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions: pictures (B, C, H, W) uint8, (B, A), (B,), next pictures, discount (B,), 0 where an episode ends."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    discount: Tensor


def random_shift(pictures: Tensor, offsets: Tensor) -> Tensor:
    """Pictures (B, C, H, W) moved up and left by offsets (2, B, 1); the pixels at an edge are repeated, as in DrQ."""
    (count, _, height, width), device = pictures.shape, pictures.device
    rows = (torch.arange(height, device=device) + offsets[0]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=device) + offsets[1]).clamp_(0, width - 1)
    each = torch.arange(count, device=device)[:, None, None]
    return pictures[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Dataset:
    """Transitions from pixels, each picture held once as uint8.

    An episode of T transitions has T + 1 rows. As in V-D4RL, row t holds a picture and what led to it: the action and
    the reward *before* that picture. In an episode's first row, only the picture is meaningful.
    """

    def __init__(self, columns: dict[str, np.ndarray], frame_stack: int) -> None:
        """`columns` are `image` (M, H, W, 3), `action` (M, A), `reward`, `discount`, `is_first` (M,): see `load`.

        Pictures are not copied; memory-mapped ones stay on the disk.
        """
        self.mapped = isinstance(columns["image"], np.memmap)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        self.images = torch.from_numpy(columns["image"]).permute(0, 3, 1, 2)
        first = columns["is_first"].nonzero()[0]
        start = first.repeat(np.diff(first, append=len(columns["is_first"])))  # the first row of each row's episode
        rows = (~columns["is_first"]).nonzero()[0]
        self.starts, self.rows = first, torch.from_numpy(rows)
        # The pictures before the action, and one more after it.
        self.frames = torch.from_numpy(np.maximum(rows[:, None] + np.arange(-frame_stack, 1), start[rows][:, None]))
        self.action = torch.from_numpy(columns["action"][rows]).float()
        self.reward = torch.from_numpy(columns["reward"][rows]).float()
        self.discount = torch.from_numpy(columns["discount"][rows]).float()
        self.returns = np.add.reduceat(np.where(columns["is_first"], 0.0, columns["reward"]), first)

    def to(self, device: torch.device) -> Dataset:
        """Move all but mapped pictures to a device, once."""
        for name in ("images", "frames", "action", "reward", "discount"):
            if not (self.mapped and name == "images"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def batch(self, index: Tensor, shift: int = 0) -> Batch:
        """The transitions `index` (B,); with `shift`, observation and next observation are each shifted at random."""
        frames = self.frames[index].flatten().to(self.images.device)
        pictures = self.images.index_select(0, frames).view(len(index), -1, *self.images.shape[2:]).to(index.device)
        pair = [pictures[:, :-3], pictures[:, 3:]]  # the stack before the action, and the one after it
        if shift:
            offsets = torch.randint(-shift, shift + 1, (2, 2, len(index), 1), device=index.device)
            pair = [random_shift(picture, offsets[:, i]) for i, picture in enumerate(pair)]
        return Batch(pair[0], self.action[index], self.reward[index], pair[1], self.discount[index])

    def sample(self, batch_size: int, shift: int) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        return self.batch(torch.randint(len(self.rows), (batch_size,), device=self.frames.device), shift)


# Agent ---------------------------------------------------------------------------------------------------------------
POLICY_LEARNING_RATE = 1e-3
ACTING_CANDIDATES = 100  # sampled actions that an evaluation with --policy argmax chooses from


class PLAS(nn.Module):
    """Networks, optimizers and updates; an update takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, env: PixelEnv, device: torch.device) -> None:
        """Build networks and optimizers for `env`'s spaces; `check` has filled in `args`."""
        super().__init__()
        self.args, self.device, self.signals = args, device, SIGNALS[args.encoder_signal]
        self.action_dim = env.action_dim
        sizes = env.observation_space.shape[0], env.size, args.num_layers, args.num_filters, args.feature_dim
        self.encoder = self.vae_encoder = Encoder(*sizes)  # one network, so that one pass serves critics and VAE
        if args.encoder_signal == "separate":
            self.vae_encoder = Encoder(*sizes)
        self.picture_decoder = None
        if "reconstruction" in self.signals:
            self.picture_decoder = PictureDecoder(self.encoder, env.size)
        self.critic = Critic(args.feature_dim, self.action_dim, args.hidden_dim, args.layer_norm)
        self.vae = ActorVAE(args.feature_dim, self.action_dim, args.hidden_dim, args.layer_norm)
        self.policy = LatentPolicy(args.feature_dim, self.vae.latent_dim, args.hidden_dim, args.max_latent_action)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.to(device)
        self.online = [*self.critic.parameters(), *self.policy.parameters()]  # in the order of self.targets
        self.targets = [*self.target_critic.parameters(), *self.target_policy.parameters()]

        trained = {"critic": self.critic, "vae": self.vae, "policy": self.policy}
        if self.signals:  # else the encoder stays as it was initialized
            views = self.encoder, self.vae_encoder, self.picture_decoder
            trained["encoder"] = nn.ModuleList(part for part in views if part is not None)
        rates = dict.fromkeys(trained, args.learning_rate) | {"policy": POLICY_LEARNING_RATE}
        self.optimizers = {
            name: torch.optim.Adam(part.parameters(), lr=rates[name], fused=True) for name, part in trained.items()
        }

    def autocast(self) -> torch.autocast:
        """bfloat16 matrix products with `--bf16`; weights, losses and optimizers stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def draw_noise(self, batch_size: int) -> dict[str, Tensor]:
        """The standard normal draws of one update: the VAE's (B, L), and those of the candidates (B, N, L)."""
        latent = self.vae.latent_dim
        noise = {"vae": torch.randn(batch_size, latent, device=self.device)}
        if self.args.policy == "argmax":
            noise["candidates"] = torch.randn(batch_size, self.args.candidates, latent, device=self.device)
        return noise

    def views(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, F) for critics and policy, and those for the VAE: the same unless with `separate`."""
        feature = self.encoder(pictures)
        return feature, feature if self.vae_encoder is self.encoder else self.vae_encoder(pictures)

    def proposals(self, pictures: Tensor, policy: LatentPolicy, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Actions (B * N, A) to choose from, and the features (B * N, F) of their states.

        Without `noise`, the policy's action (N = 1). With standard normal `noise` (B, N, L), N actions decoded from the
        noise clipped to [-0.5, 0.5], as in BCQ's code, so that they stay close to the data's.
        """
        feature, vae_feature = self.views(pictures)
        if noise is None:
            return self.vae.decode(vae_feature, policy(feature)), feature
        feature, vae_feature = (view.repeat_interleave(noise.shape[1], 0) for view in (feature, vae_feature))
        return self.vae.decode(vae_feature, noise.flatten(0, 1).clamp(-0.5, 0.5)), feature

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: dict[str, Tensor]) -> Tensor:
        """The critics' target (B,): a soft minimum of the two target values (BCQ, equation 13)."""
        # A context of its own: autocast caches its copies of weights, and those made here carry no gradient.
        with self.autocast():
            action, feature = self.proposals(batch.next_observation, self.target_policy, noise.get("candidates"))
            value, weight = self.target_critic(feature, action), self.args.soft_minimum
        mixed = weight * value.amin(0) + (1.0 - weight) * value.amax(0)
        best = mixed.view(len(batch.reward), -1).amax(1)  # over the candidates of each state
        return batch.reward + self.args.gamma * batch.discount * best

    def critic_loss(self, feature: Tensor, batch: Batch, target: Tensor) -> Tensor:
        """Both critics' mean squared error."""
        return (self.critic(feature, batch.action) - target).square().mean(1).sum()

    def vae_loss(self, feature: Tensor, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The VAE's loss, and its parts: the actions' squared error and the KL divergence."""
        action, mean, std = self.vae(feature, batch.action, noise)
        error = F.mse_loss(action, batch.action)
        kl = (0.5 * (mean.square() + std.square() - 1.0) - std.log()).mean()
        return error + self.args.kl_weight * kl, error, kl

    def picture_loss(self, feature: Tensor, batch: Batch) -> Tensor:
        """The squared error of the pictures decoded from the features (B, F)."""
        return F.mse_loss(self.picture_decoder(feature), batch.observation / 255.0 - 0.5)

    def update(
        self, batch: Batch, noise: dict[str, Tensor] | None = None, pretraining: bool = False
    ) -> dict[str, Tensor]:
        """One step of encoder, critics, VAE and policy, with one pass of the encoder.

        A head whose loss must not train the encoder reads detached features. So one backward pass of the sum gives each
        parameter the gradient of its own losses, whatever the order of calls.
        """
        noise = noise or self.draw_noise(len(batch.reward))
        target = None if pretraining else self.critic_target(batch, noise)
        with self.autocast():
            with torch.set_grad_enabled(bool(self.signals)):
                feature, vae_feature = self.views(batch.observation)
            vae_input = vae_feature if "vae" in self.signals else vae_feature.detach()
            loss, action_error, kl = self.vae_loss(vae_input, batch, noise["vae"])
            losses = {"vae": loss, "vae_action": action_error, "vae_kl": kl}
            if self.picture_decoder is not None:
                losses["reconstruction"] = self.picture_loss(feature, batch)
                loss = loss + losses["reconstruction"]
            if not pretraining:
                critic_input = feature if "critic" in self.signals else feature.detach()
                losses["td"] = self.critic_loss(critic_input, batch, target)
                loss = loss + losses["td"]
        optimizers = [optimizer for name, optimizer in self.optimizers.items() if name != "policy"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()  # parameters that no loss reached have no gradient and stay
        if not pretraining:
            if self.args.policy == "latent":
                losses |= self.update_policy(feature.detach(), vae_feature.detach())
            with torch.no_grad():
                torch._foreach_lerp_(self.targets, self.online, self.args.tau)
            losses["q_value"] = target.mean()
        return {name: value.detach() for name, value in losses.items()}

    def update_policy(self, feature: Tensor, vae_feature: Tensor) -> dict[str, Tensor]:
        """One step of the latent policy: maximize the first critic through the VAE's decoder (PLAS, equation 5).

        Gradients are computed for the policy's parameters alone.
        """
        with self.autocast():
            loss = -self.critic.first(feature, self.vae.decode(vae_feature, self.policy(feature))).mean()
        self.optimizers["policy"].zero_grad()
        loss.backward(inputs=list(self.policy.parameters()))
        self.optimizers["policy"].step()
        return {"policy": loss}

    @torch.no_grad()
    def act(self, observation: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Actions (N, A) for pictures (N, C, H, W) uint8, and the first critic's values (N,) of them."""
        count, noise = len(observation), None
        if self.args.policy == "argmax":
            shape = count, ACTING_CANDIDATES, self.vae.latent_dim
            noise = torch.randn(shape, generator=generator).to(self.device)
        with self.autocast():
            action, feature = self.proposals(torch.from_numpy(observation).to(self.device), self.policy, noise)
            value, best = self.critic.first(feature, action).view(count, -1).max(1)
        action = action.view(count, -1, self.action_dim)[torch.arange(count), best]
        return action.cpu().numpy(), value.cpu().numpy()


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(agent: PLAS, environments: list[gym.Env], seed: int, first: int = 0) -> dict[str, float]:
    """Play one episode in each environment, in lock-step, and compare the critic with the returns that followed.

    Episode i, counted from `first`, always has `episode_seed(seed, i, stream=1)`; training's random streams are not
    touched. Returns `episodic_return`, `return_std`, `episodic_length`, and `q_error` (mean squared), `q_bias` and
    `q_correlation` of Q(s, pi(s)) against the discounted return that followed, over the states after which at least
    90 % of the discounted future was seen; `q_start_*` are the same over the first states of episodes.
    """
    generator = torch.Generator().manual_seed(seed)
    observations = [env.reset(seed=episode_seed(seed, i, stream=1))[0] for i, env in enumerate(environments, first)]
    traces: list[list[tuple[float, float]]] = [[] for _ in environments]  # value and reward of each step
    terminated, active = [False] * len(environments), list(range(len(environments)))
    while active:
        actions, values = agent.act(np.stack([observations[i] for i in active]), generator)
        running = []
        for i, action, value in zip(active, actions, values.tolist(), strict=True):
            observations[i], reward, terminated[i], truncated, _ = environments[i].step(action)
            traces[i].append((value, reward))
            if not (terminated[i] or truncated):
                running.append(i)
        active = running
    pairs, starts = [], []  # value and discounted return: of all states, and of first ones
    for trace, ended in zip(traces, terminated, strict=True):
        discounted_return = 0.0
        for steps_left, (value, reward) in enumerate(reversed(trace), start=1):
            discounted_return = reward + agent.args.gamma * discounted_return
            if ended or agent.args.gamma**steps_left <= 0.1:
                pairs.append((value, discounted_return))
                if steps_left == len(trace):
                    starts.append((value, discounted_return))
    returns = np.array([sum(reward for _, reward in trace) for trace in traces])
    result = {"episodic_return": float(returns.mean()), "return_std": float(returns.std())}
    result["episodic_length"] = float(np.mean([len(trace) for trace in traces]))
    for name, compared in (("q", pairs), ("q_start", starts)):
        estimate, truth = np.array(compared or [(math.nan, math.nan)]).T
        spread = estimate.std() * truth.std()
        covariance = ((estimate - estimate.mean()) * (truth - truth.mean())).mean()
        result[f"{name}_error"] = float(np.square(estimate - truth).mean())
        result[f"{name}_bias"] = float((estimate - truth).mean())
        result[f"{name}_correlation"] = float(covariance / spread) if spread > 1e-12 else math.nan
    return result


# Main ----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        check(args)
        env, *environments = (make_env(args) for _ in range(1 + args.eval_episodes))
        check_pictures(args, env)
        dataset, digest = find_dataset(args, env)
    except ValueError as error:
        usage_error(str(error))
    with Run(args) as run:
        device = set_up_torch(args)
        if max(env.size) < 64:
            torch.set_num_threads(1)  # more threads would not speed up such small networks
        keep_freed_memory()
        agent, dataset = PLAS(args, env, device), dataset.to(device)
        count = min(2_000, len(dataset.rows))
        fixed = dataset.batch(torch.linspace(0, len(dataset.rows) - 1, count, device=device).long())
        step, seen = 0, {}
        run.say(f"{run.name}: " + ", ".join(f"{name} {getattr(args, name)}" for name in DEFAULTS_BY_ENVIRONMENT[""]))
        run.unless_stopped(lambda: seen.update(play_at_random(env, args)))
        if not run.checkpoint:
            run.unless_stopped(lambda: seen.update(levels=reference_levels(env, dataset, args)))
        if run.signal:
            run.stop()  # nothing has been learnt yet
        if run.checkpoint:
            with run.restoring():
                if run.checkpoint["dataset"] != digest:
                    usage_error(f"{args.dataset} is not the dataset that {run.folder} began with; restore it")
                step, seen["levels"] = run.checkpoint["step"], run.checkpoint["levels"]
                agent.load_state_dict(run.checkpoint["agent"])
                for name, optimizer in agent.optimizers.items():
                    optimizer.load_state_dict(run.checkpoint[f"{name}_optimizer"])
        levels = ", ".join(f"{name} {value:.2f}" for name, value in seen["levels"].items())
        size = f"{len(dataset.rows):,} transitions of {len(dataset.starts):,} episodes"
        run.say(f"{run.name}: {size}; mean returns: {levels}")

        def evaluate_agent() -> None:
            """Evaluate at this step, keep the best model, log it."""
            metrics = evaluate(agent, environments, args.seed) | measure(agent, fixed, **seen)
            if all(metrics["episodic_return"] >= row["episodic_return"] for row in run.eval_rows):
                run.save_model("best_model.pt", {"agent": agent.state_dict()})
            run.log_evaluation(step, metrics)

        def state() -> dict[str, Any]:
            """What a resumed run needs."""
            optimizers = {f"{name}_optimizer": part.state_dict() for name, part in agent.optimizers.items()}
            return {"agent": agent.state_dict(), **optimizers, "dataset": digest, "levels": seen["levels"]}

        losses: dict[str, Tensor] = {}
        run.writer.add_text("losses/td", "Not comparable between encoder signals; see q_error for how accurate Q is")
        while True:
            last = step == args.total_timesteps
            if step and (last or step % args.eval_frequency == 0) and not run.evaluated(step):
                run.unless_stopped(evaluate_agent)
            stopping = bool(run.signal)  # a signal that comes later than this is seen after the next step
            if stopping or (step and (last or step % args.checkpoint_frequency == 0)):
                run.save_checkpoint(step, state())
            if stopping and not (last and run.evaluated(step)):
                run.stop()
            if last:
                break
            batch = dataset.sample(args.batch_size, args.random_shift)
            step += 1
            losses |= agent.update(batch, pretraining=step <= args.pretrain_steps)
            run.progress(step, f"return {run.eval_rows[-1]['episodic_return']:.2f}" if run.eval_rows else "")
            every = 500, args.eval_frequency, args.checkpoint_frequency, args.total_timesteps
            if run.signal or not all(step % frequency for frequency in every):
                # Losses are read only here; one that is not finite ends the run before it can reach a checkpoint.
                run.log(step, {f"losses/{name}": value for name, value in losses.items()})
                charts = {f"charts/{name}": value for name, value in gradient_statistics(agent, batch).items()}
                run.log(step, {"charts/SPS": run.steps_per_second(step), **charts})
        run.save_model("model.pt", {"agent": agent.state_dict()})

        def draw() -> None:
            """The learning curve, and pictures beside their reconstructions."""
            run.log_figure(step, "learning_curve", draw_learning_curve(run.eval_rows, seen["levels"], run.name))
            if agent.picture_decoder is not None:
                run.log_figure(step, "reconstruction", draw_reconstruction(agent, fixed))

        def film() -> None:
            """Videos of evaluation episodes."""
            run.log_videos(step, record_videos(agent, args, run.folder / "videos"))

        run.finish(step, state(), draw, *([film] if args.capture_video else []))
    score = "return {episodic_return:.2f}, squared error of Q {q_error:.3f}".format(**run.eval_rows[-1])
    print(f"last evaluation: {score}; see {run.folder}")
    return run.folder


# Nothing below is about the algorithm: checks of the input, pictures, the run folder. -------------------------------
def check(args: Args) -> None:
    """Fill in the environment's defaults. Raises a one-line ValueError about what cannot work."""
    args.env_id = re.sub(r"^([a-z]\w*-(?!v\d+$)[a-z]\w*)$", r"dm_control/\1-v0", args.env_id)  # finger-spin
    own = DEFAULTS_BY_ENVIRONMENT.get(args.env_id.split("-")[0], {})
    for name, value in {**DEFAULTS_BY_ENVIRONMENT[""], **own}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = args.encoder_signal in SIGNALS
    need(known, f"--encoder-signal {args.encoder_signal}: expected one of {', '.join(SIGNALS)}")
    least = {name: 1 for name, value in asdict(args).items() if type(value) is int}
    least |= dict.fromkeys(("seed", "pretrain_steps", "random_shift", "camera"), 0)
    check_numbers(args, least, {"gamma": 1, "tau": 1, "soft_minimum": 1})
    steps = f"--pretrain-steps {args.pretrain_steps} of --total-timesteps {args.total_timesteps}"
    need(args.pretrain_steps < args.total_timesteps, f"{steps}: critics and policy would learn nothing; take fewer")
    kinds = "expected random; benchmark/plas_data.py --collect has other kinds"
    need(args.collect in (None, "random"), f"--collect {args.collect}: {kinds}")
    pixels, filters, collecting = args.image_size**2, args.num_filters * args.num_layers, args.collect is not None
    check_memory({  # in bytes, about
        "--batch-size, --image-size, --frame-stack, --num-layers, --num-filters":
            args.batch_size * pixels * (36 * args.frame_stack + 2 * filters) + 150 * filters * args.num_filters,
        "--feature-dim": 4 * args.num_filters * pixels * args.feature_dim,
        "--hidden-dim": 100 * args.hidden_dim * (args.hidden_dim + args.feature_dim),
        "--candidates": 8 * args.candidates * args.batch_size * args.hidden_dim,
        "--eval-episodes": args.eval_episodes * (10_000 + 6 * pixels * args.frame_stack),
        "--collect-steps": 6 * pixels * args.collect_steps * collecting,
    })  # fmt: skip


def need(holds: bool, message: str) -> None:
    """Raise ValueError with this line unless the condition holds."""
    if not holds:
        raise ValueError(message)


def check_memory(needs: dict[str, float]) -> None:
    """Raise ValueError if these needs, in bytes by name, add up to more than the machine's memory."""
    name, memory = max(needs, key=needs.get), machine_memory()
    sizes = f"about {needs[name] / 2**30:,.1f} GiB of memory, and this machine has {memory / 2**30:,.1f}"
    need(sum(needs.values()) <= memory, f"{name} needs {sizes}; take less")


def check_pictures(args: Args, env: PixelEnv) -> None:
    """Raise ValueError if the pictures are too small for the layers or the shifts."""
    Encoder(1, env.size, args.num_layers, 1, 1)
    least = min(env.size)
    need(args.random_shift < least, f"--random-shift {args.random_shift}: expected less than the pictures' {least}")


# Measures of the study -----------------------------------------------------------------------------------------------
def gradient_statistics(agent: PLAS, batch: Batch) -> dict[str, float]:
    """Norms of the losses' gradients in the encoder, whether they train it or not; cosine of critic's and VAE's.

    With `separate` each is in its own encoder, and there is no cosine. Draws nothing from training's random stream.
    """
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
        noise = agent.draw_noise(len(batch.reward))
    target = agent.critic_target(batch, noise)
    losses = {
        "critic": (agent.encoder, lambda feature: agent.critic_loss(feature, batch, target)),
        "vae": (agent.vae_encoder, lambda feature: agent.vae_loss(feature, batch, noise["vae"])[0]),
    }
    if agent.picture_decoder is not None:
        losses["reconstruction"] = agent.encoder, lambda feature: agent.picture_loss(feature, batch)
    gradients, result = [], {}
    for name, (encoder, loss) in losses.items():  # one after the other, since each holds all of its activations
        with agent.autocast():
            value = loss(encoder(batch.observation))
        parts = torch.autograd.grad(value, list(encoder.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
        result[f"encoder_gradient_{name}"] = float(gradients[-1].norm())
    if agent.vae_encoder is agent.encoder:
        result["encoder_gradient_cosine"] = float(F.cosine_similarity(*gradients[:2], 0))
    return result


@torch.no_grad()
def linear_probe(agent: PLAS, pictures: np.ndarray, states: np.ndarray) -> float:
    """R2 of the true state (N, S) by ridge regression on the features of `pictures` (N, C, H, W) uint8.

    Fitted on one half, scored on the other; the mean over the state's dimensions that vary, nan if none does.
    """
    with agent.autocast():
        parts = torch.from_numpy(pictures).to(agent.device).split(256)
        features = torch.cat([agent.encoder(part) for part in parts]).cpu().numpy().astype(np.float64)
    features = np.concatenate((features, np.ones((len(features), 1))), 1)
    half, states = len(features) // 2, states[:, states.std(0) > 1e-6]
    if not states.size:
        return math.nan
    fit, x, y = features[:half], features[half:], states[half:]
    weights = np.linalg.solve(fit.T @ fit + 1e-3 * np.eye(fit.shape[1]), fit.T @ states[:half])
    error = np.square(x @ weights - y).mean(0) / y.var(0)
    return float(1.0 - error.mean())


def reference_levels(env: PixelEnv, dataset: Dataset, args: Args) -> dict[str, float]:
    """Mean returns of the behaviour policy, of random actions and, if the environment has one, of its expert."""
    levels = {"behaviour": float(dataset.returns.mean())}
    policies: dict[str, Callable] = {"random": uniform(env, np.random.default_rng(args.seed))}
    if hasattr(env.unwrapped, "expert_action"):
        policies["expert"] = lambda _: env.unwrapped.expert_action()  # in [-1, 1], whatever the bounds
    for name, act in policies.items():
        seeds = (episode_seed(args.seed, i, stream=1) for i in range(min(args.eval_episodes, 20)))
        levels[name] = float(np.mean([sum(row[2] for row in play(env, act, seed)) for seed in seeds]))
    return levels


def play_at_random(env: PixelEnv, args: Args) -> dict[str, np.ndarray]:
    """`pictures` and `states` of short random episodes, which show the probe more states than a policy visits."""
    wide = collect(env, 2_000, args.seed + 1, longest=10)
    stacks = Dataset(wide, args.frame_stack)
    pictures = stacks.batch(torch.arange(len(stacks.rows))).observation.numpy()
    return {"pictures": pictures, "states": wide["state"][stacks.rows - 1]}


def measure(agent: PLAS, fixed: Batch, pictures: np.ndarray, states: np.ndarray, levels: dict[str, float]) -> dict:
    """What an evaluation logs besides returns and values: on a fixed batch, and on what `play_at_random` saw."""
    with torch.no_grad(), agent.autocast():
        feature = agent.vae_encoder(fixed.observation)
        cloned = agent.vae.decode(feature, torch.zeros(len(feature), agent.vae.latent_dim, device=agent.device))
    # The error of the action decoded from z = 0: how well the state alone predicts the data's action.
    metrics = {"prior_action_error": float(F.mse_loss(cloned, fixed.action))}
    metrics["probe_r2"] = linear_probe(agent, pictures, states)
    return metrics | gradient_statistics(agent, fixed) | {f"{name}_return": value for name, value in levels.items()}


# Data: read, and played at random ------------------------------------------------------------------------------------
FIELDS = {  # a dataset's columns, with one value per row
    "image": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32,
    "is_first": bool, "is_last": bool, "is_terminal": bool,
}  # fmt: skip
# Single values: how a dataset was made.
SETTINGS = ("action_repeat", "frame_stack", "camera", "env_id", "collect", "first_seed")


def check_settings(path: Path, made_with: dict[str, Any], env: PixelEnv) -> None:
    """Raise a one-line ValueError if the pictures or the actions of a file do not match those of `env`."""
    here = {"image_size": env.size[0], "frame_stack": env.args.frame_stack, "action_repeat": env.args.action_repeat}
    here |= {"env_id": env.spec.id} if env.spec else {}
    here |= {"camera": env.args.camera} if env.spec and env.spec.id.startswith("dm_control/") else {}
    other = [f"--{k.replace('_', '-')} {made_with[k]}" for k, value in here.items() if made_with.get(k, value) != value]
    need(not other, f"{path} was made with {' '.join(other)}, but this run differs; use the same")


def read_columns(path: Path, env: PixelEnv) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns of one npz file or one folder of npy files, and how they were made. Raises ValueError."""
    need(path.is_dir() or zipfile.is_zipfile(path), f"{path} is not an npz file; convert it to npz, or restore it")
    try:
        if path.is_dir():  # mapped, so that pictures stay on the disk
            files = {name: path / f"{name}.npy" for name in (*FIELDS, *SETTINGS)}
            arrays = {name: np.lib.format.open_memmap(file, "r") for name, file in files.items() if file.exists()}
        else:
            with np.load(path) as file:
                arrays = {name: file[name] for name in (*FIELDS, *SETTINGS) if name in file}
        made_with = {name: arrays.pop(name).item() for name in SETTINGS if name in arrays}
    except Exception as error:  # a damaged or encrypted file raises nearly anything
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"{path} {reason}; save plain arrays of numbers, or restore it") from None
    check_settings(path, made_with, env)
    for name in ("image", "action", "reward"):
        need(name in arrays, f"{path} lacks {name}; image, action and reward are needed")
    rows, shapes = arrays["image"].shape[:1], {"image": (*env.size, 3), "action": env.action_space.shape}
    for name, values in arrays.items():
        dtype, shape = FIELDS[name], (*rows, *shapes.get(name, ()))
        numbers = values.dtype == np.uint8 if name == "image" else values.dtype.kind in "biuf"
        expected = f"expected {name} {shape} of {np.dtype(dtype)}, got {values.shape} of {values.dtype}"
        why = "image has the number of rows, the environment the other sizes (see --image-size)"
        need(numbers and values.shape in (shape, (*shape, 1)), f"{path}: {expected}; {why}")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is rejected
            arrays[name] = values.reshape(shape).astype(dtype, copy=False)
        need(dtype is not bool or (arrays[name] == values.reshape(shape)).all(), f"{path}: expected 0 and 1 in {name}")
    need(rows[0] > 0, f"{path} has no rows")
    return {**arrays, **find_episodes(path, arrays)}, made_with


def find_episodes(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`is_first` and `discount` (M,) from all marks in a file. Raises a one-line ValueError if they are wrong."""
    terminal = columns.get("is_terminal", np.zeros(len(columns["image"]), bool))
    last, discount = columns.get("is_last"), columns.get("discount", np.float32(1.0) - terminal)
    first = columns.get("is_first")
    if first is None:  # an npz file without any mark is one episode, as V-D4RL's are
        marked = last is not None or "is_terminal" in columns
        need(marked or not path.is_dir(), f"{path} lacks is_first, which is true in the first row of each episode")
        first = np.append(True, (terminal if last is None else last)[:-1])
    need(first[0], f"{path}: expected the first row of an episode at the start, but is_first is false there")
    short = (np.diff(first.nonzero()[0], append=len(first)) < 2).sum()
    need(not short, f"{path}: {short} episodes have a length of 0; leave them out")
    ends = np.append(first[1:], True)
    wrong = terminal & ~ends
    if last is not None:
        wrong[:-1] |= (last != ends)[:-1]  # the file's end may cut an episode short
    need(not wrong.any(), f"{path}: is_first, is_last and is_terminal contradict each other after row {wrong.argmax()}")
    if "is_terminal" in columns:
        wrong = ((discount == 0.0) != terminal) & ~first
        need(not wrong.any(), f"{path}: discount and is_terminal contradict each other in row {wrong.argmax()}")
    # An episode's first row may hold anything, such as nan, except in its picture. Comparisons with nan are false.
    for name, values, inside, expected in (
        ("action", columns["action"], lambda action: (np.abs(action) <= 1.0001).all(1), "numbers in [-1, 1]"),
        ("reward", columns["reward"], np.isfinite, "finite numbers"),
        ("discount", discount, lambda discount: (discount >= 0.0) & (discount <= 1.0), "numbers in [0, 1]"),
    ):
        good = inside(values[~first])
        need(good.all(), f"{path}: {(~good).sum()} of {len(good)} rows of {name} are not {expected}; repair or rescale")
    return {"is_first": first, "discount": discount}


def load(path: Path, env: PixelEnv) -> tuple[Dataset, str, dict[str, Any]]:
    """Read an npz file, a folder of them in the order of their names, or map a folder of npy files.

    Returns the dataset, its sha256, and how its first file was made. Columns: `image` (M, H, W, 3) uint8, `action`
    (M, A) in [-1, 1], `reward` (M,), `discount` (M,) or `is_terminal` (M,), `is_first` (M,) or `is_last` (M,) (an npz
    file without any mark is one episode). Raises a one-line ValueError about what is wrong, OSError if it cannot
    be read.
    """
    sources = files = [path]
    if path.is_dir():
        visible = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        files = [each for each in visible if each.suffix == ".npy"]
        if files:
            size = sum(file.stat().st_size for file in files) / 2**30
            print(f"{path}: {size:,.2f} GiB of npy files; their pictures stay on the disk", flush=True)
        else:
            sources = files = [each for each in visible if each.suffix == ".npz"]
        need(bool(files), f"there is no npz file in {path}, and no npy file; convert the data, or name another folder")
    need(files[0].exists(), f"there is no dataset {path}; name an npz file or a folder, or add --collect random")
    digest, size = hashlib.sha256(), 0
    for file in files:
        with open(file, "rb") as content:
            hashlib.file_digest(content, lambda: digest)
        with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged one is rejected below
            size += sum(entry.file_size for entry in archive.infolist())
    check_memory({str(path): size if len(sources) == 1 else 2 * size})  # twice while parts are joined
    parts, made_with = zip(*[read_columns(source, env) for source in sources], strict=True)
    columns = parts[0]
    if len(parts) > 1:
        names = ("image", "is_first", "action", "reward", "discount")
        columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in names}
    if np.nan_to_num(columns["action"][columns["is_first"]]).any(1).mean() > 0.5:
        order = "as in D4RL, where a row's action comes after its picture; here it comes before (see the docs)"
        print(f"warning: {path}: the first rows of episodes hold actions, {order}", file=sys.stderr)
    return Dataset(columns, env.args.frame_stack), digest.hexdigest(), made_with[0]


def uniform(env: PixelEnv, generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A policy (observation) -> action (A,) that draws uniformly."""
    return lambda _: generator.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)


def play(env: PixelEnv, act: Callable, seed: int, longest: float = math.inf) -> Iterator[tuple]:
    """The rows of one episode, of at most `longest` steps: picture, action, reward, discount, is_first, state."""
    observation, info = env.reset(seed=seed)
    none = np.zeros(0)
    yield observation[-3:].copy(), np.zeros(env.action_dim, np.float32), 0.0, 1.0, True, info.get("state", none)
    length, done = 0, False
    while not done:
        action = act(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        yield observation[-3:].copy(), action, reward, 1.0 - terminated, False, info.get("state", none)
        length += 1
        done = terminated or truncated or length >= longest


def as_columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    """Rows of `play` as columns (see `load`), and `state` (M, S)."""
    image, action, reward, discount, is_first, state = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "image": np.moveaxis(image, 1, 3), "action": action, "reward": reward.astype(np.float32),
        "discount": discount.astype(np.float32), "is_first": is_first, "state": state,
    }  # fmt: skip


def collect(
    env: PixelEnv, steps: int, seed: int, longest: float = math.inf, act: Callable | None = None
) -> dict[str, np.ndarray]:
    """Columns of episodes of at most `longest` steps each and at least `steps` in all; random actions without `act`."""
    rows, episode, act = [], 0, act or uniform(env, np.random.default_rng(seed))
    while len(rows) - episode < steps:  # an episode has one more row than steps
        rows += play(env, act, episode_seed(seed, episode, stream=4), longest)
        episode += 1
    return as_columns(rows)


def write_columns(path: Path, env: PixelEnv, columns: dict[str, np.ndarray], **about: Any) -> None:
    """Write a dataset: whole or not at all, since other processes may make the same file. Raises OSError."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    about |= {"action_repeat": env.args.action_repeat, "camera": env.args.camera, "env_id": env.spec.id}
    try:
        write_atomically(own, lambda file: np.savez_compressed(file, **about, **columns))
        if not path.exists():  # else another process was faster, and has made the same
            own.replace(path)
    finally:
        for left in (own, own.with_name(own.name + ".tmp")):
            left.unlink(missing_ok=True)


def make_dataset(path: Path, kind: str, args: Args, env: PixelEnv) -> None:
    """Collect and write a dataset, the same for every --seed. Raises a one-line ValueError and OSError."""
    print(f"collecting {args.collect_steps:,} steps ({kind}) into {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "random":
        columns = collect(env, args.collect_steps, seed=0)
        return write_columns(path, env, columns, collect=kind, first_seed=episode_seed(0, 0, stream=4))
    tool = Path(__file__).resolve().with_name("benchmark") / "plas_data.py"
    need(tool.exists(), f"{path} is made by benchmark/plas_data.py, which is not here; try --dataset random")
    settings = {"env": args.env_id, "action-repeat": args.action_repeat, "steps": args.collect_steps, "seed": 0}
    flags = [f"--{name}={value}" for name, value in {**settings, "collect": kind, "file": path}.items()]
    made = subprocess.run([sys.executable, str(tool), *flags], stderr=subprocess.PIPE, text=True)
    need(made.returncode == 0, (made.stderr.splitlines() or [f"{tool} failed"])[-1].removeprefix("error: "))


def is_reproduced(dataset: Dataset, env: PixelEnv, seed: int) -> bool:
    """Whether the environment still reproduces the first steps of a collected file."""
    actions = iter(dataset.action.numpy())
    rows = list(itertools.islice(play(env, lambda _: next(actions), seed), 6))
    rewards = [row[2] for row in rows[1:]]
    same = np.allclose(rewards, dataset.reward[: len(rewards)], rtol=1e-4, atol=1e-5)
    return same and np.array_equal(rows[0][0], dataset.images[0])


def find_dataset(args: Args, env: PixelEnv) -> tuple[Dataset, str]:
    """Load `args.dataset`; if it is missing, collect it if possible. Raises a one-line ValueError."""
    path, kind = Path(args.dataset), args.collect
    try:
        if args.env_id.startswith("DotHazard") and args.dataset in ("random", "medium", "expert"):
            path, kind = Path("data") / f"{args.env_id}_{args.dataset}_{args.collect_steps}.npz", args.dataset
        elif not path.exists() and path.suffix != ".npz":
            path = path.with_name(path.name + ".npz")
        found = path.exists()
        if kind and not found:
            make_dataset(path, kind, args, env)
        dataset, digest, made_with = load(path, env)
    except OSError as error:
        raise ValueError(f"cannot read or write {path}: {error.strerror or error}; choose another --dataset") from None
    if kind and found:
        maker = f", collected by {made_with['collect']}" if "collect" in made_with else ""
        print(f"using {path}{maker}; remove it to collect it anew")
        if "first_seed" in made_with and not is_reproduced(dataset, env, made_with["first_seed"]):
            changed = f"warning: {args.env_id} no longer reproduces {path}: its code or its rendering has changed"
            print(f"{changed}; remove that file to collect it anew", file=sys.stderr)
    return dataset, digest


# Pictures ------------------------------------------------------------------------------------------------------------
def draw_learning_curve(rows: list[dict[str, float]], levels: dict[str, float], title: str) -> Figure:
    """Return, and the critic's error and correlation against the returns that followed, over gradient steps."""
    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    figure.suptitle(title)
    axes, steps = figure.subplots(1, 3), [row["step"] for row in rows]
    labels = "evaluation return", "squared error of Q against returns", "correlation of Q with returns"
    for axis, name, label in zip(axes, ("episodic_return", "q_error", "q_correlation"), labels, strict=True):
        axis.plot(steps, [row[name] for row in rows], marker=".")
        axis.set(xlabel="gradient steps", ylabel=label)
        axis.grid(alpha=0.3)
    for style, (name, value) in zip(("-", "--", ":"), levels.items(), strict=False):
        axes[0].axhline(value, color="black", linewidth=1, linestyle=style, label=f"{name}: {value:.2f}")
    axes[0].legend(fontsize=8)
    return figure


def draw_reconstruction(agent: PLAS, batch: Batch) -> Figure:
    """The newest picture of up to 8 observations above its reconstruction."""
    seen = batch.observation[:8]
    with torch.no_grad():
        decoded = agent.picture_decoder(agent.encoder(seen)) + 0.5
    pair = torch.stack((seen / 255.0, decoded))[:, :, -3:].clamp(0.0, 1.0).cpu()  # (2, N, 3, H, W)
    figure = Figure(figsize=(1.5 * len(seen), 3.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(pair.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy())  # (2 H, N W, 3)
    axis.set(title="Observation (above) and reconstruction", xticks=[], yticks=[])
    return figure


def record_videos(agent: PLAS, args: Args, folder: Path) -> list[Path]:
    """Write mp4 videos of the first three evaluation episodes and return their paths."""
    recorder = gym.wrappers.RecordVideo(
        make_env(args, video=True), str(folder), episode_trigger=lambda _: True, name_prefix="evaluation",
        disable_logger=True,
    )  # fmt: skip
    for i in range(3):
        evaluate(agent, [recorder], args.seed, first=i)
    recorder.close()
    return sorted(folder.glob("evaluation-*.mp4"))


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
