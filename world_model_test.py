"""A world model of a grid game: trained, tested, compared, in numbers and pictures.

From a frame and the joint action of all players, the model predicts the next frame and every player's reward. The test
asks what an average error hides: how many frames are exactly right, and how many break a rule of the game. Without
arguments it collects games of Markov Stag-Hunt, trains, and tests on fresh games; `--load` tests a model of yours.

The game: Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent Modeling and
Planning", ICML 2024, https://arxiv.org/abs/2406.08002; the contrastive term: van den Oord et al., 2018,
https://arxiv.org/abs/1807.03748

    python world_model_test.py
    python world_model_test.py --model mse --action-input planes --env 4p5b4x4
    python world_model_test.py --load my_package.my_module:my_model

Docs: docs/world_model_test.md
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn

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

with contextlib.suppress(ModuleNotFoundError):  # a copy of this file alone still tests on data of one's own
    from envs import stag_hunt


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
    checkpoint_frequency: int = 1_000
    """steps between two checkpoints"""
    eval_frequency: int = 1_000
    """steps between two evaluations"""
    eval_episodes: int = 100
    """episodes of each evaluation, always on the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[Literal["4p5b8x8", "4p6b8x8", "4p5b4x4"], tyro.conf.arg(aliases=["--env"])] = "4p5b8x8"
    """the stag hunt that is collected: players, beasts and board"""
    max_cycles: int = 35
    """the limit of the collected games, in steps"""
    stag_moves: bool = False
    """if toggled, stags move at random, so that no model can be right always"""
    n_blocks: int = 0
    """obstacles of the collected games"""
    rows: int = 40_000
    """transitions to collect for training"""
    test_rows: int = 50_000
    """transitions to collect for the test, of other seeds"""
    data: str | None = None
    """train and test on this file instead: a record of games, or an npz with obs, actions, rewards and next_obs"""
    load: str | None = None
    """test this model instead of training one: a model.pt of this script, or `module:function`"""
    total_timesteps: int = 8_000
    """gradient steps"""
    model: Literal["mse", "cell", "entity"] = "entity"
    """what is predicted: numbers, or probabilities, of planes and cells; or a place for each player and the stag"""
    action_input: Literal["painted", "planes"] = "painted"
    """joint action painted at each player's own cell, or as constant planes"""
    mask: bool = True
    """if toggled, an entity's places are those within one step, or gone (only with --model entity)"""
    contrastive_coef: float = 0.0
    """weight of InfoNCE between (frame, joint action) and next frame"""
    hidden_dim: int = 32
    """channels of the hidden layers"""
    num_layers: int = 1
    """3 x 3 convolutions; one 1 x 1 convolution follows"""
    learning_rate: float = 3e-3
    """learning rate at the start; it falls linearly to 0"""
    batch_size: int = 512
    """transitions in a batch"""
    open_loop_steps: int = 20
    """longest roll-out without looking at the true frames"""


# Data ----------------------------------------------------------------------------------------------------------------
class Game(NamedTuple):
    """Sizes of a game, every reward that its training data hold, and all that it can pay, where that is known."""

    players: int
    height: int
    width: int
    actions: int
    reward_values: list[float]
    single_stag: bool = True
    legal_rewards: list[float] = []  # noqa: RUF012  (never changed)

    @property
    def channels(self) -> int:
        """Planes of a frame: the players, obstacles, stags, hares."""
        return self.players + 3

    @property
    def entities(self) -> int:
        """What is in one place at most: the players, and the stag if there is only one."""
        return self.players + self.single_stag

    @property
    def cells(self) -> int:
        """Cells of the board; as a place it means "gone"."""
        return self.height * self.width

    @property
    def channel_names(self) -> list[str]:
        """Names of the planes, ego first."""
        return ["self", *[f"other {i}" for i in range(1, self.players)], "obstacles", "stag", "hare"]


class Transitions(NamedTuple):
    """Rows: frames (N, C, H, W) uint8, joint actions (N, n) int64 (-1: gone), rewards (N, n), next frames.

    `following` (N,) is the row of the same game and player one step later, -1 if there is none; `t` (N,) the step.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    following: Tensor
    t: Tensor

    def select(self, rows: Tensor) -> "Transitions":
        """Some rows; what follows on them is lost."""
        return Transitions(*[value[rows] for value in self])


def places(obs: Tensor, players: int) -> Tensor:
    """Where the players and the stag are (B, n + 1): row * width + column, or height * width for "gone".

    Of a plane with several ones (a wrong prediction, or several stags) the first counts.
    """
    planes = torch.cat((obs[:, :players], obs[:, players + 1 : players + 2]), 1).flatten(2)
    return torch.where(planes.bool().any(2), planes.argmax(2), planes.shape[2])


def read_plain(path: Path) -> dict[str, np.ndarray]:
    """An npz file's obs, actions, rewards, next_obs (and episode, agent, t). Raises ValueError with one line."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array; an npz file with one array per field expected")
            return {name: file[name] for name in file.files}
    except ValueError as error:
        pickled = "allow_pickle" in str(error) or "Object arrays" in str(error)
        reason = "it holds Python objects, which can run code when they are read" if pickled else str(error)
        raise ValueError(f"{path}: {reason}") from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__})") from None


def to_transitions(columns: dict[str, np.ndarray], name: str) -> Transitions:
    """Check and convert columns obs, actions, rewards, next_obs. Raises ValueError with one line."""
    missing = {"obs", "actions", "rewards", "next_obs"} - set(columns)
    if missing:
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}; obs, actions, rewards, next_obs are needed")
    obs, actions, rewards, next_obs = (columns[key] for key in ("obs", "actions", "rewards", "next_obs"))
    if not len(obs):
        raise ValueError(f"{name} has no rows")
    if actions.ndim != 2 or obs.ndim != 4 or rewards.shape != actions.shape or next_obs.shape != obs.shape:
        shapes = f"obs {obs.shape}, actions {actions.shape}, rewards {rewards.shape}, next_obs {next_obs.shape}"
        raise ValueError(f"{name}: shapes (N, C, H, W), (N, n), (N, n), (N, C, H, W) expected, got {shapes}")
    players = actions.shape[1]
    if obs.shape[1] != players + 3 and obs.shape[3] == players + 3:  # channels last
        obs, next_obs = np.moveaxis(obs, 3, 1), np.moveaxis(next_obs, 3, 1)
    if obs.shape[1] != players + 3:
        raise ValueError(
            f"{name}: {players} actions a row, so {players + 3} planes expected, got frames {obs.shape[1:]}"
        )
    for key, value in (("obs", obs), ("next_obs", next_obs)):
        if not np.isin(value, (0, 1)).all():
            raise ValueError(f"{name}: {key} holds other values than 0 and 1")
        crowded = (value[:, :players].sum((2, 3)) > 1).any(1)
        if crowded.any():
            raise ValueError(f"{name}: {int(crowded.sum())} rows of {key} have a player's plane with two ones in it")
    if not np.isfinite(rewards).all():
        raise ValueError(f"{name}: {int((~np.isfinite(rewards)).any(1).sum())} rows have rewards that are not finite")
    following = np.full(len(obs), -1)
    t = columns.get("t", np.zeros(len(obs))).astype(np.int64)
    if {"episode", "agent", "t"} <= set(columns):
        same = (np.diff(columns["episode"].astype(int)) == 0) & (np.diff(columns["agent"].astype(int)) == 0)
        same &= np.diff(t) == 1
        following[:-1] = np.where(same, np.arange(1, len(obs)), -1)
    return Transitions(
        torch.from_numpy(np.ascontiguousarray(obs.astype(np.uint8))), torch.from_numpy(actions.astype(np.int64)),
        torch.from_numpy(rewards.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(next_obs.astype(np.uint8))),
        torch.from_numpy(following), torch.from_numpy(t),
    )  # fmt: skip


def collect(args: Args, rows: int, seed: int) -> Transitions:
    """Games of Markov Stag-Hunt between scripted and random players; cached under data/."""
    config = stag_hunt.Config(**stag_hunt.PRESETS[args.env_id], n_blocks=args.n_blocks, stag_moves=args.stag_moves)
    kind = f"{args.env_id}{'_moving' * args.stag_moves}{f'_{args.n_blocks}blocks' * bool(args.n_blocks)}"
    path = Path("data") / f"markov_stag_hunt_{kind}_limit{args.max_cycles}_{rows}_seed{seed}.npz"
    names = ("obs", "joint_action", "rewards", "next_obs", "episode", "agent", "t", "split")
    if not path.exists():
        print(f"collecting {rows:,} transitions into {path}")
        games = stag_hunt.collect(rows, config, args.max_cycles, ("NS", "NH", "random"), seed)
        stag_hunt.save_dataset(path, games)
    return from_record(stag_hunt.load_dataset(path, names), str(path))


def from_record(record: Any, name: str) -> Transitions:
    """The transitions of a record of games."""
    columns = dict(record.arrays)
    columns["actions"] = columns.pop("joint_action")
    return to_transitions(columns, name)


def find_data(args: Args) -> tuple[Transitions, Transitions]:
    """Training and test transitions. Raises ValueError with one line."""
    if args.data is None:
        if "stag_hunt" not in globals():
            raise ValueError("envs/stag_hunt.py is not here to collect games with; pass --data FILE")
        return collect(args, args.rows, args.seed), collect(args, args.test_rows, 1_000_000 + args.seed)
    path = Path(args.data)
    columns = read_plain(path)
    if "meta" in columns:  # a record of games: the test split has games of its own
        if "next_obs" not in columns:
            raise ValueError(f"{path} has no next_obs: a world model needs the next observations")
        names = ("obs", "joint_action", "rewards", "next_obs", "episode", "agent", "t", "split")
        record = stag_hunt.load_dataset(path, names)
        test = record.arrays["split"][record.arrays["episode"]] == 2
        parts = []
        for chosen in (~test, test):
            arrays = {key: value[chosen] for key, value in record.arrays.items() if key != "split"}
            parts.append(from_record(record._replace(arrays=arrays), str(path)))
        return parts[0], parts[1]
    whole = to_transitions(columns, str(path))
    held_out = len(whole.obs) // 5  # rows are in order, so the last fifth has games of its own, but for one
    if not held_out:
        raise ValueError(f"{path} has {len(whole.obs)} rows: too few to hold out a test")
    rows = torch.arange(len(whole.obs))
    return whole.select(rows[:-held_out]), whole.select(rows[-held_out:])._replace(
        following=torch.full((held_out,), -1)
    )


# Networks ------------------------------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """What a model says of a batch; which fields are there depends on `--model`.

    `planes` (B, C, H, W): values (mse) or logits (cell; entity: obstacles, stags, hares). `entities` (B, E, H W + 1):
    logits of each player's and the single stag's place. `rewards`: (B, n) values, or (B, n, V) logits.
    """

    planes: Tensor
    entities: Tensor | None
    rewards: Tensor


class WorldModel(nn.Module):
    """Frame (B, C, H, W) and joint action (B, n) -> next frame and rewards.

    A 3 x 3 convolution and a 1 x 1 convolution give each cell its features. What happens to a cell is read there; who
    leaves, and what is paid, from features and inputs at the entity's own cell.
    """

    def __init__(self, game: Game, args: Args) -> None:
        """`args` names the kind of prediction and the sizes."""
        super().__init__()
        self.game, self.kind, self.painted, self.masked = game, args.model, args.action_input == "painted", args.mask
        hidden, values = args.hidden_dim, len(game.reward_values)
        layers: list[nn.Module] = []
        inputs = channels = game.channels + game.players * game.actions + 1
        for _ in range(args.num_layers):
            layers += [nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU()]
            channels = hidden
        self.trunk = nn.Sequential(*layers, nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        entities = game.entities if self.kind == "entity" else 0
        self.cell_head = nn.Conv2d(hidden, game.channels + entities, 1)
        here = hidden + inputs  # with the inputs themselves: several players' actions in one cell crowd its features
        if entities:
            self.gone_head = nn.Sequential(nn.Linear(here, 64), nn.ReLU(), nn.Linear(64, entities))
        # Rewards read what the next state will be: who leaves, and what prey is left in the player's cell.
        next_state = 0 if self.kind == "mse" else game.players + 2
        self.reward_head = nn.Sequential(
            nn.Linear(here + next_state, 64), nn.ReLU(),
            nn.Linear(64, game.players * (1 if self.kind == "mse" else values)),
        )  # fmt: skip
        if args.contrastive_coef > 0.0:
            self.query = nn.Linear(hidden * game.cells, 64)
            self.key = nn.Sequential(
                nn.Conv2d(game.channels, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * game.cells, 64)
            )
        # Where an entity can be after one step: geometry, and that who is gone stays gone.
        cell = torch.arange(game.cells)
        row, column = cell // game.width, cell % game.width
        near = (row[:, None] - row).abs() + (column[:, None] - column).abs() <= 1
        reach = torch.ones(game.cells + 1, game.cells + 1, dtype=torch.bool)
        reach[:-1, :-1], reach[-1, :-1] = near, False
        self.register_buffer("reach", reach, persistent=False)
        self.to(memory_format=torch.channels_last)  # the convolutions are faster so

    def entity_channels(self) -> list[int]:
        """The planes that hold one entity each."""
        return [*range(self.game.players), *[self.game.players + 1] * self.game.single_stag]

    def inputs(self, obs: Tensor, actions: Tensor, where: Tensor) -> Tensor:
        """Planes of frames (B, C, H, W), of joint actions (B, n), and of ones; `where` (B, n + 1) are the places."""
        game, batch = self.game, len(obs)
        one_hot = F.one_hot(actions.clamp_min(0), game.actions) * (actions >= 0)[:, :, None]  # (B, n, A)
        if self.painted:
            painted = torch.zeros(batch, game.players, game.actions, game.cells + 1, device=obs.device)
            index = where[:, : game.players, None, None].expand(-1, -1, game.actions, 1)
            painted.scatter_(3, index, one_hot[..., None].float())
            action_planes = painted[..., :-1].reshape(batch, -1, game.height, game.width)
        else:
            action_planes = one_hot.float().view(batch, -1, 1, 1).expand(-1, -1, game.height, game.width)
        inside = obs.new_ones(
            batch, 1, game.height, game.width, dtype=torch.float32
        )  # tells the border from a free cell
        return torch.cat((obs.float(), action_planes, inside), 1)

    def at(self, features: Tensor, where: Tensor) -> Tensor:
        """Features (B, E, hidden) of the cells `where` (B, E); zeros for who is gone."""
        index = where.clamp_max(self.game.cells - 1)[:, None].expand(-1, features.shape[1], -1)
        return features.flatten(2).gather(2, index).transpose(1, 2) * (where < self.game.cells)[:, :, None]

    def forward(self, obs: Tensor, actions: Tensor, next_obs: Tensor | None = None) -> tuple[Prediction, Tensor]:
        """The prediction and the features. Rewards are read off `next_obs`, or off the predicted mode without it."""
        game = self.game
        where = places(obs, game.players)
        inputs = self.inputs(obs, actions, where)
        features = self.trunk(inputs)
        cells = self.cell_head(features)
        planes, entities = cells[:, : game.channels], None
        own = torch.cat((self.at(features, where), self.at(inputs, where)), 2)
        if self.kind == "entity":
            index = torch.arange(game.entities, device=obs.device)
            gone = self.gone_head(own[:, : game.entities])[:, index, index]
            entities = torch.cat((cells[:, game.channels :].flatten(2), gone[:, :, None]), 2)
            if self.masked:
                entities = entities.masked_fill(~self.reach[where[:, : game.entities]], -math.inf)
        own = own[:, : game.players]
        if self.kind != "mse":
            if next_obs is None:
                next_obs = self.frame(planes, entities)
            after = places(next_obs, game.players)[:, : game.players]
            gone = (after == game.cells).float()[:, None].expand(-1, game.players, -1)
            prey = self.at(next_obs[:, -2:].float(), where[:, : game.players])
            own = torch.cat((own, gone, prey), 2)
        index = torch.arange(game.players, device=obs.device)
        # Each player has an output of its own, so that the head need not find out whose cell it reads.
        rewards = self.reward_head(own).view(len(obs), game.players, game.players, -1)[:, index, index]
        return Prediction(planes, entities, rewards[..., 0] if self.kind == "mse" else rewards), features

    def frame(self, planes: Tensor, entities: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """The predicted frame (B, C, H, W) uint8: the most likely one, or, with `generator`, one drawn.

        Planes of mse, which are values, are rounded at 0.5 and never drawn.
        """
        game = self.game
        if self.kind == "mse" or generator is None:
            frame = (planes > (0.5 if self.kind == "mse" else 0.0)).to(torch.uint8)
        else:
            draw = torch.rand(planes.shape, generator=generator).to(planes.device)
            frame = (draw < torch.sigmoid(planes)).to(torch.uint8)
        if entities is not None:
            if generator is None:
                where = entities.argmax(2)
            else:
                flat = entities.softmax(2).flatten(0, 1).cpu()
                where = torch.multinomial(flat, 1, generator=generator).view(entities.shape[:2]).to(planes.device)
            one_hot = F.one_hot(where, game.cells + 1)[..., :-1].to(torch.uint8)
            one_hot = one_hot.view(len(planes), -1, game.height, game.width)
            frame[:, self.entity_channels()] = one_hot
        return frame


# Learning ------------------------------------------------------------------------------------------------------------
class Learner:
    """The model, its one optimizer, and the update, which takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, game: Game, device: torch.device) -> None:
        """Build everything from the game's sizes."""
        self.args, self.game, self.device = args, game, device
        self.model = WorldModel(game, args).to(device)
        self.values = torch.tensor(game.reward_values, device=device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=True)

    def losses(self, batch: Transitions) -> dict[str, Tensor]:
        """The parts of the loss: frame, reward and, where it is asked for, the contrastive term.

        The frame's is summed over a frame and averaged over the batch: a negative log-likelihood in nats, or squares.
        """
        game, model = self.game, self.model
        prediction, features = model(batch.obs, batch.actions, batch.next_obs)
        target = batch.next_obs.float()
        if model.kind == "mse":
            result = {
                "frame": (prediction.planes - target).square().flatten(1).sum(1).mean(),
                "reward": (prediction.rewards - batch.rewards).square().sum(1).mean(),
            }
        else:
            planes = list(range(game.channels))
            if model.kind == "entity":
                planes = [channel for channel in planes if channel not in model.entity_channels()]
            error = F.binary_cross_entropy_with_logits(
                prediction.planes[:, planes], target[:, planes], reduction="none"
            )
            frame = error.flatten(1).sum(1).mean()
            if prediction.entities is not None:
                after = places(batch.next_obs, game.players)[:, : game.entities]
                error = F.cross_entropy(prediction.entities.flatten(0, 1), after.flatten(), reduction="none")
                frame = frame + error.view(after.shape).sum(1).mean()
            value = (batch.rewards[:, :, None] - self.values).abs().argmin(2)
            error = F.cross_entropy(prediction.rewards.flatten(0, 1), value.flatten(), reduction="none")
            result = {"frame": frame, "reward": error.view(value.shape).sum(1).mean()}
        if self.args.contrastive_coef > 0.0:
            similarity = self.similarity(features, batch.next_obs)
            result["contrastive"] = F.cross_entropy(similarity, torch.arange(len(similarity), device=self.device))
        return result

    def similarity(self, features: Tensor, next_obs: Tensor) -> Tensor:
        """How well each (frame, joint action) goes with each next frame (B, B), as InfoNCE's logits."""
        query = F.normalize(self.model.query(features.flatten(1)), dim=1)
        key = F.normalize(self.model.key(next_obs.float()), dim=1)
        return query @ key.T / 0.1

    def update(self, batch: Transitions, progress: float = 0.0) -> dict[str, Tensor]:
        """One step on the sum of the losses; `progress` in [0, 1] lets the learning rate fall to 0."""
        losses = self.losses(batch)
        losses["total"] = losses["frame"] + losses["reward"]
        if "contrastive" in losses:
            losses["total"] = losses["total"] + self.args.contrastive_coef * losses["contrastive"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * (1.0 - progress)
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


# Testing -------------------------------------------------------------------------------------------------------------
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # frames, joint actions -> next frames, rewards
HUNT_STAG, HUNT_HARE = 5, 6  # actions of Markov Stag-Hunt
SAME_REWARD = 0.02  # a regression's rounding is no violation; the game's rewards are at least 0.08 apart
RULES = {
    "duplicated": "a player or the stag is in two cells",
    "jumped": "a player moved more than one cell",
    "vanished": "a player left without catching anything",
    "reappeared": "a player who was gone is back",
    "in an obstacle": "a player stands in an obstacle",
    "prey": "prey came, went without being hunted, or jumped",
    "obstacles": "an obstacle changed",
    "reward": "a reward that the game never pays",
}


def violations(
    game: Game, obs: Tensor, actions: Tensor, next_obs: Tensor, rewards: Tensor, stag_moves: bool = False
) -> dict[str, Tensor]:
    """Which frames (B,) break which rule of Markov Stag-Hunt, `any` of them, or `any in the frame`: without the reward.

    Frames are uint8, rewards (B, n).
    """
    n, width = game.players, game.width
    before, after = obs[:, :n].flatten(2), next_obs[:, :n].flatten(2)
    was, there, count = before.bool().any(2), after.bool().any(2), after.sum(2, dtype=torch.int64)
    place = before.to(torch.uint8).argmax(2)
    cell = torch.arange(game.cells, device=obs.device)
    row, column = cell // width, cell % width
    far = (row[place][:, :, None] - row).abs() + (column[place][:, :, None] - column).abs()  # (B, n, cells)
    stag, next_stag = obs[:, n + 1].flatten(1), next_obs[:, n + 1].flatten(1)
    hares, next_hares = obs[:, n + 2].flatten(1), next_obs[:, n + 2].flatten(1)
    together = (place[:, :, None] == place[:, None]) & was[:, :, None] & was[:, None]
    for_stag, for_hare = (actions == HUNT_STAG) & was, (actions == HUNT_HARE) & was
    enough = (together & for_stag[:, None]).sum(2) >= 2
    caught_stag = for_stag & enough & stag.gather(1, place).bool()
    caught_hare = for_hare & hares.gather(1, place).bool()

    def hunted(by: Tensor) -> Tensor:
        """Cells (B, cells) in which some player catches."""
        marks = torch.zeros(len(obs), game.cells, dtype=torch.int64, device=obs.device)
        return marks.scatter_add_(1, place, by.long()) > 0

    hares_wrong = (next_hares > hares) | ((next_hares < hares) & ~hunted(caught_hare))
    stag_wrong = (next_stag > stag) | ((next_stag < stag) & ~hunted(caught_stag))
    if stag_moves:  # it may be in one of the cells around; only their number is left to check
        around = F.max_pool2d(obs[:, n + 1 : n + 2].float(), 3, 1, 1).flatten(1) > 0
        lost = stag.sum(1, dtype=torch.int64) - next_stag.sum(1, dtype=torch.int64)
        stag_wrong = ((next_stag > 0) & ~around) | (lost != hunted(caught_stag).sum(1))[:, None]
    legal = torch.tensor(game.legal_rewards, device=obs.device)
    result = {
        "duplicated": (count > 1).any(1) | (next_stag.sum(1, dtype=torch.int64) > stag.sum(1, dtype=torch.int64)),
        "jumped": ((after > 0) & (far > 1) & was[:, :, None]).any(2).any(1),
        "vanished": (was & ~there & ~caught_stag & ~caught_hare).any(1),
        "reappeared": (~was & there).any(1),
        "in an obstacle": ((after > 0) & (obs[:, n].flatten(1) > 0)[:, None]).any(2).any(1),
        "prey": hares_wrong.any(1) | stag_wrong.any(1),
        "obstacles": (next_obs[:, n] != obs[:, n]).flatten(1).any(1),
        "reward": ((rewards[:, :, None] - legal).abs().amin(2) > SAME_REWARD).any(1),
    }
    in_frame = torch.stack([broken for rule, broken in result.items() if rule != "reward"]).any(0)
    return result | {"any in the frame": in_frame, "any": in_frame | result["reward"]}


def impossible(args: Args | None) -> set[str]:
    """Violations that a model's form rules out: nothing that it is praised for."""
    if args is None or args.model == "mse":
        return set()
    if args.model == "cell":
        return {"reward"}
    return {"reward", "duplicated"} | ({"jumped", "reappeared"} if args.mask else set())


def event_names(game: Game, hare: float = 1.0, stag: float = 10.0) -> dict[float, str]:
    """What pays each reward: prey and number of hunters, in Markov Stag-Hunt."""
    names = {}
    for value in game.legal_rewards:
        for prey, pay in (("hare", hare), ("stag", stag)):
            for hunters in range(1, game.players + 1):
                if abs(value - pay / hunters) < 1e-3:
                    names[value] = f"{prey}, {hunters} hunter{'s' * (hunters > 1)}"
    return {value: names.get(value, f"reward {value:g}") for value in game.legal_rewards if value}


def measure_frames(
    game: Game, predict: Predict, data: Transitions, stag_moves: bool = False, batch_size: int = 2_000
) -> dict[str, Any]:
    """Exact frames, violations and rewards of `predict` on `data`, as shares of 1 (see `report` for their names)."""
    n, sums, events = game.players, {}, {value: [0, 0] for value in event_names(game)}

    def add(name: str, hits: Tensor) -> None:
        total, count = sums.get(name, (0, 0))
        sums[name] = total + int(hits.sum()), count + hits.numel()

    for rows in torch.arange(len(data.obs)).split(batch_size):
        batch = data.select(rows)
        frame, rewards = predict(batch.obs, batch.actions)
        right = (frame == batch.next_obs).flatten(2).all(2)  # (B, C)
        exact, changed = right.all(1), (batch.next_obs != batch.obs).flatten(1).any(1)
        paid = ((rewards - batch.rewards).abs() < SAME_REWARD).all(1)
        add("exact", exact)
        add("exact_changed", exact[changed])
        add("exact_players", right[:, :n].all(1))
        for i, name in enumerate(game.channel_names):
            add(f"exact {name}", right[:, i])
        for name, broken in violations(game, batch.obs, batch.actions, frame, rewards, stag_moves).items():
            add(f"violation {name}", broken)
        add("reward", paid)
        add("reward_event", paid[(batch.rewards != 0).any(1)])
        add("exact_event", exact[(batch.rewards != 0).any(1)])
        for value, count in events.items():
            chosen = ((batch.rewards - value).abs() < 1e-3).any(1)
            count[0], count[1] = count[0] + int(paid[chosen].sum()), count[1] + int(chosen.sum())
    result: dict[str, Any] = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
    names = event_names(game)
    result["events"] = {names[v]: {"frames": c[1], "exact": c[0] / c[1]} for v, c in events.items() if c[1]}
    return result


def measure_values(expected: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], data: Transitions) -> dict[str, Any]:
    """Squared errors of expected frames (B, C, H, W) and rewards (B, n), and both definitions of PSNR, in dB.

    `psnr_of_mean` is 10 log10(1 / MSE); `mean_of_psnr` averages over frames, none of which counts above 100 dB.
    """
    frames, rewards = [], []
    for rows in torch.arange(len(data.obs)).split(2_000):
        batch = data.select(rows)
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


def measure_open_loop(game: Game, predict: Predict, data: Transitions, steps: int) -> dict[int, float]:
    """Share of exact frames after k steps that see only predicted frames, of those games that last `steps` steps more.

    All games are rolled out together. Starts are where such a game is first seen, and every `steps` steps.
    """
    last = torch.arange(len(data.obs))
    for _ in range(steps - 1):
        last = torch.where(last >= 0, data.following[last.clamp_min(0)], last)
    rows = ((last >= 0) & (data.t % steps == 0)).nonzero()[:, 0]
    result = {}
    frame = data.obs[rows]
    for k in range(1, steps + 1 if len(rows) else 1):
        parts = [predict(*pair)[0] for pair in zip(frame.split(2_000), data.actions[rows].split(2_000), strict=True)]
        frame = torch.cat(parts)
        result[k] = float((frame == data.next_obs[rows]).flatten(1).all(1).float().mean())
        rows = data.following[rows]
    return result


class Tested(NamedTuple):
    """A model under test: its likeliest frames, draws (if it can), expected values, and arguments (if it is ours)."""

    mode: Predict
    sample: Predict | None
    expected: Predict
    args: Args | None


def wrap(learner: Learner, seed: int) -> Tested:
    """A trained model's ways to predict; draws have a random stream of their own."""
    model, generator = learner.model, torch.Generator().manual_seed(seed)
    values = learner.values

    @torch.no_grad()
    def mode(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        prediction, _ = model(obs, actions)
        rewards = prediction.rewards if model.kind == "mse" else values[prediction.rewards.argmax(2)]
        return model.frame(prediction.planes, prediction.entities), rewards

    @torch.no_grad()
    def sample(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        prediction, _ = model(obs, actions)
        frame = model.frame(prediction.planes, prediction.entities, generator)
        logits = model(obs, actions, frame)[0].rewards
        drawn = torch.multinomial(logits.softmax(2).flatten(0, 1).cpu(), 1, generator=generator).view(actions.shape)
        return frame, values[drawn.to(values.device)]

    @torch.no_grad()
    def expected(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        prediction, _ = model(obs, actions)
        if model.kind == "mse":
            return prediction.planes, prediction.rewards
        planes = torch.sigmoid(prediction.planes)
        if prediction.entities is not None:
            shares = prediction.entities.softmax(2)[..., :-1].view(len(obs), -1, *obs.shape[2:])
            planes[:, model.entity_channels()] = shares
        return planes, (prediction.rewards.softmax(2) * values).sum(2)

    return Tested(mode, None if model.kind == "mse" else sample, expected, learner.args)


@torch.no_grad()
def calibration(learner: Learner, data: Transitions, bins: int = 15) -> dict[str, float]:
    """Negative log-likelihood of a next frame in nats, and the expected calibration error of the players' places.

    (With `cell` the error is that of each plane's value in each cell.) Not defined for `mse`.
    """
    model, game = learner.model, learner.game
    nll, confidence, hits = [], [], []
    for rows in torch.arange(len(data.obs)).split(2_000):
        batch = data.select(rows)
        nll.append(float(learner.losses(batch)["frame"]) * len(rows))
        prediction, _ = model(batch.obs, batch.actions)
        if prediction.entities is not None:
            top, place = prediction.entities.softmax(2)[:, : game.players].max(2)
            right = place == places(batch.next_obs, game.players)[:, : game.players]
        else:
            share = torch.sigmoid(prediction.planes[:, : game.players])
            top, right = torch.maximum(share, 1.0 - share), (share > 0.5) == batch.next_obs[:, : game.players].bool()
        confidence.append(top.flatten())
        hits.append(right.flatten().float())
    share, right = torch.cat(confidence), torch.cat(hits)
    index = (share * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins).index_add_(0, index, share - right)
    return {"nll": sum(nll) / len(data.obs), "ece": float(gap.abs().sum() / len(share))}


@torch.no_grad()
def ranking(learner: Learner, data: Transitions, pool: int = 1_000) -> dict[str, float]:
    """Hits@1 and mean reciprocal rank of the true next frame among a pool of as many, by the contrastive similarity."""
    batch = data.select(torch.linspace(0, len(data.obs) - 1, min(pool, len(data.obs))).long())
    _, features = learner.model(batch.obs, batch.actions)
    similarity = learner.similarity(features, batch.next_obs)
    rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    return {"hits_at_1": float((rank == 1).float().mean()), "mrr": float((1.0 / rank).mean()), "pool": len(batch.obs)}


def game_limit(args: Args, data: Transitions, rows: int = 300, draws: int = 100) -> float:
    """The share of frames that a perfect model's most likely frame hits: 1, unless stags move at random.

    Then the environment is set to the state of some rows again and again, and the commonest outcome counted: the mean
    of the largest probability, estimated (a little above the truth, as a maximum of estimates is).
    """
    if not args.stag_moves:
        return 1.0
    preset = stag_hunt.PRESETS[args.env_id]
    env = stag_hunt.parallel_env(**preset, n_blocks=args.n_blocks, stag_moves=True, max_cycles=args.max_cycles + 1)
    env.reset(seed=0)
    n, cells, shares = preset["n_players"], preset["size"] ** 2, []
    for row in torch.linspace(0, len(data.obs) - 1, rows).long().tolist():
        planes = data.obs[row].flatten(1).numpy().astype(bool)
        state = {"players": [int(p.argmax()) if p.any() else cells for p in planes[:n]], "blocks": planes[n]}
        for name, plane, count in (
            ("stags", planes[n + 1], preset["n_stags"]),
            ("hares", planes[n + 2], preset["n_hares"]),
        ):
            there = np.flatnonzero(plane).tolist()
            state[name] = there + [cells] * (count - len(there))
        outcomes: dict[tuple[int, ...], int] = {}
        for seed in range(draws):
            env.set_state({name: np.array(value) for name, value in state.items()} | {"seed": np.array(seed), "t": 0})
            env.step({name: int(data.actions[row, int(name.split("_")[1])]) for name in env.agents})
            after = env.get_state()
            key = tuple(sorted(after["stags"].tolist()))
            outcomes[key] = outcomes.get(key, 0) + 1
        shares.append(max(outcomes.values()) / draws)
    return float(np.mean(shares))


def measure_all(
    tested: Tested, learner: Learner | None, args: Args, game: Game, train: Transitions, test: Transitions
) -> dict[str, Any]:
    """Everything that the report, `metrics.json` and the pictures need."""
    mean = train.next_obs.float().mean(0), train.rewards.mean(0)
    result: dict[str, Any] = {
        "rows": len(test.obs), "limit": game_limit(args, test), "values": measure_values(tested.expected, test),
        "values_copy": measure_values(lambda obs, _: (obs.float(), torch.zeros(len(obs), game.players)), test),
        "values_mean": measure_values(lambda obs, _: (mean[0].expand(obs.shape), mean[1].expand(len(obs), -1)), test),
        "mode": measure_frames(game, tested.mode, test, args.stag_moves),
        "sample": measure_frames(game, tested.sample, test, args.stag_moves) if tested.sample else None,
        "copy": measure_frames(game, lambda obs, _: (obs, torch.zeros(len(obs), game.players)), test, args.stag_moves),
        "open_loop": measure_open_loop(game, tested.mode, test, args.open_loop_steps),
        "impossible": sorted(impossible(tested.args)),
    }  # fmt: skip
    offset = [0]

    def truth(obs: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(offset[0], offset[0] + len(obs))
        offset[0] += len(obs)
        return test.next_obs[rows], test.rewards[rows]

    result["truth"] = measure_frames(game, truth, test, args.stag_moves)
    if learner is not None and learner.args.model != "mse":
        result["calibration"] = calibration(learner, test)
    if learner is not None and learner.args.contrastive_coef > 0.0:
        result["ranking"] = ranking(learner, test)
    return result


def report(result: dict[str, Any], game: Game, name: str) -> str:
    """One screen of text."""
    values, copy, mean = result["values"], result["values_copy"], result["values_mean"]
    lines = [
        f"=== {name}: {result['rows']:,} transitions ===",
        f"Obs MSE:  {values['obs_mse']:.6f}   (copied frame {copy['obs_mse']:.6f}, mean frame {mean['obs_mse']:.6f})",
        f"Obs PSNR: {values['psnr_of_mean']:.2f} dB of the mean error; {values['mean_of_psnr']:.2f} dB as the mean of",
        "          all frames (at most 100 each)",
        f"Rew MSE:  {values['reward_mse']:.6f}   (nothing {copy['reward_mse']:.6f}, the mean {mean['reward_mse']:.6f})",
    ]
    channels = zip(game.channel_names, values["channel_mse"], strict=True)
    lines += ["Per-channel MSE: " + ", ".join(f"{channel} {value:.2e}" for channel, value in channels), ""]
    columns = [key for key in ("mode", "sample", "copy", "truth") if result[key]]
    lines.append(f"{'share of frames, %':34}" + "".join(f"{key:>10}" for key in columns) + f"{'limit':>10}")
    rows = {
        "exact": "exactly right", "exact_changed": "... where something changed",
        "exact_event": "... where prey was caught", "exact_players": "all players right",
        "reward": "all rewards right", "reward_event": "... where prey was caught",
    }  # fmt: skip
    for key, label in rows.items():
        limit = f"{100 * result['limit']:10.3f}" if key == "exact" else ""
        lines.append(f"{label:34}" + "".join(f"{100 * result[c][key]:10.3f}" for c in columns) + limit)
    for rule in [*RULES, "any in the frame", "any"]:
        label = f"breaks a rule: {rule}" + ("*" if rule in result["impossible"] else "")
        lines.append(f"{label:34}" + "".join(f"{100 * result[c][f'violation {rule}']:10.3f}" for c in columns))
    if result["impossible"]:
        lines.append("  * cannot happen by the model's form")
    lines.append("")
    events = [f"{key} {100 * v['exact']:.1f} % of {v['frames']}" for key, v in result["mode"]["events"].items()]
    lines.append("rewards exact: " + "; ".join(events))
    for key, label in (("calibration", "calibration"), ("ranking", "contrastive")):
        if key in result:
            lines.append(f"{label}: " + ", ".join(f"{k} {v:.4g}" for k, v in result[key].items()))
    shown = [k for k in (1, 3, 5, 10, 20) if k in result["open_loop"]]
    if shown:
        rolled = ", ".join(f"{k}: {100 * result['open_loop'][k]:.2f}" for k in shown)
        lines.append(f"open loop, % of frames exactly right after k steps: {rolled}   (limit 100 if nothing is random)")
    return "\n".join(lines)


def load_function(name: str, game: Game) -> Tested:
    """Anybody's model, `module:function`: f(obs (B, C, H, W), actions (B, n)) -> (next_obs, rewards), NumPy arrays.

    Raises ValueError with one line if it cannot be found, or returns wrong shapes or values that are not finite.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a stranger's module raises
        raise ValueError(f"--load {name} cannot be imported ({type(error).__name__}: {error})") from None

    def expected(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        try:
            outputs = function(obs.numpy().astype(np.float32), actions.numpy())
            frame, rewards = (np.asarray(value, np.float32) for value in outputs)
        except Exception as error:
            raise ValueError(f"{name} failed ({type(error).__name__}: {error})") from None
        for what, value, shape in (("next_obs", frame, tuple(obs.shape)), ("rewards", rewards, tuple(actions.shape))):
            if value.shape != shape:
                raise ValueError(f"{name} returned {what} of shape {value.shape}, {shape} expected")
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{name} returned {what} with {int((~np.isfinite(value)).sum())} values that are not finite"
                )
        return torch.from_numpy(frame), torch.from_numpy(rewards)

    def mode(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        frame, rewards = expected(obs, actions)
        return (frame > 0.5).to(torch.uint8), rewards

    return Tested(mode, None, expected, None)


def load_model(path: Path, game: Game, device: torch.device) -> Learner:
    """A model.pt of this script. Raises ValueError with one line if it is none, or of another game."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        args, theirs = Args(**json.loads(content["arguments"])), Game(**json.loads(content["game"]))
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is not a model of world_model_test.py ({type(error).__name__})") from None
    sizes = [(g.channels, g.height, g.width, g.players) for g in (theirs, game)]
    if sizes[0] != sizes[1]:
        shapes = [f"frames {s[:3]} of {s[3]} players" for s in sizes]
        raise ValueError(f"{path} is a model of {shapes[0]}, the data have {shapes[1]}")
    learner = Learner(args, theirs, device)
    learner.model.load_state_dict(content["model"])
    return learner


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
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.name = name.replace("/", "-").replace(":", "-")
        self.folder = Path(args.runs_dir) / self.name
        self.settings = {k: v for k, v in asdict(args).items() if k not in ("resume", "runs_dir", "run_name")}
        self.eval_rows: list[dict[str, float]] = []
        self.signal, self.wandb, self.checkpoint = 0, None, None
        if self.folder.exists() and not args.resume:
            usage_error(f"{self.folder} exists; add --resume to continue it, or choose another --run-name")
        if args.resume and self.folder.exists():
            self.load_checkpoint()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            usage_error(f"cannot create {self.folder}: {error.strerror}; choose another --runs-dir")
        if self.checkpoint is None:
            git = f"git -C '{Path(__file__).resolve().parent}' rev-parse HEAD"
            commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip() or None
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
            import wandb

            try:
                wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=self.name, id=self.name,
                    resume="allow", config=self.settings, dir=str(self.folder), save_code=True,
                )  # fmt: skip
            except wandb.errors.Error as error:
                if self.checkpoint is None:
                    shutil.rmtree(self.folder)
                usage_error(f"wandb: {error}; run `wandb login`, or set WANDB_MODE=offline")
            wandb.define_metric("*", step_metric="global_step")
            self.wandb = wandb
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())
        self.started = self.shown = self.window_time = time.monotonic()
        self.window_step = step
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(self, number: int, _: Any) -> None:
        """Remember the signal; the loop saves and stops after its current step."""
        self.signal = number

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
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }  # fmt: skip
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save({**own, **state}, file))

    def load_checkpoint(self) -> None:
        """Read the folder's checkpoint, if there is one. Exits 2 if it is not one of this script and arguments."""
        path, about = self.folder / "checkpoint.pt", self.folder / "args.json"
        try:
            if path.exists():
                self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                script, arguments = self.checkpoint["script"], json.loads(self.checkpoint["arguments"])
                self.eval_rows = self.checkpoint["eval_rows"]
            elif about.exists():
                recorded = json.loads(about.read_text())
                script, arguments = recorded["script"], recorded["arguments"]
            elif not {path.name for path in self.folder.iterdir()} - {"args.json.tmp"}:
                return  # killed before anything was written
            else:
                usage_error(f"{self.folder} exists but is not a run folder; choose another --run-name")
        except Exception as error:  # a damaged file raises nearly anything
            damaged, reason = path if path.exists() else about, type(error).__name__
            usage_error(f"{damaged} is damaged ({reason}); restore a copy, or start again with another --run-name")
        if script != Path(__file__).stem:
            usage_error(f"{self.folder} is a run of {script}.py; choose another --run-name for {Path(__file__).name}")
        changed = [k for k in {**arguments, **self.settings} if arguments.get(k) != self.settings.get(k)]
        if changed:
            listed = ", ".join(f"{k} was {arguments.get(k)}, now {self.settings.get(k)}" for k in changed)
            usage_error(f"--resume with changed arguments: {listed}; repeat the old ones, or choose another --run-name")
        if self.checkpoint and self.checkpoint["finished"]:
            print(f"{self.folder} is finished")
            raise SystemExit(0)

    def restore_random_state(self) -> None:
        """Continue the checkpoint's random streams, and its eval.csv: a killed run may have written further."""
        torch.set_rng_state(self.checkpoint["torch_rng"])
        if self.checkpoint["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.checkpoint["cuda_rng"])
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


# --- end of the common block ---


# Pictures ------------------------------------------------------------------------------------------------------------
COLOURS = ("#1f69c8", "#cd3e32", "#8a4fbf", "#d98a1f", "#2e8c57", "#555555")


def draw_frame(axis: Any, game: Game, frame: Tensor, actions: Tensor | None = None, outlined: bool = False) -> None:
    """A frame (C, H, W): obstacles grey, stag brown, hares green, players as discs, with arrows for their actions."""
    n = game.players
    axis.set(xlim=(-0.5, game.width - 0.5), ylim=(game.height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set(color="red" if outlined else "#b0b2b6", linewidth=2.5 if outlined else 1.0)
    axis.vlines(np.arange(1, game.width) - 0.5, -0.5, game.height - 0.5, color="#e4e4e0", linewidth=0.5)
    axis.hlines(np.arange(1, game.height) - 0.5, -0.5, game.width - 0.5, color="#e4e4e0", linewidth=0.5)
    for channel, colour in ((n, "#8d9096"), (n + 1, "#d9b48c"), (n + 2, "#bfe3c9")):
        for row, column in frame[channel].nonzero().tolist():
            axis.fill(
                (column - 0.5, column + 0.5, column + 0.5, column - 0.5),
                (row - 0.5, row - 0.5, row + 0.5, row + 0.5),
                colour,
            )
    moves = ((0, -0.6), (0, 0.6), (-0.6, 0), (0.6, 0))
    for i in range(n):
        for row, column in frame[i].nonzero().tolist():
            x, y = column + (-0.22, 0.22)[i % 2], row + (-0.22, 0.22)[i // 2 % 2]
            axis.plot(x, y, "o", markersize=5, color=COLOURS[i % len(COLOURS)])
            if actions is not None and 0 <= (action := int(actions[i])) < len(moves):
                axis.annotate("", (x + moves[action][0], y + moves[action][1]), (x, y), arrowprops={"arrowstyle": "->"})
            elif actions is not None and action in (HUNT_STAG, HUNT_HARE):
                axis.plot(x, y, "x", markersize=8, color="black")


def draw_transitions(game: Game, tested: Tested, data: Transitions, stag_moves: bool, worst: bool) -> Figure:
    """8 transitions: the frame with the joint action, the true next frame, the predicted one, outlined if unlawful.

    The worst are those that break a rule, then those that are wrong; else they are spread evenly.
    """
    picked = torch.linspace(0, len(data.obs) - 1, min(len(data.obs), 20_000 if worst else 8)).long()
    batch = data.select(picked)
    frame, rewards = tested.mode(batch.obs, batch.actions)
    broken = violations(game, batch.obs, batch.actions, frame, rewards, stag_moves)
    if worst:
        wrong = (frame != batch.next_obs).flatten(1).sum(1) + 1_000 * broken["any"]
        wrong = wrong + ((rewards - batch.rewards).abs() > SAME_REWARD).any(1)
        rows = wrong.argsort(descending=True, stable=True)[:8]
    else:
        rows = torch.arange(len(picked))
    figure = Figure(figsize=(7.5, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, line in zip(rows.tolist(), axes, strict=True):
        rules = [rule for rule in RULES if broken[rule][row]]
        draw_frame(line[0], game, batch.obs[row], batch.actions[row])
        draw_frame(line[1], game, batch.next_obs[row])
        draw_frame(line[2], game, frame[row], outlined=bool(rules))
        paid = [", ".join(f"{v:.2f}" for v in r[row].tolist()) for r in (batch.rewards, rewards)]
        line[0].set_title("frame and joint action", fontsize=8)
        line[1].set_title(f"true next frame, rewards {paid[0]}", fontsize=8)
        right = "right" if torch.equal(frame[row], batch.next_obs[row]) else "wrong"
        line[2].set_title(f"predicted ({', '.join(rules) or right}), {paid[1]}", fontsize=8)
    return figure


def draw_summary(result: dict[str, Any], title: str) -> Figure:
    """Violations by rule, and exact frames in open loop with the limit."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    figure.suptitle(title)
    bars, curve = figure.subplots(1, 2)
    names = [*RULES, "any in the frame", "any"]
    kinds = [kind for kind in ("mode", "sample", "copy") if result[kind]]
    for i, kind in enumerate(kinds):
        heights = [100 * result[kind][f"violation {name}"] for name in names]
        bars.bar(np.arange(len(names)) + 0.27 * i, heights, 0.25, label=kind)
    bars.set_xticks(np.arange(len(names)) + 0.27, names, rotation=40, ha="right", fontsize=8)
    bars.set(ylabel="frames that break a rule, %")
    bars.legend(fontsize=8)
    steps = list(result["open_loop"])
    curve.plot(steps, [100 * result["open_loop"][k] for k in steps], marker=".", label="most likely frame")
    if result["limit"] == 1.0:
        curve.axhline(100.0, color="black", linestyle="--", linewidth=1, label="limit")
    curve.set(xlabel="steps without the true frame", ylabel="frames exactly right, %", ylim=(0, 103))
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    return figure


# Main ----------------------------------------------------------------------------------------------------------------
def check(args: Args) -> Args:
    """Check all sizes. Raises ValueError with one line."""
    at_least_one = {
        "checkpoint_frequency", "eval_frequency", "max_cycles", "rows", "test_rows", "total_timesteps", "hidden_dim",
        "num_layers", "batch_size", "open_loop_steps",
    }  # fmt: skip
    for name, value in asdict(args).items():
        least = 1 if name in at_least_one else 0
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name.replace('_', '-')} {value}: a number of at least {least} expected")
    return args


def find_game(train: Transitions, test: Transitions, args: Args) -> Game:
    """The game's sizes and rewards, from its training data. Raises ValueError if both parts do not fit together."""
    if train.obs.shape[1:] != test.obs.shape[1:] or train.actions.shape[1] != test.actions.shape[1]:
        raise ValueError(f"training frames {tuple(train.obs.shape[1:])}, test frames {tuple(test.obs.shape[1:])}")
    values = sorted({round(value, 4) for value in train.rewards.unique().tolist()} | {0.0})
    if args.model != "mse" and len(values) > 100:
        raise ValueError(f"{len(values)} different rewards: too many for a categorical; take --model mse")
    legal = sorted({*values, *test.rewards.unique().tolist()})
    if args.data is None:  # what Markov Stag-Hunt pays: one hare or stag, shared by its hunters
        config, players = stag_hunt.Config(), range(1, train.actions.shape[1] + 1)
        legal = [0.0, *(pay / hunters for pay in (config.hare_reward, config.stag_reward) for hunters in players)]
    exact = [min(train.rewards.unique().tolist(), key=lambda own: abs(own - value)) for value in values]
    actions = 1 + max(int(train.actions.max()), int(test.actions.max()), HUNT_HARE)
    stags = int(train.obs[:, train.actions.shape[1] + 1].flatten(1).sum(1).max())
    return Game(train.actions.shape[1], *train.obs.shape[2:], actions, exact, stags <= 1, legal)


def check_mask(game: Game, learner: Learner, data: Transitions) -> None:
    """Raises ValueError if the mask forbids what happened: then this is another game."""
    if learner.model.kind == "entity" and learner.model.masked:
        before, after = (places(obs, game.players)[:, : game.entities] for obs in (data.obs, data.next_obs))
        far = (~learner.model.reach.cpu()[before, after]).any(1)
        if far.any():
            raise ValueError(f"in {int(far.sum())} rows a player moves more than one cell or comes back; add --no-mask")


def main(args: Args) -> Path:
    """Train a model, or take one, test it, and return the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    torch.manual_seed(args.seed)
    try:
        train, test = find_data(check(args))
        game = find_game(train, test, args)
        learner = Learner(args, game, device)
        if args.load is None:
            check_mask(game, learner, train)
            tested = wrap(learner, args.seed)
        elif ":" in args.load and not Path(args.load).exists():
            learner, tested = None, load_function(args.load, game)
            tested.mode(test.obs[:2], test.actions[:2])  # does it work at all?
        else:
            learner = load_model(Path(args.load), game, device)
            tested = wrap(learner, args.seed)
    except ValueError as error:
        usage_error(str(error))
    digest = hashlib.sha256(train.obs.numpy().data).hexdigest()
    run = Run(args)
    step, losses = 0, {}
    if run.checkpoint is not None:
        if run.checkpoint["data"] != digest:
            usage_error(f"the data are not those that {run.folder} began with; restore them")
        step = run.checkpoint["step"]
        learner.model.load_state_dict(run.checkpoint["model"])
        learner.optimizer.load_state_dict(run.checkpoint["optimizer"])
        run.restore_random_state()
    on_device = Transitions(*[value.to(device) for value in train])
    sample = test.select(torch.linspace(0, len(test.obs) - 1, min(5_000, len(test.obs))).long())
    for step in range(step + 1, args.total_timesteps + 1 if args.load is None else 0):  # noqa: B020
        batch = on_device.select(torch.randint(len(train.obs), (args.batch_size,)).to(device))
        losses = learner.update(batch, (step - 1) / args.total_timesteps)
        last, evaluating = step == args.total_timesteps, step % args.eval_frequency == 0
        run.progress(step, f"{100 * run.eval_rows[-1]['exact']:.2f} % exact" if run.eval_rows else "")
        if step % 100 == 0 or evaluating or last or run.signal or step % args.checkpoint_frequency == 0:
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            run.log(step, {f"losses/{name}": value for name, value in losses.items()})
            run.log(step, {"charts/transitions_per_second": run.steps_per_second(step) * args.batch_size})
        if evaluating or last:
            metrics = measure_frames(game, tested.mode, sample, args.stag_moves)
            run.log_evaluation(step, {
                "exact": metrics["exact"], "exact_changed": metrics["exact_changed"],
                "any_violation": metrics["violation any"], "reward_event": metrics["reward_event"],
                "obs_mse": measure_values(tested.expected, sample)["obs_mse"],
            })  # fmt: skip
        if step % args.checkpoint_frequency == 0 or last or run.signal:
            state = {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict(), "data": digest}
            run.save_checkpoint(step, state)
            if run.signal and not last:
                run.stop()

    if args.load is None:
        about = {"arguments": json.dumps(asdict(args)), "game": json.dumps(game._asdict())}
        content = {"model": learner.model.state_dict(), **about}
        write_atomically(run.folder / "model.pt", lambda file: torch.save(content, file))
    try:
        result = measure_all(tested, learner, args, game, train, test)
    except ValueError as error:  # a foreign function may fail on some rows only
        run.fail(str(error))
    name = args.load or f"{args.model}, {args.action_input}"
    print(report(result, game, name))
    write_atomically(run.folder / "metrics.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    step = args.total_timesteps
    scalars = {k: v for k, v in result["mode"].items() if isinstance(v, float) and math.isfinite(v)}
    run.log(step, {f"test/{key.replace(' ', '_')}": value for key, value in scalars.items()})
    run.log_figure(step, "summary", draw_summary(result, name))
    run.log_figure(step, "transitions_worst", draw_transitions(game, tested, test, args.stag_moves, worst=True))
    run.log_figure(step, "transitions_spread", draw_transitions(game, tested, test, args.stag_moves, worst=False))
    run.save_checkpoint(step, {}, finished=True)
    run.close()
    print(f"all figures and pictures: {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
