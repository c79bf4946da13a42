"""A world model of a grid game: trained, tested, compared, in numbers and pictures.

From a frame and the joint action of all players, the model predicts the next frame and every player's reward. The test
counts what an average error hides: how many frames are exactly right, and how many break a rule of the game. Without
arguments it collects games of Markov Stag-Hunt, trains, and tests on other games; `--load` tests your own model.

The game: Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent Modeling and
Planning", ICML 2024, https://arxiv.org/abs/2406.08002; the contrastive term: van den Oord et al., 2018,
https://arxiv.org/abs/1807.03748

    python world_model_test.py
    python world_model_test.py --model mse --action-input planes --env 4p5b4x4
    python world_model_test.py --load my_package.my_module:my_model

Docs: docs/world_model_test.md
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "tensorboard==2.21.0",
#   "pillow==11.3.0", "moviepy==2.2.1",
# ]
# ///

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
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
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ModuleNotFoundError):  # a copy of this file alone trains and tests on your own data
    from envs import records, stag_hunt

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
    checkpoint_frequency: int = 1_000
    """steps between checkpoints"""
    eval_frequency: int = 1_000
    """steps between evaluations"""
    eval_episodes: int = 100
    """episodes per evaluation, always with the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[Literal["4p5b8x8", "4p6b8x8", "4p5b4x4"], tyro.conf.arg(aliases=["--env"])] = "4p5b8x8"
    """the stag hunt to collect games of: players, beasts (prey) and board"""
    total_timesteps: int = 8_000
    """gradient steps"""
    size: int | None = None
    """cells along a side of the board (if left out: as --env says)"""
    n_stags: int | None = None
    """stags (if left out: as --env says)"""
    n_hares: int | None = None
    """hares (if left out: as --env says)"""
    n_blocks: int = 0
    """obstacles in the collected games"""
    stag_moves: bool = False
    """if toggled, stags move at random, so that no model can always be right"""
    max_cycles: int = 35
    """time limit of the collected games, in steps"""
    rows: int = 40_000
    """transitions to collect for training"""
    test_rows: int = 50_000
    """transitions to collect for the test, with other seeds"""
    data: str | None = None
    """train and test on this file instead: a record of games, or an npz with obs, actions, rewards and next_obs"""
    load: str | None = None
    """test this model instead of training one: a model.pt of this script, or `module:function`"""
    model: Literal["mse", "cell", "entity"] = "entity"
    """what is predicted: cells as numbers (mse) or probabilities (cell), or a place per player and stag (entity)"""
    action_input: Literal["painted", "planes"] = "painted"
    """joint action painted at each player's own cell, or as constant planes"""
    mask: bool = True
    """if toggled, entities are only predicted within one step, or gone (only with --model entity)"""
    contrastive_coef: float = 0.0
    """weight of InfoNCE between (frame, joint action) and next frame"""
    hidden_dim: int = 32
    """channels of the hidden layers"""
    num_layers: int = 1
    """3 x 3 convolutions; one 1 x 1 convolution follows"""
    learning_rate: float = 3e-3
    """initial learning rate; it falls linearly to 0"""
    batch_size: int = 512
    """transitions in a batch"""
    open_loop_steps: int = 20
    """steps of the longest roll-out without looking at the true frames"""


# Data ----------------------------------------------------------------------------------------------------------------
HUNT_STAG, HUNT_HARE = 5, 6  # actions of Markov Stag-Hunt


class Game(NamedTuple):
    """Sizes of a game, and what it pays."""

    players: int
    height: int
    width: int
    actions: int
    reward_values: list[float]  # in the training data
    single_stag: bool = True
    pays: dict[str, float] = {}  # all rewards that the game pays, by event; empty: not known  # noqa: RUF012
    same_reward: float = 0.02  # rewards closer than this count as equal, so that rounding is no violation
    stag_moves: bool = False

    @property
    def channel_names(self) -> list[str]:
        """Names of a frame's planes, ego first."""
        return ["self", *[f"other {i}" for i in range(1, self.players)], "obstacles", "stag", "hare"]

    @property
    def entity_channels(self) -> list[int]:
        """The planes of entities that are in at most one cell: the players, and the stag if there is only one."""
        return list(range(self.players)) + ([self.players + 1] if self.single_stag else [])


class Transitions(NamedTuple):
    """Rows: frames (N, C, H, W) uint8, joint actions (N, n) int64 (-1: gone), rewards (N, n), next frames.

    Successive rows with the same `view` (N,) are successive steps `t` (N,) of one game, seen by one player.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    episode: Tensor
    view: Tensor
    t: Tensor

    def select(self, rows: Tensor) -> Transitions:
        """Some rows."""
        return Transitions(*[value[rows] for value in self])

    def spread(self, count: int) -> Transitions:
        """At most `count` rows, evenly spaced."""
        return self.select(torch.linspace(0, len(self.obs) - 1, min(count, len(self.obs))).long())

    def games(self, count: int) -> Transitions:
        """All rows of at most `count` games, evenly spaced."""
        names = self.episode.unique()
        chosen = torch.linspace(0, len(names) - 1, min(count, len(names))).long()
        return self.select(torch.isin(self.episode, names[chosen]))

    def to(self, device: torch.device) -> Transitions:
        """The same rows on a device."""
        return Transitions(*[value.to(device) for value in self])

    def batches(self) -> Iterator[Transitions]:
        """All rows, in parts of 2,000, so that a pass over a large test needs little memory."""
        return (self.select(rows) for rows in torch.arange(len(self.obs)).split(2_000))


def reach(height: int, width: int) -> Tensor:
    """Whether an entity can get from a place (first index) to another in one step (H W + 1, H W + 1).

    The last place is "gone", from which nobody returns.
    """
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    near = torch.cdist(cells, cells, p=1.0) <= 1.0
    return F.pad(F.pad(near, (0, 0, 0, 1), value=False), (0, 1), value=True)


def places(obs: Tensor, game: Game) -> Tensor:
    """Where the entities are (B, E): row * width + column, or height * width for "gone"."""
    planes = obs[:, game.entity_channels].flatten(2)  # a wrong prediction may have several ones: the first counts
    return torch.where(planes.bool().any(2), planes.argmax(2), planes.shape[2])


def collect(args: Args, config: stag_hunt.Config, rows: int, seed: int) -> Transitions:
    """Play Markov Stag-Hunt between scripted and random players; cached under data/. Raises ValueError."""
    usual, rules = stag_hunt.Config(**stag_hunt.PRESETS[args.env_id])._asdict(), config._asdict()
    kind = args.env_id + "".join(f"_{name}{value}" for name, value in rules.items() if value != usual[name])
    path = Path("data") / f"markov_stag_hunt_{kind}_limit{args.max_cycles}_{rows}_seed{seed}.npz"

    def play(count: int) -> stag_hunt.Dataset:
        return stag_hunt.collect(count, config, args.max_cycles, ("NS", "NH", "random"), seed)

    return to_transitions(records.cached_records(path, rows, play, RECORD_FIELDS).arrays, str(path))


def find_data(args: Args) -> tuple[Transitions, Transitions, stag_hunt.Config | None]:
    """Training and test transitions, and the game's rules if they are known. Raises a one-line ValueError."""
    if args.data is None:
        sizes = {name: getattr(args, name) for name in ("size", "n_stags", "n_hares", "n_blocks", "stag_moves")}
        config = stag_hunt.Config(**{**stag_hunt.PRESETS[args.env_id], **sizes}).check()
        train = collect(args, config, args.rows, args.seed)
        return train, collect(args, config, args.test_rows, 1_000_000 + args.seed), config
    columns, config = read_columns(Path(args.data)), None
    if "meta" in columns:
        columns, config = read_record(Path(args.data))
    whole = to_transitions(columns, args.data)
    names = whole.episode.unique()
    held_out = torch.isin(whole.episode, names[len(names) - len(names) // 5 :])  # the last fifth of the games
    if "split" in columns:  # a record, whose test split has games of its own
        held_out = torch.from_numpy(columns["split"] == 2)[whole.episode]
    if not held_out.any():
        few = f"too few to hold out a fifth of its {len(names)} games"
        raise ValueError(f"{args.data} has {len(whole.obs)} rows: {few}")
    return whole.select(~held_out), whole.select(held_out), config


# Model ---------------------------------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """A model's output for a batch; `--model` decides which fields are there.

    `planes` (B, C, H, W): values (mse) or logits (cell; entity: obstacles, stags, hares). `entities` (B, E, H W + 1):
    logits of each player's and the single stag's place. `frame` (B, C, H, W) uint8: the next frame, on which
    `rewards` are conditioned: (B, n) values, or (B, n, V) logits. `features` (B, hidden, H, W) are the trunk's.
    """

    planes: Tensor
    entities: Tensor | None
    frame: Tensor
    rewards: Tensor
    features: Tensor


def pick(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """The index (...) of the most likely value under logits (..., V), or, with `generator`, of a sampled one."""
    if generator is None:
        return logits.argmax(-1)
    shares = logits.softmax(-1).flatten(0, -2).cpu()
    return torch.multinomial(shares, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)


def nll(logits: Tensor, value: Tensor) -> Tensor:
    """Negative log-likelihood of values (B, K) under logits (B, K, V), summed over K, averaged over the batch."""
    error = F.cross_entropy(logits.flatten(0, 1), value.flatten(), reduction="none")
    return error.view(value.shape).sum(1).mean()


class WorldModel(nn.Module):
    """Frame (B, C, H, W) and joint action (B, n) -> next frame and rewards; with its optimizer and update.

    A 3 x 3 and a 1 x 1 convolution give each cell its features, from which the cell's planes are predicted. Who leaves,
    and what is paid, is predicted from the features and inputs at the entity's own cell. So the weights fit boards of
    any size, except for the contrastive term's two projections.
    """

    def __init__(self, game: Game, args: Args) -> None:
        """`args` names the kind of prediction and the sizes."""
        super().__init__()
        self.game, self.args, self.kind, self.painted = game, args, args.model, args.action_input == "painted"
        hidden, n, channels = args.hidden_dim, game.players, game.players + 3
        inputs = channels + n * game.actions + 1
        layers = [nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU()]
        for _ in range(args.num_layers - 1):
            layers += [nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        entities = len(game.entity_channels) if self.kind == "entity" else 0
        self.cell_head = nn.Conv2d(hidden, channels + entities, 1)
        here = hidden + inputs  # the features alone are too narrow for the actions of several players in one cell
        if entities:
            # One output for each action of the player itself, shared by all players, and one for the stag.
            self.gone_head = nn.Sequential(nn.Linear(here, 64), nn.ReLU(), nn.Linear(64, game.actions + 1))
        # Rewards also depend on the next frame: who is gone, and what prey is left in the player's cell.
        next_state, values = (0, 1) if self.kind == "mse" else (n + 2, len(game.reward_values))
        self.reward_head = nn.Sequential(nn.Linear(here + next_state, 64), nn.ReLU(), nn.Linear(64, n * values))
        if args.contrastive_coef > 0.0:
            cells = game.height * game.width
            self.query = nn.Linear(hidden * cells, 64)
            convolution = nn.Conv2d(channels, 32, 3, padding=1)
            self.key = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(32 * cells, 64))
        self.register_buffer("values", torch.tensor(game.reward_values), persistent=False)
        self.register_buffer("reach", reach(game.height, game.width), persistent=False)
        self.to(memory_format=torch.channels_last)  # makes the convolutions faster
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.learning_rate, fused=True)

    def inputs(self, obs: Tensor, acts: Tensor, where: Tensor) -> Tensor:
        """Planes of frames (B, C, H, W), of one-hot actions (B, n, A), and of ones; `where` (B, E) are the places."""
        height, width = obs.shape[2:]
        if self.painted:
            cells = F.one_hot(where[:, : self.game.players], height * width + 1)[..., :-1].float()  # (B, n, H W)
        else:
            cells = torch.ones(*acts.shape[:2], height * width, device=obs.device)
        action_planes = (acts[..., None] * cells[:, :, None]).view(len(obs), -1, height, width)
        inside = torch.ones_like(action_planes[:, :1])  # tells the border from a free cell
        return torch.cat((obs.float(), action_planes, inside), 1)

    @staticmethod
    def at(features: Tensor, where: Tensor) -> Tensor:
        """Features (B, E, hidden) at the cells `where` (B, E); zeros for an entity that is gone."""
        features = features.flatten(2)
        cells = features.shape[2]
        index = where.clamp_max(cells - 1)[:, None].expand(-1, features.shape[1], -1)
        return features.gather(2, index).transpose(1, 2) * (where < cells)[:, :, None]

    def forward(
        self, obs: Tensor, actions: Tensor, next_obs: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Prediction:
        """The prediction. Rewards are conditioned on `next_obs`, or, without it, on the predicted (sampled) frame."""
        game, n, where = self.game, self.game.players, places(obs, self.game)
        acts = (F.one_hot(actions.clamp_min(0), game.actions) * (actions >= 0)[:, :, None]).float()  # (B, n, A)
        inputs = self.inputs(obs, acts, where)
        features = self.trunk(inputs)
        cells = self.cell_head(features)
        planes, entities = cells[:, : n + 3], None
        own = torch.cat((self.at(features, where), self.at(inputs, where)), 2)
        if self.kind == "entity":
            gone = self.gone_head(own)
            gone = torch.cat(((gone[:, :n, :-1] * acts).sum(2), gone[:, n:, -1]), 1)
            entities = torch.cat((cells[:, n + 3 :].flatten(2), gone[:, :, None]), 2)
            if self.args.mask:
                entities = entities.masked_fill(~self.reach[where], -math.inf)
        own = own[:, :n]
        if next_obs is None:
            next_obs = self.frame(planes, entities, generator)
        if self.kind != "mse":
            gone = (~next_obs[:, :n].bool().flatten(2).any(2)).float()[:, None].expand(-1, n, -1)
            own = torch.cat((own, gone, self.at(next_obs[:, -2:].float(), where[:, :n])), 2)
        # Each player has its own outputs, so the head need not infer whose cell it reads.
        rewards = self.reward_head(own).unflatten(2, (n, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        return Prediction(planes, entities, next_obs, rewards[..., 0] if self.kind == "mse" else rewards, features)

    def frame(self, planes: Tensor, entities: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The predicted frame (B, C, H, W) uint8: the most likely one, or, with `generator`, a sampled one.

        With `mse` the planes are values: rounded at 0.5, never sampled.
        """
        if self.kind == "mse" or generator is None:
            frame = planes > (0.5 if self.kind == "mse" else 0.0)
        else:
            frame = torch.rand(planes.shape, generator=generator).to(planes.device) < torch.sigmoid(planes)
        if entities is not None:
            one_hot = F.one_hot(pick(entities, generator), entities.shape[2])[..., :-1]
            frame[:, self.game.entity_channels] = one_hot.unflatten(2, frame.shape[2:]).bool()
        return frame.to(torch.uint8)

    @torch.no_grad()
    def predict(self, obs: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The most likely next frames (B, C, H, W) uint8 and rewards (B, n), or, with `generator`, sampled ones."""
        prediction = self(obs.to(self.values.device), actions.to(self.values.device), generator=generator)
        rewards = prediction.rewards if self.kind == "mse" else self.values[pick(prediction.rewards, generator)]
        return prediction.frame.cpu(), rewards.cpu()

    @torch.no_grad()
    def expected(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Expected next frames (B, C, H, W) and rewards (B, n), which minimise the squared error."""
        prediction = self(obs.to(self.values.device), actions.to(self.values.device))
        planes, rewards = prediction.planes, prediction.rewards
        if self.kind != "mse":
            planes, rewards = torch.sigmoid(planes), (rewards.softmax(2) * self.values).sum(2)
        if prediction.entities is not None:
            shares = prediction.entities.softmax(2)[..., :-1]
            planes[:, self.game.entity_channels] = shares.unflatten(2, planes.shape[2:])
        return planes.cpu(), rewards.cpu()

    def similarity(self, features: Tensor, next_obs: Tensor) -> Tensor:
        """How well each (frame, joint action) goes with each next frame (B, B), as InfoNCE's logits."""
        query = F.normalize(self.query(features.flatten(1)), dim=1)
        key = F.normalize(self.key(next_obs.float()), dim=1)
        return query @ key.T / 0.1

    def losses(self, batch: Transitions) -> dict[str, Tensor]:
        """The parts of the loss: frame, reward and, with `--contrastive-coef`, the contrastive term.

        The frame's loss is summed over a frame and averaged over the batch: nats, or with `mse` squared errors.
        """
        prediction, target = self(batch.obs, batch.actions, batch.next_obs), batch.next_obs.float()
        if self.kind == "mse":
            frame = (prediction.planes - target).square().flatten(1).sum(1).mean()
            reward = (prediction.rewards - batch.rewards).square().sum(1).mean()
        else:
            own = self.game.entity_channels if self.kind == "entity" else []  # these are predicted as places instead
            planes = [channel for channel in range(target.shape[1]) if channel not in own]
            logits, cells = prediction.planes[:, planes], target[:, planes]
            error = F.binary_cross_entropy_with_logits(logits, cells, reduction="none")
            frame = error.flatten(1).sum(1).mean()
            if prediction.entities is not None:
                frame = frame + nll(prediction.entities, places(batch.next_obs, self.game))
            reward = nll(prediction.rewards, (batch.rewards[:, :, None] - self.values).abs().argmin(2))
        result = {"frame": frame, "reward": reward}
        if self.args.contrastive_coef > 0.0:
            similarity = self.similarity(prediction.features, batch.next_obs)
            result["contrastive"] = F.cross_entropy(similarity, torch.arange(len(similarity), device=target.device))
        return result

    def update(self, batch: Transitions, progress: float = 0.0) -> dict[str, Tensor]:
        """One step of Adam on the sum of the losses; the learning rate falls to 0 as `progress` goes from 0 to 1."""
        losses = self.losses(batch)
        weights = {"contrastive": self.args.contrastive_coef}
        losses["total"] = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * (1.0 - progress)
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


# Testing -------------------------------------------------------------------------------------------------------------
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # frames, joint actions -> next frames, rewards
RULES = ("duplicated", "jumped", "vanished", "stayed", "reappeared", "in an obstacle", "prey", "obstacles", "reward")


def violations(game: Game, obs: Tensor, actions: Tensor, next_obs: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """For each rule of Markov Stag-Hunt, which next frames (B,) break it; `any in the frame` leaves the reward out."""
    n, now, after = game.players, obs.flatten(2).bool(), next_obs.flatten(2).bool()  # (B, C, H W)
    players, next_players = now[:, :n], after[:, :n]
    was, there, near = players.any(2), next_players.any(2), reach(game.height, game.width)
    far = ~near[places(obs, game)[:, :n], :-1]  # (B, n, H W)
    together = (players[:, :, None] & players[:, None]).any(3)  # (B, n, n)
    hunters = (together & (actions == HUNT_STAG)[:, None]).sum(2)
    caught, prey_wrong = torch.zeros_like(was), torch.zeros_like(was[:, 0])
    for channel, hunts in ((n + 1, (actions == HUNT_STAG) & (hunters >= 2)), (n + 2, actions == HUNT_HARE)):
        prey, next_prey = now[:, channel], after[:, channel]
        catches = hunts & (players & prey[:, None]).any(2)
        hunted = (players & catches[:, :, None]).any(1)  # cells in which somebody catches
        caught |= catches
        left = prey & ~hunted
        if game.stag_moves and channel == n + 1:  # each is within a step, neither in an obstacle nor on a hare
            within_a_step = left.float() @ near[:-1, :-1].float() > 0.0
            wrong = next_prey & (~within_a_step | now[:, n] | after[:, n + 2])
            prey_wrong |= wrong.any(1) | (left.sum(1) != next_prey.sum(1))
        else:
            prey_wrong |= (next_prey != left).any(1)
    more_stags = after[:, n + 1].sum(1) > now[:, n + 1].sum(1)
    legal = torch.tensor(sorted(game.pays.values()))
    unpaid = (rewards[:, :, None] - legal).abs().amin(2) if game.pays else torch.zeros_like(rewards)
    result = {
        "duplicated": (next_players.sum(2) > 1).any(1) | more_stags,  # a player or the stag is in two cells
        "jumped": (next_players & far & was[:, :, None]).flatten(1).any(1),  # more than one cell
        "vanished": (was & ~there & ~caught).any(1),  # left without catching anything
        "stayed": (caught & there).any(1),  # a player who catches something leaves
        "reappeared": (~was & there).any(1),
        "in an obstacle": (next_players & now[:, n : n + 1]).flatten(1).any(1),
        "prey": prey_wrong,  # appeared, left without being caught, jumped, or stayed when caught
        "obstacles": (after[:, n] != now[:, n]).any(1),  # changed
        "reward": (unpaid > game.same_reward).any(1),  # is never paid
    }
    in_frame = torch.stack([broken for rule, broken in result.items() if rule != "reward"]).any(0)
    return result | {"any in the frame": in_frame, "any": in_frame | result["reward"]}


def measure_frames(game: Game, predict: Predict, data: Transitions) -> dict[str, Any]:
    """Shares (0 to 1) of exact frames, violations and right rewards of `predict` on `data`; `report` explains them."""
    events, counts = {name: pay for name, pay in game.pays.items() if pay}, {}
    for batch in data.batches():
        frame, rewards = predict(batch.obs, batch.actions)
        right = (frame == batch.next_obs).flatten(2).all(2)  # (B, C)
        exact, changed = right.all(1), (batch.next_obs != batch.obs).flatten(1).any(1)
        paid, event = ((rewards - batch.rewards).abs() < game.same_reward).all(1), (batch.rewards != 0).any(1)
        broken = violations(game, batch.obs, batch.actions, frame, rewards)
        hits = {
            "exact": exact, "exact_changed": exact[changed], "exact_players": right[:, : game.players].all(1),
            **{f"exact {name}": right[:, i] for i, name in enumerate(game.channel_names)},
            **{f"violation {rule}": rows for rule, rows in broken.items()},
            "reward": paid, "reward_event": paid[event], "exact_event": exact[event],
            **{name: paid[((batch.rewards - pay).abs() < 1e-3).any(1)] for name, pay in events.items()},
        }  # fmt: skip
        for name, hit in hits.items():
            total, number = counts.get(name, (0, 0))
            counts[name] = (total + int(hit.sum()), number + hit.numel())
    shares = {name: total / number if number else math.nan for name, (total, number) in counts.items()}
    seen = {name: {"frames": counts[name][1], "exact": shares[name]} for name in events if counts[name][1]}
    return {name: share for name, share in shares.items() if name not in events} | {"events": seen}


def measure_values(expected: Predict, data: Transitions) -> dict[str, Any]:
    """Squared errors of expected frames (B, C, H, W) and rewards (B, n), and both definitions of PSNR, in dB.

    `psnr_of_mean` is 10 log10(1 / MSE); `mean_of_psnr` averages over frames, each capped at 100 dB.
    """
    frames, rewards = [], []
    for batch in data.batches():
        frame, reward = expected(batch.obs, batch.actions)
        frames.append((frame - batch.next_obs.float()).square().double().flatten(2).mean(2))
        rewards.append((reward - batch.rewards).square().double())
    frame, reward = torch.cat(frames), torch.cat(rewards)
    return {
        "obs_mse": float(frame.mean()), "reward_mse": float(reward.mean()),
        "psnr_of_mean": float(-10.0 * frame.mean().clamp_min(1e-10).log10()),
        "mean_of_psnr": float((-10.0 * frame.mean(1).clamp_min(1e-10).log10()).mean()),
        "channel_mse": frame.mean(0).tolist(),
    }  # fmt: skip


def measure_open_loop(predict: Predict, data: Transitions, steps: int) -> dict[int, float]:
    """The share of exact frames after k steps in which the model sees only its own frames, for k up to `steps`.

    Roll-outs start at every `steps`-th step of each view, if it lasts `steps` steps more.
    """
    first = torch.arange(max(len(data.obs) - steps + 1, 0))
    rows = first[(data.view[first] == data.view[first + steps - 1]) & (data.t[first] % steps == 0)]
    frame, result = data.obs[rows], {}
    for k in range(1, steps + 1 if len(rows) else 1):
        parts = zip(frame.split(2_000), data.actions[rows].split(2_000), strict=True)
        frame = torch.cat([predict(*part)[0] for part in parts])
        result[k] = float((frame == data.next_obs[rows]).flatten(1).all(1).float().mean())
        rows = rows + 1
    return result


@torch.no_grad()
def calibration(model: WorldModel, data: Transitions, bins: int = 15) -> dict[str, float]:
    """Negative log-likelihood of a next frame in nats, and expected calibration error of the players' places.

    With `cell`, the calibration error is over all cells of the players' planes. Not defined for `mse`.
    """
    n, total, shares, hits = model.game.players, 0.0, [], []
    for batch in data.batches():
        batch = batch.to(model.values.device)
        total += float(model.losses(batch)["frame"]) * len(batch.obs)
        prediction = model(batch.obs, batch.actions)
        if prediction.entities is not None:
            share, place = prediction.entities.softmax(2)[:, :n].max(2)
            right = place == places(batch.next_obs, model.game)[:, :n]
        else:
            one = torch.sigmoid(prediction.planes[:, :n])
            share, right = torch.maximum(one, 1.0 - one), (one > 0.5) == batch.next_obs[:, :n].bool()
        shares.append(share.flatten().cpu())
        hits.append(right.flatten().float().cpu())
    share, right = torch.cat(shares), torch.cat(hits)
    gap = torch.zeros(bins).index_add_(0, (share * bins).long().clamp_max(bins - 1), share - right)
    return {"nll": total / len(data.obs), "ece": float(gap.abs().sum() / len(share))}


@torch.no_grad()
def ranking(model: WorldModel, data: Transitions, pool: int = 1_000) -> dict[str, float]:
    """Hits@1 and mean reciprocal rank of the true next frame among `pool` frames, by the contrastive similarity."""
    batch = data.spread(pool).to(model.values.device)
    similarity = model.similarity(model(batch.obs, batch.actions).features, batch.next_obs)
    rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    return {"hits_at_1": float((rank == 1).float().mean()), "mrr": float((1.0 / rank).mean()), "pool": len(batch.obs)}


def evaluate(model: WorldModel | Foreign, data: Transitions, game: Game) -> dict[str, float]:
    """How good the most likely next frame is on `data`, as shares (0 to 1), and the expected frame's squared error."""
    metrics = measure_frames(game, model.predict, data)
    metrics |= {"any_violation": metrics["violation any"], **measure_values(model.expected, data)}
    names = ("exact", "exact_changed", "any_violation", "reward_event", "obs_mse")
    return {name: metrics[name] for name in names}


def measure(
    model: WorldModel | Foreign, game: Game, train: Transitions, test: Transitions, args: Args,
    config: stag_hunt.Config | None,
) -> dict[str, Any]:  # fmt: skip
    """The whole test, compared with copying the frame, the training mean, and the truth, which must break no rule."""
    ours = isinstance(model, WorldModel)
    draws = ours and model.kind != "mse"
    generator = torch.Generator().manual_seed(args.seed)  # sampling has its own random stream
    sample = functools.partial(model.predict, generator=generator) if draws else None
    true = ((batch.next_obs, batch.rewards) for batch in test.batches())
    mean_frame, mean_rewards = train.next_obs.float().mean(0), train.rewards.mean(0)

    def copy(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return obs, torch.zeros(actions.shape)

    def mean(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return mean_frame.expand(obs.shape), mean_rewards.expand(actions.shape)

    some = test.spread(300)
    limit = config.limit(some.obs.numpy(), some.actions.numpy()) if config else 1.0
    result: dict[str, Any] = {"rows": len(test.obs), "limit": limit}
    for name, expected in {"values": model.expected, "values_copy": copy, "values_mean": mean}.items():
        result[name] = measure_values(expected, test)
    for way, predict in {"mode": model.predict, "sample": sample, "copy": copy, "truth": lambda *_: next(true)}.items():
        result[way] = predict and measure_frames(game, predict, test)
    for name, predict in {"open_loop": model.predict, "open_loop_sample": sample}.items():
        result[name] = measure_open_loop(predict, test, args.open_loop_steps) if predict else {}
    result["impossible"] = impossible(model) if ours else []
    if draws:
        result["calibration"] = calibration(model, test)
    if ours and model.args.contrastive_coef > 0.0:
        result["ranking"] = ranking(model, test)
    return result


# Main ----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> Path:
    """Train a model, or load one, test it, and return the run folder."""
    try:
        check(args)
        train, test, config = find_data(args)
        game = find_game(train, test, args, config)
        check_data(args, game, train, test)
        model = load(args.load, game, test) if args.load else None
    except (ValueError, OSError) as error:
        usage_error(str(error))
    with Run(args) as run:
        device = set_up_torch(args)
        model = (model or WorldModel(game, args)).to(device)
        on_device, games = train.to(device), test.games(args.eval_episodes)
        step, losses = 0, {}
        digest = hashlib.sha256()
        for values in (*train, *test):
            digest.update(values.numpy().data)
        if run.checkpoint:
            with run.restoring():
                if run.checkpoint["data"] != digest.hexdigest():
                    usage_error(f"the data are not those that {run.folder} began with; restore them")
                step = run.checkpoint["step"]
                model.load_state_dict(run.checkpoint["agent"])
                model.optimizer.load_state_dict(run.checkpoint["optimizer"])

        def evaluate_model() -> None:
            metrics = evaluate(model, games, game)
            if not math.isfinite(metrics["obs_mse"]):
                raise RunError(f"step {step}: the predictions are not finite; try a smaller learning rate")
            run.log_evaluation(step, metrics)

        while args.load is None:
            last = step == args.total_timesteps
            evaluating = step > 0 and (last or step % args.eval_frequency == 0)
            saving = step > 0 and (last or step % args.checkpoint_frequency == 0)
            if losses and (step % 100 == 0 or evaluating or saving or run.signal):
                # Losses are read only here; one that is not finite ends the run before it can reach a checkpoint.
                run.log(step, {f"losses/{name}": value for name, value in losses.items()})
                run.log(step, {"charts/transitions_per_second": run.steps_per_second(step) * args.batch_size})
            if evaluating and not run.evaluated(step):
                run.unless_stopped(evaluate_model)
            stopping = run.signal and not (last and run.evaluated(step))
            if saving or stopping:
                state = {"agent": model.state_dict(), "optimizer": model.optimizer.state_dict()}
                run.save_checkpoint(step, {**state, "data": digest.hexdigest()})
            if stopping:
                run.stop()
            if last:
                break
            rows = torch.randint(len(train.obs), (args.batch_size,), device=device)
            losses = model.update(on_device.select(rows), step / args.total_timesteps)
            step += 1
            run.progress(step, f"{100 * run.eval_rows[-1]['exact']:.2f} % exact" if run.eval_rows else "")

        if args.load is None:
            run.save_model("model.pt", {"agent": model.state_dict(), "game": json.dumps(game._asdict())})
        step, name = args.total_timesteps, args.load or f"{args.model}, {args.action_input}"

        def final_test() -> None:
            result = measure(model, game, train, test, args, config)
            run.say(report(result, game, name))
            text = json.dumps(result, indent=1).encode()
            write_atomically(run.folder / "metrics.json", lambda file: file.write(text))
            run.log(step, {f"test/{k.replace(' ', '_')}": v for k, v in result["mode"].items() if k != "events"})

        def draw() -> None:
            some = torch.randperm(len(test.obs), generator=torch.Generator().manual_seed(0))[:8]
            for kind, rows in {"worst": worst(game, model.predict, test), "random": some}.items():
                batch = test.select(rows)
                figure = draw_transitions(game, batch, *model.predict(batch.obs, batch.actions))
                run.log_figure(step, f"transitions_{kind}", figure)

        def film() -> None:
            run.log_videos(step, film_open_loop(game, model.predict, test, run.folder / "videos"))

        run.unless_stopped(final_test)  # a resumed run makes it again
        if run.signal:
            run.stop()
        run.finish(step, {}, *((draw, film) if args.capture_video else (draw,)))
    print(f"all figures and pictures: {run.folder}")
    return run.folder


# Nothing below is about the algorithm: checks of the input, pictures, the run folder. -------------------------------
WHOLE, FLOAT = np.iinfo(np.int64), np.finfo(np.float32)
FIELDS = {  # of a file: type, dimensions, least and greatest value, what they are
    "obs": (np.uint8, 4, 0, 1, "0 or 1"),
    "actions": (np.int64, 2, -1, 999, "whole numbers from -1 (gone) on"),
    "rewards": (np.float32, 2, FLOAT.min, FLOAT.max, "finite"),
    "next_obs": (np.uint8, 4, 0, 1, "0 or 1"),
    "episode": (np.int64, 1, WHOLE.min, WHOLE.max, "whole numbers"),
    "agent": (np.int64, 1, WHOLE.min, WHOLE.max, "whole numbers"),
    "t": (np.int64, 1, WHOLE.min, WHOLE.max, "whole numbers"),
}
NEEDED, IDS = ["obs", "actions", "rewards", "next_obs"], ["episode", "agent", "t"]  # the latter are for roll-outs
RECORD_FIELDS = ("obs", "joint_action", "rewards", "next_obs", *IDS, "split")
MOST_REWARDS = 100  # more distinct rewards than this can't be a game's rule


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that are needed here. Raises a one-line ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in (*FIELDS, "joint_action", "meta")}
    except Exception as error:  # a damaged file may raise nearly anything
        reason = f"{type(error).__name__}; convert it to npz with {', '.join(NEEDED)}"
        if "Object arrays" in str(error):
            reason = "it holds Python objects; save arrays of numbers instead"
        raise ValueError(f"{path} is missing, damaged or not a plain npz file ({reason})") from None


def read_record(path: Path) -> tuple[dict[str, np.ndarray], stag_hunt.Config | None]:
    """A record of games, and the rules, if they are Markov Stag-Hunt's. Raises a one-line ValueError."""
    if "records" not in globals():
        raise ValueError(f"the record {path} needs envs/, which is not here; copy it here, or pass a plain npz")
    columns, meta = records.read_records(path, RECORD_FIELDS)
    given = meta.get("env_kwargs") or {}
    rules = {name: value for name, value in given.items() if name in stag_hunt.Config._fields}
    try:
        config = stag_hunt.Config(**rules).check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its meta names an impossible game ({error})") from None
    fits = columns["obs"].shape[1:] == (config.channels, config.size, config.size)
    return columns, config if rules and fits else None  # else it is another game's


def to_transitions(columns: dict[str, np.ndarray], name: str) -> Transitions:
    """Check and convert the columns of a plain file or of a record of games. Raises a one-line ValueError."""
    columns = {"actions": columns.get("joint_action"), **columns}
    if missing := [field for field in NEEDED if columns.get(field) is None]:
        raise ValueError(f"{name} has no {', '.join(missing)}; {', '.join(NEEDED)} are needed")
    given, found = {field: columns[field] for field in FIELDS if field in columns}, {}
    shapes = ", ".join(f"{field} {values.shape}" for field, values in given.items())
    misfit = ValueError(f"{name}: expected frames (N, n + 3, H, W), actions and rewards (N, n), got {shapes}")
    for field, values in given.items():
        kind, dimensions, least, most, expected = FIELDS[field]
        if values.dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers in {field}, got {values.dtype}")
        if values.ndim != dimensions or len(values) != len(given["obs"]):
            raise misfit
        with np.errstate(invalid="ignore", over="ignore"):
            found[field] = values.astype(kind, order="C")  # and checked in its new type
        bad = ~((found[field] >= least) & (found[field] <= most))
        if kind is not np.float32:
            bad |= found[field] != values
        if rows := int(bad.any(tuple(range(1, dimensions))).sum()):
            raise ValueError(f"{name}: {rows} rows have {field} that are not {expected}")
    obs, actions, rewards, next_obs = (found[field] for field in NEEDED)
    players = actions.shape[1]
    if not (rewards.shape == actions.shape and next_obs.shape == obs.shape and players + 3 in obs.shape[1::2]):
        raise misfit
    if obs.shape[1] != players + 3:  # channels last
        obs, next_obs = (np.ascontiguousarray(np.moveaxis(frames, 3, 1)) for frames in (obs, next_obs))
    for field, frames in (("obs", obs), ("next_obs", next_obs)):
        if rows := int((frames[:, :players].sum((2, 3)) > 1).any(1).sum()):
            raise ValueError(f"{name}: {rows} rows of {field} have a player's plane with two ones in it")
    order = view = np.arange(len(obs))
    episode, t = view * 1_000 // max(len(obs), 1_000), np.zeros_like(view)  # 1,000 parts count as games
    if set(IDS) <= set(found):
        order = np.lexsort([found[field] for field in reversed(IDS)])
        episode, agent, t = (found[field][order] for field in IDS)
        begins = (np.diff(episode) != 0) | (np.diff(agent) != 0) | (np.diff(t) != 1)
        view = np.concatenate((view[:1], begins.cumsum()))
    values = (obs[order], actions[order], rewards[order], next_obs[order], episode, view, t)
    return Transitions(*[torch.from_numpy(value) for value in values])


class Foreign(nn.Module):
    """A user's model, `module:function`: f(obs (B, C, H, W), actions (B, n)) -> (next_obs, rewards), NumPy arrays."""

    def __init__(self, name: str) -> None:
        """Import it. Raises a one-line ValueError if it cannot be found."""
        super().__init__()
        self.name, (module, _, attribute) = name, name.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            self.function = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # whatever a third-party module raises
            raise ValueError(f"--load {name} cannot be imported ({type(error).__name__}: {error})") from None

    def expected(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """What it returns. Raises a one-line RunError for wrong shapes or values that are not finite."""
        try:
            outputs = self.function(obs.numpy().astype(np.float32), actions.numpy().copy())
            with np.errstate(over="ignore"):  # rejected below
                frame, rewards = (np.asarray(value, np.float32) for value in outputs)
        except Exception as error:
            raise RunError(f"{self.name} failed ({type(error).__name__}: {error})") from None
        for what, value, shape in (("next_obs", frame, tuple(obs.shape)), ("rewards", rewards, tuple(actions.shape))):
            if value.shape != shape:
                raise RunError(f"{self.name} returned {what} of shape {value.shape}, expected {shape}")
            if infinite := int((~np.isfinite(value)).sum()):
                raise RunError(f"{self.name} returned {what} with {infinite} values that are not finite")
        return torch.from_numpy(frame.copy()), torch.from_numpy(rewards.copy())

    def predict(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Next frames with zeros and ones, and rewards."""
        frame, rewards = self.expected(obs, actions)
        return (frame > 0.5).to(torch.uint8), rewards


def load(name: str, game: Game, test: Transitions) -> WorldModel | Foreign:
    """A user's function, tried on all test data, or a model.pt of this script. Raises ValueError, OSError."""
    if ":" in name and not Path(name).exists():
        foreign, least, most = Foreign(name), 0.0, 1.0
        for batch in test.batches():
            frame, _ = foreign.expected(batch.obs, batch.actions)
            least, most = min(least, float(frame.min())), max(most, float(frame.max()))
        if least < 0.0 or most > 1.0:
            cure = "cells above 0.5 count as ones, so logits need a sigmoid, and 0 to 255 a division"
            found = f"{name} returned next_obs from {least:.4g} to {most:.4g}, not in [0, 1]"
            print(f"warning: {found}; {cure}", file=sys.stderr)
        return foreign
    try:
        content = torch.load(name, map_location="cpu", weights_only=True)
        args, own = Args(**json.loads(content["arguments"])), Game(**json.loads(content["game"]))
        state = content["agent"]
        if (own.height, own.width) != (game.height, game.width):  # what depends on it is for training only
            args.contrastive_coef = 0.0
            state = {key: value for key, value in state.items() if not key.startswith(("query.", "key."))}
        model = WorldModel(own._replace(height=game.height, width=game.width), args)
        model.load_state_dict(state)
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(f"{name} is not a model of this world_model_test.py ({type(error).__name__})") from None
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{name} has weights that are not finite: {', '.join(bad)}")
    if (own.players, own.actions) != (game.players, game.actions):
        theirs = f"the data have {game.players} and {game.actions}"
        raise ValueError(f"{name} is a model of {own.players} players with {own.actions} actions; {theirs}")
    if args.model == "entity" and own.single_stag and not game.single_stag:
        raise ValueError(f"{name} is a model of one stag; the data have several stags")
    return model


def find_game(train: Transitions, test: Transitions, args: Args, config: stag_hunt.Config | None = None) -> Game:
    """The game's sizes and rewards. Raises a one-line ValueError if they are too many for a categorical."""
    players, seen = train.actions.shape[1], train.rewards.unique().tolist()
    values = sorted({round(value, 4) for value in seen} | {0.0})
    if args.load is None and args.model != "mse" and len(values) > MOST_REWARDS:
        raise ValueError(f"{len(values)} different rewards: too many for a categorical; take --model mse")
    values = [min(seen, key=lambda own: abs(own - value)) for value in values]
    pays = {f"reward {pay:g}": pay for pay in sorted({0.0, *values, *test.rewards.unique().tolist()})}
    if config is not None:
        pays = {"nothing": 0.0, **config.payments}
    elif len(pays) > MOST_REWARDS:
        pays = {}
    amounts = np.array(sorted(pays.values()))
    gaps = np.diff(amounts)
    apart = gaps[gaps > 1e-5 * np.abs(amounts).max(initial=0.0)]  # by more than rounding
    same = min(0.02, float(apart.min(initial=math.inf)) / 4.0)
    actions = 1 + max(int(train.actions.max()), int(test.actions.max()), HUNT_HARE)
    single = max(int(part.obs[:, players + 1].flatten(1).sum(1).max()) for part in (train, test)) <= 1
    moves = config is not None and config.stag_moves
    return Game(players, *train.obs.shape[2:], actions, values, single, pays, same, moves)


def check(args: Args) -> None:
    """Refuse what cannot work, and fill in the board of --env. Raises a one-line ValueError."""
    positive = ("total_timesteps", "max_cycles", "rows", "test_rows", "hidden_dim", "num_layers", "batch_size")
    positive += ("open_loop_steps", "checkpoint_frequency", "eval_frequency", "eval_episodes")
    least = {**dict.fromkeys(positive, 1), "learning_rate": 1e-12, "size": 2}
    check_numbers(args, least, {"max_cycles": 32_767, "size": 64})
    if args.data is None and "stag_hunt" not in globals():
        raise ValueError("collecting games needs envs/stag_hunt.py, which is not here; pass --data FILE, a plain npz")
    sizes = (args.size, args.n_stags, args.n_hares)
    if args.data and (args.stag_moves or args.n_blocks or any(size is not None for size in sizes)):
        flags = "--size, --n-stags, --n-hares, --n-blocks and --stag-moves"
        raise ValueError(f"{flags} are for games that are collected here; leave them out")
    if args.data is None:
        for name, value in stag_hunt.PRESETS[args.env_id].items():
            if getattr(args, name, 0) is None:
                setattr(args, name, value)
    cells, inputs, layers = (args.size or 8) ** 2, 36, args.num_layers + 1
    collected = 0 if args.data else 4 * (args.rows + args.test_rows) * (14 * cells + 500)
    paths = 1_024 * (cells + 1) ** 2 * 16 if args.n_blocks else 0  # a table of shortest paths for each game
    batch = 16 * args.batch_size * cells * (inputs + layers * args.hidden_dim)
    weights = 16 * args.hidden_dim * (9 * inputs + 9 * args.hidden_dim * layers)
    wanted, memory = collected + paths + batch + weights, machine_memory()
    if wanted > memory:
        needed = f"about {wanted / 2**30:,.0f} GiB of memory are needed, and this machine has {memory / 2**30:,.0f}"
        raise ValueError(f"{needed}; take smaller --rows, --test-rows, --size, --batch-size or --hidden-dim")


def check_data(args: Args, game: Game, train: Transitions, test: Transitions) -> None:
    """Raises ValueError if the data are not what was asked for: of another game, or with nothing to film."""
    if args.load is None and args.model == "entity" and args.mask:
        allowed = reach(game.height, game.width)[places(train.obs, game), places(train.next_obs, game)]
        if far := int((~allowed).any(1).sum()):
            raise ValueError(f"in {far} rows a player moves more than one cell or comes back; add --no-mask")
    if args.capture_video and len(test.view.unique()) == len(test.view):
        raise ValueError(f"--capture-video needs roll-outs: rows of {args.data} with episode, agent and t")


def impossible(model: WorldModel) -> list[str]:
    """Violations that the model's form makes impossible: their absence is no merit."""
    rules = []
    if model.kind != "mse":
        rules.append("reward")
    if model.kind == "entity" and model.game.single_stag:  # several stags are predicted cell by cell
        rules.append("duplicated")
    if model.kind == "entity" and model.args.mask:
        rules += ["jumped", "reappeared"]
    return sorted(rules)


def report(result: dict[str, Any], game: Game, name: str) -> str:
    """The result of `measure` as one screen of text."""
    values, copy, mean = result["values"], result["values_copy"], result["values_mean"]
    channels = zip(game.channel_names, values["channel_mse"], strict=True)
    columns = [key for key in ("mode", "sample", "copy", "truth") if result[key]]
    lines = [
        f"=== {name}: {result['rows']:,} transitions ===",
        f"Obs MSE:  {values['obs_mse']:.6f}   (copied frame {copy['obs_mse']:.6f}, mean frame {mean['obs_mse']:.6f})",
        f"Obs PSNR: {values['psnr_of_mean']:.2f} dB of mean error, {values['mean_of_psnr']:.2f} dB as mean of frames",
        f"Rew MSE:  {values['reward_mse']:.6f}   (nothing {copy['reward_mse']:.6f}, the mean {mean['reward_mse']:.6f})",
        "Per-channel MSE: " + ", ".join(f"{channel} {value:.2e}" for channel, value in channels),
        f"\n{'share of frames, %  *: impossible':34}" + "".join(f"{key:>10}" for key in columns) + f"{'limit':>10}",
    ]
    rows = {
        "exact": "exactly right", "exact_changed": "... where something changed",
        "exact_event": "... where prey was caught", "exact_players": "all players right",
        "reward": "all rewards right", "reward_event": "... where prey was caught",
    }  # fmt: skip
    for rule in [*RULES, "any in the frame", "any"]:
        star = "*" if rule in result["impossible"] else ""
        rows[f"violation {rule}"] = f"breaks a rule: {rule}{star}"
    for key, label in rows.items():
        shares = [result[column][key] for column in columns]
        if key == "exact":
            shares.append(result["limit"])
        lines.append(f"{label:34}" + "".join(f"{100 * share:10.3f}" for share in shares))
    events = [f"{key} {100 * v['exact']:.1f} % of {v['frames']}" for key, v in result["mode"]["events"].items()]
    lines.append("\nrewards exact: " + "; ".join(events))
    for key in [key for key in ("calibration", "ranking") if key in result]:
        lines.append(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in result[key].items()))
    for key, way in (("open_loop", "most likely"), ("open_loop_sample", "drawn")):
        rolled = ", ".join(f"{k}: {100 * v:.2f}" for k, v in result[key].items() if k in (1, 3, 5, 10, 20))
        if rolled:
            lines.append(f"open loop, {way} frames, % exactly right after k steps: {rolled}")
    return "\n".join(lines)


def worst(game: Game, predict: Predict, data: Transitions) -> Tensor:
    """The eight worst rows: those that break a rule first, each group by its number of wrong cells."""
    scores = []
    for batch in data.batches():
        frame, rewards = predict(batch.obs, batch.actions)
        broken = violations(game, batch.obs, batch.actions, frame, rewards)["any"]
        mispaid = ((rewards - batch.rewards).abs() > game.same_reward).any(1)
        scores.append((frame != batch.next_obs).flatten(1).sum(1) + 1_000 * broken + mispaid)
    return torch.cat(scores).argsort(descending=True, stable=True)[:8]


def draw_transitions(game: Game, data: Transitions, frame: Tensor, rewards: Tensor) -> Figure:
    """For each row: frame and joint action, true next frame, predicted next frame (red if it breaks a rule).

    Obstacles are grey, the stag brown, hares green; players are numbers, 0 is the ego. Signs show their actions: an
    arrow, a dot for staying, S or H for hunting the stag or a hare.
    """
    broken = violations(game, data.obs, data.actions, frame, rewards)
    wrong = (frame != data.next_obs).flatten(1).any(1)
    mispaid = ((rewards - data.rewards).abs() > game.same_reward).any(1)
    ground = np.array([[255, 255, 255], [141, 144, 150], [217, 180, 140], [191, 227, 201]], np.uint8)
    figure = Figure(figsize=(9.0, 3.4 * len(frame)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(frame), 3, squeeze=False)):
        verdict = ", ".join(rule for rule in RULES if broken[rule][row])
        true, paid = (", ".join(f"{value:.2f}" for value in pay[row].tolist()) for pay in (data.rewards, rewards))
        predicted = f"predicted: {verdict or ('wrong frame' if wrong[row] else 'right frame')}\n"
        predicted += f"{'wrong rewards' if mispaid[row] else 'rewards'} {paid}"
        titles = ("frame and joint action", f"true next frame\nrewards {true}", predicted)
        for axis, planes, title in zip(axes, (data.obs[row], data.next_obs[row], frame[row]), titles, strict=True):
            kind = (planes[-3:].long() * torch.arange(1, 4)[:, None, None]).amax(0)
            axis.pcolormesh(ground[kind], edgecolors="#e4e4e0", linewidth=0.5)
            axis.set(xticks=[], yticks=[], ylim=(len(kind), 0), aspect="equal")
            red = title is predicted and verdict
            axis.spines[:].set(color="red" if red else "#b0b2b6", linewidth=2.5 if red else 1.0)
            axis.set_title(title, fontsize=7)
            for i, y, x in planes[:-3].nonzero().tolist():
                x, y = x + (0.25, 0.75)[i % 2], y + (0.28, 0.72)[i // 2 % 2]
                action = int(data.actions[row, i]) if axis is axes[0] else -1
                text = f"{i}{'↑↓←→·SH'[action : action + 1]}"  # no sign for a player who does not act
                axis.text(x, y, text, color=f"C{i}", fontsize=7, weight="bold", ha="center", va="center")
    return figure


def film_open_loop(game: Game, predict: Predict, data: Transitions, folder: Path) -> list[Path]:
    """Write mp4 videos of roll-outs on predicted frames beside the truth, for the three longest views."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from moviepy import ImageSequenceClip  # slow to import, and only needed here

    folder.mkdir(exist_ok=True)
    views, lengths = data.view.unique(return_counts=True)
    paths = []
    for number, view in enumerate(views[lengths.argsort(descending=True, stable=True)[:3]]):
        rows = (data.view == view).nonzero()[:, 0]
        frame, pictures = data.obs[rows[:1]], []
        for row in rows.split(1):
            step = data.select(row)._replace(obs=frame)
            frame, rewards = predict(step.obs, step.actions)
            canvas = FigureCanvasAgg(draw_transitions(game, step, frame, rewards))
            canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        paths.append(folder / f"open_loop_{number}.mp4")
        ImageSequenceClip(pictures, fps=2).write_videofile(str(paths[-1]), logger=None)
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
