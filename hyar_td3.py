"""HyAR-TD3: reinforcement learning with hybrid (discrete + continuous) actions.

A conditional VAE turns each hybrid action into one continuous latent action, and TD3 learns in that
latent space; what the policy emits is decoded into a discrete action and its own parameters.

Paper: Li et al., "HyAR: Addressing Discrete-Continuous Action Reinforcement Learning via Hybrid Action
Representation", ICLR 2022, https://arxiv.org/abs/2109.05490

    python hyar_td3.py --env Platform-v0
    python hyar_td3.py --env Goal-v0 --seed 2 --capture-video
    python hyar_td3.py --env SomePackage:Their-v0 --total-timesteps 100000 --run-name mine --resume

Docs: docs/hyar_td3.md
"""

import contextlib
import copy
import difflib
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
from collections import deque
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
    checkpoint_frequency: int = 10_000
    """steps between two checkpoints"""
    eval_frequency: int = 2_500
    """steps between two evaluations"""
    eval_episodes: int = 100
    """episodes of each evaluation, always on the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Platform-v0"
    """the environment: any Gymnasium id with a hybrid action space, `package:Name-v0` imports the package first"""
    total_timesteps: int | None = None
    """environment steps of the learning phase (default: by environment; the random phase comes on top)"""
    learning_rate: float = 3e-4
    """learning rate of the actor and the critics"""
    buffer_size: int | None = None
    """newest transitions that the critics sample from (default: by environment); the VAE samples from all"""
    gamma: float = 0.99
    """the discount factor gamma"""
    bootstrap_at_limit: bool = True
    """if toggled off, a time limit ends the value as a terminal state does, as in the original code"""
    tau: float = 0.005
    """target smoothing coefficient"""
    batch_size: int = 128
    """batch size of the actor and the critics"""
    policy_noise: float = 0.1
    """standard deviation of the target policy's smoothing noise"""
    noise_clip: float = 0.5
    """clip of the target policy's smoothing noise"""
    exploration_noise_start: float = 1.0
    """standard deviation of the exploration noise in the first episode"""
    exploration_noise: float = 0.1
    """standard deviation of the exploration noise after its linear decay"""
    exploration_noise_episodes: int = 1_000
    """episodes over which the exploration noise decays"""
    learning_starts: int = 128
    """step of the learning phase at which updates begin"""
    policy_frequency: int = 2
    """critic updates per update of the actor and the targets"""
    policy_average: float = 5e-4
    """rate of the moving average of the actor's weights, which is evaluated beside the actor and does not act"""
    random_episodes: int | None = None
    """episodes of the random phase, which the VAE is pre-trained on (default: by environment)"""
    discrete_embedding: Literal["learned", "one-hot"] = "learned"
    """embedding of the discrete action: a trained table (the paper's) or fixed one-hot vectors"""
    discrete_latent_dim: int | None = None
    """size of a discrete action's embedding (default: by environment; one-hot: the number of actions)"""
    parameter_latent_dim: int | None = None
    """size of the VAE's latent for the action's parameters (default: by environment)"""
    vae_pretrain_steps: int = 5_000
    """gradient steps of the VAE on the random phase's transitions"""
    vae_batch_size: int = 64
    """batch size of the VAE"""
    vae_learning_rate: float = 1e-4
    """learning rate of the VAE"""
    anneal_vae_learning_rate: bool = False
    """if toggled, the VAE's learning rate falls linearly to 0 over the learning phase"""
    vae_update_start: int = 1_000
    """episode of the learning phase from which the VAE is trained further"""
    vae_update_episodes: int | None = None
    """episodes between two further VAE steps and updates of the latent range (default: by environment)"""
    parameter_weight: float = 2.0
    """weight of the parameters' reconstruction error in the VAE's loss"""
    state_weight: float = 1.0
    """weight of the state-change prediction error in the VAE's loss"""
    kl_weight: float = 0.5
    """weight of the KL divergence (mean over batch and dimensions) in the VAE's loss"""
    latent_range_samples: int = 5_000
    """transitions whose latents give the latent range"""
    latent_range_tail: float = 0.02
    """share of latents outside of the latent range on each side (0.02: c = 96 % in the paper)"""
    relabel: bool = True
    """if toggled, latent actions that the current VAE would decode otherwise are replaced in each batch"""
    relabel_threshold: float = 5.0
    """a latent is replaced if its state-change error is above this many times the VAE's mean error"""
    relabel_in_latent_range: bool = True
    """if toggled off, that error is of the policy's z as it stands, not scaled to the latent range (as the original)"""
    rebuild_vae_optimizer: bool = False
    """if toggled, each VAE step uses a new Adam, as the original code does (for the ablation)"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int]] = {  # the original code's; "" holds what is not listed above it
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
UNBOUNDED = 1e6  # bounds beyond it, such as inf or float32's largest number, are none


class HybridActionSpace:
    """A `Tuple(Discrete(K), Tuple(Box, ..., Box))` (a Box per action) or `Tuple(Discrete(K), Box)` (one for all).

    Inside of the script an action is `(k, x)`: index k in 0..K-1 and parameters x (P,) in [-1, 1], padded with zeros
    to the largest number of parameters P; `mask` (K, P) is 1 where an action has a parameter.
    """

    def __init__(self, space: gym.Space) -> None:
        """Read sizes and bounds. Raises ValueError, with what was expected, for any other space."""
        expected = "hybrid actions expected: Tuple(Discrete, Tuple(Box, ...)) or Tuple(Discrete, Box)"
        if isinstance(space, gym.spaces.Box):
            raise ValueError(f"{expected}, got a Box; for continuous control see sac_ae_pixels.py")
        if isinstance(space, gym.spaces.Discrete):
            raise ValueError(f"{expected}, got a Discrete space without parameters; try a DQN")
        parts = space.spaces if isinstance(space, gym.spaces.Tuple) else ()
        if len(parts) != 2 or not isinstance(parts[0], gym.spaces.Discrete):
            raise ValueError(f"{expected}, got {space}")
        self.num_actions, self.first = int(parts[0].n), int(parts[0].start)
        self.shared = isinstance(parts[1], gym.spaces.Box)
        own = parts[1].spaces if isinstance(parts[1], gym.spaces.Tuple) else ()
        self.boxes = [parts[1]] * self.num_actions if self.shared else list(own)
        if len(self.boxes) != self.num_actions or not all(isinstance(box, gym.spaces.Box) for box in self.boxes):
            raise ValueError(f"{expected}, with one Box for each of the {self.num_actions} actions, got {parts[1]}")
        for k, box in enumerate(self.boxes):
            if not (np.abs([box.low, box.high]) < UNBOUNDED).all():
                raise ValueError(f"bounded parameters expected, but action {k} has {box}; wrap it with finite bounds")
        self.parameter_dims = [math.prod(box.shape) for box in self.boxes]
        self.parameter_dim = max(self.parameter_dims)
        if self.parameter_dim == 0:
            raise ValueError("no action has a parameter: this is a discrete problem; try a DQN")
        self.mask = np.float32(np.arange(self.parameter_dim) < np.array(self.parameter_dims)[:, None])
        self.bounds = [(box.low.reshape(-1).astype(float), box.high.reshape(-1).astype(float)) for box in self.boxes]
        self.others = tuple(((box.low + box.high) / 2).astype(box.dtype) for box in self.boxes)

    def to_environment(self, k: int, x: np.ndarray) -> tuple[int, Any]:
        """The environment's own form of action `k` with parameters `x` (P,) in [-1, 1]."""
        box, (low, high) = self.boxes[k], self.bounds[k]
        scaled = low + (high - low) * (x[: len(low)].astype(float) + 1.0) / 2.0
        if np.issubdtype(box.dtype, np.integer):
            scaled = np.rint(scaled)  # cut off, the upper bound would never be reached
        parameters = scaled.clip(low, high).astype(box.dtype).reshape(box.shape)
        # Other actions' parameters are not read by the environment: any value inside of their bounds will do.
        return k + self.first, parameters if self.shared else (*self.others[:k], parameters, *self.others[k + 1 :])


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Make the environment. Raises ValueError with one line, if it is unknown or its spaces do not fit."""
    try:
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like Platform-v0 or package:Name-v0"
        raise ValueError(f"unknown environment {env_id} ({str(error).rstrip('.')}); {hint}") from None
    except Exception as error:  # whatever a third party's environment raises, it is about this id
        raise ValueError(f"could not make {env_id}: {type(error).__name__}: {error}") from None
    if not isinstance(env.observation_space, gym.spaces.Box):
        kind = type(env.observation_space).__name__
        raise ValueError(f"a Box observation expected, {env_id} has {kind}; try gymnasium's FlattenObservation on it")
    HybridActionSpace(env.action_space)
    return env if len(env.observation_space.shape) == 1 else gym.wrappers.FlattenObservation(env)


# Networks ------------------------------------------------------------------------------------------------------------
class HybridActionVAE(nn.Module):
    """The hybrid action representation: an embedding table and a conditional VAE (section 3.1, figure 2).

    Sizes: S observation, K discrete actions, P parameters, d1 embedding, d2 latent. Beside the weights it holds the
    latent range of section 3.3, in which a policy's z in [-1, 1] is read, and its own mean state-change error.
    """

    def __init__(
        self, observation_dim: int, num_actions: int, parameter_dim: int, embedding_dim: int, latent_dim: int, kind: str
    ) -> None:
        """`kind` is "learned" (a table K x d1, trained by this VAE's loss) or "one-hot" (fixed, d1 = K)."""
        super().__init__()
        self.kind, hidden = kind, 256

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

    def forward(
        self, observation: Tensor, k: Tensor, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstructed parameters (B, P) in (-1, 1), predicted state change (B, S), mean and std (B, d2).

        `k` (B,) are action indices, `noise` (B, d2) standard normal, drawn here if it is not given.
        """
        embedding = self.discrete_embedding()[k]
        mean, std = self.encode(observation, embedding, x)
        latent = mean + std * (torch.randn_like(std) if noise is None else noise)
        hidden = self.decode(observation, embedding, latent)
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

    @torch.no_grad()
    def latent_range(self, observation: Tensor, k: Tensor, x: Tensor, delta: Tensor, tail: float) -> None:
        """Set the latent range to the central `1 - 2 tail` of sampled latents, and `state_error`, from these rows."""
        parts = []
        for part in zip(*(value.split(500) for value in (observation, k, x, delta)), strict=True):  # fits the cache
            part_observation, embedding = part[0], self.discrete_embedding()[part[1]]
            mean, std = self.encode(part_observation, embedding, part[2])
            latent = mean + std * torch.randn_like(std)
            predicted = torch.tanh(self.state_head(self.decode(part_observation, embedding, latent)))
            kl = 0.5 * (mean.square() + std.square() - 1.0) - std.log()
            parts.append((latent, (predicted - part[3]).square().mean(1), kl))
        latent, error, kl = (torch.cat(values) for values in zip(*parts, strict=True))
        border = min(int(tail * len(latent)), (len(latent) - 1) // 2)
        ordered = latent.sort(0).values
        self.latent_low.copy_(ordered[border])
        self.latent_high.copy_(ordered[-border - 1])
        self.state_error.copy_(error.mean())
        self.latent_information.copy_(kl.mean(0))


class Actor(nn.Module):
    """The policy (B, S) -> (B, d1 + d2) in (-1, 1): an embedding and a z (section 4, figure 3)."""

    def __init__(self, observation_dim: int, latent_action_dim: int) -> None:
        """Two hidden layers of 256; both heads of the original are one layer here."""
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(observation_dim, 256), nn.ReLU(True), nn.Linear(256, 256), nn.ReLU(True),
            nn.Linear(256, latent_action_dim), nn.Tanh(),
        )  # fmt: skip

    def forward(self, observation: Tensor) -> Tensor:
        """The latent action of each observation."""
        return self.network(observation)


class TwinCritic(nn.Module):
    """Two Q functions of (observation, latent action) in one pass: twice as wide, block-diagonal in the middle."""

    def __init__(self, observation_dim: int, latent_action_dim: int) -> None:
        """Each twin is drawn as three `nn.Linear` draw theirs; inputs -> 256 -> 256 -> 1."""
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
        """The first value alone (B,), which the actor climbs."""
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

    def __init__(self, capacity: int, observation_dim: int, latent_action_dim: int, parameter_dim: int) -> None:
        """`capacity` in transitions: those of the random phase and all that the run will add."""
        self.widths = [observation_dim, latent_action_dim, parameter_dim, 1, observation_dim, 1, 1]
        self.rows = torch.zeros(capacity, sum(self.widths))
        self.fields = [part.numpy() for part in self.rows.split(self.widths, 1)]  # views of the same memory
        self.size = 0
        self.random_size = 0

    def add(self, *values: Any) -> None:
        """Append one transition, its values in the order of `Batch`."""
        for column, value in zip(self.fields, values, strict=True):
            column[self.size] = value
        self.size += 1

    def sample(self, low: int, batch_size: int, device: torch.device) -> Batch:
        """Rows drawn uniformly from the `low`-th to the newest, with replacement."""
        rows = self.rows[torch.randint(low, self.size, (batch_size,))].to(device)
        batch = Batch(*rows.split(self.widths, 1))
        return batch._replace(k=batch.k[:, 0].long(), reward=batch.reward[:, 0], terminated=batch.terminated[:, 0])


# Learning ------------------------------------------------------------------------------------------------------------
class HyARTD3:
    """Networks, optimizers and the four updates; an update takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, env: gym.Env, device: torch.device) -> None:
        """Build everything from the sizes of `env`'s spaces; `args` has no None left (see `resolve`)."""
        self.args, self.device = args, device
        self.actions = HybridActionSpace(env.action_space)
        names, count = getattr(env.unwrapped, "action_names", ()), self.actions.num_actions  # for the pictures
        fits = isinstance(names, list | tuple) and len(names) == count
        self.names = list(names) if fits else [f"action {k}" for k in range(count)]
        space = env.observation_space
        self.observation_dim = int(np.prod(space.shape))
        self.embedding_dim = args.discrete_latent_dim
        self.latent_dim = args.parameter_latent_dim
        self.latent_action_dim = self.embedding_dim + self.latent_dim
        # The scaling to [-1, 1], by the space's bounds or by the narrower ones that the environment gives as customary.
        # `fit_observation_scale` replaces what is unbounded.
        low = np.array(getattr(env.unwrapped, "scale_low", space.low), np.float64).reshape(-1)
        high = np.array(getattr(env.unwrapped, "scale_high", space.high), np.float64).reshape(-1)
        self.unbounded = (low < -UNBOUNDED) | (high > UNBOUNDED) | (low == high)
        low, high = np.where(self.unbounded, -1.0, low), np.where(self.unbounded, 1.0, high)
        self.center, self.scale = ((low + high) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)
        self.mask = torch.from_numpy(self.actions.mask).to(device)

        sizes = self.observation_dim, self.latent_action_dim
        self.actor = Actor(*sizes).to(device)
        self.critic = TwinCritic(*sizes).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critic).requires_grad_(False)
        self.vae = HybridActionVAE(
            self.observation_dim, self.actions.num_actions, self.actions.parameter_dim,
            self.embedding_dim, self.latent_dim, args.discrete_embedding,
        ).to(device)  # fmt: skip
        self.initial_embedding = self.vae.discrete_embedding().detach().clone()
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.learning_rate, fused=True)
        self.vae_optimizer = torch.optim.Adam(self.vae.parameters(), lr=args.vae_learning_rate, fused=True)
        self.online = [*self.actor.parameters(), *self.critic.parameters()]  # in the order of self.targets
        self.average, self.actor_updates = list(self.average_actor.parameters()), 0
        self.targets = [*self.target_actor.parameters(), *self.target_critics.parameters()]

    def fit_observation_scale(self, observations: np.ndarray) -> None:
        """Normalise unbounded dimensions by the mean and deviation of these observations (N, S), for good."""
        mean, std = observations.mean(0, dtype=np.float64), observations.std(0, dtype=np.float64)
        std[std < 1e-6] = 1.0  # never moved: no measure of how far it may go
        self.center = np.where(self.unbounded, mean, self.center).astype(np.float32)
        self.scale = np.where(self.unbounded, std, self.scale).astype(np.float32)

    def scale_observation(self, observation: np.ndarray) -> np.ndarray:
        """Observations (..., S) of the environment as the networks see them, float32."""
        return (observation.astype(np.float32) - self.center) / self.scale

    @torch.inference_mode()
    def act(self, observation: np.ndarray, noise: float = 0.0, average: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Latent actions (N, d1 + d2), action indices (N,) and parameters (N, P), on the CPU.

        `observation` (N, S) is scaled; `noise` is the standard deviation of the exploration noise; `average` takes the
        actor's moving average.
        """
        state = torch.from_numpy(observation).to(self.device)
        latent_action = (self.average_actor if average else self.actor)(state)
        if noise > 0.0:
            latent_action = (latent_action + noise * torch.randn_like(latent_action)).clamp_(-1.0, 1.0)
        k = self.vae.select_discrete_action(latent_action[:, : self.embedding_dim])
        x = self.vae.select_parameter_action(state, k, latent_action[:, self.embedding_dim :]) * self.mask[k]
        return latent_action.cpu(), k.cpu(), x.cpu()

    def update_vae(self, batch: Batch, progress: float = 0.0, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One step on equation 6: parameters, state change and KL. `progress` in [0, 1] drives the annealing."""
        args, vae = self.args, self.vae
        x, delta, mean, std = vae(batch.observation, batch.k, batch.x, noise)
        parameter_loss = F.mse_loss(x, batch.x)
        state_loss = F.mse_loss(delta, batch.next_observation - batch.observation)
        kl = (0.5 * (mean.square() + std.square() - 1.0) - std.log()).mean()
        loss = args.parameter_weight * parameter_loss + args.state_weight * state_loss + args.kl_weight * kl
        if args.rebuild_vae_optimizer:
            self.vae_optimizer = torch.optim.Adam(vae.parameters(), lr=args.vae_learning_rate, fused=True)
        for group in self.vae_optimizer.param_groups:  # a new rate never costs the optimizer its moments
            group["lr"] = args.vae_learning_rate * (1.0 - progress * args.anneal_vae_learning_rate)
        self.vae_optimizer.zero_grad()
        loss.backward()
        self.vae_optimizer.step()
        losses = {"vae": loss, "vae_parameter": parameter_loss, "vae_state": state_loss, "vae_kl": kl}
        return {name: value.detach() for name, value in losses.items()}

    def update_latent_range(self, batch: Batch) -> None:
        """Recompute the latent range from these rows (latent space constraint, section 3.3)."""
        delta = batch.next_observation - batch.observation
        self.vae.latent_range(batch.observation, batch.k, batch.x, delta, self.args.latent_range_tail)

    @torch.no_grad()
    def relabel(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latent actions (B, d1 + d2) that the current VAE decodes into what was done (section 3.3).

        `noise` (B, d1 + d2) is standard normal. Only the rows in need of it are encoded.
        """
        args, vae = self.args, self.vae
        embedding, z = batch.latent_action.split((self.embedding_dim, self.latent_dim), 1)
        embedding_noise, latent_noise = noise.split((self.embedding_dim, self.latent_dim), 1)
        own = vae.discrete_embedding()[batch.k]
        stale = vae.select_discrete_action(embedding) != batch.k
        jitter = (args.policy_noise * embedding_noise).clamp_(-args.noise_clip, args.noise_clip)
        embedding = torch.where(stale[:, None], (own + jitter).clamp_(-1.0, 1.0), embedding)

        delta = batch.next_observation - batch.observation
        predicted = vae.select_delta_state(batch.observation, batch.k, z, args.relabel_in_latent_range)
        error = (predicted - delta).square_().mean(1)
        invalid = error >= args.relabel_threshold * vae.state_error
        rows = invalid.nonzero()[:, 0]
        mean, std = vae.encode(batch.observation[rows], own[rows], batch.x[rows])
        z = z.index_copy(0, rows, vae.to_policy(mean + std * latent_noise[rows]))
        kept = {"kept_embedding": 1.0 - stale.float().mean(), "kept_latent": 1.0 - invalid.float().mean()}
        return torch.cat((embedding, z), 1), kept

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Relabelled latent actions (B, d1 + d2), the targets (B,) of clipped double Q-learning (equation 7), metrics.

        `noise` (B, 2 (d1 + d2)) is standard normal: half for relabelling, half for the target policy's smoothing.
        """
        args = self.args
        if noise is None:
            noise = torch.randn(len(batch.reward), 2 * self.latent_action_dim, device=self.device)
        relabel_noise, smoothing = noise.chunk(2, 1)
        latent_action, kept = self.relabel(batch, relabel_noise) if args.relabel else (batch.latent_action, {})
        smoothing = (args.policy_noise * smoothing).clamp_(-args.noise_clip, args.noise_clip)
        rows = (batch.terminated == 0.0).nonzero()[:, 0]  # what has ended has no next value
        following = batch.next_observation[rows]
        next_action = (self.target_actor(following) + smoothing[rows]).clamp_(-1.0, 1.0)
        next_value = self.target_critics(following, next_action).amin(0)
        return latent_action, batch.reward.index_add(0, rows, next_value, alpha=args.gamma), kept

    def update_critic(self, observation: Tensor, latent_action: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step of both critics towards `target` (B,)."""
        values = self.critic(observation, latent_action)
        loss = (values - target).square().mean(1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return {"critic": loss.detach(), "q_value": values.detach().mean()}

    def update_actor(self, observation: Tensor) -> dict[str, Tensor]:
        """One step up the first critic with inverted gradients, then the targets follow.

        The gradient towards a bound shrinks with the room that is left (Hausknecht and Stone, 2016).
        """
        action = self.actor(observation)
        leaf = action.detach().requires_grad_()
        value = self.critic.first(observation, leaf).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        leaf = leaf.detach()
        inverted = gradient * torch.where(gradient > 0.0, 1.0 - leaf, 1.0 + leaf) / 2.0
        self.actor_optimizer.zero_grad()
        action.backward(-inverted)
        norm = nn.utils.clip_grad_norm_(self.actor.parameters(), 10.0)
        self.actor_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.targets, self.online, self.args.tau)
            self.actor_updates += 1  # the mean of all actors so far, until there are 1 / policy_average of them
            rate = max(self.args.policy_average, 1.0 / self.actor_updates)
            torch._foreach_lerp_(self.average, self.online[: len(self.average)], rate)
        return {"actor": -value.detach(), "actor_gradient_norm": norm.detach()}

    def update(self, batch: Batch, noise: Tensor | None = None) -> dict[str, Tensor]:
        """`policy_frequency` critic updates on the parts of one large batch, then one actor update on the last part.

        The targets and the VAE stand still in between, so one pass gives the targets of all parts.
        """
        latent_action, target, losses = self.critic_target(batch, noise)
        parts = [value.chunk(self.args.policy_frequency) for value in (batch.observation, latent_action, target)]
        for observation, latent_action, target in zip(*parts, strict=True):
            losses |= self.update_critic(observation, latent_action, target)
        return losses | self.update_actor(observation)

    def statistics(self) -> dict[str, float]:
        """How far the embedding has moved, and how many latent dimensions carry more than 0.01 nats."""
        moved = (self.vae.discrete_embedding().detach() - self.initial_embedding).abs().max()
        return {
            "charts/embedding_moved": float(moved),
            "charts/latent_dimensions_in_use": float((self.vae.latent_information > 0.01).sum()),
            "charts/latent_range": float((self.vae.latent_high - self.vae.latent_low).mean()),
            "charts/state_error": float(self.vae.state_error),
        }

    def row_sizes(self) -> tuple[int, int, int]:
        """Sizes of an observation, a latent action and the padded parameters in the replay buffer."""
        return self.observation_dim, self.latent_action_dim, self.actions.parameter_dim

    def modules(self) -> dict[str, nn.Module]:
        """All networks by name."""
        names = "actor", "average_actor", "critic", "target_actor", "target_critics", "vae"
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        names = "actor_optimizer", "critic_optimizer", "vae_optimizer"
        return {
            **{name: module.state_dict() for name, module in self.modules().items()},
            **{name: getattr(self, name).state_dict() for name in names},
            "actor_updates": self.actor_updates,
            "center": torch.from_numpy(self.center),
            "scale": torch.from_numpy(self.scale),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s, or a model file's, which has no optimizers."""
        for name, part in state.items():
            if name in ("center", "scale"):
                setattr(self, name, part.cpu().numpy())
            elif name == "actor_updates":
                self.actor_updates = part
            else:
                getattr(self, name).load_state_dict(part)


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(
    agent: HyARTD3, environments: list[gym.Env], seed: int, average: bool = False,
    stopped: Callable[[], Any] = lambda: False,
) -> dict[str, float]:  # fmt: skip
    """Play one episode without noise in each environment, in lock-step, so that the policy sees one batch a step.

    Episode i always has `episode_seed(seed, i, stream=1)`; training's random streams are not touched. Returns
    `episodic_return` (mean), `return_std`, `episodic_length` and `success_rate` (nan, if infos hold no `is_success`);
    nothing once `stopped()` is true. Raises ValueError for an observation or a reward that is not finite.
    """
    count = len(environments)
    returns, lengths, successes = np.zeros(count), np.zeros(count), np.full(count, np.nan)
    observations, active = [], list(range(count))
    for i, env in enumerate(environments):
        if stopped():
            return {}
        observations.append(env.reset(seed=episode_seed(seed, i, stream=1))[0])

    def check(finite: np.ndarray, what: str) -> None:
        if not finite.all():
            where = f"the evaluation episode with reset seed {episode_seed(seed, active[finite.argmin()], stream=1)}"
            raise ValueError(f"{what} is not finite, in {where}")

    while active:
        if stopped():
            return {}
        seen = np.stack([observations[i] for i in active])
        check(np.isfinite(seen).all(1), "an observation")
        _, ks, xs = agent.act(agent.scale_observation(seen), average=average)
        running = []
        for i, k, x in zip(active, ks.tolist(), xs.numpy(), strict=True):
            action = agent.actions.to_environment(k, x)
            observations[i], reward, terminated, truncated, info = environments[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                successes[i] = info.get("is_success", np.nan)
            else:
                running.append(i)
        check(np.isfinite(returns[active]), "a reward")
        active = running
    return {
        "episodic_return": float(returns.mean()),
        "return_std": float(returns.std()),
        "episodic_length": float(lengths.mean()),
        "success_rate": float(successes.mean()),
    }


def record_videos(
    agent: HyARTD3, args: Args, folder: Path, step: int, stopped: Callable[[], Any] = lambda: False
) -> list[Path]:
    """Write mp4 videos of the averaged policy's first three evaluation episodes and return their paths."""
    env = gym.wrappers.RecordVideo(
        make_env(args.env_id, render_mode="rgb_array"),
        str(folder / "videos"), episode_trigger=lambda _: True, name_prefix=f"step{step}", disable_logger=True,
    )  # fmt: skip
    for i in range(min(3, args.eval_episodes)):
        observation, done = env.reset(seed=episode_seed(args.seed, i, stream=1))[0], False
        while not (done or stopped()):
            _, k, x = agent.act(agent.scale_observation(observation)[None], average=True)
            observation, _, terminated, truncated, _ = env.step(agent.actions.to_environment(int(k), x[0].numpy()))
            done = terminated or truncated
    env.close()
    return sorted((folder / "videos").glob(f"step{step}-*.mp4"))


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
def new_figure(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure of its own (no pyplot, so no global state), with an array (rows, columns) of axes."""
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)


@torch.no_grad()
def draw_latent_actions(agent: HyARTD3, observation: np.ndarray) -> dict[str, Figure]:
    """Three pictures of the latent action space in one state, `observation` (S,), scaled; 24 parameters at most.

    The map of decoded parameters over the two most informative latent dimensions, alternatives sampled from the prior
    and around the policy's z (with a random generator of their own), an interpolation between two latent actions.
    """
    vae, dims, generator = agent.vae, agent.actions.parameter_dims, torch.Generator().manual_seed(0)
    panels = [(k, p) for k in range(agent.actions.num_actions) for p in range(dims[k])][:24]
    shown = sorted({k for k, _ in panels})
    titles = [f"{agent.names[k]}, parameter {p}" for k, p in panels]

    def panel_figure(title: str) -> tuple[Figure, np.ndarray]:
        """A figure with axes (N,) for the N panels, 6 in a row."""
        figure, axes = new_figure(-(-len(panels) // 6), min(6, len(panels)), title)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        return figure, axes.flat[: len(panels)]

    def decode(k: Tensor | int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters (N, P) and state changes (N, S) of actions k with the policy's z (N, d2)."""
        states, z = torch.from_numpy(observation).expand(len(z), -1).to(agent.device), z.to(agent.device)
        k = torch.as_tensor(k, device=agent.device).expand(len(z))
        return vae.select_parameter_action(states, k, z).cpu(), vae.select_delta_state(states, k, z).cpu()

    ranked = vae.latent_information.argsort(descending=True).tolist()
    first, second = ranked[0], ranked[min(1, len(ranked) - 1)]
    grid, z = torch.linspace(-1.0, 1.0, 41), torch.zeros(41 * 41, agent.latent_dim)
    z[:, second], z[:, first] = grid.repeat_interleave(41), grid.repeat(41)
    latent_map, axes = panel_figure("Latent action map: decoded parameter, other dimensions of z at 0")
    for axis, (k, p), title in zip(axes, panels, titles, strict=True):
        values = decode(k, z)[0][:, p].reshape(41, 41)
        image = axis.imshow(values, cmap="coolwarm", origin="lower", extent=(-1, 1, -1, 1), vmin=-1, vmax=1)
        axis.set(title=title, xlabel=f"z[{first}]", ylabel=f"z[{second}]")
    latent_map.colorbar(image, ax=list(axes), label="parameter in [-1, 1]")

    alternatives, axes = panel_figure("Parameters decoded from the prior and from around the policy's z")
    own = agent.act(observation[None])[0][0, agent.embedding_dim :]
    near = (own + 0.1 * torch.randn(500, agent.latent_dim, generator=generator)).clamp(-1.0, 1.0)
    prior = vae.to_policy(torch.randn(500, agent.latent_dim, generator=generator).to(agent.device))
    for axis, (k, p), title in zip(axes, panels, titles, strict=True):
        for name, samples in (("prior", prior), ("policy's z + N(0, 0.1)", near)):
            axis.hist(decode(k, samples)[0][:, p].numpy(), np.linspace(-1, 1, 41), alpha=0.6, label=name)
        axis.set(title=title, xlabel="parameter in [-1, 1]", ylabel="samples of 500")
    axes[0].legend(fontsize=8)

    table, share = vae.discrete_embedding().cpu(), torch.linspace(0.0, 1.0, 101)[:, None]
    ends = [torch.cat((table[k], torch.full((agent.latent_dim,), z))) for k, z in ((shown[0], -1.0), (shown[-1], 1.0))]
    path = torch.lerp(*ends, share)
    k = vae.select_discrete_action(path[:, : agent.embedding_dim].to(agent.device)).cpu()
    parameters, change = decode(k, path[:, agent.embedding_dim :])
    largest = np.argsort(-np.ptp(change.numpy(), axis=0))[:5].tolist()
    title = f"On the way from {agent.names[shown[0]]}, z = -1 to {agent.names[shown[-1]]}, z = 1"
    interpolation, axes = new_figure(1, 3, title)
    axes[0, 0].plot(share, k, drawstyle="steps-mid")
    axes[0, 0].set(ylabel="decoded discrete action", yticks=sorted(set(k.tolist())))
    axes[0, 1].plot(share, parameters, label=[f"parameter {p}" for p in range(parameters.shape[1])])
    axes[0, 1].set(ylabel="decoded parameters", ylim=(-1.05, 1.05))
    axes[0, 2].plot(share, change[:, largest], label=[f"observation {i}" for i in largest])
    axes[0, 2].set(ylabel="predicted state change (scaled)")
    for axis in axes[0]:
        axis.set(xlabel="share of the way")
    for axis in axes[0, 1:]:
        axis.legend(fontsize=8)
    names = "latent_action_map", "latent_alternatives", "latent_interpolation"
    return dict(zip(names, (latent_map, alternatives, interpolation), strict=True))


def draw_embedding(history: list[Tensor], names: list[str]) -> Figure:
    """The embedding tables (K, d1) of a run in two main directions: each action's path since the start."""
    tables = torch.stack(history).cpu().double()
    centered = tables - tables.mean((0, 1))
    directions = torch.linalg.svd(centered.flatten(0, 1), full_matrices=False).Vh
    paths = (centered @ directions[:2].T).numpy()  # (evaluations, K, 2)
    figure, axes = new_figure(1, 1, "Embedding of the discrete actions")
    figure.set_size_inches(7.0, 4.5)
    for k in range(min(paths.shape[1], 64)):
        x, y = paths[:, k, 0], paths[:, k, -1]
        axes[0, 0].plot(x, y, color=f"C{k % 10}", linewidth=1)
        axes[0, 0].scatter(x[-1:], y[-1:], color=f"C{k % 10}", s=30, label=f"{k}: {names[k]}")
        axes[0, 0].annotate(str(k), (x[-1], y[-1]), textcoords="offset points", xytext=(5, 4))
    figure.legend(loc="outside center right", fontsize=8, ncols=1 + min(paths.shape[1], 64) // 17)
    axes[0, 0].set(xlabel="first main direction", ylabel="second main direction")
    axes[0, 0].margins(0.25)
    return figure


def draw_learning_curve(rows: list[dict[str, float]], title: str) -> Figure:
    """Evaluation return, and success rate where there is one, over environment steps."""
    success = not math.isnan(rows[-1]["success_rate"])
    figure, axes = new_figure(1, 1 + success, title)
    steps = [row["step"] for row in rows]
    for axis, name in zip(axes[0], ("episodic_return", "success_rate"), strict=False):
        axis.plot(steps, [row[name] for row in rows], marker=".", label="actor")
        axis.plot(steps, [row[f"average_{name}"] for row in rows], marker=".", label="its moving average")
        axis.legend(fontsize=8)
        axis.set(xlabel="environment steps", ylabel=f"evaluation {name.replace('_', ' ')}")
        axis.grid(alpha=0.3)
    return figure


# Main ----------------------------------------------------------------------------------------------------------------
def resolve(args: Args, env: gym.Env) -> Args:
    """Fill in what depends on the environment and check all sizes. Raises ValueError with one line."""
    if args.discrete_embedding == "one-hot":
        size, chosen = HybridActionSpace(env.action_space).num_actions, args.discrete_latent_dim
        if chosen not in (None, size):
            raise ValueError(f"--discrete-latent-dim {chosen}: one-hot has {size} here, one an action; leave it out")
        args.discrete_latent_dim = size
    own = env.spec.id.split("-v")[0].rstrip("0123456789") if env.spec else ""
    for name, value in {**DEFAULTS_BY_ENVIRONMENT[""], **DEFAULTS_BY_ENVIRONMENT.get(own, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    at_least_one = {
        "checkpoint_frequency", "eval_frequency", "eval_episodes", "total_timesteps", "buffer_size", "batch_size",
        "policy_frequency", "exploration_noise_episodes", "random_episodes", "discrete_latent_dim",
        "parameter_latent_dim", "vae_batch_size", "vae_update_episodes", "latent_range_samples",
    }  # fmt: skip
    for name, value in asdict(args).items():
        least = 1 if name in at_least_one else 0
        most = 2**63 - 1 if type(value) is int else math.inf
        if isinstance(value, int | float) and not (math.isfinite(value) and least <= value <= most):
            limits = f"a number of at least {least}{', below 2**63,' * (value > most)}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {limits} expected")
    for name, limit in (("gamma", 1.0), ("tau", 1.0), ("policy_average", 1.0), ("latent_range_tail", 0.49)):
        if getattr(args, name) > limit:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at most {limit} expected")
    if args.total_timesteps - max(args.learning_starts, 1) + 1 < args.policy_frequency:
        flags = f"--total-timesteps {args.total_timesteps} ends before the first update: --learning-starts"
        flags += f" {args.learning_starts}, --policy-frequency {args.policy_frequency}"
        raise ValueError(f"{flags}; raise the first or lower the others")
    return args


def check_rendering(env_id: str) -> None:
    """Draw a picture now, not after hours of training. Raises ValueError with one line, if that is not possible."""
    env = make_env(env_id, "rgb_array")
    try:
        env.reset(seed=0)
        picture = env.render()
    except Exception as error:
        raise ValueError(f"{env_id} cannot be drawn: {type(error).__name__}: {error}; see --capture-video") from None
    if env.render_mode != "rgb_array" or not isinstance(picture, np.ndarray):
        raise ValueError(f"{env_id} draws no rgb_array (render_mode {env.render_mode}); leave out --capture-video")
    env.close()


def check_finite(run: Run, reward: float, observation: np.ndarray, step: int, args: Args, episode: int) -> None:
    """End the run at a reward or observation that is not finite, before it reaches the buffer or a checkpoint."""
    if not (math.isfinite(reward) and np.isfinite(observation).all()):
        what = f"observation {observation}" if math.isfinite(reward) else f"reward {reward}"
        seed = episode_seed(args.seed, args.random_episodes + episode)
        run.fail(f"step {step}: {what} is not finite, in the episode with reset seed {seed}")


def reset_episode(env: gym.Env, args: Args, episode: int, run: Run, step: int = 0) -> np.ndarray:
    """The first observation of an episode of the learning phase; those of the random phase have smaller indices."""
    observation = env.reset(seed=episode_seed(args.seed, args.random_episodes + episode))[0]
    check_finite(run, 0.0, observation, step, args, episode)
    return observation


def random_phase(agent: HyARTD3, env: gym.Env, args: Args, run: Run) -> ReplayBuffer:
    """Play uniformly random actions and return a buffer of them, with room for the learning phase.

    Sets the scale of unbounded observations. Steps of this phase are not counted as environment steps, as in the paper.
    """
    generator = np.random.default_rng(episode_seed(args.seed, 0, stream=2))
    actions, transitions = agent.actions, []
    for episode in range(-args.random_episodes, 0):
        observation, done = reset_episode(env, args, episode, run), False
        shown = f"random phase, episode {episode + args.random_episodes + 1:,} of {args.random_episodes:,}"
        while not done:
            run.progress(0, shown)
            k = int(generator.integers(actions.num_actions))
            x = generator.uniform(-1.0, 1.0, actions.parameter_dim).astype(np.float32) * actions.mask[k]
            before = observation.copy()  # some environments write each observation into the same array
            observation, reward, terminated, truncated, _ = env.step(actions.to_environment(k, x))
            check_finite(run, float(reward), observation, 0, args, episode)
            transitions.append((before, x, k, observation.copy(), reward, terminated))
            done = terminated or truncated
            if run.signal:
                run.stop()
    before, x, k, after, reward, terminated = (np.array(column) for column in zip(*transitions, strict=True))
    agent.fit_observation_scale(before)
    buffer = ReplayBuffer(len(transitions) + args.total_timesteps, *agent.row_sizes())
    buffer.size = buffer.random_size = len(transitions)
    values = agent.scale_observation(before), 0.0, x, k, agent.scale_observation(after), reward, terminated
    for column, value in zip(buffer.fields, values, strict=True):
        column[: buffer.size] = value if np.ndim(value) != 1 else value[:, None]
    return buffer


def save_model(agent: HyARTD3, args: Args, path: Path) -> None:
    """Write the weights alone (and the arguments, from which `HyARTD3` can be built again)."""
    state = {name: module.state_dict() for name, module in agent.modules().items() if "target" not in name}
    scale = {"center": torch.from_numpy(agent.center), "scale": torch.from_numpy(agent.scale)}
    content = {**state, **scale, "arguments": json.dumps(asdict(args))}
    write_atomically(path, lambda file: torch.save(content, file))


def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        env = make_env(args.env_id)
        args = resolve(args, env)
        if args.capture_video:
            check_rendering(args.env_id)
        evaluation_envs = [make_env(args.env_id) for _ in range(args.eval_episodes)]
    except ValueError as error:
        usage_error(str(error))
    run = Run(args)
    chosen = {name: getattr(args, name) for name in DEFAULTS_BY_ENVIRONMENT[""]}
    print(f"{run.name}: " + ", ".join(f"{name} {value:,}" for name, value in chosen.items()))
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products fail on a GPU
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.set_num_threads(1)  # these products are too small for two threads
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    agent = HyARTD3(args, env, device)
    recent: deque[tuple[float, int]] = deque(maxlen=100)  # return and length of the last episodes

    def evaluate_policies() -> bool:
        """Evaluate the actor and its average at this step, and keep the best model; False if a signal came first."""
        try:
            actor = evaluate(agent, evaluation_envs, args.seed, stopped=lambda: run.signal)
            averaged = actor and evaluate(agent, evaluation_envs, args.seed, True, lambda: run.signal)
        except ValueError as error:
            run.fail(f"step {step}: {error}")
        if not averaged:
            return False
        run.log_evaluation(step, {
            **actor, **{f"average_{name}": averaged[name] for name in ("episodic_return", "success_rate")}
        })  # fmt: skip
        if args.discrete_embedding == "learned":
            embedding_history.append(agent.vae.discrete_embedding().detach().cpu().clone())
        if averaged["episodic_return"] >= max(row["average_episodic_return"] for row in run.eval_rows):
            save_model(agent, args, run.folder / "best_model.pt")
        return True

    if run.checkpoint is None:
        buffer = random_phase(agent, env, args, run)
        losses = {}
        for update in range(1, args.vae_pretrain_steps + 1):
            losses = agent.update_vae(buffer.sample(0, args.vae_batch_size, device))
            if run.signal:
                run.stop()
            if update % 1_000 == 0:
                run.progress(0, f"VAE pre-training, update {update:,}, loss {losses['vae']:.4f}")
        run.log(0, {f"losses/{name}": value for name, value in losses.items()})
        agent.update_latent_range(buffer.sample(0, args.latent_range_samples, device))
        step = episode = updates_due = evaluation_due = 0
        episode_return, episode_actions = 0.0, []
        embedding_history = [agent.initial_embedding.cpu(), agent.vae.discrete_embedding().detach().cpu().clone()]
        observation = reset_episode(env, args, episode, run, step)
    else:
        state = run.checkpoint
        with run.restoring():
            step, episode = state["step"], state["episode"]
            updates_due, evaluation_due = state["updates_due"], state["evaluation_due"]
            episode_return, episode_actions = state["episode_return"], state["episode_actions"]
            embedding_history = state["embedding_history"]
            recent.extend(state["recent"])
            if missing := agent.state_dict().keys() - state["agent"].keys():
                raise LookupError(f"without {missing}")
            agent.load_state_dict(state["agent"])
            buffer = ReplayBuffer(args.total_timesteps + state["random_size"], *agent.row_sizes())
            buffer.size, buffer.random_size = len(state["rows"]), state["random_size"]
            buffer.rows[: buffer.size] = state["rows"]
            saved_observation = state["observation"].numpy()
        observation = reset_episode(env, args, episode, run, step)
        for k, *x in episode_actions:  # replay the interrupted episode up to here
            action = agent.actions.to_environment(int(k), np.array(x, np.float32))
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                observation = None  # it had not ended
                break
        if not np.array_equal(observation, saved_observation):
            print(f"warning: episode {episode} does not replay to the saved observation; going on with the next one")
            episode, episode_return, episode_actions = episode + 1, 0.0, []
            observation = reset_episode(env, args, episode, run, step)
        run.restore_random_state()
        if evaluation_due and not evaluate_policies():
            run.stop()  # it is still due in the checkpoint

    run.steps_per_second(step)  # counts from here
    scaled, losses = agent.scale_observation(observation), {}
    mean_return, mean_length = np.mean(recent or [(math.nan, math.nan)], 0)
    for step in range(step + 1, args.total_timesteps + 1):  # noqa: B020
        decay = min(1.0, episode / args.exploration_noise_episodes)
        noise = args.exploration_noise_start + decay * (args.exploration_noise - args.exploration_noise_start)
        latent_action, k, x = (value[0].numpy() for value in agent.act(scaled[None], noise))
        if not np.isfinite(x).all():  # diverged: name the loss, if it shows there already
            run.log(step, {f"losses/{name}": value for name, value in losses.items()})
            run.fail(f"step {step}: the policy's parameters are {x}; try a smaller learning rate")
        observation, reward, terminated, truncated, _ = env.step(agent.actions.to_environment(int(k), x))
        check_finite(run, float(reward), observation, step, args, episode)
        previous, scaled = scaled, agent.scale_observation(observation)
        ended = terminated or (truncated and not args.bootstrap_at_limit)
        buffer.add(previous, latent_action, x, k, scaled, reward, ended)
        episode_actions.append([float(k), *x.tolist()])
        episode_return += float(reward)

        if step >= args.learning_starts:
            # One critic update a step; as in the original, one more at the first step of each episode.
            updates_due += 2 if len(episode_actions) == 1 else 1
            while updates_due >= args.policy_frequency:
                oldest = max(buffer.random_size, buffer.size - args.buffer_size)
                losses |= agent.update(buffer.sample(oldest, args.policy_frequency * args.batch_size, device))
                updates_due -= args.policy_frequency

        if terminated or truncated:
            recent.append((episode_return, len(episode_actions)))
            mean_return, mean_length = np.mean(recent, 0)
            episode += 1
            if episode >= args.vae_update_start and episode % args.vae_update_episodes == 0:
                batch = buffer.sample(0, args.vae_batch_size, device)
                losses |= agent.update_vae(batch, step / args.total_timesteps)
                agent.update_latent_range(buffer.sample(0, args.latent_range_samples, device))
            episode_return, episode_actions = 0.0, []
            observation = reset_episode(env, args, episode, run, step)
            scaled = agent.scale_observation(observation)

        last, evaluating = step == args.total_timesteps, step % args.eval_frequency == 0
        run.progress(step, f"return {mean_return:.3f}")
        if step % 1_000 == 0 or evaluating or last or run.signal or step % args.checkpoint_frequency == 0:
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            run.log(step, {f"losses/{name}": value for name, value in losses.items()} | agent.statistics())
            run.log(step, {
                "charts/episodic_return": mean_return, "charts/episodic_length": mean_length,
                "charts/episodes": episode, "charts/SPS": run.steps_per_second(step),
                "charts/exploration_noise": noise,
            })  # fmt: skip
        evaluation_due = (evaluating or last) and not evaluate_policies()
        if step % args.checkpoint_frequency == 0 or last or run.signal:
            run.save_checkpoint(step, {
                "agent": agent.state_dict(), "random_size": buffer.random_size,
                "rows": buffer.rows[: buffer.size].clone(),  # a view would bring the whole buffer along
                "episode": episode, "episode_actions": episode_actions, "episode_return": episode_return,
                "observation": torch.from_numpy(observation.copy()), "updates_due": updates_due,
                "evaluation_due": evaluation_due, "recent": list(recent), "embedding_history": embedding_history,
            })  # fmt: skip
            if run.signal and (evaluation_due or not last):
                run.stop()

    save_model(agent, args, run.folder / "model.pt")
    start = agent.scale_observation(evaluation_envs[0].reset(seed=episode_seed(args.seed, 0, stream=1))[0])
    figures = draw_latent_actions(agent, start)
    figures["embedding"] = draw_embedding(embedding_history, agent.names)
    figures["learning_curve"] = draw_learning_curve(run.eval_rows, run.name)
    for name, figure in figures.items():
        run.log_figure(args.total_timesteps, name, figure)
    if args.capture_video:
        paths = record_videos(agent, args, run.folder, step, lambda: run.signal)
        if run.signal:
            run.stop()
        run.log_videos(step, paths)
    run.save_checkpoint(args.total_timesteps, {"agent": agent.state_dict()}, finished=True)
    run.close()
    score, averaged = np.mean(
        [[row["episodic_return"], row["average_episodic_return"]] for row in run.eval_rows[-10:]], 0
    )
    print(f"mean return of the last 10 evaluations: {score:.3f}, averaged policy {averaged:.3f}; see {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
