"""HyAR-TD3: reinforcement learning with hybrid (discrete + continuous) actions.

A conditional VAE turns each hybrid action into one continuous latent action, and TD3 learns in that
latent space; the policy's output is decoded into a discrete action and that action's parameters.

Paper: Li et al., "HyAR: Addressing Discrete-Continuous Action Reinforcement Learning via Hybrid Action
Representation", ICLR 2022, https://arxiv.org/abs/2109.05490

    python hyar_td3.py --env Platform-v0
    python hyar_td3.py --env Goal-v0 --seed 2 --capture-video
    python hyar_td3.py --env SomePackage:Their-v0 --total-timesteps 100000 --run-name mine --resume

Docs: docs/hyar_td3.md
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "tensorboard==2.21.0",
#   "pillow==11.3.0", "gymnasium==1.4.0", "moviepy==2.2.1",
# ]
# ///

from __future__ import annotations

import contextlib
import copy
import difflib
import errno
import importlib.metadata
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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ModuleNotFoundError):  # a copy of this file alone still runs on any other environment
    import envs  # noqa: F401  (registers Platform-v0, Goal-v0, HardGoal-v0, CatchPoint-v0, HardMove-v0, SimpleMove-v0)

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
    checkpoint_frequency: int = 10_000
    """steps between checkpoints"""
    eval_frequency: int = 2_500
    """steps between evaluations"""
    eval_episodes: int = 100
    """episodes per evaluation, always with the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Platform-v0"
    """the environment: any Gymnasium id with a hybrid action space, `package:Name-v0` imports the package first"""
    total_timesteps: int | None = None
    """environment steps of the learning phase (if left out: set per environment; the random phase is extra)"""
    max_episode_steps: int | None = None
    """steps after which an episode is truncated (if left out: the environment's own limit)"""
    learning_rate: float = 3e-4
    """learning rate of the actor and the critics"""
    buffer_size: int | None = None
    """number of newest transitions that the critics sample (if left out: set per environment); the VAE samples all"""
    gamma: float = 0.99
    """the discount factor gamma"""
    bootstrap_at_limit: bool = True
    """if toggled off, a time limit counts as a terminal state, as in the original code"""
    tau: float = 0.005
    """target smoothing coefficient"""
    batch_size: int = 128
    """batch size of the actor and the critics"""
    policy_noise: float = 0.1
    """standard deviation of the target policy's smoothing noise"""
    noise_clip: float = 0.5
    """clipping bound of the target policy's smoothing noise"""
    exploration_noise: float = 0.1
    """standard deviation of the exploration noise, after a linear decay from 1"""
    exploration_noise_episodes: int = 1_000
    """episodes over which the exploration noise decays"""
    learning_starts: int = 128
    """step of the learning phase at which updates begin"""
    policy_frequency: int = 2
    """critic updates per update of the actor and the targets"""
    policy_average: float = 5e-4
    """rate of the moving average of the actor's weights, which is evaluated alongside the actor but does not act"""
    random_episodes: int | None = None
    """episodes of the random phase, on which the VAE is pre-trained (if left out: set per environment)"""
    discrete_embedding: Literal["learned", "one-hot"] = "learned"
    """embedding of the discrete action: a trained table (the paper's) or fixed one-hot vectors"""
    discrete_latent_dim: int | None = None
    """size of a discrete action's embedding (if left out: set per environment; one-hot: the number of actions)"""
    parameter_latent_dim: int | None = None
    """size of the VAE's latent for the action's parameters (if left out: set per environment)"""
    vae_pretrain_steps: int = 5_000
    """gradient steps of the VAE on the random phase's transitions"""
    vae_batch_size: int = 64
    """batch size of the VAE"""
    vae_learning_rate: float = 1e-4
    """learning rate of the VAE"""
    vae_update_episodes: int | None = None
    """episodes between further VAE steps, each with an update of the latent range (if left out: set per environment)"""
    parameter_weight: float = 2.0
    """weight of the parameters' reconstruction error in the VAE's loss"""
    state_weight: float = 1.0
    """weight of the state-change prediction error in the VAE's loss"""
    kl_weight: float = 0.5
    """weight of the KL divergence (mean over batch and dimensions) in the VAE's loss"""
    latent_range_tail: float = 0.02
    """fraction of latents outside the latent range on each side (0.02: c = 96 % in the paper)"""
    relabel: bool = True
    """if toggled, latent actions that the current VAE would decode differently are replaced in each batch"""
    relabel_threshold: float = 5.0
    """a latent is replaced if its state-change error is above this many times the VAE's mean error"""
    relabel_in_latent_range: bool = True
    """if toggled off, that error is computed at the policy's z, not scaled to the latent range (as in the original)"""
    rebuild_vae_optimizer: bool = False
    """if toggled, each VAE step uses a new Adam, as the original code does (for the ablation)"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int]] = {  # the original code's; "" applies where nothing is listed above
    "Goal": {"total_timesteps": 300_000, "random_episodes": 20_000},
    "HardGoal": {"total_timesteps": 300_000, "random_episodes": 20_000},
    "CatchPoint": {"total_timesteps": 1_000_000, "discrete_latent_dim": 4, "parameter_latent_dim": 4},
    "HardMove": {"total_timesteps": 1_000_000, "buffer_size": 1_000_000},
    "SimpleMove": {"total_timesteps": 1_000_000, "vae_update_episodes": 100},
    "": {
        "total_timesteps": 200_000,
        "random_episodes": 5_000,
        "buffer_size": 100_000,
        "discrete_latent_dim": 6,
        "parameter_latent_dim": 6,
        "vae_update_episodes": 10,
    },
}


# Environment ---------------------------------------------------------------------------------------------------------
class HybridEnv(gym.Wrapper):
    """An environment with hybrid actions, as the networks see it.

    Observations are (S,) float32, scaled to about [-1, 1]. An action is `(k, x)`: its index k in 0..K-1 and parameters
    x (P,) in [-1, 1], with zeros after the action's own; `mask` (K, P) is 1 at the parameters that an action has.
    The action space is `Tuple(Discrete(K), Tuple(Box, ..., Box))`, a Box per action, or `Tuple(Discrete(K), Box)`.
    """

    def __init__(self, env: gym.Env, scale: ObservationScale | None = None) -> None:
        """Read sizes and bounds; `scale` shares another environment's. Raises ValueError for other spaces."""
        check_spaces(env)
        super().__init__(Door(env))
        discrete, boxes = env.action_space.spaces
        self.num_actions = int(discrete.n)
        self.first_action = int(discrete.start)
        self.shared = isinstance(boxes, gym.spaces.Box)
        self.boxes = [boxes] * self.num_actions if self.shared else list(boxes.spaces)
        sizes = np.array([math.prod(box.shape) for box in self.boxes])
        self.parameter_dim = int(sizes.max())
        self.mask = np.float32(np.arange(self.parameter_dim) < sizes[:, None])
        self.bounds = [(box.low.reshape(-1).astype(float), box.high.reshape(-1).astype(float)) for box in self.boxes]
        # The environment does not read other actions' parameters: any value within their bounds will do.
        self.others = tuple(((box.low + box.high) / 2).astype(box.dtype) for box in self.boxes)
        self.observation_dim = math.prod(env.observation_space.shape)
        self.scale = scale or ObservationScale(env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The first observation (S,) of an episode, and its info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observe(observation), info

    def step(self, action: tuple[int, np.ndarray]) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step with action `(k, x)`."""
        observation, reward, terminated, truncated, info = self.env.step(self.to_space(*action))
        return self.observe(observation), reward, terminated, truncated, info

    def observe(self, observation: Any) -> np.ndarray:
        """What the environment returned, as (S,) float32 and scaled. Raises RunError if it is not finite."""
        with np.errstate(over="ignore"):  # too large for float32: rejected below
            array = np.asarray(observation, np.float32).reshape(-1)
        if array.size != self.observation_dim or not np.isfinite(array).all():
            expected = f"expected {self.observation_dim} finite numbers"
            raise RunError(f"observation {observation} is not finite or has another size, {expected}, {self.env.where}")
        return self.scale(array)

    def to_space(self, k: int, x: np.ndarray) -> tuple[int, Any]:
        """Action `(k, x)` in the action space's format."""
        box, (low, high) = self.boxes[k], self.bounds[k]
        scaled = low + (high - low) * (x[: len(low)].astype(float) + 1.0) / 2.0
        if np.issubdtype(box.dtype, np.integer):
            scaled = np.rint(scaled)  # truncated, it would never reach the upper bound
        parameters = scaled.clip(low, high).astype(box.dtype).reshape(box.shape)
        if self.shared:
            return k + self.first_action, parameters
        return k + self.first_action, (*self.others[:k], parameters, *self.others[k + 1 :])


def make_env(args: Args, scale: ObservationScale | None = None, video: bool = False) -> HybridEnv:
    """Make the environment; `scale` shares another's. Raises a one-line ValueError if that is not possible."""
    return HybridEnv(open_env(args, {"render_mode": "rgb_array"} if video else {}), scale)


# Networks ------------------------------------------------------------------------------------------------------------
class HybridActionVAE(nn.Module):
    """The hybrid action representation: an embedding table and a conditional VAE (section 3.1, figure 2).

    Sizes: S observation, K discrete actions, P parameters, d1 embedding, d2 latent. Besides the weights, it holds
    the latent range of section 3.3, to which the policy's z in [-1, 1] is scaled, and its mean state-change error.
    """

    def __init__(
        self, observation_dim: int, num_actions: int, parameter_dim: int, embedding_dim: int, latent_dim: int, kind: str
    ) -> None:
        """`kind` is "learned" (a table K x d1, trained by this VAE's loss) or "one-hot" (fixed, d1 = K)."""
        super().__init__()
        self.kind = kind
        hidden = 256

        def two_layers() -> nn.Sequential:
            return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True))

        if kind == "one-hot":
            self.register_buffer("embedding_table", torch.eye(num_actions))
        else:
            self.embedding_table = nn.Parameter(torch.empty(num_actions, embedding_dim).uniform_(-1.0, 1.0))
        self.encoder_condition = nn.Linear(observation_dim + embedding_dim, hidden)
        self.encoder_parameters = nn.Linear(parameter_dim, hidden)
        self.encoder_hidden = two_layers()
        self.encoder_heads = nn.Linear(hidden, 2 * latent_dim)  # mean and log standard deviation
        self.decoder_condition = nn.Linear(observation_dim + embedding_dim, hidden)
        self.decoder_latent = nn.Linear(latent_dim, hidden)
        self.decoder_hidden = two_layers()
        self.parameter_head = nn.Linear(hidden, parameter_dim)
        # Cascaded after the decoder's trunk (equation 5).
        self.state_head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(True), nn.Linear(hidden, observation_dim))
        self.register_buffer("latent_low", -torch.ones(latent_dim))
        self.register_buffer("latent_high", torch.ones(latent_dim))
        self.register_buffer("state_error", torch.zeros(()))  # mean squared error of the predicted state change
        self.register_buffer("latent_information", torch.zeros(latent_dim))  # KL of each dimension in nats

    def discrete_embedding(self) -> Tensor:
        """The embeddings (K, d1) of all discrete actions, in [-1, 1] as the policy's output."""
        return self.embedding_table if self.kind == "one-hot" else torch.tanh(self.embedding_table)

    def encode(self, observation: Tensor, embedding: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, d2) of the latent, from (B, S), (B, d1), (B, P)."""
        condition = F.relu(self.encoder_condition(torch.cat((observation, embedding), 1)))
        hidden = self.encoder_hidden(condition * F.relu(self.encoder_parameters(x)))
        mean, log_std = self.encoder_heads(hidden).chunk(2, 1)
        return mean, log_std.clamp(-4.0, 15.0).exp()

    def decode(self, observation: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        """The decoder's trunk (B, 256), from (B, S), (B, d1), (B, d2), which both heads read."""
        condition = F.relu(self.decoder_condition(torch.cat((observation, embedding), 1)))
        return self.decoder_hidden(condition * F.relu(self.decoder_latent(latent)))

    def forward(self, observation: Tensor, k: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Reconstructed parameters (B, P) in (-1, 1), predicted state change (B, S), mean and std (B, d2).

        `k` (B,) are action indices; `noise` (B, d2) is standard normal.
        """
        embedding = self.discrete_embedding()[k]
        mean, std = self.encode(observation, embedding, x)
        hidden = self.decode(observation, embedding, mean + std * noise)
        return torch.tanh(self.parameter_head(hidden)), torch.tanh(self.state_head(hidden)), mean, std

    def select_discrete_action(self, embedding: Tensor) -> Tensor:
        """The action (B,) whose embedding is nearest (L2) to the policy's (B, d1) (equation 4)."""
        table = self.discrete_embedding()
        return (table.square().sum(1) - 2.0 * embedding @ table.T).argmin(1)

    def select_parameter_action(self, observation: Tensor, k: Tensor, z: Tensor) -> Tensor:
        """Parameters (B, P) in (-1, 1) of action `k` for the policy's `z` (B, d2) in [-1, 1]."""
        hidden = self.decode(observation, self.discrete_embedding()[k], self.to_latent(z))
        return torch.tanh(self.parameter_head(hidden))

    def select_delta_state(self, observation: Tensor, k: Tensor, z: Tensor, in_latent_range: bool = True) -> Tensor:
        """Predicted change (B, S) of the scaled observation for action `k` and the policy's `z` in [-1, 1]."""
        latent = self.to_latent(z) if in_latent_range else z
        return torch.tanh(self.state_head(self.decode(observation, self.discrete_embedding()[k], latent)))

    def to_latent(self, z: Tensor) -> Tensor:
        """From the policy's [-1, 1] to the latent range (latent space constraint, section 3.3)."""
        return torch.lerp(self.latent_low, self.latent_high, (z + 1.0) / 2.0)

    def to_policy(self, latent: Tensor) -> Tensor:
        """The inverse of `to_latent`, clamped to [-1, 1]."""
        width = (self.latent_high - self.latent_low).clamp_min(1e-6)
        return (2.0 * (latent - self.latent_low) / width - 1.0).clamp(-1.0, 1.0)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """The KL divergence of normal distributions from the standard normal, for each dimension (B, d2), in nats."""
    return 0.5 * (mean.square() + std.square() - 1.0) - std.log()


class Actor(nn.Sequential):
    """The policy (B, S) -> (B, d1 + d2) in (-1, 1): an embedding and a z (section 4, figure 3)."""

    def __init__(self, observation_dim: int, latent_action_dim: int) -> None:
        """Two hidden layers of 256; the original's two heads are one layer here."""
        super().__init__(
            nn.Linear(observation_dim, 256), nn.ReLU(True), nn.Linear(256, 256), nn.ReLU(True),
            nn.Linear(256, latent_action_dim), nn.Tanh(),
        )  # fmt: skip


class TwinCritic(nn.Module):
    """Two Q functions of (observation, latent action) in one pass: twice as wide, block-diagonal in the middle."""

    def __init__(self, observation_dim: int, latent_action_dim: int) -> None:
        """Each twin is initialized as three `nn.Linear` layers are; inputs -> 256 -> 256 -> 1."""
        super().__init__()
        inputs = observation_dim + latent_action_dim
        twins = [[nn.Linear(*size) for size in ((inputs, 256), (256, 256), (256, 1))] for _ in range(2)]
        first, middle, last = ([twin[i] for twin in twins] for i in range(3))
        self.weight1 = nn.Parameter(torch.stack([layer.weight.detach().T for layer in first]))  # (2, inputs, 256)
        self.bias1 = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in first]))
        self.weight2 = nn.Parameter(torch.stack([layer.weight.detach().T for layer in middle]))  # (2, 256, 256)
        self.bias2 = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in middle]))
        self.weight3 = nn.Parameter(torch.stack([layer.weight.detach() for layer in last]))  # (2, 1, 256)
        self.bias3 = nn.Parameter(torch.stack([layer.bias.detach() for layer in last]))

    def forward(self, observation: Tensor, latent_action: Tensor) -> Tensor:
        """Both values (2, B)."""
        inputs = torch.cat((observation, latent_action), 1).expand(2, -1, -1)
        hidden = torch.baddbmm(self.bias1, inputs, self.weight1).relu_()
        hidden = torch.baddbmm(self.bias2, hidden, self.weight2).relu_()
        return (hidden * self.weight3).sum(2) + self.bias3

    def first(self, observation: Tensor, latent_action: Tensor) -> Tensor:
        """The first value alone (B,), which the actor maximizes."""
        inputs = torch.cat((observation, latent_action), 1)
        hidden = torch.addmm(self.bias1[0], inputs, self.weight1[0]).relu_()
        hidden = torch.addmm(self.bias2[0], hidden, self.weight2[0]).relu_()
        return hidden @ self.weight3[0, 0] + self.bias3[0]


# Replay buffer -------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions: (B, S), (B, d1 + d2), (B, P), (B,) int64, (B, S), (B,), (B,) float 0 or 1."""

    observation: Tensor
    latent_action: Tensor
    x: Tensor
    k: Tensor
    next_observation: Tensor
    reward: Tensor
    terminated: Tensor


class ReplayBuffer:
    """All transitions of a run in order, one float32 row each, so that a batch is one gather.

    The random phase's rows come first; the VAE samples from all rows, the critics from the newest of the others.
    """

    def __init__(self, observation_dim: int, latent_action_dim: int, parameter_dim: int) -> None:
        """An empty buffer, which grows as needed."""
        self.widths = [observation_dim, latent_action_dim, parameter_dim, 1, observation_dim, 1, 1]
        self.rows = torch.zeros(4_096, sum(self.widths))
        self.size = 0
        self.random_size = 0

    def add(self, *values: Any) -> None:
        """Append one transition, its values in the order of `Batch`."""
        if self.size == len(self.rows):
            self.rows = torch.cat((self.rows, torch.zeros_like(self.rows)))
        np.concatenate([np.atleast_1d(value) for value in values], out=self.rows[self.size].numpy())
        self.size += 1

    def columns(self, rows: Tensor) -> Batch:
        """The parts of these rows (B, ...)."""
        batch = Batch(*rows.split(self.widths, 1))
        return batch._replace(k=batch.k[:, 0].long(), reward=batch.reward[:, 0], terminated=batch.terminated[:, 0])

    def sample(self, oldest: int, batch_size: int, device: torch.device) -> Batch:
        """Rows drawn uniformly, with replacement, from row `oldest` to the newest."""
        return self.columns(self.rows[torch.randint(oldest, self.size, (batch_size,))].to(device))


# Agent ---------------------------------------------------------------------------------------------------------------
class HyARTD3(nn.Module):
    """Networks, optimizers and one function per gradient step, which takes a batch and returns detached tensors."""

    def __init__(self, args: Args, env: HybridEnv, device: torch.device) -> None:
        """Build everything from the sizes of `env`; `args` has no None left (see `check`)."""
        super().__init__()
        self.args = args
        self.embedding_dim = env.num_actions if args.discrete_embedding == "one-hot" else args.discrete_latent_dim
        self.latent_dim = args.parameter_latent_dim
        self.latent_action_dim = self.embedding_dim + self.latent_dim
        self.register_buffer("mask", torch.from_numpy(env.mask))
        self.actor = Actor(env.observation_dim, self.latent_action_dim)
        self.critic = TwinCritic(env.observation_dim, self.latent_action_dim)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.vae = HybridActionVAE(
            env.observation_dim, env.num_actions, env.parameter_dim,
            self.embedding_dim, self.latent_dim, args.discrete_embedding,
        )  # fmt: skip
        self.register_buffer("initial_embedding", self.vae.discrete_embedding().detach().clone())
        self.to(device)
        self.actor_updates = 0
        self.online = [*self.actor.parameters(), *self.critic.parameters()]  # in the order of self.targets
        self.targets = [*self.target_actor.parameters(), *self.target_critic.parameters()]
        self.average = list(self.average_actor.parameters())
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True),
            "critic": torch.optim.Adam(self.critic.parameters(), lr=args.learning_rate, fused=True),
            "vae": torch.optim.Adam(self.vae.parameters(), lr=args.vae_learning_rate, fused=True),
        }

    @torch.inference_mode()
    def act(self, observation: np.ndarray, noise: float = 0.0, average: bool = False) -> tuple[np.ndarray, ...]:
        """Latent actions (N, d1 + d2), action indices (N,) and parameters (N, P) for observations (N, S).

        `noise` is the exploration noise's standard deviation; `average` uses the actor's moving average.
        """
        state = torch.from_numpy(observation).to(self.mask.device)
        latent_action = (self.average_actor if average else self.actor)(state)
        if noise > 0.0:
            latent_action = (latent_action + noise * torch.randn_like(latent_action)).clamp_(-1.0, 1.0)
        embedding, z = latent_action.split((self.embedding_dim, self.latent_dim), 1)
        k = self.vae.select_discrete_action(embedding)
        x = self.vae.select_parameter_action(state, k, z) * self.mask[k]
        return latent_action.cpu().numpy(), k.cpu().numpy(), x.cpu().numpy()

    def update_vae(self, batch: Batch, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One step on equation 6: parameters, state change and KL. `noise` (B, d2) is standard normal."""
        args = self.args
        if noise is None:
            noise = torch.randn(len(batch.k), self.latent_dim, device=self.mask.device)
        x, delta, mean, std = self.vae(batch.observation, batch.k, batch.x, noise)
        parameter_loss = F.mse_loss(x, batch.x)
        state_loss = F.mse_loss(delta, batch.next_observation - batch.observation)
        kl = kl_divergence(mean, std).mean()
        loss = args.parameter_weight * parameter_loss + args.state_weight * state_loss + args.kl_weight * kl
        if args.rebuild_vae_optimizer:
            self.optimizers["vae"] = torch.optim.Adam(self.vae.parameters(), lr=args.vae_learning_rate, fused=True)
        self.optimizers["vae"].zero_grad()
        loss.backward()
        self.optimizers["vae"].step()
        losses = {"vae": loss, "vae_parameter": parameter_loss, "vae_state": state_loss, "vae_kl": kl}
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update_latent_range(self, batch: Batch) -> None:
        """Set the latent range (section 3.3) to the span of most of these rows' latents, and update `state_error`."""
        vae, embedding, parts = self.vae, self.vae.discrete_embedding(), []
        for columns in zip(*(column.split(500) for column in batch), strict=True):  # as much as fits into the cache
            part = Batch(*columns)
            mean, std = vae.encode(part.observation, embedding[part.k], part.x)
            parts.append((mean + std * torch.randn_like(mean), kl_divergence(mean, std)))
        latent, kl = (torch.cat(values) for values in zip(*parts, strict=True))
        border = min(int(self.args.latent_range_tail * len(latent)), (len(latent) - 1) // 2)
        ordered = latent.sort(0).values
        vae.latent_low.copy_(ordered[border])
        vae.latent_high.copy_(ordered[-border - 1])
        vae.latent_information.copy_(kl.mean(0))
        some = Batch(*(column[:STATE_ERROR_ROWS] for column in batch))
        delta = vae.select_delta_state(some.observation, some.k, latent[:STATE_ERROR_ROWS], in_latent_range=False)
        vae.state_error.copy_((delta - (some.next_observation - some.observation)).square().mean())

    @torch.no_grad()
    def relabel(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latent actions (B, d1 + d2) that the current VAE decodes into what was done (section 3.3).

        `noise` (B, d1 + d2) is standard normal.
        """
        args, vae = self.args, self.vae
        embedding, z = batch.latent_action.split((self.embedding_dim, self.latent_dim), 1)
        embedding_noise, latent_noise = noise.split((self.embedding_dim, self.latent_dim), 1)
        own = vae.discrete_embedding()[batch.k]
        stale = vae.select_discrete_action(embedding) != batch.k
        jitter = (args.policy_noise * embedding_noise).clamp(-args.noise_clip, args.noise_clip)
        embedding = torch.where(stale[:, None], (own + jitter).clamp(-1.0, 1.0), embedding)

        predicted = vae.select_delta_state(batch.observation, batch.k, z, args.relabel_in_latent_range)
        error = (predicted - (batch.next_observation - batch.observation)).square().mean(1)
        invalid = error >= args.relabel_threshold * vae.state_error
        mean, std = vae.encode(batch.observation[invalid], own[invalid], batch.x[invalid])
        z = z.clone()
        z[invalid] = vae.to_policy(mean + std * latent_noise[invalid])
        kept = {"kept_embedding": 1.0 - stale.float().mean(), "kept_latent": 1.0 - invalid.float().mean()}
        return torch.cat((embedding, z), 1), kept

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor) -> Tensor:
        """The targets (B,) of clipped double Q-learning (equation 7); `noise` (B, d1 + d2) is standard normal."""
        smoothing = (self.args.policy_noise * noise).clamp(-self.args.noise_clip, self.args.noise_clip)
        next_action = (self.target_actor(batch.next_observation) + smoothing).clamp(-1.0, 1.0)
        min_q = self.target_critic(batch.next_observation, next_action).amin(0)
        return batch.reward + self.args.gamma * (1.0 - batch.terminated) * min_q

    def update_critic(self, observation: Tensor, latent_action: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step of both critics towards `target` (B,)."""
        values = self.critic(observation, latent_action)
        loss = (values - target).square().mean(1).sum()
        self.optimizers["critic"].zero_grad()
        loss.backward()
        self.optimizers["critic"].step()
        return {"critic": loss.detach(), "q_value": values.detach().mean()}

    def update_actor(self, observation: Tensor) -> dict[str, Tensor]:
        """One step of gradient ascent on the first critic, with inverted gradients.

        The gradient towards a bound shrinks with the room that is left (Hausknecht and Stone, 2016).
        """
        action = self.actor(observation)
        leaf = action.detach().requires_grad_()
        value = self.critic.first(observation, leaf).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        leaf = leaf.detach()
        inverted = gradient * torch.where(gradient > 0.0, 1.0 - leaf, 1.0 + leaf) / 2.0
        self.optimizers["actor"].zero_grad()
        action.backward(-inverted)
        norm = nn.utils.clip_grad_norm_(self.actor.parameters(), 10.0)
        self.optimizers["actor"].step()
        return {"actor": -value.detach(), "actor_gradient_norm": norm.detach()}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the targets and the actor's average one step towards the trained networks."""
        torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        self.actor_updates += 1  # the mean of all actors so far, until there are 1 / policy_average of them
        rate = max(self.args.policy_average, 1.0 / self.actor_updates)
        torch._foreach_lerp_(self.average, self.online[: len(self.average)], rate)

    def update(self, batch: Batch, noise: Tensor | None = None) -> dict[str, Tensor]:
        """`policy_frequency` critic updates on the parts of one large batch, then one actor update on the last part.

        The targets and the VAE do not change in between, so one pass relabels all parts and computes their targets.
        `noise` (B, 2 (d1 + d2)) is standard normal: half for relabelling, half for the target policy's smoothing.
        """
        if noise is None:
            noise = torch.randn(len(batch.reward), 2 * self.latent_action_dim, device=self.mask.device)
        relabel_noise, smoothing_noise = noise.chunk(2, 1)
        latent_action, losses = self.relabel(batch, relabel_noise) if self.args.relabel else (batch.latent_action, {})
        target = self.critic_target(batch, smoothing_noise)
        parts = [value.chunk(self.args.policy_frequency) for value in (batch.observation, latent_action, target)]
        for part in zip(*parts, strict=True):
            losses |= self.update_critic(*part)
        losses |= self.update_actor(parts[0][-1])
        self.update_targets()
        return losses


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(agent: HyARTD3, environments: list[HybridEnv], seed: int, average: bool = False) -> dict[str, float]:
    """Play one episode without noise in each environment, in lock-step, so that the policy sees one batch a step.

    Episode i always has `episode_seed(seed, i, stream=1)`; training's random streams are not touched. `success_rate` is
    nan if no episode's last info reports success; if others do, an episode that does not counts as a failure.
    """
    count = len(environments)
    returns, lengths = np.zeros(count), np.zeros(count)
    successes: list[bool | None] = [None for _ in environments]
    observations = [env.reset(seed=episode_seed(seed, i, stream=1))[0] for i, env in enumerate(environments)]
    active = list(range(count))
    while active:
        _, ks, xs = agent.act(np.stack([observations[i] for i in active]), average=average)
        running = []
        for i, k, x in zip(active, ks.tolist(), xs, strict=True):
            observations[i], reward, terminated, truncated, info = environments[i].step((k, x))
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                successes[i] = info.get("is_success")
            else:
                running.append(i)
        active = running
    return {
        "episodic_return": float(returns.mean()),
        "return_std": float(returns.std()),
        "episodic_length": float(lengths.mean()),
        "success_rate": successes.count(True) / count if any(s is not None for s in successes) else math.nan,
    }


# Main ----------------------------------------------------------------------------------------------------------------
EXPLORATION_NOISE_START = 1.0  # standard deviation in the first episode
VAE_UPDATE_START = 1_000  # episode of the learning phase at which training of the VAE resumes
LATENT_RANGE_ROWS = 5_000  # transitions from whose latents the latent range is computed
STATE_ERROR_ROWS = 1_000  # of these, those that the mean state-change error is computed from: decoding is slow


def random_phase(env: HybridEnv, buffer: ReplayBuffer, args: Args, run: Run) -> None:
    """Fill the buffer with uniformly random actions, and set the scale of unbounded observations.

    Its steps are not counted as environment steps, as in the paper.
    """
    generator = np.random.default_rng(episode_seed(args.seed, 0, stream=2))
    no_latent_action = np.zeros(buffer.widths[1])
    for episode in range(args.random_episodes):
        observation, _ = env.reset(seed=episode_seed(args.seed, episode))
        done = False
        while not done:
            run.progress(0, f"random phase, episode {episode + 1:,} of {args.random_episodes:,}")
            k = int(generator.integers(env.num_actions))
            x = generator.uniform(-1.0, 1.0, env.parameter_dim).astype(np.float32) * env.mask[k]
            next_observation, reward, terminated, truncated, _ = env.step((k, x))
            buffer.add(observation, no_latent_action, x, k, next_observation, reward, terminated)
            observation, done = next_observation, terminated or truncated
            if run.signal:
                run.stop()
    buffer.random_size = buffer.size
    rows = buffer.columns(buffer.rows[: buffer.size])
    env.scale.fit(rows.observation.numpy())
    for column in (rows.observation, rows.next_observation):  # views of the buffer; bounded ones are scaled already
        unbounded = torch.from_numpy(env.scale.unbounded)
        column[:, unbounded] = torch.from_numpy(env.scale(column.numpy()))[:, unbounded]


def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        check(args)
        env = probe(args)
        evaluation_envs = [make_env(args, env.scale) for _ in range(args.eval_episodes)]
    except ValueError as error:
        usage_error(str(error))
    with Run(args) as run:
        run.say(f"{run.name}: " + ", ".join(f"{name} {getattr(args, name):,}" for name in DEFAULTS_BY_ENVIRONMENT[""]))
        device = set_up_torch(args)
        torch.set_num_threads(1)  # these matrix products are too small for two threads
        agent = HyARTD3(args, env, device)
        buffer = ReplayBuffer(env.observation_dim, agent.latent_action_dim, env.parameter_dim)
        recent: deque[tuple[float, int]] = deque(maxlen=100)  # return and length of the last episodes
        losses: dict[str, Tensor] = {}
        step = episode = episode_length = updates_due = 0
        episode_return = 0.0

        def start_episode() -> np.ndarray:
            """The first observation of an episode of the learning phase; the random phase took the first seeds."""
            return env.reset(seed=episode_seed(args.seed, args.random_episodes + episode))[0]

        def evaluate_agent() -> None:
            """Evaluate the actor and its average, and keep the best model; a signal may interrupt this anywhere."""
            metrics = evaluate(agent, evaluation_envs, args.seed)
            averaged = evaluate(agent, evaluation_envs, args.seed, average=True)
            for name in ("episodic_return", "success_rate"):
                metrics[f"average_{name}"] = averaged[name]
            if all(averaged["episodic_return"] >= row["average_episodic_return"] for row in run.eval_rows):
                run.save_model("best_model.pt", model_state(agent, env.scale))
            run.log_evaluation(step, metrics)

        if run.checkpoint is None:
            random_phase(env, buffer, args, run)
            for update in range(1, args.vae_pretrain_steps + 1):
                losses = agent.update_vae(buffer.sample(0, args.vae_batch_size, device))
                if run.signal:
                    run.stop()
                if update % 1_000 == 0:
                    run.progress(0, f"VAE pre-training, update {update:,}, loss {losses['vae']:.4f}")
            run.log(0, {f"losses/{name}": value for name, value in losses.items()})
            agent.update_latent_range(buffer.sample(0, LATENT_RANGE_ROWS, device))
            observation = start_episode()
        else:
            with run.restoring():
                state = run.checkpoint
                step, episode, updates_due = state["step"], state["episode"], state["updates_due"]
                episode_length, episode_return = state["episode_length"], state["episode_return"]
                recent.extend(state["recent"])
                load_learning_state(state, agent, env, buffer)
                saved_observation = state["observation"].numpy()
            observation = start_episode()
            if episode_length > 0:  # the interrupted episode up to here
                observation = replay(env, buffer.columns(buffer.rows[buffer.size - episode_length : buffer.size]))
            if not np.array_equal(observation, saved_observation):
                run.say(f"warning: episode {episode} does not replay to the saved observation; going on with the next")
                episode, episode_length, episode_return = episode + 1, 0, 0.0
                observation = start_episode()

        first_step = step
        mean_return, mean_length = np.mean(recent or [(math.nan, math.nan)], 0)
        run.steps_per_second(step)  # the rate counts from here
        while True:
            decay = min(1.0, episode / args.exploration_noise_episodes)
            noise = EXPLORATION_NOISE_START + decay * (args.exploration_noise - EXPLORATION_NOISE_START)
            last = step == args.total_timesteps
            evaluating = step > 0 and (last or step % args.eval_frequency == 0)
            saving = step > first_step and (last or step % args.checkpoint_frequency == 0)
            if step > first_step and (evaluating or saving or run.signal or step % 1_000 == 0):
                # Losses are read only here; one that is not finite ends the run before it can reach a checkpoint.
                run.log(step, {
                    **{f"losses/{name}": value for name, value in losses.items()},
                    **latent_statistics(agent, buffer.columns(buffer.rows[: buffer.random_size][:32].to(device))),
                    "charts/episodic_return": mean_return, "charts/episodic_length": mean_length,
                    "charts/episodes": episode, "charts/exploration_noise": noise,
                    "charts/SPS": run.steps_per_second(step),
                })  # fmt: skip
            if evaluating and not run.evaluated(step):
                run.unless_stopped(evaluate_agent)
            stopping = bool(run.signal)  # a later signal stops the run in the next step, after its checkpoint
            if saving or stopping:
                run.save_checkpoint(step, {
                    **learning_state(agent, env, buffer), "episode": episode, "episode_length": episode_length,
                    "episode_return": episode_return, "observation": torch.from_numpy(observation),
                    "updates_due": updates_due, "recent": list(recent),
                })  # fmt: skip
            if stopping:
                run.stop()
            if last:
                break

            step += 1
            latent_action, k, x = (value[0] for value in agent.act(observation[None], noise))
            if not np.isfinite(x).all():  # diverged: name the loss, if one is not finite already
                run.log(step, {f"losses/{name}": value for name, value in losses.items()})
                raise RunError(f"step {step}: the policy's parameters are {x}; try a smaller learning rate")
            next_observation, reward, terminated, truncated, _ = env.step((int(k), x))
            ended = terminated or (truncated and not args.bootstrap_at_limit)
            buffer.add(observation, latent_action, x, k, next_observation, reward, ended)
            observation = next_observation
            episode_length += 1
            episode_return += reward

            if step >= args.learning_starts:
                # One critic update a step; as in the original, one more at the first step of each episode.
                updates_due += 2 if episode_length == 1 else 1
                while updates_due >= args.policy_frequency:
                    oldest = max(buffer.random_size, buffer.size - args.buffer_size)
                    losses |= agent.update(buffer.sample(oldest, args.policy_frequency * args.batch_size, device))
                    updates_due -= args.policy_frequency

            if terminated or truncated:
                recent.append((episode_return, episode_length))
                mean_return, mean_length = np.mean(recent, 0)
                episode, episode_length, episode_return = episode + 1, 0, 0.0
                if episode >= VAE_UPDATE_START and episode % args.vae_update_episodes == 0:
                    losses |= agent.update_vae(buffer.sample(0, args.vae_batch_size, device))
                    agent.update_latent_range(buffer.sample(0, LATENT_RANGE_ROWS, device))
                observation = start_episode()
            run.progress(step, f"return {mean_return:.3f}")

        run.save_model("model.pt", model_state(agent, env.scale))

        def draw() -> None:
            """The latent action space in an evaluation's first state, and the learning curve."""
            start, _ = evaluation_envs[0].reset(seed=episode_seed(args.seed, 0, stream=1))
            run.log_figure(step, "latent_action_map", draw_latent_action_map(agent, env, start))
            run.log_figure(step, "learning_curve", draw_learning_curve(run.eval_rows, run.name))

        def film() -> None:
            """Videos of the averaged policy."""
            run.log_videos(step, record_videos(agent, args, env.scale, run.folder / "videos"))

        run.finish(step, {"agent": agent.state_dict()}, draw, *([film] if args.capture_video else []))
    score, averaged = (
        np.mean([row[name] for row in run.eval_rows[-10:]]) for name in ("episodic_return", "average_episodic_return")
    )
    print(f"mean return of the last 10 evaluations: {score:.3f}, averaged policy {averaged:.3f}; see {run.folder}")
    return run.folder


# Nothing below is about the algorithm: checks of the input, pictures, the run folder. -------------------------------
def check(args: Args) -> None:
    """Fill in the environment's defaults. Raises a one-line ValueError for settings that can't work."""
    if args.discrete_embedding == "one-hot" and args.discrete_latent_dim is not None:
        raise ValueError("--discrete-latent-dim: one-hot embeddings have one dimension per action; leave it out")
    name = args.env_id.rpartition(":")[2].split("-v")[0].rstrip("0123456789")
    for field, value in {**DEFAULTS_BY_ENVIRONMENT[""], **DEFAULTS_BY_ENVIRONMENT.get(name, {})}.items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    at_least_one = (
        "checkpoint_frequency", "eval_frequency", "eval_episodes", "total_timesteps", "buffer_size", "batch_size",
        "policy_frequency", "exploration_noise_episodes", "random_episodes", "discrete_latent_dim",
        "parameter_latent_dim", "vae_batch_size", "vae_update_episodes", "max_episode_steps",
    )  # fmt: skip
    most = {"gamma": 1.0, "tau": 1.0, "policy_average": 1.0, "latent_range_tail": 0.49}
    check_numbers(args, dict.fromkeys(at_least_one, 1), most)
    if args.total_timesteps - max(args.learning_starts, 1) + 1 < args.policy_frequency:
        flags = f"--total-timesteps {args.total_timesteps} ends before the first update: --learning-starts"
        flags += f" {args.learning_starts}, --policy-frequency {args.policy_frequency}"
        raise ValueError(f"{flags}; raise the first or lower the others")
    check_memory(args)


def check_memory(args: Args) -> None:
    """Raise ValueError if the sizes alone need more memory than this machine has."""
    latent = args.discrete_latent_dim + args.parameter_latent_dim
    row, activations = 4.0 * (latent + 6), 4.0 * 3_000  # bytes of a transition, and of its activations in an update
    needed = {
        "total_timesteps": row * args.total_timesteps,
        "random_episodes": row * args.random_episodes,
        "batch_size": activations * args.batch_size * args.policy_frequency,
        "vae_batch_size": activations * args.vae_batch_size,
        "discrete_latent_dim": 4.0 * 40 * 256 * args.discrete_latent_dim,  # weights, gradients, moments, targets
        "parameter_latent_dim": 4.0 * 40 * 256 * args.parameter_latent_dim,
        "eval_episodes": 5_000.0 * args.eval_episodes,  # one environment each
    }
    memory, total = machine_memory(), sum(needed.values())
    if total > memory:
        sizes = f"the run needs at least {1e-9 * total:,.0f} GB of memory, and this machine has {1e-9 * memory:,.0f}"
        largest = max(needed, key=lambda name: getattr(args, name))
        raise ValueError(f"{sizes}; lower --{largest.replace('_', '-')}")


UNBOUNDED = 1e6  # bounds beyond this, such as inf or float32's largest number, count as none


class ObservationScale:
    """Scales observations to about [-1, 1]: by the space's bounds, or narrower ones that the environment declares.

    Dimensions without bounds are not scaled until `fit` has seen observations.
    """

    def __init__(self, env: gym.Env) -> None:
        """Read the bounds: `scale_low` and `scale_high` of the environment, else those of its observation space."""
        space = env.observation_space
        low = np.array(getattr(env.unwrapped, "scale_low", space.low), np.float64).reshape(-1)
        high = np.array(getattr(env.unwrapped, "scale_high", space.high), np.float64).reshape(-1)
        self.unbounded = (low < -UNBOUNDED) | (high > UNBOUNDED) | (low == high)
        low = np.where(self.unbounded, -1.0, low)
        high = np.where(self.unbounded, 1.0, high)
        self.center = ((low + high) / 2).astype(np.float32)
        self.width = ((high - low) / 2).astype(np.float32)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Observations (..., S) as the networks see them, float32."""
        return (observation - self.center) / self.width

    def fit(self, observations: np.ndarray) -> None:
        """From now on, scale unbounded dimensions by mean and standard deviation of these observations (N, S)."""
        mean = observations.mean(0, dtype=np.float64)
        deviation = observations.std(0, dtype=np.float64)
        deviation[deviation < 1e-6] = 1.0  # it never changed, so its range is unknown
        self.center = np.where(self.unbounded, mean, self.center).astype(np.float32)
        self.width = np.where(self.unbounded, deviation, self.width).astype(np.float32)


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


def open_env(args: Args, options: dict[str, Any]) -> gym.Env:
    """`gym.make`. Raises a one-line ValueError if the environment is unknown or cannot be made."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that `mine:Name-v0` finds the user's mine.py
    if args.max_episode_steps:
        options = {**options, "max_episode_steps": args.max_episode_steps}
    try:
        return gym.make(args.env_id, **options)
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like Platform-v0 or package:Name-v0"
        raise ValueError(f"unknown environment {args.env_id} ({str(error).rstrip('.')}); {hint}") from None
    except Exception as error:  # whatever a third-party environment raises, it concerns this id
        raise ValueError(f"could not make {args.env_id}: {type(error).__name__}: {error}") from None


def check_spaces(env: gym.Env) -> None:
    """Raise ValueError, with what was expected, for spaces other than a hybrid action problem's."""
    space, expected = env.action_space, "expected Tuple(Discrete, Tuple(Box, ...)) or Tuple(Discrete, Box) actions"
    if isinstance(space, gym.spaces.Box):
        raise ValueError(f"{expected}, got a Box; for continuous control see sac_ae_pixels.py")
    if isinstance(space, gym.spaces.Discrete):
        raise ValueError(f"{expected}, got a Discrete space without parameters; try a DQN")
    parts = space.spaces if isinstance(space, gym.spaces.Tuple) else ()
    if len(parts) != 2 or not isinstance(parts[0], gym.spaces.Discrete):
        raise ValueError(f"{expected}, got {space}")
    count = int(parts[0].n)
    boxes = parts[1].spaces if isinstance(parts[1], gym.spaces.Tuple) else [parts[1]]
    if not all(isinstance(box, gym.spaces.Box) for box in boxes) or (parts[1] is not boxes[0] and len(boxes) != count):
        raise ValueError(f"{expected}, with one Box for each of the {count} actions, got {parts[1]}")
    for k, box in enumerate(boxes):
        if not (np.abs([box.low, box.high]) < UNBOUNDED).all():
            raise ValueError(f"expected bounded parameters, but action {k} has {box}; wrap it with finite bounds")
    if not any(math.prod(box.shape) for box in boxes):
        raise ValueError("no action has a parameter: this is a discrete problem; try a DQN")
    if not isinstance(env.observation_space, gym.spaces.Box):
        kind = type(env.observation_space).__name__
        raise ValueError(f"expected a Box observation, but the environment has {kind}; try FlattenObservation")


def probe(args: Args) -> HybridEnv:
    """Make the environment and try a step, and a picture if videos are wanted. Raises a one-line ValueError."""
    env = make_env(args)
    try:
        env.reset(seed=0)
        env.step((0, np.zeros(env.parameter_dim)))
    except Exception as error:  # whatever a third-party environment raises
        raise ValueError(
            f"{args.env_id} does not work as a Gymnasium environment: {type(error).__name__}: {error}"
        ) from None
    if args.capture_video:
        drawn = make_env(args, video=True)
        try:
            drawn.reset(seed=0)
            picture = drawn.render()
        except Exception as error:
            raise ValueError(f"{args.env_id} cannot be drawn: {type(error).__name__}: {error}") from None
        drawn.close()
        if drawn.render_mode != "rgb_array" or not isinstance(picture, np.ndarray):
            mode = f"render_mode {drawn.render_mode}"
            raise ValueError(f"{args.env_id} does not render rgb_array ({mode}); leave out --capture-video")
    return env


def learning_state(agent: HyARTD3, env: HybridEnv, buffer: ReplayBuffer) -> dict[str, Any]:
    """What a checkpoint holds of them; a network or optimizer added to the agent is included automatically."""
    return {
        "agent": agent.state_dict(),
        "actor_updates": agent.actor_updates,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()},
        "center": torch.from_numpy(env.scale.center),
        "width": torch.from_numpy(env.scale.width),
        "rows": buffer.rows[: buffer.size].clone(),  # a view would bring the whole buffer along
        "random_size": buffer.random_size,
    }


def load_learning_state(state: dict[str, Any], agent: HyARTD3, env: HybridEnv, buffer: ReplayBuffer) -> None:
    """Restore `learning_state`. Raises LookupError or RuntimeError for what is missing or does not fit."""
    agent.load_state_dict(state["agent"])
    agent.actor_updates = state["actor_updates"]
    for name, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    env.scale.center, env.scale.width = (state[name].numpy() for name in ("center", "width"))
    buffer.rows = state["rows"]
    buffer.size = len(buffer.rows)
    buffer.random_size = state["random_size"]


def replay(env: HybridEnv, actions: Batch) -> np.ndarray | None:
    """The observation (S,) that these actions of an episode lead to; None if the episode ends on the way."""
    for k, x in zip(actions.k.tolist(), actions.x.numpy(), strict=True):
        observation, _, terminated, truncated, _ = env.step((k, x))
        if terminated or truncated:
            return None
    return observation


def model_state(agent: HyARTD3, scale: ObservationScale) -> dict[str, Any]:
    """What is needed to play: the weights, and the observations' scale."""
    scales = {"center": torch.from_numpy(scale.center), "width": torch.from_numpy(scale.width)}
    return {"agent": agent.state_dict(), **scales}


@torch.inference_mode()
def latent_statistics(agent: HyARTD3, batch: Batch) -> dict[str, float]:
    """How far the embedding has moved, what the latent holds, and how much of the parameters' range it can reach.

    `charts/latent_reach` is the mean width (at most 2) of the range of parameters that z in [-1, 1] decodes into,
    measured at the states and actions of `batch`.
    """
    vae, count, draws = agent.vae, len(batch.k), 256
    z = torch.rand(count * draws, agent.latent_dim, generator=torch.Generator().manual_seed(0)).to(batch.k.device)
    states = batch.observation.repeat_interleave(draws, 0)
    decoded = vae.select_parameter_action(states, batch.k.repeat_interleave(draws), 2.0 * z - 1.0)
    decoded = decoded.view(count, draws, -1)
    width = (decoded.amax(1) - decoded.amin(1))[agent.mask[batch.k] > 0.0]
    return {
        "charts/embedding_moved": float((vae.discrete_embedding() - agent.initial_embedding).abs().max()),
        "charts/latent_dimensions_in_use": float((vae.latent_information > 0.01).sum()),
        "charts/latent_range": float((vae.latent_high - vae.latent_low).mean()),
        "charts/latent_reach": float(width.mean()),
        "charts/state_error": float(vae.state_error),
    }


def record_videos(agent: HyARTD3, args: Args, scale: ObservationScale, folder: Path) -> list[Path]:
    """Record the averaged policy's first three evaluation episodes, and return the mp4 files."""
    videos = []
    for i in range(min(3, args.eval_episodes)):
        env, options = make_env(args, scale, video=True), {"episode_trigger": lambda _: True, "disable_logger": True}
        with warnings.catch_warnings(action="ignore"):  # it warns that the folder exists
            videos.append(gym.wrappers.RecordVideo(env, str(folder), name_prefix=f"evaluation-{i}", **options))
    evaluate(agent, videos, args.seed, average=True)
    for video in videos:
        video.close()
    return sorted(folder.glob("evaluation-*.mp4"))


def action_names(env: HybridEnv) -> list[str]:
    """The environment's own names of its actions, if it has one for each."""
    names = getattr(env.unwrapped, "action_names", ())
    if isinstance(names, list | tuple) and len(names) == env.num_actions:
        return list(names)
    return [f"action {k}" for k in range(env.num_actions)]


@torch.no_grad()
def draw_latent_action_map(agent: HyARTD3, env: HybridEnv, observation: np.ndarray) -> Figure:
    """Decoded parameters over the two most informative dimensions of z, in one state (S,); 24 panels at most."""
    vae, count = agent.vae, env.num_actions
    names = action_names(env)
    panels = [(k, p) for k in range(count) for p in range(env.parameter_dim) if env.mask[k, p]][:24]
    ranked = vae.latent_information.argsort(descending=True).tolist()
    first, second = ranked[0], ranked[min(1, len(ranked) - 1)]
    grid, z = torch.linspace(-1.0, 1.0, 41), torch.zeros(41 * 41, agent.latent_dim)
    z[:, second] = grid.repeat_interleave(41)
    z[:, first] = grid.repeat(41)
    columns, rows = min(6, len(panels)), math.ceil(len(panels) / 6)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle("Latent action map: decoded parameter, other dimensions of z at 0")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    device = agent.mask.device
    states, z = torch.from_numpy(observation).expand(len(z), -1).to(device), z.to(device)
    for axis, (k, p) in zip(axes, panels, strict=False):
        values = vae.select_parameter_action(states, torch.full((len(z),), k, device=device), z)[:, p].cpu().numpy()
        image = axis.imshow(
            values.reshape(41, 41), cmap="coolwarm", origin="lower", extent=(-1, 1, -1, 1), vmin=-1, vmax=1
        )
        axis.set(title=f"{names[k]}, parameter {p}", xlabel=f"z[{first}]", ylabel=f"z[{second}]")
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.colorbar(image, ax=axes[: len(panels)], label="parameter in [-1, 1]")
    return figure


def draw_learning_curve(rows: list[dict[str, float]], title: str) -> Figure:
    """Evaluation return, and success rate where there is one, over environment steps."""
    shown = ["episodic_return"] if math.isnan(rows[-1]["success_rate"]) else ["episodic_return", "success_rate"]
    figure = Figure(figsize=(3.6 * len(shown) + 0.6, 3.5), layout="constrained")
    figure.suptitle(title)
    steps = [row["step"] for row in rows]
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot(steps, [row[name] for row in rows], marker=".", label="actor")
        axis.plot(steps, [row[f"average_{name}"] for row in rows], marker=".", label="its moving average")
        axis.legend(fontsize=8)
        axis.set(xlabel="environment steps", ylabel=f"evaluation {name.replace('_', ' ')}")
        axis.grid(alpha=0.3)
    return figure


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
