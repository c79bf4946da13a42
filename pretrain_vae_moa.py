"""Pre-train a VAE on records of a multi-agent game, measured against what can be known at all.

The encoder turns a player's view into a latent z; from z a policy head predicts what that player does next (the
"modelling other agents" objective) and a decoder reconstructs the view. The scripted players of Markov Stag-Hunt have
known probabilities, so `python benchmark/moa.py report RUN` shows every score next to the exact Bayes ceiling.

The game and the setting: Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, https://arxiv.org/abs/2406.08002. The VAE over opponents: Yu et al., "Opponent
Modeling based on Subgoal Inference", NeurIPS 2024.

    python pretrain_vae_moa.py
    python pretrain_vae_moa.py --objective moa --context history --rows 600000 --run-name mine --resume
    python pretrain_vae_moa.py --env sisl/pursuit-v5 --rows 5000 --total-timesteps 2000 --eval-frequency 500

Docs: docs/pretrain_vae_moa.md
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "tensorboard==2.21.0",
#   "pillow==11.3.0", "gymnasium==1.4.0", "moviepy==2.2.1", "pettingzoo==1.27.0", "pygame==2.6.1",
#   "scipy==1.17.1",
# ]
# ///

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import functools
import importlib
import importlib.metadata
import io
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import pettingzoo
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

stag_hunt: Any = None
with contextlib.suppress(ModuleNotFoundError):  # a copy of this file alone still runs on any other environment
    from envs import stag_hunt
    from envs.records import Record, cached_records, read_records

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
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "4p5b8x8"
    """the game: 4p5b8x8, 4p6b8x8 or 4p5b4x4 (stag hunts), another PettingZoo parallel id, or `module:callable`"""
    total_timesteps: int = 25_000
    """gradient steps; --eval-frequency of them make an epoch, so the default is 10 epochs"""
    dataset: str | None = None
    """a dataset file to read (if left out: collect --rows rows, and keep them in --data-dir)"""
    data_dir: str = "data"
    """the folder in which collected datasets are kept"""
    data_seed: int = 1
    """seed of the collected games and of their split; runs with other --seed share one dataset"""
    rows: int = 107_010
    """rows to collect; a row is what one player sees and does at one step"""
    max_cycles: int = 18
    """time limit of the collected games, in steps"""
    load: str | None = None
    """a model.pt to start from; with --total-timesteps 0 it is only evaluated"""
    objective: str = "both"
    """what is learnt, besides alpha * KL: reconstruction, moa (the player's action), or both"""
    head_input: str = "z"
    """what the policy head sees besides time and legal actions: z, state, or state+z"""
    context: str = "1"
    """what the encoder sees: 1 frame, the last 4, or the whole history"""
    latent_dim: int = 16
    """size of the latent z"""
    learning_rate: float = 5e-4
    """initial learning rate"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls to 0 over the run along half a cosine"""
    max_grad_norm: float = 10.0
    """the gradient's norm is clipped to this"""
    batch_size: int = 128
    """rows in a batch; with --context history about this many, in whole sequences"""
    kl_weight: float = 1e-4
    """weight alpha of the KL divergence (sum over dimensions) after its warm-up"""
    kl_warmup: int = 20_000
    """gradient steps of the warm-up: alpha = kl_weight (1 - exp(-step / kl_warmup))"""
    reconstruction_weight: float = 0.05
    """weight of the reconstruction's cross-entropy (sum over planes and cells, in nats)"""
    augment: bool = True
    """if toggled, boards are mirrored and rotated, and the other players reordered, at random (stag hunts only)"""


USED = {  # objective -> the networks that it trains
    "reconstruction": ("encoder", "decoder"),
    "moa": ("encoder", "head"),
    "both": ("encoder", "decoder", "head"),
}
LOSSES = ("loss", "policy", "reconstruction", "kl")  # the objective's total, and its parts
HIDDEN = 128  # width of the hidden layers that are not convolutions
POSITION_PLANES = 2  # row and column, beside the planes of an observation
PROBE_ROWS = 20_000  # training rows that the linear probes are fitted to
Arrays = dict[str, np.ndarray]


# Data ----------------------------------------------------------------------------------------------------------------
class Sizes(NamedTuple):
    """What a model's shape depends on: planes, board, actions, players, and the scales of pixels and time."""

    channels: int
    height: int
    width: int
    actions: int
    players: int
    pixel_scale: float
    time_scale: float


class Batch(NamedTuple):
    """R rows of any episodes, or (with history) all rows of some sequences one after another.

    `frames` (R, C x context + 2, H, W) in [0, 1], the newest first, then row and column of each cell; `time` (R,) in
    [0, 1], `mask` (R, A) legal actions, `action` (R,). With history also `previous` (R, n, A + 1), the last joint
    action one-hot, ego first, its last entry for none; and `slot` (R,), a row's place in a table of `sequences` x
    `length`.
    """

    frames: Tensor
    time: Tensor
    mask: Tensor
    action: Tensor
    previous: Tensor | None = None
    slot: Tensor | None = None
    sequences: int = 0
    length: int = 0


def position_planes(sizes: Sizes) -> Tensor:
    """Row and column of each cell (2, H, W), from 0 to 1."""
    rows, columns = (torch.linspace(0, 1, n) for n in (sizes.height, sizes.width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


class Symmetry:
    """The 8 ways to mirror and rotate a square board, for games whose actions 0..3 are up, down, left, right.

    The position planes are turned with the board. So rules that depend on absolute positions stay true, such as which
    of two equally near hares a player chooses.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        """Look-up tables, one row for each of the 8 turns.

        `cells` (8, H W): the cell that each cell's content comes from. `places` (8, 2, H, W): the position planes.
        `turned_action` (8, A + 1): what each action becomes; the last entry, "no action", stays. `original_action`
        (8, A): its inverse.
        """
        self.players, self.things = sizes.players, torch.arange(sizes.players, sizes.channels, device=device)
        tables = stag_hunt.symmetries(sizes.height, sizes.actions + 1)
        self.cells, self.turned_action = (torch.from_numpy(table).to(device) for table in tables)
        self.original_action = self.turned_action[:, :-1].argsort(1)
        places = position_planes(sizes).to(device)
        self.places = places.flatten(1)[:, self.cells].transpose(0, 1).unflatten(2, places.shape[1:])

    def draw(self, units: int) -> tuple[Tensor, Tensor]:
        """For each unit a random turn (U,), and a random order of the players (U, n) in which the ego stays first."""
        order = torch.rand(units, self.players)
        order[:, 0] = -1.0
        return torch.randint(8, (units,)), order.argsort(1)


class Records:
    """The dataset on the device, sorted by episode, player and time, so that a batch is one gather.

    A sequence is the rows of one player in one episode.
    """

    def __init__(self, arrays: Arrays, meta: dict[str, Any], context: str, device: torch.device) -> None:
        """Copy what training reads to the device."""
        self.arrays, self.meta, self.context = arrays, meta, context
        self.sizes = sizes_of(arrays, meta)
        channels, height, width, actions = self.sizes[:4]
        known = (arrays["strategy"] >= 0).all()
        self.strategies = list(meta.get("strategies") or []) if known else []
        names = list(meta.get("action_names") or [])
        self.action_names = names if len(names) == actions else [str(action) for action in range(actions)]
        planes = list(meta.get("channel_names") or [])
        self.channel_names = planes if len(planes) == channels else [f"plane {channel}" for channel in range(channels)]

        def to_device(values: np.ndarray, kind: type) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, kind)).to(device)

        self.obs, self.mask = to_device(arrays["obs"], np.uint8), to_device(arrays["action_mask"], np.bool_)
        self.action, self.strategy = (to_device(arrays[name], np.int64) for name in ("action", "strategy"))
        previous = arrays["prev_actions"].astype(np.int64)
        self.previous = to_device(np.where(previous < 0, actions, previous), np.int64)
        self.time = to_device(arrays["t"].astype(np.float32) / self.sizes.time_scale, np.float32)
        self.places = position_planes(self.sizes).to(device)
        self.symmetry = Symmetry(self.sizes, device) if is_stag_hunt(meta) and height == width else None
        key = arrays["episode"].astype(np.int64) * 1_000 + arrays["agent"]
        self.starts = np.flatnonzero(np.diff(key, prepend=-1))
        self.lengths = np.diff(self.starts, append=len(key))
        self.position = to_device(np.arange(len(key)) - np.repeat(self.starts, self.lengths), np.int64)
        self.split = arrays["split"][arrays["episode"]]

    @functools.cached_property
    def ceilings(self) -> Arrays:
        """Predictions (N, A) of `history Bayes` and `oracle` (see envs/stag_hunt.py); empty for unknown policies."""
        if "policy_probs" not in self.arrays:
            return {}
        return stag_hunt.ceilings(Record(self.arrays, self.meta))

    def fingerprint(self) -> str:
        """Identifies the dataset: a resumed run must have the one that it began with."""
        hashes, obs, action = self.meta.get("sha256") or {}, self.arrays["obs"], self.arrays["action"]
        split = int(self.arrays["split"].astype(int) @ np.arange(len(self.arrays["split"])))
        return json.dumps([hashes, split, obs.shape, int(action.sum())])

    def rows(self, split: int, episodes: int | None = None) -> np.ndarray:
        """Row numbers of a split (0 train, 1 validation, 2 test), or of its first episodes."""
        chosen = self.split == split
        if episodes is not None:
            chosen &= np.isin(self.arrays["episode"], np.unique(self.arrays["episode"][chosen])[:episodes])
        return np.flatnonzero(chosen)

    def probe_rows(self, count: int = PROBE_ROWS) -> np.ndarray:
        """The first rows of the training split, which probes are fitted to: whole episodes, at least one."""
        rows = self.rows(0)
        episodes = self.arrays["episode"][rows]
        return rows[episodes <= episodes[min(count, len(rows)) - 1]]

    def units(self, rows: np.ndarray) -> np.ndarray:
        """What batches are drawn from: the rows themselves, or with history the numbers of their sequences."""
        return np.flatnonzero(np.isin(self.starts, rows)) if self.context == "history" else rows

    def rows_of(self, units: Tensor) -> tuple[Tensor, Tensor, int]:
        """The rows (R,) of some units (U,), each row's slot (R,) in a table of units by steps, and its width."""
        device = self.obs.device
        if self.context != "history":
            return units.to(device), torch.arange(len(units), device=device), 1
        starts, lengths = (torch.from_numpy(values)[units] for values in (self.starts, self.lengths))
        sequence, longest = torch.repeat_interleave(torch.arange(len(units)), lengths), int(lengths.max())
        place = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
        return (starts[sequence] + place).to(device), (sequence * longest + place).to(device), longest

    def batch(self, units: Tensor, world: tuple[Tensor, Tensor] | None = None) -> Batch:
        """The batch of these rows or sequences (U,), given by index on the CPU.

        `world` is a pair from `Symmetry.draw`: turns (U,) and orders of the players (U, n), applied to planes and
        actions alike.
        """
        rows, slot, length = self.rows_of(units)
        back = torch.arange(4 if self.context == "4" else 1, device=rows.device)
        then = (rows[:, None] - back).clamp_min(0)
        mask, action = self.mask[rows], self.action[rows]
        if world is None:
            frames, places = self.obs[then], self.places.expand(len(rows), -1, -1, -1)
        else:
            turn, order = (values.to(rows.device)[slot // length] for values in world)
            plane = torch.cat((order, self.symmetry.things.expand(len(rows), -1)), 1)
            source = then[:, :, None] * self.sizes.channels + plane[:, None]  # (R, frames, C), while still bytes
            frames = self.obs.flatten(0, 1).flatten(1).index_select(0, source.flatten()).view(*source.shape, -1)
            frames = frames.gather(3, self.symmetry.cells[turn][:, None, None].expand_as(frames))
            frames, places = frames.unflatten(3, self.obs.shape[2:]), self.symmetry.places[turn]
            turned_action = self.symmetry.turned_action[turn]
            mask = mask.gather(1, self.symmetry.original_action[turn])
            action = turned_action.gather(1, action[:, None])[:, 0]
        if self.context == "4":  # zeros before an episode's first frame
            frames = frames * (back <= self.position[rows, None])[:, :, None, None, None]
        frames = frames.flatten(1, 2).float().div_(self.sizes.pixel_scale)
        batch = Batch(torch.cat((frames, places), 1), self.time[rows], mask, action)
        if self.context != "history":
            return batch
        previous = self.previous[rows]
        if world is not None:
            previous = turned_action.gather(1, previous.gather(1, order))
        previous = F.one_hot(previous, self.sizes.actions + 1).float()
        return batch._replace(previous=previous, slot=slot, sequences=len(units), length=length)


class Sampler:
    """Batches in a new order at each pass: pure functions of the seed and the step, so there is nothing to save."""

    def __init__(self, records: Records, rows: np.ndarray, batch_size: int, seed: int) -> None:
        """Draw from these rows. With history, a batch has as many sequences as hold `batch_size` rows on average."""
        self.records, self.seed = records, seed
        self.units = torch.from_numpy(records.units(rows))
        self.size = min(max(1, round(batch_size * len(self.units) / len(rows))), len(self.units))
        self.batches = len(self.units) // self.size
        self.passes, self.order = -1, self.units

    def draw(self, step: int) -> Tensor:
        """The units of the batch of a step, counted from 0. Units left over at the end of a pass are skipped."""
        passes, number = divmod(step, self.batches)
        if passes != self.passes:
            generator = torch.Generator().manual_seed(episode_seed(self.seed, passes, stream=2))
            self.passes, self.order = passes, self.units[torch.randperm(len(self.units), generator=generator)]
        return self.order[number * self.size : (number + 1) * self.size]

    def batch(self, step: int, augment: bool) -> Batch:
        """The batch of a step; with `augment` turned and reordered at random, if the game allows it."""
        units, symmetry = self.draw(step), self.records.symmetry
        return self.records.batch(units, symmetry.draw(len(units)) if symmetry and augment else None)


# Networks ------------------------------------------------------------------------------------------------------------
def convolutions(channels: int) -> nn.Sequential:
    """16-32-32 filters of 3x3, the second layer with stride 2: (B, C, H, W) -> (B, 32, H / 2, W / 2), rounded up."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1), nn.ReLU(True), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(True),
        nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(True),
    )  # fmt: skip


def half(sizes: Sizes) -> tuple[int, int]:
    """Height and width after `convolutions`."""
    return (sizes.height + 1) // 2, (sizes.width + 1) // 2


class Trunk(nn.Module):
    """A player's view as HIDDEN features: convolutions and a layer; with history a GRU over the episode so far."""

    def __init__(self, sizes: Sizes, context: str) -> None:
        """`context` is "1", "4" or "history"."""
        super().__init__()
        self.convolutions = convolutions(sizes.channels * (4 if context == "4" else 1) + POSITION_PLANES)
        inputs = 32 * math.prod(half(sizes))
        if context == "history":
            inputs += sizes.players * (sizes.actions + 1) + 1
        self.layer = nn.Linear(inputs, HIDDEN)
        self.memory = nn.GRU(HIDDEN, HIDDEN, batch_first=True) if context == "history" else None

    def forward(self, batch: Batch) -> Tensor:
        """Features (R, HIDDEN)."""
        features = self.convolutions(batch.frames).flatten(1)
        if self.memory is None:
            return F.relu(self.layer(features))
        features = F.relu(self.layer(torch.cat((features, batch.previous.flatten(1), batch.time[:, None]), 1)))
        table = features.new_zeros(batch.sequences * batch.length, HIDDEN).index_copy(0, batch.slot, features)
        # The padding comes after a sequence's last step, so it cannot change what the GRU returns for the sequence.
        memory = self.memory(table.view(batch.sequences, batch.length, HIDDEN))[0]
        return features + memory.flatten(0, 1)[batch.slot]


class Encoder(nn.Module):
    """q(z | view): mean and log variance."""

    def __init__(self, sizes: Sizes, context: str, latent_dim: int) -> None:
        """A trunk and one layer."""
        super().__init__()
        self.trunk = Trunk(sizes, context)
        self.heads = nn.Linear(HIDDEN, 2 * latent_dim)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log variance (R, latent)."""
        mean, log_variance = self.heads(self.trunk(batch)).chunk(2, 1)
        return mean, log_variance.clamp(-10.0, 10.0)


class Decoder(nn.Module):
    """p(frame | z) of the current frame: the encoder mirrored.

    A sub-pixel convolution (Shi et al., 2016) takes the place of the stride.
    """

    def __init__(self, sizes: Sizes, latent_dim: int) -> None:
        """Two layers, then 3x3 convolutions at half the size; the pixel shuffle doubles it."""
        super().__init__()
        self.sizes, self.small = sizes, half(sizes)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, HIDDEN), nn.ReLU(True), nn.Linear(HIDDEN, 32 * math.prod(self.small)), nn.ReLU(True)
        )
        self.convolutions = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(True), nn.Conv2d(32, 4 * sizes.channels, 3, 1, 1), nn.PixelShuffle(2)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Logits (R, C, H, W) of the planes, from (R, latent)."""
        frame = self.convolutions(self.layers(z).unflatten(1, (32, *self.small)))
        return frame[:, :, : self.sizes.height, : self.sizes.width]  # an odd size was rounded up when it was halved


class PolicyHead(nn.Module):
    """p(action | z, time, legal actions): what the player does next."""

    def __init__(self, sizes: Sizes, head_input: str, context: str, latent_dim: int) -> None:
        """`head_input` is "z", "state" (the view through a trunk of its own) or "state+z"."""
        super().__init__()
        self.uses_z = "z" in head_input
        self.trunk = Trunk(sizes, context) if "state" in head_input else None
        inputs = 1 + sizes.actions
        if self.uses_z:
            inputs += latent_dim
        if self.trunk is not None:
            inputs += HIDDEN
        self.layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.ReLU(True), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(True),
            nn.Linear(HIDDEN, sizes.actions),
        )  # fmt: skip

    def forward(self, z: Tensor, batch: Batch) -> Tensor:
        """Masked logits (R, A): -inf where an action is illegal.

        There is no softmax here, since the cross-entropy has its own. Two softmaxes would keep the loss above
        ln(e + A - 1) - 1 (1.165 for 7 actions), even for a prediction that is certain and right.
        """
        inputs = [batch.time[:, None], batch.mask.float()]
        if self.trunk is not None:
            inputs.insert(0, self.trunk(batch))
        if self.uses_z:
            inputs.insert(0, z)
        logits = self.layers(torch.cat(inputs, 1))
        return logits.masked_fill(~batch.mask, -math.inf)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The KL divergence (R,) of q(z | view) from the standard normal, both (R, latent), summed over dimensions."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)


# Learning ------------------------------------------------------------------------------------------------------------
ADAM_EPSILON = 1e-5


class MOA(nn.Module):
    """The networks, one Adam over all networks that the objective uses, and the update."""

    def __init__(self, args: Args, sizes: Sizes, device: torch.device) -> None:
        """Build everything; `args` has been checked (see `check`)."""
        super().__init__()
        self.args, self.sizes = args, sizes
        self.encoder = Encoder(sizes, args.context, args.latent_dim)
        self.decoder = Decoder(sizes, args.latent_dim)
        self.head = PolicyHead(sizes, args.head_input, args.context, args.latent_dim)
        self.register_buffer("places", position_planes(sizes), persistent=False)
        self.to(device)
        self.used = USED[args.objective]
        self.trained = [parameter for name in self.used for parameter in getattr(self, name).parameters()]
        self.optimizer = torch.optim.Adam(self.trained, lr=args.learning_rate, eps=ADAM_EPSILON, fused=True)

    def policy_loss(self, logits: Tensor, action: Tensor) -> Tensor:
        """The cross-entropy (scalar) of masked logits (R, A) and the actions taken (R,)."""
        return F.cross_entropy(logits, action)

    def losses(self, batch: Batch, alpha: float, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The objective's `total`, and its unweighted parts; `noise` (R, latent) is standard normal."""
        mean, log_variance = self.encoder(batch)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (0.5 * log_variance).exp() * noise
        losses = {"kl": kl_divergence(mean, log_variance).mean()}
        total = alpha * losses["kl"]
        if "decoder" in self.used:
            frame, logits = batch.frames[:, : self.sizes.channels], self.decoder(z)
            losses["reconstruction"] = F.binary_cross_entropy_with_logits(logits, frame, reduction="sum") / len(z)
            losses["reconstruction_mse"] = (logits.detach().sigmoid() - frame).square().mean()
            total = total + self.args.reconstruction_weight * losses["reconstruction"]
        if "head" in self.used:
            losses["policy"] = self.policy_loss(self.head(z, batch), batch.action)
            total = total + losses["policy"]
        return {"total": total, **losses}

    def alpha(self, step: int) -> float:
        """The KL weight at a step: 0 at the start."""
        return self.args.kl_weight * (1.0 - math.exp(-step / max(self.args.kl_warmup, 1e-9)))

    def update(self, batch: Batch, step: int = 0, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One step of Adam on the objective at gradient step `step`, counted from 0."""
        args = self.args
        losses = self.losses(batch, self.alpha(step), noise)
        share = 0.5 * (1.0 + math.cos(math.pi * step / max(args.total_timesteps, 1))) if args.anneal_lr else 1.0
        self.optimizer.param_groups[0]["lr"] = share * args.learning_rate  # Adam keeps its moments
        self.optimizer.zero_grad()
        losses["total"].backward()
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(self.trained, args.max_grad_norm)
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def encode(self, observation: Tensor) -> Tensor:
        """The latent mean (B, latent) of single frames (B, C, H, W), scaled as the records are, for use in other code.

        Gradients flow, so the encoder can be fine-tuned; call it inside `torch.no_grad()` to keep it frozen.
        Raises ValueError for a model that needs more than one frame.
        """
        if self.args.context != "1":
            raise ValueError("one frame is not enough for a model with --context 4 or history; call encoder(Batch)")
        places = self.places.expand(len(observation), -1, -1, -1)
        frames = torch.cat((observation.to(places.device).float() / self.sizes.pixel_scale, places), 1)
        nothing = frames.new_zeros(len(frames))
        return self.encoder(Batch(frames, nothing, nothing, nothing))[0]


# Evaluation ----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def predict(agent: MOA, records: Records, rows: np.ndarray, size: int = 2_048) -> Arrays:
    """For each row: latent `mean` (R, latent), `kl`, the head's `q` (R, A), the decoder's `frame_nll` and `frame_mse`.

    The latent is the mean, without noise. Networks that the objective does not train are left out.
    """
    units = torch.from_numpy(records.units(rows))
    parts: dict[str, list[Tensor]] = {}
    for part in units.split(max(1, size * len(units) // len(rows))):
        batch = records.batch(part)
        mean, log_variance = agent.encoder(batch)
        values = {"mean": mean, "kl": kl_divergence(mean, log_variance)}
        if "head" in agent.used:
            values["q"] = agent.head(mean, batch).softmax(1)
        if "decoder" in agent.used:
            frame, logits = batch.frames[:, : agent.sizes.channels], agent.decoder(mean)
            nll = F.binary_cross_entropy_with_logits(logits, frame, reduction="none")
            values["frame_nll"] = nll.sum((1, 2, 3))
            values["frame_mse"] = (logits.sigmoid() - frame).square().mean((1, 2, 3))
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def fit_probe(inputs: Tensor, target: Tensor, classes: int, legal: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Fit a linear classifier on standardised features (R, D) by L-BFGS; returns its log-probability function.

    `legal` (R, classes or 1) are the classes that are possible.
    """
    center, scale = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    weight = torch.zeros(inputs.shape[1] + 1, classes, requires_grad=True)

    def log_probabilities(x: Tensor, legal: Tensor) -> Tensor:
        logits = (x - center) / scale @ weight[:-1] + weight[-1]
        return logits.masked_fill(~legal, -math.inf).log_softmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(log_probabilities(inputs, legal), target) + 1e-5 * weight.square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    weight.requires_grad_(False)
    return log_probabilities


def predict_actions(agent: MOA, records: Records, rows: np.ndarray) -> Arrays:
    """`predict`, with `row` (R,) and `q` (R, A); where no head is trained, `q` is from a linear probe of the latent."""
    values = predict(agent, records, rows)
    if "q" not in values:
        seen, action, legal = records.probe_rows(), records.action.cpu(), records.mask.cpu()
        latent = torch.from_numpy(predict(agent, records, seen)["mean"])
        classify = fit_probe(latent, action[seen], records.sizes.actions, legal[seen])
        values["q"] = classify(torch.from_numpy(values["mean"]), legal[rows]).exp().numpy()
    return {"row": rows, **values, "q": values["q"].astype(np.float64)}


def evaluate(agent: MOA, records: Records, test: Arrays) -> dict[str, float]:
    """Losses on the validation games, without noise, and scores of `test`, the predictions on the test games."""
    rows = records.rows(1)
    seen = predict(agent, records, rows)
    parts = {"kl": (seen["kl"], agent.args.kl_weight)}  # always the final weight, so that epochs can be compared
    if "q" in seen:
        parts["policy"] = negative_log(seen["q"][np.arange(len(rows)), records.arrays["action"][rows]]), 1.0
    if "frame_nll" in seen:
        parts["reconstruction"] = seen["frame_nll"], agent.args.reconstruction_weight
    losses = {name: float(values.mean()) for name, (values, _) in parts.items()}
    losses["loss"] = sum(weight * losses[name] for name, (_, weight) in parts.items())
    metrics = {f"validation_{name}": losses.get(name, math.nan) for name in LOSSES}
    for row in score_subsets(test["q"], records, test["row"]):
        prefix = "" if row["subset"] == "all" else f"{row['subset']}_"
        metrics |= {f"{prefix}{name}": value for name, value in row.items() if name not in ("subset", "rows")}
    metrics["frame_mse"] = float(test["frame_mse"].mean()) if "frame_mse" in test else math.nan
    return metrics


# Main ----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> Path:
    """Pre-train one model, evaluate it, and return its run folder."""
    try:
        check(args)
        arrays, meta = open_dataset(args)
        loaded = load_model(args.load) if args.load else None
        check_fit(args, sizes_of(arrays, meta), meta, loaded)
    except ValueError as error:
        usage_error(str(error))
    with Run(args) as run:
        device = set_up_torch(args)
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more threads gain nothing
        records = Records(arrays, meta, args.context, device)
        agent = MOA(args, records.sizes, device)
        if loaded:
            for name in loaded.used:
                getattr(agent, name).load_state_dict(getattr(loaded, name).state_dict())
        sampler = Sampler(records, records.rows(0), args.batch_size, args.seed)
        passes = f"{args.total_timesteps / sampler.batches:.1f} passes, {sampler.size} units a batch"
        run.say(f"{run.name}: {len(records.rows(0)):,} training rows, {passes}")
        losses: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}  # of the losses, since the last evaluation
        step = 0
        if run.checkpoint:
            with run.restoring():
                state = run.checkpoint
                if state["dataset"] != records.fingerprint():
                    usage_error(f"{run.folder} began with another dataset; restore it, or start another run")
                step, sums = state["step"], state["sums"]
                agent.load_state_dict(state["agent"])
                agent.optimizer.load_state_dict(state["optimizer"])

        def model_state() -> dict[str, Any]:
            """What `load_model` builds the networks from, besides the arguments."""
            return {"agent": agent.state_dict(), "sizes": json.dumps(records.sizes)}

        def evaluate_agent() -> None:
            """Evaluate after an epoch, write its files, keep the best model; a signal may interrupt this anywhere."""
            epoch, steps = math.ceil(step / args.eval_frequency), (step - 1) % args.eval_frequency + 1
            train = {name: float(value) / steps for name, value in sums.items()}
            train["loss"] = train.get("total", math.nan)
            test = predict_actions(agent, records, records.rows(2, args.eval_episodes))
            metrics = {f"train_{name}": train.get(name, math.nan) for name in LOSSES}
            metrics |= evaluate(agent, records, test)
            write_epoch(run.folder, epoch, test, records)
            rows = [*run.eval_rows, {"step": step, **metrics}]
            run.log_figure(step, "vae_loss_curve", draw_losses(rows, run.name))
            if all(metrics["validation_loss"] <= row["validation_loss"] for row in run.eval_rows):
                run.save_model("best_model.pt", model_state())  # chosen by validation rows, never by test rows
            names = {"balanced_accuracy": "balanced accuracy", "nll": "NLL", "regret": "regret", "ece": "ECE"}
            run.say(f"[MOA] epoch {epoch}: top1={metrics['top1']:.4f}, top3={metrics['top3']:.4f}, " + ", ".join(
                f"{label}={metrics[name]:.4f}" for name, label in names.items() if not math.isnan(metrics[name])
            ))  # fmt: skip
            run.log_evaluation(step, metrics)

        while True:
            last = step == args.total_timesteps
            evaluating = last or (step > 0 and step % args.eval_frequency == 0)
            saving = evaluating or (step > 0 and step % args.checkpoint_frequency == 0) or run.signal
            if losses and (saving or step % 500 == 0):
                # Losses are read only here; one that is not finite ends the run before it can reach a checkpoint.
                speed = run.steps_per_second(step)
                run.log(step, {
                    **{f"losses/{name}": value for name, value in losses.items()}, "charts/SPS": speed,
                    "charts/rows_per_second": speed * args.batch_size, "charts/alpha": agent.alpha(step),
                    "charts/learning_rate": agent.optimizer.param_groups[0]["lr"],
                })  # fmt: skip
            if evaluating and not run.evaluated(step):
                run.unless_stopped(evaluate_agent)
            if run.evaluated(step):
                sums = {}
            if saving:
                state = {
                    "agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict(), "sums": sums,
                    "dataset": records.fingerprint(),
                }  # fmt: skip
                run.save_checkpoint(step, state)
                if run.signal and not (last and run.evaluated(step)):
                    run.stop()
            if last:
                break

            losses = agent.update(sampler.batch(step, args.augment), step)
            # Tensors, so that no step waits for the device.
            sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
            step += 1
            run.progress(step, "")

        run.save_model("model.pt", model_state())

        def film() -> None:
            """Videos of three held-out games, with what the best model predicts for each player."""
            best = load_model(run.folder / "best_model.pt", device)
            test = predict_actions(best, records, records.rows(2, 3))
            run.log_videos(step, record_videos(test, records, run.folder / "videos"))

        run.finish(step, state, *([film] if args.capture_video else []))
    print(f"see {run.folder}; scores beside the ceilings, and pictures: python benchmark/moa.py report {run.folder}")
    return run.folder


# Nothing below is about the algorithm: checks of the input, pictures, the run folder. -------------------------------
CHOICES = {"objective": tuple(USED), "head_input": ("z", "state", "state+z"), "context": ("1", "4", "history")}


def check(args: Args) -> None:
    """Check all that can be checked without the data. Raises a one-line ValueError."""
    for name, choices in CHOICES.items():
        if (value := getattr(args, name)) not in choices:
            near = difflib.get_close_matches(value, choices, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected one of {', '.join(choices)}{hint}")
    at_least_one = (
        "checkpoint_frequency", "eval_frequency", "eval_episodes", "rows", "max_cycles", "latent_dim", "batch_size",
    )  # fmt: skip
    positive = dict.fromkeys(("learning_rate", "max_grad_norm"), 1e-30)
    most = {"max_cycles": np.iinfo(np.int16).max, "latent_dim": 65_536}
    check_numbers(args, {**dict.fromkeys(at_least_one, 1), **positive}, most)
    if args.total_timesteps == 0 and not args.load:
        raise ValueError("--total-timesteps 0 without --load: there would be nothing to evaluate")


def sizes_of(arrays: Arrays, meta: dict[str, Any]) -> Sizes:
    """The sizes of a record."""
    _, channels, height, width = arrays["obs"].shape
    actions, players = arrays["action_mask"].shape[1], arrays["prev_actions"].shape[1]
    steps = (meta.get("env_kwargs") or {}).get("max_cycles") or arrays["t"].max() + 1
    pixel_scale = meta.get("observation_scale") or (255 if arrays["obs"].max() > 1 else 1)
    return Sizes(channels, height, width, actions, players, float(pixel_scale), float(steps))


def is_stag_hunt(meta: dict[str, Any]) -> bool:
    """Whether a record is of the stag hunt, the only game in which turning the board is known to turn the actions."""
    return stag_hunt is not None and list(meta.get("action_names") or []) == list(stag_hunt.ACTION_NAMES)


def check_fit(args: Args, sizes: Sizes, meta: dict[str, Any], model: MOA | None) -> None:
    """Raise ValueError if the model of `--load` does not fit arguments and data, or the game cannot be filmed."""
    if args.capture_video and not is_stag_hunt(meta):
        raise ValueError("--capture-video draws games of the stag hunt; these are of another one")
    if model is None:
        return
    text = "observations {}x{}x{}, {} actions, {} players, --latent-dim {}, --head-input {}, --context {}"
    has, wanted = (
        text.format(*shape[:5], own.latent_dim, own.head_input, own.context)
        for own, shape in ((model.args, model.sizes), (args, sizes))
    )
    if has != wanted:
        raise ValueError(f"{args.load} is a model for {has}; this run has {wanted}")
    if args.total_timesteps == 0 and model.args.objective != args.objective:
        raise ValueError(f"{args.load} was trained with --objective {model.args.objective}: evaluate it with that")
    if args.total_timesteps == 0 and model.sizes.time_scale != sizes.time_scale:
        limits = f"games of at most {model.sizes.time_scale:g} steps; these have {sizes.time_scale:g}"
        raise ValueError(f"{args.load} was trained on {limits}: it would read the time wrongly")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> MOA:
    """The model of a `model.pt`. Raises a one-line ValueError if the file is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        args, sizes = (json.loads(content[name]) for name in ("arguments", "sizes"))
        with torch.random.fork_rng([]):  # initial weights are drawn, and replaced below
            model = MOA(Args(**args), Sizes(*sizes), torch.device(device))
        model.load_state_dict(content["agent"])
    except FileNotFoundError:
        raise ValueError(f"there is no model {path}; a run writes model.pt at its end, best_model.pt before") from None
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(f"{path} is not a model of {Path(__file__).name} ({type(error).__name__})") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite; its training has failed")
    return model


# Games: from a file, of scripted players, or of any PettingZoo game at random
FIELDS = (  # of a record, those that this script reads; see envs/records.py
    "obs", "action", "action_mask", "t", "episode", "agent", "prev_actions", "strategy", "policy_probs", "split",
    "episode_seed",
)  # fmt: skip


def open_dataset(args: Args) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and metadata of `--dataset`, of the file collected earlier, or of games played now.

    Raises a one-line ValueError.
    """
    if args.dataset and stag_hunt is None:
        raise ValueError("--dataset needs the folder envs beside this script")
    if args.dataset:
        return read_records(Path(args.dataset), FIELDS)
    env = make_env(args)
    name = f"{re.sub('[/:]', '-', args.env_id)}__{args.max_cycles}__{args.rows}__{args.data_seed}.npz"
    try:
        if stag_hunt is None:
            return collect(args, env, args.rows)
        return cached_records(Path(args.data_dir) / name, args.rows, functools.partial(collect, args, env), FIELDS)
    except KeyboardInterrupt:
        print("stopped while games were collected; none were kept", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(Exception):  # a third-party environment's
            env.close()


def make_env(args: Args) -> Any:
    """Make a PettingZoo parallel environment. Raises a one-line ValueError if it cannot be made or does not fit."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that `mine:game` finds the user's mine.py
    module, colon, name = args.env_id.partition(":")
    try:
        env = getattr(importlib.import_module(module), name)() if colon else pettingzoo.make("parallel", args.env_id)
    except Exception as error:  # whatever a third-party environment raises, it concerns this id
        known = [key.removesuffix("-v0") for key in pettingzoo.parallel_registry]
        near = difflib.get_close_matches(args.env_id, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like sisl/pursuit-v5 or module:callable"
        reason = str(error).split(" Available environments")[0].rstrip(".")
        raise ValueError(f"could not make {args.env_id}: {type(error).__name__}: {reason}; {hint}") from None
    if not hasattr(env, "possible_agents") or hasattr(env, "agent_iter"):
        raise ValueError(f"expected a PettingZoo parallel environment, but {args.env_id} is a {type(env).__name__}")
    try:
        pairs = [(agent, box_of(env, agent), env.action_space(agent)) for agent in env.possible_agents]
    except Exception as error:
        raise ValueError(f"{args.env_id} does not give its spaces: {type(error).__name__}: {error}") from None
    for agent, box, action in pairs:
        if not isinstance(action, gym.spaces.Discrete):
            raise ValueError(f"expected discrete actions, but {agent} of {args.env_id} has {action}")
        if not isinstance(box, gym.spaces.Box) or len(box.shape) != 3:
            raise ValueError(f"expected image-like observations (a Box with 3 axes), but {agent} has {box}")
    kinds = {f"views {box.shape}, {action.n} actions from {action.start} on" for _, box, action in pairs}
    if not kinds:
        raise ValueError(f"{args.env_id} has no player: its possible_agents are empty")
    if len(kinds) > 1:
        raise ValueError(f"expected agents of one kind, but those of {args.env_id} differ: {'; '.join(sorted(kinds))}")
    return env


def box_of(env: Any, agent: str) -> Any:
    """The space of an agent's picture, which may be in a dict together with a mask of legal actions."""
    space = env.observation_space(agent)
    return space.spaces.get("observation", space) if isinstance(space, gym.spaces.Dict) else space


def collect(args: Args, env: Any, rows: int) -> tuple[Arrays, dict[str, Any]]:
    """Play games until there are `rows` rows, with scripted players where the game has some. Raises ValueError."""
    box = box_of(env, env.possible_agents[0])
    needed = 2 * rows * box.dtype.itemsize * math.prod(box.shape)  # what each row shows before and after its step
    if needed > (memory := machine_memory()):
        text = f"--rows {rows} need {needed / 1e9:,.1f} GB of memory"
        raise ValueError(f"{text}; this machine has {memory / 1e9:,.1f}")
    try:
        if stag_hunt is not None and isinstance(env, stag_hunt.StagHunt):
            arrays, meta = stag_hunt.collect(rows, env.config, args.max_cycles, seed=args.data_seed)
        else:
            arrays, meta = play_randomly(env, rows, args.max_cycles, args.data_seed)
    except Exception as error:  # whatever a third-party environment raises
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{args.env_id} cannot be played: {reason}") from None
    if rows == args.rows and (games := len(arrays["split"])) < 3:
        raise ValueError(f"--rows {rows} make {games} games: at least 3 are needed, to train, validate and test on")
    return arrays, {**meta, "env_id": args.env_id, "command": sys.argv}


def see(env: Any, agent: str, seen: Any, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A copy (C, H, W) of an agent's picture, and its legal actions (A,).

    The mask may be next to the picture, in the info, or in both; without one all actions are legal.
    """
    legal, shape = np.ones(env.action_space(agent).n, bool), box_of(env, agent).shape
    for place in (seen if isinstance(seen, dict) else {}, info):
        mask = np.asarray(place.get("action_mask", legal))
        if mask.shape != legal.shape:
            raise ValueError(f"{agent} has {len(legal)} actions, but a mask of shape {mask.shape}")
        legal = legal & mask.astype(bool)
    picture = np.array(seen["observation"] if isinstance(seen, dict) else seen)
    if picture.shape != shape:
        raise ValueError(f"{agent} sees shape {picture.shape}, but its space has {shape}")
    if not np.isfinite(picture).all():
        raise ValueError(f"{agent} sees nan or inf, which no picture can hold")
    # Channels first: theirs is the axis whose size differs from the other two.
    first = shape[1] == shape[2] != shape[0] or (len(set(shape)) == 3 and shape[0] == min(shape))
    return picture.transpose((0, 1, 2) if first else (2, 0, 1)), legal


def play_randomly(env: Any, rows: int, max_cycles: int, seed: int) -> tuple[Arrays, dict[str, Any]]:
    """Arrays (the format's fields) and metadata of any game, played with random legal actions."""
    agents, generator, table, episode = env.possible_agents, np.random.default_rng([seed, 2]), [], 0
    n, start = len(agents), int(env.action_space(agents[0]).start)
    while len(table) < rows:
        views, infos = env.reset(seed=episode_seed(seed, episode))
        now = {agent: see(env, agent, views[agent], infos.get(agent) or {}) for agent in env.agents}
        previous = np.full(n, -1)
        for t in range(max_cycles):
            if stuck := [agent for agent, (_, legal) in now.items() if not legal.any()]:
                raise ValueError(f"{stuck[0]} has no legal action at step {t} of game {episode}")
            chosen = {agent: int(generator.choice(np.flatnonzero(legal))) for agent, (_, legal) in now.items()}
            if not chosen or len(table) >= rows:
                break
            views, rewards, ended, cut, infos = env.step({agent: k + start for agent, k in chosen.items()})
            # Some games send no view to agents that have left: their last one stays.
            shown = [agent for agent in dict.fromkeys([*chosen, *env.agents]) if agent in views or agent in env.agents]
            then = now | {agent: see(env, agent, views[agent], infos.get(agent) or {}) for agent in shown}
            paid = np.array([np.asarray(rewards.get(agent, 0.0), float).item() for agent in agents])
            joint = np.array([chosen.get(agent, -1) for agent in agents])
            for agent, action in chosen.items():
                i = agents.index(agent)
                table.append({
                    "obs": now[agent][0], "next_obs": then[agent][0], "action": action, "action_mask": now[agent][1],
                    "t": t, "episode": episode, "agent": i, "prev_actions": np.roll(previous, -i),
                    "joint_action": np.roll(joint, -i), "reward": paid[i], "rewards": np.roll(paid, -i),
                    "terminated": bool(ended.get(agent, agent not in shown)),
                    "truncated": bool(cut.get(agent, False)) or t == max_cycles - 1,
                })  # fmt: skip
            now, previous = {agent: then[agent] for agent in env.agents}, joint
        if not table or table[-1]["episode"] != episode:
            raise ValueError(f"it has no player at the start of game {episode}")
        episode += 1
    table = sorted(table[:rows], key=lambda row: (row["episode"], row["agent"], row["t"]))
    arrays = {name: np.array([row[name] for row in table]) for name in table[0]}
    if not np.isfinite(arrays["rewards"]).all():
        raise ValueError("it pays rewards that are not finite")
    arrays |= {"strategy": np.full(rows, -1), "roster": np.full((episode, n), -1), "split": np.zeros(episode, int)}
    arrays["episode_seed"] = np.array([episode_seed(seed, i) for i in range(episode)])
    held_out, order = max(1, round(episode / 10)), np.random.default_rng([seed, 1]).permutation(episode)
    arrays["split"][order[:held_out]], arrays["split"][order[held_out : 2 * held_out]] = 2, 1
    pictures, scaling = to_bytes((arrays["obs"], arrays["next_obs"]), box_of(env, agents[0]))
    arrays["obs"], arrays["next_obs"] = pictures
    return arrays, {"env_kwargs": {"max_cycles": max_cycles}, "seed": seed, **scaling}


UNBOUNDED = 1e6  # wider bounds count as no bounds


def to_bytes(pictures: tuple[np.ndarray, ...], box: gym.spaces.Box) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """Pictures (N, C, H, W) as uint8, scaled from the bounds of their space to 0..255; uint8 stays as it is.

    Without bounds, the range is that of the pictures. Raises ValueError if scaling would merge nearly all values.
    """
    low, high = float(box.low.min()), float(box.high.max())
    least, most = float(min(map(np.min, pictures))), float(max(map(np.max, pictures)))
    bounded = max(abs(low), abs(high)) < UNBOUNDED
    if not bounded:
        low, high = least, most
    if least < low or most > high:
        print(f"warning: views from {least:g} to {most:g} are cut off at {low:g} and {high:g}", file=sys.stderr)
    about = {"observation_range": [low, high], "observation_bounded": bounded, "observation_scale": 255}
    if all(values.dtype == np.uint8 for values in pictures):
        return pictures, {**about, "observation_scale": 1 if max(high, most) <= 1 else 255}
    scaled = [np.rint((values.astype(float) - low) / max(high - low, 1e-9) * 255).clip(0, 255) for values in pictures]
    some = slice(None, None, max(1, pictures[0].size // 100_000))
    before, after = (len(np.unique(values.reshape(-1)[some])) for values in (pictures[0], scaled[0]))
    if 32 * after < min(before, 256):
        lost = f"scaled from [{low:g}, {high:g}] to bytes, only {after} of {before:,} different values would be left"
        raise ValueError(f"{lost}; give its observation space the bounds that matter")
    return tuple(values.astype(np.uint8) for values in scaled), about


# Scores, and what is written for each epoch
def negative_log(probabilities: np.ndarray) -> np.ndarray:
    """-log p in nats, infinite for 0."""
    with np.errstate(divide="ignore"):
        return -np.log(probabilities.astype(np.float64))


def expected_nll(q: np.ndarray, true: np.ndarray) -> float:
    """The mean negative log-likelihood of q (R, A), with actions weighted by their true probabilities (R, A)."""
    return float((true * np.where(true > 0, negative_log(q), 0.0)).sum(1).mean())


def confusion(q: np.ndarray, records: Records, rows: np.ndarray) -> np.ndarray:
    """Counts (A, A): rows are the actions taken, columns the actions predicted."""
    size = records.sizes.actions
    pairs = records.arrays["action"][rows].astype(int) * size + q.argmax(1)
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def recalls(counts: np.ndarray) -> np.ndarray:
    """The recall (A,) of each action, from a confusion matrix; nan for an action that was never taken."""
    return np.diag(counts) / np.where(counts.sum(1) > 0, counts.sum(1), np.nan)


def score(q: np.ndarray, records: Records, rows: np.ndarray) -> dict[str, float]:
    """Scores of predictions (R, A) on these rows.

    `top1`, `top3`, `balanced_accuracy`, `macro_f1`, `nll` and `ece` (15 bins) compare them with the actions taken.
    Where the true policies are known, `expected_top1` is the mean true probability of the predicted action (top-1
    without the noise of sampled actions), and `regret` the expected NLL above that of history Bayes; else both are nan.
    """
    action, every = records.arrays["action"][rows].astype(int), np.arange(len(rows))
    guess, sure, counts = q.argmax(1), q.max(1), confusion(q, records, rows)
    hit, done = guess == action, counts.sum(1)
    present = done > 0
    f1 = 2 * np.diag(counts)[present] / (done + counts.sum(0))[present]
    gaps = np.bincount(np.minimum((sure * 15).astype(int), 14), weights=hit - sure, minlength=15) / len(rows)
    result = {
        "rows": len(rows), "top1": hit.mean(), "top3": (np.argsort(-q, 1)[:, :3] == action[:, None]).any(1).mean(),
        "expected_top1": math.nan, "balanced_accuracy": recalls(counts)[present].mean(), "macro_f1": f1.mean(),
        "nll": negative_log(q[every, action]).mean(), "regret": math.nan, "ece": np.abs(gaps).sum(),
    }  # fmt: skip
    if records.ceilings:
        true, best = records.ceilings["oracle"][rows], records.ceilings["history Bayes"][rows]
        result["expected_top1"] = true[every, guess].mean()
        result["regret"] = expected_nll(q, true) - expected_nll(best, true)
    return {name: float(value) for name, value in result.items()}


def subsets(records: Records, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names and positions in `rows`: "all", then each strategy that occurs."""
    yield "all", np.arange(len(rows))
    for k, name in enumerate(records.strategies):
        part = np.flatnonzero(records.arrays["strategy"][rows] == k)
        if len(part):
            yield name, part


def score_subsets(q: np.ndarray, records: Records, rows: np.ndarray) -> list[dict[str, Any]]:
    """`score` of all rows, then of each strategy's rows."""
    return [{"subset": name, **score(q[part], records, rows[part])} for name, part in subsets(records, rows)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts with the same keys as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_epoch(folder: Path, epoch: int, test: Arrays, records: Records) -> None:
    """`moa_eval_epoch{k}.csv`: scores and recall by strategy; `.npz`: predictions and latents, row by row."""
    rows, q = test["row"], test["q"]
    table = score_subsets(q, records, rows)
    for row, (_, part) in zip(table, subsets(records, rows), strict=True):
        recall = recalls(confusion(q[part], records, rows[part])).tolist()
        row |= {f"recall {name}": value for name, value in zip(records.action_names, recall, strict=True)}
    write_csv(folder / f"moa_eval_epoch{epoch}.csv", table)
    content = {**test, "q": q.astype(np.float32), "confusion": confusion(q, records, rows)}
    content |= {name: records.arrays[name][rows] for name in ("action", "strategy")}
    write_atomically(folder / f"moa_eval_epoch{epoch}.npz", lambda file: np.savez_compressed(file, **content))


# Pictures
def draw_losses(rows: list[dict[str, float]], title: str) -> Figure:
    """The loss and its unweighted parts: means over each epoch's batches, and on the validation games."""
    names = [name for name in LOSSES if not math.isnan(rows[-1][f"validation_{name}"])]
    figure = Figure(figsize=(4.0 * len(names) + 0.6, 3.9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    steps = [row["step"] for row in rows]
    for axis, name in zip(axes, names, strict=True):
        for part in ("train", "validation"):
            axis.plot(steps, [row[f"{part}_{name}"] for row in rows], ".-", label=f"{part} rows")
        axis.set(xlabel="gradient steps", ylabel=f"{name} (nats)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def record_videos(test: Arrays, records: Records, folder: Path) -> list[Path]:
    """Write mp4 videos of the games in `test`, with what is predicted for each player, and return their paths."""
    from moviepy import ImageSequenceClip  # slow to import, and only needed here

    arrays, names, paths = records.arrays, records.action_names, []

    def caption(row: int) -> str:
        q = test["q"][np.searchsorted(test["row"], row)]
        likely = ", ".join(f"{names[a]} {q[a]:.0%}" for a in np.argsort(-q)[:3] if q[a] >= 0.005)
        player = str(arrays["agent"][row])
        if records.strategies:
            player += f" ({records.strategies[arrays['strategy'][row]]})"
        return f"{player} does {names[arrays['action'][row]]}; predicted: {likely}"

    folder.mkdir(exist_ok=True)
    for episode in np.unique(arrays["episode"][test["row"]]):
        frames = list(stag_hunt.replay(Record(arrays, records.meta), episode, caption))
        paths.append(folder / f"game{episode}.mp4")
        ImageSequenceClip(frames, fps=2).write_videofile(str(paths[-1]), logger=None)
    return paths


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
