"""PLAS from pixels: offline reinforcement learning with a policy in the latent action space of a VAE.

A VAE over the dataset's actions keeps the policy near to what was tried; an encoder turns pictures into features for
critics and VAE alike. Which losses train that encoder is a switch, `--encoder-signal`: the study in the docs tells why
it matters. `--policy argmax` takes the best of some sampled actions instead (BCQ without perturbation, EMaQ).

Papers: Zhou et al., "PLAS: Latent Action Space for Offline Reinforcement Learning", CoRL 2020,
https://arxiv.org/abs/2011.07213; Fujimoto et al., "Off-Policy Deep Reinforcement Learning without Exploration",
ICML 2019, https://arxiv.org/abs/1812.02900

    python plas_pixels.py --dataset medium --encoder-signal both
    python plas_pixels.py --dataset medium --encoder-signal critic --policy argmax
    python plas_pixels.py --env dm_control/cartpole-swingup-v0 --dataset data/cartpole --collect random

Docs: docs/plas_pixels.md
"""

import contextlib
import copy
import ctypes
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
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
    """if toggled, a GPU is used where there is one"""
    track: bool = False
    """if toggled, this experiment is tracked with Weights and Biases (WANDB_MODE=offline needs no key)"""
    wandb_project_name: str = "LatentRL"
    """the wandb project's name"""
    wandb_entity: str | None = None
    """the entity (team) of the wandb project"""
    capture_video: bool = False
    """if toggled, videos of evaluation episodes are written to the run folder's videos/"""
    runs_dir: str = "runs"
    """the folder that run folders are created in"""
    run_name: str | None = None
    """the run folder's name (default: environment, experiment, seed and time)"""
    resume: bool = False
    """if toggled, continue the run named by --run-name: from its checkpoint, or from the start if it has none"""
    checkpoint_frequency: int = 2_000
    """steps between two checkpoints"""
    eval_frequency: int = 2_000
    """steps between two evaluations"""
    eval_episodes: int = 20
    """episodes of each evaluation, always on the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "DotHazard-v0"
    """the environment of the dataset, for evaluation: any with a Box action space, and pictures or rendering"""
    dataset: str = "medium"
    """an npz file or a folder of them; DotHazard-v0 also has random, medium and expert, collected at once"""
    collect: str | None = None
    """collect --dataset if it is missing: by random, medium or scripted actions, or a model.pt of sac_ae_pixels.py"""
    collect_steps: int = 15_000
    """transitions to collect (agent steps: an action that is repeated counts once)"""
    total_timesteps: int = 10_000
    """gradient steps"""
    encoder_signal: str = "both"
    """what trains the encoder: critic, vae, both, separate (one for each), reconstruction (of the picture) or none"""
    policy: Literal["latent", "argmax"] = "latent"
    """a policy in the VAE's latent space (PLAS), or the best of some sampled actions (BCQ without perturbation)"""
    learning_rate: float = 1e-3
    """learning rate of the encoder, the critics and the VAE"""
    policy_learning_rate: float = 1e-3
    """learning rate of the latent policy"""
    gamma: float | None = None
    """the discount factor gamma (default: by environment)"""
    tau: float = 0.005
    """target smoothing coefficient"""
    batch_size: int | None = None
    """batch size (default: by environment)"""
    soft_minimum: float = 0.75
    """weight of the smaller of both target values, the rest is the larger one's (BCQ's lambda)"""
    max_latent_action: float = 2.0
    """bound of the latent policy's z (PLAS, section 4)"""
    candidates: int = 10
    """actions sampled for each next state with --policy argmax"""
    acting_candidates: int = 100
    """actions sampled to choose one from, in evaluations with --policy argmax"""
    kl_weight: float = 0.5
    """weight of the VAE's KL divergence (mean over batch and dimensions) beside the actions' squared error"""
    pretrain_steps: int = 0
    """first gradient steps without critics: VAE and picture decoder, and the encoder if their losses train it"""
    image_size: int = 64
    """height and width of rendered pictures; an environment or dataset whose observations are pictures keeps theirs"""
    camera: int | None = None
    """the camera of dm_control (default: 0; quadruped 2)"""
    action_repeat: int | None = None
    """environment steps that an action is repeated for (default: by environment)"""
    frame_stack: int | None = None
    """pictures in an observation, the newest ones (default: by environment)"""
    random_shift: int | None = None
    """pixels that pictures are randomly shifted by in training (default: by environment)"""
    num_layers: int | None = None
    """convolutions of the encoder (default: by environment)"""
    num_filters: int | None = None
    """filters of each convolution (default: by environment)"""
    feature_dim: int = 50
    """size of the encoder's output"""
    hidden_dim: int = 256
    """width of the two hidden layers of critics, VAE and policy"""
    bf16: bool = False
    """if toggled, networks compute in bfloat16 (weights, losses and optimizers stay in float32)"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int | float]] = {  # "" holds what is not listed above it
    "DotHazard": {
        "gamma": 0.9, "batch_size": 64, "action_repeat": 1, "frame_stack": 1, "random_shift": 0,
        "num_layers": 2, "num_filters": 16,
    },
    # The paper's table of SAC+AE, which these tasks are usually compared by.
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
class PixelEnv(gym.Wrapper[np.ndarray, np.ndarray, Any, Any]):
    """Pictures for observations, stacked: (k * 3, H, W) uint8, oldest first; actions are in [-1, 1] and repeated.

    An environment whose observations are pictures (H, W, 3) keeps them, others are rendered. `info["state"]` holds the
    true state: what the environment says itself, or the observation that the picture replaces.
    """

    def __init__(self, env: gym.Env, image_size: int, action_repeat: int, frame_stack: int) -> None:
        """Raises ValueError, with what was expected, if it has no Box actions or no pictures."""
        super().__init__(gym.wrappers.RepeatAction(env, action_repeat))
        space = env.action_space
        if not (isinstance(space, gym.spaces.Box) and np.isfinite([space.low, space.high]).all()):
            raise ValueError(f"plas_pixels needs a Box action space with finite bounds, got {space}")
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        own = env.observation_space
        self.rendered = not (isinstance(own, gym.spaces.Box) and own.dtype == np.uint8 and own.shape[2:] == (3,))
        if self.rendered and env.render_mode != "rgb_array":
            raise ValueError("pictures expected, but it neither observes nor renders them (render_mode rgb_array)")
        self.size = (image_size, image_size) if self.rendered else own.shape[:2]
        self.action_repeat, self.frame_stack = action_repeat, frame_stack
        self.observation_space = gym.spaces.Box(0, 255, (3 * frame_stack, *self.size), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (math.prod(space.shape),), np.float32)
        self.frames: list[np.ndarray] = []

    def picture(self, observation: Any) -> np.ndarray:
        """The newest picture (3, H, W) uint8."""
        frame = self.env.render() if self.rendered else observation
        if frame.shape[:2] != self.size:
            frame = np.asarray(PIL.Image.fromarray(frame).resize(self.size[::-1], PIL.Image.Resampling.BILINEAR))
        return np.moveaxis(frame, 2, 0).copy()

    def info(self, observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        """`info` with `state` (S,) float64."""
        return {"state": gym.spaces.flatten(self.env.observation_space, observation), **info}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Any]:
        """The first picture, as often as the stack is high."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.frames = [self.picture(observation)] * self.frame_stack
        return np.concatenate(self.frames), self.info(observation, info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat an action (A,) in [-1, 1]; the reward is the sum."""
        scaled = self.low + (self.high - self.low) * (action.reshape(self.low.shape).astype(np.float64) + 1.0) / 2.0
        scaled = scaled.clip(self.low, self.high).astype(self.env.action_space.dtype)
        observation, reward, terminated, truncated, info = self.env.step(scaled)
        self.frames = [*self.frames[1:], self.picture(observation)]
        return np.concatenate(self.frames), float(reward), terminated, truncated, self.info(observation, info)

    def render(self) -> np.ndarray:
        """What the agent sees last, enlarged to at least 256 pixels, for videos."""
        times = -(-256 // min(self.size))
        return np.moveaxis(self.frames[-1], 0, 2).repeat(times, 0).repeat(times, 1)


def make_env(args: Args) -> PixelEnv:
    """Make the environment of `args`. Raises ValueError with one line, if it is unknown or does not fit."""
    options: dict[str, Any] = {"render_mode": "rgb_array"}
    if args.env_id.startswith("dm_control/"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
        # Software OpenGL would take all cores for each picture, and fight with the networks for them.
        os.environ.setdefault("LP_NUM_THREADS", str(torch.get_num_threads()))
        try:
            import shimmy  # noqa: F401  (registers dm_control's tasks)
        except Exception as error:  # it is not there, or OpenGL is not
            hint = "pip install 'shimmy[dm-control]', apt-get install libegl1 libgl1-mesa-dri, or MUJOCO_GL=osmesa"
            needs = f"{args.env_id} needs dm_control and OpenGL ({type(error).__name__}: {error})"
            raise ValueError(f"{needs}; try {hint}") from None
        size = args.image_size
        options["render_kwargs"] = {"width": size, "height": size, "camera_id": args.camera}
    try:
        env = gym.make(args.env_id, **options)
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like DotHazard-v0 or package:Name-v0"
        raise ValueError(f"unknown environment {args.env_id} ({str(error).rstrip('.')}); {hint}") from None
    except Exception as error:  # whatever a third party's environment raises, it is about this id
        raise ValueError(f"could not make {args.env_id}: {type(error).__name__}: {error}") from None
    if args.env_id.startswith("dm_control/"):
        # Where pictures are rendered in software, most of the time goes into shadows and an unused large buffer.
        visual = env.unwrapped._env.physics.model.vis
        visual.quality.shadowsize, visual.global_.offwidth, visual.global_.offheight = 512, size, size
    pixels = PixelEnv(env, args.image_size, args.action_repeat, args.frame_stack)
    try:
        pixels.reset(seed=0)
    except Exception as error:
        hint = "; try MUJOCO_GL=osmesa" if "GL" in str(error) else ""
        raise ValueError(f"{args.env_id} cannot be drawn: {type(error).__name__}: {error}{hint}") from None
    return pixels


# Networks ------------------------------------------------------------------------------------------------------------
class Output(nn.Linear):
    """A linear layer that computes in float32 whatever autocast says: values of Q need more than bfloat16's 8 bits."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs) float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    hidden_layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*hidden_layers, Output(hidden, outputs))


class Encoder(nn.Module):
    """Pictures (B, C, H, W) uint8 -> features (B, F) in (-1, 1): SAC+AE's encoder (Yarats et al., 2019)."""

    def __init__(self, channels: int, size: tuple[int, int], layers: int, filters: int, feature_dim: int) -> None:
        """3 x 3 convolutions, the first with stride 2. Raises ValueError if `size` is too small for the layers."""
        super().__init__()
        self.map = [(side - 3) // 2 + 1 - 2 * (layers - 1) for side in size]
        if min(self.map) < 1:
            raise ValueError(f"pictures of {size[0]} x {size[1]} are too small for --num-layers {layers}; take fewer")
        first = nn.Conv2d(channels, filters, 3, stride=2), nn.ReLU()
        inner = [part for _ in range(layers - 1) for part in (nn.Conv2d(filters, filters, 3), nn.ReLU())]
        self.convolutions = nn.Sequential(*first, *inner)
        self.head = nn.Sequential(nn.Linear(filters * math.prod(self.map), feature_dim), nn.LayerNorm(feature_dim))
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        """The features."""
        return torch.tanh(self.head(self.convolutions(pictures / 255.0 - 0.5).flatten(1)).float())


class PictureDecoder(nn.Module):
    """Features (B, F) -> pictures (B, C, H, W) in about [-0.5, 0.5]: the encoder's mirror."""

    def __init__(self, encoder: Encoder, channels: int, size: tuple[int, int], layers: int, filters: int) -> None:
        """`encoder` gives the sizes."""
        super().__init__()
        self.shape = (filters, *encoder.map)
        self.head = nn.Linear(encoder.head[0].out_features, math.prod(self.shape))
        odd = tuple(1 - side % 2 for side in size)  # an even side loses a pixel on the way in
        inner = [part for _ in range(layers - 1) for part in (nn.ConvTranspose2d(filters, filters, 3), nn.ReLU())]
        last = nn.ConvTranspose2d(filters, channels, 3, stride=2, output_padding=odd)
        self.convolutions = nn.Sequential(*inner, last)
        self.to(memory_format=torch.channels_last)

    def forward(self, feature: Tensor) -> Tensor:
        """The pictures."""
        return self.convolutions(F.relu(self.head(feature)).view(-1, *self.shape)).float()


class ActorVAE(nn.Module):
    """A VAE over the dataset's actions, given features: (B, F), (B, A) -> (B, A) (BCQ, section 5.1)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden: int) -> None:
        """The latent has twice the action's size, as in BCQ's code."""
        super().__init__()
        self.latent_dim = 2 * action_dim
        self.encoder = mlp(feature_dim + action_dim, hidden, 2 * self.latent_dim)
        self.decoder = mlp(feature_dim + self.latent_dim, hidden, action_dim)

    def decode(self, feature: Tensor, latent: Tensor) -> Tensor:
        """Actions (B, A) in (-1, 1)."""
        return torch.tanh(self.decoder(torch.cat((feature, latent), 1)))

    def forward(self, feature: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructed actions (B, A), mean and standard deviation (B, L); `noise` (B, L) is standard normal."""
        mean, log_std = self.encoder(torch.cat((feature, action), 1)).chunk(2, 1)
        std = log_std.clamp(-4.0, 15.0).exp()
        return self.decode(feature, mean + std * noise), mean, std


class LatentPolicy(nn.Module):
    """The policy (B, F) -> z (B, L), bounded (PLAS, section 4)."""

    def __init__(self, feature_dim: int, latent_dim: int, hidden: int, bound: float) -> None:
        """`bound` keeps z where the VAE's prior has mass."""
        super().__init__()
        self.bound = bound
        self.network = mlp(feature_dim, hidden, latent_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """The latent action of each state."""
        return self.bound * torch.tanh(self.network(feature))


class Critic(nn.Module):
    """Two Q functions of features (B, F) and actions (B, A)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden: int) -> None:
        """Each has two hidden layers."""
        super().__init__()
        self.q1 = mlp(feature_dim + action_dim, hidden, 1)
        self.q2 = mlp(feature_dim + action_dim, hidden, 1)

    def forward(self, feature: Tensor, action: Tensor) -> Tensor:
        """Both values (2, B)."""
        inputs = torch.cat((feature, action), 1)
        return torch.stack((self.q1(inputs)[:, 0], self.q2(inputs)[:, 0]))

    def first(self, feature: Tensor, action: Tensor) -> Tensor:
        """The first value alone (B,), which the policy climbs."""
        return self.q1(torch.cat((feature, action), 1))[:, 0]


# Dataset -------------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions: pictures (B, C, H, W) uint8, (B, A), (B,), next pictures, and (B,) 0 where the episode ended."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    discount: Tensor


def shifted(pictures: Tensor, offsets: Tensor) -> Tensor:
    """Pictures (B, C, H, W) moved up and left by offsets (2, B, 1), the pixels of an edge repeated, as DrQ does.

    Without making a larger picture: rows and columns out of range are clamped.
    """
    (count, _, height, width), device = pictures.shape, pictures.device
    rows = (torch.arange(height, device=device) + offsets[0]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=device) + offsets[1]).clamp_(0, width - 1)
    each = torch.arange(count, device=device)[:, None, None]
    return pictures[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Dataset:
    """Transitions from pixels, each picture held once as uint8.

    An episode of T transitions has T + 1 rows. As in V-D4RL, row t holds the picture and what led to it: the action and
    the reward *before* that picture; the first row of an episode has no meaning but its picture.
    """

    def __init__(self, columns: dict[str, np.ndarray], frame_stack: int) -> None:
        """`columns` are `image` (M, H, W, 3), `action` (M, A), `reward`, `discount`, `is_first` (M,): see `load`."""
        self.images = torch.from_numpy(columns["image"]).permute(0, 3, 1, 2).contiguous()
        first = columns["is_first"].nonzero()[0]
        start = first.repeat(np.diff(first, append=len(columns["is_first"])))  # the first row of each row's episode
        rows = (~columns["is_first"]).nonzero()[0]
        self.starts, self.rows = first, torch.from_numpy(rows)
        # The stack before the action, and one more picture after it.
        self.frames = torch.from_numpy(np.maximum(rows[:, None] + np.arange(-frame_stack, 1), start[rows][:, None]))
        self.action = torch.from_numpy(columns["action"][rows].astype(np.float32))
        self.reward = torch.from_numpy(columns["reward"][rows].astype(np.float32))
        self.discount = torch.from_numpy(columns["discount"][rows].astype(np.float32))
        self.returns = np.add.reduceat(np.where(columns["is_first"], 0.0, columns["reward"]), first)

    def to(self, device: torch.device) -> "Dataset":
        """Move all to a device, once."""
        for name in ("images", "frames", "action", "reward", "discount"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def batch(self, index: Tensor, shift: int = 0) -> Batch:
        """The transitions `index` (B,); with `shift`, observation and next observation are each shifted at random."""
        pictures = self.images[self.frames[index]].flatten(1, 2)  # (B, (k + 1) * 3, H, W): one gather for both
        pair = [pictures[:, :-3], pictures[:, 3:]]
        if shift:
            offsets = torch.randint(-shift, shift + 1, (2, 2, len(index), 1), device=index.device)
            pair = [shifted(picture, offsets[:, i]) for i, picture in enumerate(pair)]
        return Batch(pair[0], self.action[index], self.reward[index], pair[1], self.discount[index])

    def sample(self, batch_size: int, shift: int) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        return self.batch(torch.randint(len(self.rows), (batch_size,), device=self.images.device), shift)


def check_settings(path: Path, made_with: dict[str, Any], env: gym.Env) -> None:
    """Raise ValueError with one line if the pictures or the actions of a file are not as `env` has them."""
    here = {"image_size": env.size[0], "frame_stack": env.frame_stack, "action_repeat": env.action_repeat}
    here |= {"env_id": env.spec.id} if env.spec else {}
    other = [f"--{k.replace('_', '-')} {made_with[k]}" for k, value in here.items() if made_with.get(k, value) != value]
    if other:
        raise ValueError(f"{path} was made with {' '.join(other)}, not as here; use the same")


def read_columns(path: Path, env: gym.Env) -> dict[str, np.ndarray]:
    """One npz file's columns. Raises ValueError with one line if it is none, or would run code when read."""
    names = ("image", "action", "reward", "discount", "is_first", "is_terminal")
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in names if name in file}
            made_with = {name: file[name].item() for name in ("action_repeat", "frame_stack", "env_id") if name in file}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: it is encrypted
        raise ValueError(f"{path} is not an npz file ({type(error).__name__})") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds Python objects or is damaged ({error}); save plain arrays") from None
    check_settings(path, made_with, env)

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{path}{message}")

    missing = {"image", "action", "reward"} - set(columns)
    need(not missing, f" lacks {', '.join(sorted(missing))}; image, action and reward are needed")
    image, action = columns["image"], columns["action"]
    expected = f"image (rows, height, width, 3) of uint8 expected, got {image.dtype} {image.shape}"
    need(image.dtype == np.uint8 and image.ndim == 4 and image.shape[3] == 3, f": {expected}")
    rows = len(image)
    for name, values in columns.items():
        need(
            values.dtype.kind in "biuf" and values.ndim > 0, f": numbers by row expected in {name}, got {values.dtype}"
        )
        need(len(values) == rows, f": {name} has {len(values)} rows, image has {rows}")
        numbers = 1 if name in ("image", "action") else values.size // max(rows, 1)
        need(numbers == 1, f": {name} has {numbers} numbers in a row, 1 expected")
    need(action.ndim == 2, f": action (rows, size) expected, got {action.shape}")
    theirs, ours = (image.shape[1:], action.shape[1]), ((*env.observation_space.shape[1:], 3), *env.action_space.shape)
    both = f"images {theirs[0]} and {theirs[1]} actions in the dataset, {ours[0]} and {ours[1]} in the environment"
    need(theirs == ours, f" does not match the environment: {both} (see --image-size)")
    first = columns.get("is_first", np.arange(rows) == 0).astype(bool).reshape(rows)  # V-D4RL: one episode a file
    need(rows > 0 and first[0], ": the first row of an episode expected at the start, is_first is false there")
    short = int((np.diff(first.nonzero()[0], append=rows) < 2).sum())
    need(not short, f": {short} episodes have a length of 0; leave them out")
    terminal = columns.get("is_terminal", np.zeros(rows))
    discount = columns.get("discount", 1.0 - terminal).reshape(rows)
    columns = {"action": action, "reward": columns["reward"].reshape(rows), "discount": discount}
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        columns = {name: values.astype(np.float32) for name, values in columns.items()}
    for name, values in columns.items():  # some first rows hold nan, since nothing led to them
        bad = ~np.isfinite(values[~first]).reshape(rows - first.sum(), -1).all(1)
        need(not bad.any(), f": {int(bad.sum())} of {len(bad)} values of {name} are not finite")
    probability = ((columns["discount"] >= 0.0) & (columns["discount"] <= 1.0))[~first].all()
    need(probability, ": discount and is_terminal between 0 and 1 expected")
    beyond = np.abs(columns["action"][~first]).max(1) - 1.0
    outside = f"{(beyond > 1e-4).sum()} actions are outside of [-1, 1], by up to {beyond.max():.3g}; rescale them"
    need(beyond.max() <= 1e-4, f": {outside}")
    return {"image": image, "is_first": first, **columns}


def load(path: Path, env: gym.Env) -> tuple[Dataset, str]:
    """Read an npz file, or all of a folder in the order of their names. Returns the dataset and its sha256.

    Columns: `image` (M, H, W, 3) uint8, `action` (M, A) in [-1, 1], `reward` (M,), `discount` (M,) or `is_terminal`
    (M,), `is_first` (M,) (a file without it is one episode); `action_repeat`, `frame_stack` and `env_id` are
    compared with those of `env`, if they are there. Raises ValueError with one line about what is wrong.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"there is no dataset {path}; name an npz file or a folder of them, or add --collect random")
    parts, digest = [], hashlib.sha256()
    for file in files:
        parts.append(read_columns(file, env))
        with open(file, "rb") as content:
            hashlib.file_digest(content, lambda: digest)
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}  # twice at most
    return Dataset(columns, env.frame_stack), digest.hexdigest()


# Learning ------------------------------------------------------------------------------------------------------------
class PLAS:
    """Networks, optimizers and updates; an update takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, env: gym.Env, device: torch.device) -> None:
        """Build everything from the sizes of `env`'s spaces; `args` has no None left (see `resolve`)."""
        self.args, self.device, self.signals = args, device, SIGNALS[args.encoder_signal]
        channels, *size = env.observation_space.shape
        (self.action_dim,) = env.action_space.shape
        shape = channels, tuple(size), args.num_layers, args.num_filters
        self.encoder = Encoder(*shape, args.feature_dim)
        # The VAE's own view with `separate`; else the same network, so that one pass serves both.
        separate = args.encoder_signal == "separate"
        self.vae_encoder = Encoder(*shape, args.feature_dim) if separate else self.encoder
        self.picture_decoder = PictureDecoder(self.encoder, *shape) if "reconstruction" in self.signals else None
        self.critic = Critic(args.feature_dim, self.action_dim, args.hidden_dim)
        self.vae = ActorVAE(args.feature_dim, self.action_dim, args.hidden_dim)
        self.policy = LatentPolicy(args.feature_dim, self.vae.latent_dim, args.hidden_dim, args.max_latent_action)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        for module in self.modules().values():
            module.to(device)

        def adam(rate: float, *modules: nn.Module) -> torch.optim.Adam:
            return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=rate, fused=True)

        views = [self.encoder, *[self.vae_encoder] * separate, *[self.picture_decoder] * bool(self.picture_decoder)]
        self.encoder_optimizer = adam(args.learning_rate, *views) if self.signals else None  # none: it stays as drawn
        self.critic_optimizer = adam(args.learning_rate, self.critic)
        self.vae_optimizer = adam(args.learning_rate, self.vae)
        self.policy_optimizer = adam(args.policy_learning_rate, self.policy)
        self.online = [*self.critic.parameters(), *self.policy.parameters()]  # in the order of self.targets
        self.targets = [*self.target_critic.parameters(), *self.target_policy.parameters()]

    def autocast(self) -> torch.autocast:
        """bfloat16 products with `--bf16`; weights, losses and optimizers stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def draw_noise(self, batch_size: int) -> dict[str, Tensor]:
        """The standard normal draws of one update: the VAE's (B, L), and those of the candidates (B, N, L)."""
        latent = self.vae.latent_dim
        noise = {"vae": torch.randn(batch_size, latent, device=self.device)}
        if self.args.policy == "argmax":
            noise["candidates"] = torch.randn(batch_size, self.args.candidates, latent, device=self.device)
        return noise

    def views(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, F) that critics and policy read, and those that the VAE reads: mostly the same ones."""
        feature = self.encoder(pictures)
        return feature, feature if self.vae_encoder is self.encoder else self.vae_encoder(pictures)

    def proposals(self, pictures: Tensor, policy: LatentPolicy, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Actions (B * N, A) to choose from, and the features (B * N, F) of their states: the policy's alone (N = 1).

        With `--policy argmax` N sampled ones; `noise` (B, N, L) is standard normal. BCQ's code clips these latents to
        [-0.5, 0.5], so that they decode to what the data holds.
        """
        feature, vae_feature = self.views(pictures)
        if noise is None:
            return self.vae.decode(vae_feature, policy(feature)), feature
        feature, vae_feature = (view.repeat_interleave(noise.shape[1], 0) for view in (feature, vae_feature))
        return self.vae.decode(vae_feature, noise.flatten(0, 1).clamp(-0.5, 0.5)), feature

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: dict[str, Tensor]) -> Tensor:
        """The critics' target (B,): a weighted minimum of both target values (BCQ, equation 13)."""
        # A context of its own: older autocasts would keep these weights' copies, which no gradient passes.
        with self.autocast():
            action, feature = self.proposals(batch.next_observation, self.target_policy, noise.get("candidates"))
            value, weight = self.target_critic(feature, action), self.args.soft_minimum
        mixed = weight * value.amin(0) + (1.0 - weight) * value.amax(0)
        best = mixed.view(len(batch.reward), -1).amax(1)  # of the candidates, where there are any
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
        """One step of encoder, critics, VAE and policy on one pass of the encoder.

        Each head reads the features, or, where its loss shall not train the encoder, the features detached. So a single
        backward of the sum gives every parameter its own losses' gradient, and the order of calls cannot matter.
        """
        noise = self.draw_noise(len(batch.reward)) if noise is None else noise
        target = None if pretraining else self.critic_target(batch, noise)
        with self.autocast():
            with torch.set_grad_enabled(bool(self.signals)):
                feature, vae_feature = self.views(batch.observation)
            vae_input = vae_feature if "vae" in self.signals else vae_feature.detach()
            parts = self.vae_loss(vae_input, batch, noise["vae"])
            losses = dict(zip(("vae", "vae_action", "vae_kl"), parts, strict=True))
            if self.picture_decoder is not None:
                losses["reconstruction"] = self.picture_loss(feature, batch)
            if not pretraining:
                critic_input = feature if "critic" in self.signals else feature.detach()
                losses["td"] = self.critic_loss(critic_input, batch, target)
        optimizers = [o for o in (self.vae_optimizer, self.encoder_optimizer, self.critic_optimizer) if o]
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(losses[name] for name in ("vae", "reconstruction", "td") if name in losses).backward()
        for optimizer in optimizers:
            optimizer.step()  # what no loss reached has no gradient and stays
        if not pretraining:
            if self.args.policy == "latent":
                losses |= self.update_policy(feature.detach(), vae_feature.detach())
            with torch.no_grad():
                torch._foreach_lerp_(self.targets, self.online, self.args.tau)
            losses["q_value"] = target.mean()
        return {name: value.detach() for name, value in losses.items()}

    def update_policy(self, feature: Tensor, vae_feature: Tensor) -> dict[str, Tensor]:
        """One step of the latent policy up the first critic, through the VAE's decoder (PLAS, equation 5).

        Its gradient reaches neither of them: only the policy's parameters are asked for.
        """
        with self.autocast():
            loss = -self.critic.first(feature, self.vae.decode(vae_feature, self.policy(feature))).mean()
        self.policy_optimizer.zero_grad()
        loss.backward(inputs=list(self.policy.parameters()))
        self.policy_optimizer.step()
        return {"policy": loss}

    def gradient_statistics(self, batch: Batch) -> dict[str, float]:
        """Norms of the losses' gradients in the encoder, whether they train it or not; the cosine of critic and VAE.

        With `separate` each is in its own encoder and there is no cosine. Leaves the run's random stream as it is.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            noise = self.draw_noise(len(batch.reward))
        target = self.critic_target(batch, noise)
        losses = {
            "critic": (self.encoder, lambda feature: self.critic_loss(feature, batch, target)),
            "vae": (self.vae_encoder, lambda feature: self.vae_loss(feature, batch, noise["vae"])[0]),
        }
        if self.picture_decoder is not None:
            losses["reconstruction"] = self.encoder, lambda feature: self.picture_loss(feature, batch)
        gradients, result = [], {}
        for name, (encoder, loss) in losses.items():  # one after the other: each keeps all of its activations
            with self.autocast():
                value = loss(encoder(batch.observation))
            parts = torch.autograd.grad(value, list(encoder.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
            result[f"charts/encoder_gradient_{name}"] = float(gradients[-1].norm())
        if self.vae_encoder is self.encoder:
            result["charts/encoder_gradient_cosine"] = float(F.cosine_similarity(*gradients[:2], 0))
        return result

    @torch.no_grad()
    def act(self, observation: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Actions (N, A) for pictures (N, C, H, W) uint8, and the first critic's values (N,) of them."""
        count, noise = len(observation), None
        if self.args.policy == "argmax":
            shape = count, self.args.acting_candidates, self.vae.latent_dim
            noise = torch.randn(shape, generator=generator).to(self.device)
        with self.autocast():
            action, feature = self.proposals(torch.from_numpy(observation).to(self.device), self.policy, noise)
            value, best = self.critic.first(feature, action).view(count, -1).max(1)
        action = action.view(count, -1, self.action_dim)[torch.arange(count), best]
        return action.cpu().numpy(), value.cpu().numpy()

    @torch.no_grad()
    def features(self, observation: np.ndarray) -> np.ndarray:
        """The critics' features (N, F) of pictures (N, C, H, W) uint8."""
        with self.autocast():
            parts = torch.from_numpy(observation).to(self.device).split(256)
            return torch.cat([self.encoder(part) for part in parts]).cpu().numpy()

    @torch.no_grad()
    def prior_action_error(self, batch: Batch) -> float:
        """Mean squared error of the action decoded from z = 0: whether the state alone tells the data's action."""
        with self.autocast():
            feature = self.vae_encoder(batch.observation)
            action = self.vae.decode(feature, torch.zeros(len(feature), self.vae.latent_dim, device=self.device))
        return float(F.mse_loss(action, batch.action))

    def modules(self) -> dict[str, nn.Module]:
        """All networks by name."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}
        if self.vae_encoder is self.encoder:
            del named["vae_encoder"]
        return named

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        optimizers = {name: value for name, value in vars(self).items() if isinstance(value, torch.optim.Optimizer)}
        return {name: part.state_dict() for name, part in {**self.modules(), **optimizers}.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, or any of its parts."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(
    agent: PLAS, environments: list[gym.Env], seed: int, stopped: Callable[[], Any] = lambda: False, first: int = 0
) -> dict[str, float]:
    """Play one episode in each environment, in lock-step, and compare the critic with the returns that followed.

    Episode i, counted from `first`, always has `episode_seed(seed, i, stream=1)`; training's random streams are not
    touched. Returns `episodic_return`, `return_std`, `episodic_length`, and `q_error` (mean squared), `q_bias`,
    `q_correlation` of Q(s, pi(s)) against the discounted return from there, over those states after which at least 90 %
    of the discounted future was seen. `q_start_*` are the same over the first states among them. Nothing, once
    `stopped()` is true.
    """
    generator = torch.Generator().manual_seed(seed)
    observations = [env.reset(seed=episode_seed(seed, i, stream=1))[0] for i, env in enumerate(environments, first)]
    traces: list[list[tuple[float, float]]] = [[] for _ in environments]  # value and reward of each step
    ended, active = [False] * len(environments), list(range(len(environments)))
    while active:
        if stopped():
            return {}
        actions, values = agent.act(np.stack([observations[i] for i in active]), generator)
        running = []
        for i, action, value in zip(active, actions, values.tolist(), strict=True):
            observations[i], reward, ended[i], truncated, _ = environments[i].step(action)
            traces[i].append((value, reward))
            if not (ended[i] or truncated):
                running.append(i)
        active = running
    gamma = agent.args.gamma
    horizon = math.log(0.1) / math.log(gamma) if 0.0 < gamma < 1.0 else math.inf if gamma else 1.0
    pairs, starts = [], []
    for trace, terminal in zip(traces, ended, strict=True):
        following = 0.0
        for left, (value, reward) in enumerate(reversed(trace), start=1):
            following = reward + gamma * following
            if terminal or left >= horizon:
                pairs.append((value, following))
                if left == len(trace):
                    starts.append((value, following))
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


def record_videos(agent: PLAS, args: Args, folder: Path, stopped: Callable[[], Any]) -> list[Path]:
    """Write mp4 videos of the first three evaluation episodes and return their paths."""
    env, dm_control = make_env(args), args.env_id.startswith("dm_control/")
    fps = 1.0 / env.unwrapped.control_timestep() if dm_control else env.metadata.get("render_fps", 30)
    recorder = gym.wrappers.RecordVideo(
        env, str(folder), episode_trigger=lambda _: True, name_prefix="evaluation",
        fps=max(1, round(fps / args.action_repeat)), disable_logger=True,
    )  # fmt: skip
    for i in range(3):
        evaluate(agent, [recorder], args.seed, stopped, first=i)
    recorder.close()
    return sorted(folder.glob("evaluation-*.mp4"))


def probe(agent: PLAS, pictures: np.ndarray, states: np.ndarray) -> float:
    """R2 of the true state (N, S) by ridge regression on the features: fitted on one half, scored on the other.

    The mean over the dimensions of the state that vary.
    """
    features = agent.features(pictures).astype(np.float64)
    features = np.concatenate((features, np.ones((len(features), 1))), 1)
    half, states = len(features) // 2, states[:, states.std(0) > 1e-6]
    fit, x, y = features[:half], features[half:], states[half:]
    weights = np.linalg.solve(fit.T @ fit + 1e-3 * np.eye(fit.shape[1]), fit.T @ states[:half])
    error = np.square(x @ weights - y).mean(0) / y.var(0)
    return float(1.0 - error.mean())


def sac_ae_policy(path: Path, env: gym.Env) -> Callable[[gym.Env, np.ndarray], np.ndarray]:
    """The mean action of a model that sac_ae_pixels.py saved. Raises ValueError if it is none or does not fit `env`."""
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        weights, theirs = model["actor"], json.loads(model["arguments"])
        actions = len(weights["trunk.4.bias"]) // 2
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is not a model of sac_ae_pixels.py ({type(error).__name__})") from None
    check_settings(path, {name: theirs[name] for name in theirs if name != "env_id"}, env)  # its task may be another
    if actions != env.action_space.shape[0]:
        raise ValueError(f"{path} has {actions} actions, the environment {env.action_space.shape[0]}")

    def layer(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    @torch.no_grad()
    def act(_: gym.Env, observation: np.ndarray) -> np.ndarray:
        hidden = torch.from_numpy(observation)[None] / 255.0
        for i in range(theirs["num_layers"]):
            hidden = F.relu(F.conv2d(hidden, *layer(f"encoder.convs.{i}"), stride=1 if i else 2))
        hidden = F.linear(hidden.permute(0, 2, 3, 1).flatten(1), *layer("encoder.fc"))
        hidden = torch.tanh(F.layer_norm(hidden, hidden.shape[1:], *layer("encoder.ln")))
        for name in ("trunk.0", "trunk.2"):
            hidden = F.relu(F.linear(hidden, *layer(name)))
        return torch.tanh(F.linear(hidden, *layer("trunk.4")).chunk(2, 1)[0])[0].numpy()

    return act


def behaviour(name: str, generator: np.random.Generator, env: gym.Env) -> Callable[[gym.Env, np.ndarray], np.ndarray]:
    """A policy (environment, observation) -> action (A,): random, expert (scripted), medium, or a model's.

    Medium is the expert with a quarter of its actions random and noise of 0.5 on the others.
    """

    def uniform() -> np.ndarray:
        return generator.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)

    def expert(env: gym.Env, _: np.ndarray) -> np.ndarray:
        if not hasattr(env.unwrapped, "expert_action"):
            raise ValueError(f"{env.unwrapped} has no expert_action; take --collect random or a model.pt")
        return env.unwrapped.expert_action()  # in [-1, 1], whatever the environment's bounds

    def medium(env: gym.Env, observation: np.ndarray) -> np.ndarray:
        noisy = expert(env, observation) + 0.5 * generator.standard_normal(env.action_space.shape)
        return uniform() if generator.random() < 0.25 else noisy.clip(-1.0, 1.0).astype(np.float32)

    known = {"random": lambda *_: uniform(), "medium": medium, "expert": expert, "scripted": expert}
    if name in known:
        return known[name]
    if not Path(name).is_file():
        raise ValueError(f"--collect {name}: random, medium, scripted or a model.pt expected")
    return sac_ae_policy(Path(name), env)


def play(env: gym.Env, act: Callable, seed: int, longest: float = math.inf) -> Iterator[tuple]:
    """The rows of one episode, of at most `longest` steps, in the order of `as_columns`."""
    observation, info = env.reset(seed=seed)
    yield observation[-3:].copy(), np.zeros(env.action_space.shape, np.float32), 0.0, 1.0, True, info["state"]
    length, done = 0, False
    while not done:
        action = act(env, observation)
        observation, reward, terminated, truncated, info = env.step(action)
        yield observation[-3:].copy(), action, reward, 1.0 - terminated, False, info["state"]
        length += 1
        done = terminated or truncated or length >= longest


def as_columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    """Rows of `play` as columns, which `load` describes, and `state` (M, S)."""
    image, action, reward, discount, is_first, state = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "image": np.moveaxis(image, 1, 3), "action": action, "reward": reward.astype(np.float32),
        "discount": discount.astype(np.float32), "is_first": is_first, "state": state,
    }  # fmt: skip


def collect(env: gym.Env, policy: str, steps: int, seed: int, longest: float = math.inf) -> dict[str, np.ndarray]:
    """Play episodes, of at most `longest` steps, for at least `steps` steps in all.

    Returns columns as `load` describes them, and `state` (M, S).
    """
    act, rows, episode = behaviour(policy, np.random.default_rng(seed), env), [], 0
    while len(rows) - episode < steps:  # an episode has a row more than steps
        rows += play(env, act, episode_seed(seed, episode, stream=4), longest)
        episode += 1
    return as_columns(rows)


def find_dataset(args: Args, env: gym.Env) -> tuple[Dataset, str]:
    """Load `args.dataset`, and collect it before if it is missing and may be. Raises ValueError with one line."""
    path, policy = Path(args.dataset), args.collect
    if args.env_id.startswith("DotHazard") and args.dataset in ("random", "medium", "expert"):
        path, policy = Path("data") / f"{args.env_id}_{args.dataset}_{args.collect_steps}.npz", args.dataset
    elif not path.exists() and path.suffix != ".npz":
        named = path.with_name(path.name + ".npz")
        path = named if policy or named.exists() else path
    if not path.exists() and policy:
        print(f"collecting {args.collect_steps:,} steps ({policy}) into {path}")
        about = {"action_repeat": args.action_repeat, "env_id": env.spec.id}
        own = path.with_name(f"{path.stem}-{os.getpid()}.npz")  # other runs may collect the same at the same time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = collect(env, policy, args.collect_steps, seed=0)  # the same data for every --seed
            write_atomically(own, lambda file: np.savez_compressed(file, **about, **columns))
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; choose another --dataset") from None
        if path.exists():
            own.unlink()
        else:
            own.replace(path)
    return load(path, env)


# --- run folder, logging, checkpoints: the same text in every script ---
def usage_error(message: str) -> NoReturn:
    """Print one line about a user's mistake and exit with status 2; called before anything is created."""
    print("error:", *message.split(), file=sys.stderr)  # others' messages may have several lines
    raise SystemExit(2)


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
    """The run folder, everything that is written into it, and the signals that end a run."""

    def __init__(self, args: Args) -> None:
        """Create `{runs_dir}/{run_name}`, or load its checkpoint with `--resume`. Exits 2 if that is not possible."""
        if args.resume and not args.run_name:
            usage_error("--resume needs the --run-name of the run to continue")
        if args.track:
            try:
                import wandb
            except ModuleNotFoundError:
                usage_error("--track needs wandb; try pip install wandb, or leave it out")
        if args.capture_video and importlib.util.find_spec("moviepy") is None:
            usage_error("--capture-video needs moviepy; try pip install moviepy, or leave it out")
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.name = re.sub(r"[/\\:]", "-", name)
        if self.name in ("", ".", "..") or not self.name.isprintable() or len(os.fsencode(self.name)) > 200:
            usage_error(f"--run-name {name[:50]!r}: a plain folder name of at most 200 bytes expected")
        self.folder = Path(args.runs_dir) / self.name
        self.settings = {k: v for k, v in asdict(args).items() if k not in ("resume", "runs_dir", "run_name")}
        self.eval_rows: list[dict[str, float]] = []
        self.signal, self.at_once, self.wandb, self.checkpoint = 0, False, None, None
        if self.folder.exists() and not args.resume:
            usage_error(f"{self.folder} exists; add --resume to continue it, or choose another --run-name")
        if self.folder.exists():
            found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"it is a file"}
            if found and not found & {"args.json", "args.json.tmp", "checkpoint.pt", "lock"}:
                usage_error(f"{self.folder} exists but is not a run folder; choose another --run-name")
        try:
            self.folder.mkdir(parents=True, exist_ok=args.resume)
            self.lock = self.take_lock()
        except FileExistsError:  # another process was faster
            usage_error(f"{self.folder} exists; choose another --run-name")
        except OSError as error:
            usage_error(f"cannot create {self.folder}: {error.strerror}; choose another --runs-dir")
        if args.resume:
            self.load_checkpoint()
        if self.checkpoint is None:
            commit = None
            with contextlib.suppress(OSError):  # no git here
                git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
                commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
            about = {
                "script": Path(__file__).stem, "arguments": self.settings, "command": sys.argv,
                "commit": commit, "python": sys.version.split()[0],
                "packages": {d.name: d.version for d in importlib.metadata.distributions()},
            }  # fmt: skip
            write_atomically(self.folder / "args.json", lambda f: f.write(json.dumps(about, indent=1).encode()))
            shutil.copy(__file__, self.folder / Path(__file__).name)
        step = self.checkpoint["step"] if self.checkpoint else 0
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        if args.track:
            try:
                wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=self.name, id=self.name,
                    resume="allow", config=self.settings, dir=str(self.folder), save_code=True,
                )  # fmt: skip
            except Exception as error:  # no key, a bad name, no network; nothing is removed: it may be a run of old
                hint = "run `wandb login`" if "key" in str(error) or "login" in str(error) else "change the name"
                hint += f", or set WANDB_MODE=offline, and go on with --run-name {self.name} --resume"
                usage_error(f"wandb: {error}; {hint}")
            wandb.define_metric("*", step_metric="global_step")
            self.wandb = wandb
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())
        self.started = self.shown = self.window_time = time.monotonic()
        self.window_step = step
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def take_lock(self) -> BinaryIO:
        """Keep other processes out of the run folder while this one lives. Exits 2 if one is there already."""
        file = open(self.folder / "lock", "ab")  # noqa: SIM115  (open until the run is closed)
        try:  # not flock, which children inherit: one that outlives this process would keep the folder
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            usage_error(f"{self.folder} is in use by another process; end it first, or choose another --run-name")
        except (NameError, OSError) as error:  # not on this system, or not on this file system
            print(f"warning: {self.folder} cannot be locked ({error}); start no second process on it", file=sys.stderr)
        return file

    def on_signal(self, number: int, _: Any) -> None:
        """Remember the signal; the loop saves and stops after its current step. What is made anew stops `at_once`."""
        self.signal = number
        if self.at_once:
            raise KeyboardInterrupt

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write scalars to TensorBoard and wandb; a loss that is not finite ends the run."""
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                self.fail(f"step {step}: {name} is {value}; try a smaller learning rate")
            self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({**metrics, "global_step": step})

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log an evaluation and write `eval.csv` (which has no clock, so that equal runs have equal files)."""
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.eval_rows.append({"step": step, **metrics})
        self.write_evaluations()

    def write_evaluations(self) -> None:
        """Write all evaluations so far to `eval.csv`."""
        rows = [row.values() for row in self.eval_rows]
        lines = [",".join(map(str, row)) + "\n" for row in [list(*self.eval_rows[:1]), *rows]]
        write_atomically(self.folder / "eval.csv", lambda file: file.write("".join(lines).encode()))

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """Write a matplotlib figure to `{name}.png` in the run folder, TensorBoard and wandb (as images/{name})."""
        path = self.folder / f"{name}.png"
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
        figure.clear()
        image = np.asarray(PIL.Image.open(path).convert("RGB"))
        self.writer.add_image(f"images/{name}", image, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({f"images/{name}": self.wandb.Image(image), "global_step": step})

    def log_videos(self, step: int, paths: list[Path]) -> None:
        """Show videos that lie in the run folder in wandb too."""
        if self.wandb and paths:
            videos = [self.wandb.Video(str(path), format="mp4") for path in paths]
            self.wandb.log({"videos/evaluation": videos, "global_step": step})

    def progress(self, step: int, text: str) -> None:
        """Move the bar; without a terminal, print a line every 10 seconds."""
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if now - self.shown > 10.0:
            self.shown = now
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.disable:
                done = f"step {step:,} of {self.bar.total:,}, {now - self.started:.0f} s"
                print(f"{self.name}: {done}, {text}", flush=True)

    def steps_per_second(self, step: int) -> float:
        """Environment steps per second since the last call."""
        then, self.window_time = self.window_time, time.monotonic()
        steps, self.window_step = step - self.window_step, step
        return steps / max(self.window_time - then, 1e-9)

    def save_checkpoint(self, step: int, state: dict[str, Any], finished: bool = False) -> None:
        """Write `state` (tensors, numbers and strings only) and this block's own to `checkpoint.pt`."""
        own = {
            "script": Path(__file__).stem, "arguments": json.dumps(self.settings), "step": step,
            "eval_rows": self.eval_rows, "finished": finished, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }  # fmt: skip
        path = self.folder / "checkpoint.pt"
        try:
            write_atomically(path, lambda file: torch.save({**own, **state}, file))
        except (OSError, RuntimeError) as error:  # the disk is full: the checkpoint before is still whole
            self.fail(f"step {step}: cannot write {path} ({error})")

    def load_checkpoint(self) -> None:
        """Read the folder's checkpoint, if there is one. Exits 2 if it is not one of this script and arguments."""
        path, about = self.folder / "checkpoint.pt", self.folder / "args.json"
        try:
            if path.exists():
                if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                    raise ValueError(damaged)
                self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                script, arguments = self.checkpoint["script"], dict(json.loads(self.checkpoint["arguments"]))
                self.eval_rows, finished = self.checkpoint["eval_rows"], self.checkpoint["finished"]
            elif about.exists():
                recorded = json.loads(about.read_text())
                script, arguments = recorded["script"], dict(recorded["arguments"])
            else:
                return  # killed before anything was written
        except Exception as error:  # a damaged file raises nearly anything
            self.refuse_damaged(path if path.exists() else about, error)
        if script != Path(__file__).stem:
            usage_error(f"{self.folder} is a run of {script}.py; choose another --run-name for {Path(__file__).name}")
        changed = [k for k in {**arguments, **self.settings} if arguments.get(k) != self.settings.get(k)]
        if changed:
            listed = ", ".join(f"{k} was {arguments.get(k)}, now {self.settings.get(k)}" for k in changed)
            usage_error(f"--resume with changed arguments: {listed}; repeat the old ones, or choose another --run-name")
        if self.checkpoint and finished:
            print(f"{self.folder} is finished")
            raise SystemExit(0)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Whatever goes wrong in here, the checkpoint is to blame: exits 2 with one line."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self.close()
            self.refuse_damaged(self.folder / "checkpoint.pt", error)

    def refuse_damaged(self, path: Path, error: Exception) -> NoReturn:
        """Exit 2: a file of the run folder is not what was written."""
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        usage_error(f"{path} is damaged ({reason}); restore a copy, or start again with another --run-name")

    def restore_random_state(self) -> None:
        """Continue the checkpoint's random streams, and its eval.csv: a killed run may have written further."""
        with self.restoring():
            torch.set_rng_state(self.checkpoint["torch_rng"])
            if self.checkpoint["cuda_rng"] is not None and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(self.checkpoint["cuda_rng"])
        self.write_evaluations()

    def fail(self, message: str) -> NoReturn:
        """End the run with one line and status 1; the last checkpoint stays as it is."""
        path = self.folder / "checkpoint.pt"
        last = f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        self.close()
        print(f"error: {message}; {last}", file=sys.stderr)
        raise SystemExit(1)

    def stop(self) -> NoReturn:
        """End the run after a signal, with the status that a shell gives it (143 or 130)."""
        self.close()
        print(f"stopped by signal {self.signal}; continue with --run-name {self.name} --resume", file=sys.stderr)
        raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Close the bar and the loggers and give the signals back."""
        self.bar.close()
        self.writer.close()
        if self.wandb:
            self.wandb.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()


# --- end of the common block ---


# Pictures ------------------------------------------------------------------------------------------------------------
def draw_learning_curve(rows: list[dict[str, float]], levels: dict[str, float], title: str) -> Figure:
    """Return, and the critic's error and correlation against what followed, over gradient steps."""
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


# Main ----------------------------------------------------------------------------------------------------------------
def resolve(args: Args) -> Args:
    """Fill in what depends on the environment and check all sizes. Raises ValueError with one line."""
    args.env_id = re.sub(r"^([a-z]\w*-(?!v\d+$)[a-z]\w*)$", r"dm_control/\1-v0", args.env_id)  # finger-spin
    own = args.env_id.split("-")[0]
    for name, value in {**DEFAULTS_BY_ENVIRONMENT[""], **DEFAULTS_BY_ENVIRONMENT.get(own, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.encoder_signal not in SIGNALS:
        near = difflib.get_close_matches(args.encoder_signal, SIGNALS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--encoder-signal {args.encoder_signal}: one of {', '.join(SIGNALS)} expected{hint}")
    may_be_zero = {"seed", "pretrain_steps", "random_shift", "camera"}
    for name, value in asdict(args).items():
        least = 1 if type(value) is int and name not in may_be_zero else 0
        most = 1 if name in ("gamma", "tau", "soft_minimum") else 2**63 - 1 if type(value) is int else math.inf
        if isinstance(value, int | float) and not (math.isfinite(value) and least <= value <= most):
            expected = f"at most {most}" if value > most else f"a number of at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {expected} expected")
    if args.pretrain_steps >= args.total_timesteps:
        steps = f"--pretrain-steps {args.pretrain_steps} of --total-timesteps {args.total_timesteps}"
        raise ValueError(f"{steps}: critics and policy would learn nothing; raise that or lower this")
    return args


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, up to 32 MiB each (its limit) and 2 GiB in all; other systems do as they do.

    It would give a batch of pictures back to the system and get it again, page by page, several times an update.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def save_model(agent: PLAS, args: Args, path: Path) -> None:
    """Write the weights alone (and the arguments, from which `PLAS` can be built again)."""
    state = {name: module.state_dict() for name, module in agent.modules().items() if "target" not in name}
    write_atomically(path, lambda file: torch.save({**state, "arguments": json.dumps(asdict(args))}, file))


def reference_levels(
    env: gym.Env, dataset: Dataset, episodes: int, seed: int, stopped: Callable[[], Any]
) -> dict[str, float]:
    """Mean returns of the dataset's behaviour, of random actions and, where the environment scripts one, the expert.

    Incomplete, once `stopped()` is true.
    """
    levels = {"behaviour": float(dataset.returns.mean())}
    for name in ("random", "expert"):
        with contextlib.suppress(ValueError):  # no expert
            act = behaviour(name, np.random.default_rng(seed), env)
            played = (play(env, act, episode_seed(seed, i, stream=1)) for i in range(episodes) if not stopped())
            levels[name] = float(np.mean([sum(row[2] for row in rows) for rows in played] or [math.nan]))
    return levels


def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        args = resolve(args)
        env = make_env(args)
        Encoder(1, env.observation_space.shape[1:], args.num_layers, 1, 1)  # are the pictures large enough?
        if args.random_shift >= min(env.size):
            raise ValueError(f"--random-shift {args.random_shift}: less than the pictures' {min(env.size)} expected")
        dataset, digest = find_dataset(args, env)
    except ValueError as error:
        usage_error(str(error))
    environments = [make_env(args) for _ in range(args.eval_episodes)]
    run = Run(args)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products fail on a GPU
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    if max(env.size) < 64:
        torch.set_num_threads(1)  # these products are too small for two threads
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    agent, dataset = PLAS(args, env, device), dataset.to(device)
    fixed = dataset.batch(torch.linspace(0, len(dataset.rows) - 1, min(2_000, len(dataset.rows)), device=device).long())
    wide = collect(env, "random", 2_000, args.seed + 1, longest=10)  # more kinds of states than a policy visits
    stacks = Dataset(wide, args.frame_stack)
    pictures = stacks.batch(torch.arange(len(stacks.rows))).observation.numpy()
    states = wide["state"][stacks.rows - 1]

    def evaluate_policy() -> bool:
        """Evaluate at this step, log it, keep the best model; False if a signal came first."""
        metrics = evaluate(agent, environments, args.seed, lambda: run.signal)
        if not metrics:
            return False
        metrics["prior_action_error"] = agent.prior_action_error(fixed)
        metrics["probe_r2"] = probe(agent, pictures, states)
        metrics |= {name.removeprefix("charts/"): v for name, v in agent.gradient_statistics(fixed).items()}
        metrics |= {f"{name}_return": value for name, value in levels.items()}
        run.log_evaluation(step, metrics)
        if metrics["episodic_return"] >= max(row["episodic_return"] for row in run.eval_rows):
            save_model(agent, args, run.folder / "best_model.pt")
        return True

    if run.checkpoint is None:
        step, episodes = 0, min(args.eval_episodes, 20)
        levels = reference_levels(env, dataset, episodes, args.seed, lambda: run.signal)
        if run.signal:
            run.stop()  # nothing has been learnt yet
    else:
        with run.restoring():
            if run.checkpoint["dataset"] != digest:
                run.close()
                usage_error(f"{args.dataset} is not the dataset that {run.folder} began with; restore it")
            step, levels, evaluation_due = (run.checkpoint[name] for name in ("step", "levels", "evaluation_due"))
            if missing := agent.state_dict().keys() - run.checkpoint["agent"].keys():
                raise LookupError(f"without {missing}")
            agent.load_state_dict(run.checkpoint["agent"])
        run.restore_random_state()
        if evaluation_due and not evaluate_policy():
            run.stop()  # it is still due in the checkpoint
    chosen = {name: getattr(args, name) for name in DEFAULTS_BY_ENVIRONMENT[""]}
    print(f"{run.name}: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    run.writer.add_text(
        "losses/td", "Not comparable between encoder signals, and no evidence that Q is right: see q_error"
    )
    told = ", ".join(f"{name} {value:.2f}" for name, value in levels.items())
    print(f"{run.name}: {len(dataset.rows):,} transitions of {len(dataset.starts):,} episodes; mean returns: {told}")

    losses: dict[str, Tensor] = {}
    for step in range(step + 1, args.total_timesteps + 1):  # noqa: B020
        batch = dataset.sample(args.batch_size, args.random_shift)
        losses |= agent.update(batch, pretraining=step <= args.pretrain_steps)
        last, evaluating = step == args.total_timesteps, step % args.eval_frequency == 0
        run.progress(step, f"return {run.eval_rows[-1]['episodic_return']:.2f}" if run.eval_rows else "")
        if step % 500 == 0 or evaluating or last or run.signal or step % args.checkpoint_frequency == 0:
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            run.log(step, {f"losses/{name}": value for name, value in losses.items()})
            run.log(step, {"charts/SPS": run.steps_per_second(step), **agent.gradient_statistics(batch)})
        evaluation_due = (evaluating or last) and not evaluate_policy()
        if step % args.checkpoint_frequency == 0 or last or run.signal:
            state = {"agent": agent.state_dict(), "dataset": digest, "levels": levels, "evaluation_due": evaluation_due}
            run.save_checkpoint(step, state)
            if run.signal and (evaluation_due or not last):
                run.stop()

    save_model(agent, args, run.folder / "model.pt")
    run.log_figure(step, "learning_curve", draw_learning_curve(run.eval_rows, levels, run.name))
    if agent.picture_decoder is not None:
        run.log_figure(step, "reconstruction", draw_reconstruction(agent, fixed))
    paths = record_videos(agent, args, run.folder / "videos", lambda: run.signal) if args.capture_video else []
    if run.signal:
        run.stop()
    run.log_videos(step, paths)
    run.save_checkpoint(step, {"agent": agent.state_dict()}, finished=True)
    run.close()
    score = "return {episodic_return:.2f}, squared error of Q {q_error:.3f}".format(**run.eval_rows[-1])
    print(f"last evaluation: {score}; see {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
