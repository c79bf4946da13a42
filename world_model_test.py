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
from collections.abc import Callable, Iterator
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
RECORD_FIELDS = ("obs", "joint_action", "rewards", "next_obs", "episode", "agent", "t", "split")  # what is read of it


class Game(NamedTuple):
    """Sizes of a game, every reward that its training data hold, and all that it can pay, where that is known.

    `stag_moves`: stags go at random.
    """

    players: int
    height: int
    width: int
    actions: int
    reward_values: list[float]
    single_stag: bool = True
    legal_rewards: list[float] = []  # noqa: RUF012  (never changed)
    stag_moves: bool = False

    @property
    def channels(self) -> int:
        """Planes of a frame: the players, obstacles, stags, hares."""
        return self.players + 3

    @property
    def channel_names(self) -> list[str]:
        """Names of the planes, ego first."""
        return ["self", *[f"other {i}" for i in range(1, self.players)], "obstacles", "stag", "hare"]

    @property
    def entity_channels(self) -> list[int]:
        """The planes of what is in one place at most: the players, and the stag if there is only one."""
        return [*range(self.players), *[self.players + 1] * self.single_stag]

    @property
    def cells(self) -> int:
        """Cells of the board; as a place it means "gone"."""
        return self.height * self.width

    @property
    def reach(self) -> Tensor:
        """Whether an entity that is at a place (first index) can be at another one step later; "gone" is for good."""
        cells = torch.cartesian_prod(torch.arange(self.height), torch.arange(self.width)).float()
        near = torch.cdist(cells, cells, p=1.0) <= 1.0
        return F.pad(F.pad(near, (0, 0, 0, 1), value=False), (0, 1), value=True)


class Transitions(NamedTuple):
    """Rows: frames (N, C, H, W) uint8, joint actions (N, n) int64 (-1: gone), rewards (N, n), next frames.

    Neighbouring rows of the same `game` (N,) are what one player sees of it, step after step; `t` (N,) is the step.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    game: Tensor
    t: Tensor

    def select(self, rows: Tensor) -> "Transitions":
        """Some rows."""
        return Transitions(*[value[rows] for value in self])

    def spread(self, count: int) -> "Transitions":
        """So many rows (or all, if there are fewer), evenly apart."""
        return self.select(torch.linspace(0, len(self.obs) - 1, min(count, len(self.obs))).long())

    def to(self, device: torch.device) -> "Transitions":
        """The same rows on a device."""
        return Transitions(*[value.to(device) for value in self])

    def batches(self) -> Iterator["Transitions"]:
        """All rows, in parts that fit into any memory."""
        return (self.select(rows) for rows in torch.arange(len(self.obs)).split(2_000))


def places(obs: Tensor, game: Game) -> Tensor:
    """Where the entities are (B, E): row * width + column, or height * width for "gone".

    Of a plane with several ones (a wrong prediction) the first counts.
    """
    planes = obs[:, game.entity_channels].flatten(2)
    return torch.where(planes.bool().any(2), planes.argmax(2), game.cells)


GAME_IDS = ("episode", "agent", "t")  # which game and player a row is of, and when


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises ValueError with one line."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # a damaged file raises nearly anything
        pickled = "; it holds Python objects, which can run code" * ("allow_pickle" in str(error))
        raise ValueError(f"{path} is missing, damaged or no npz file ({type(error).__name__}{pickled})") from None


def to_transitions(columns: dict[str, np.ndarray], name: str) -> Transitions:
    """Check and convert the columns of a plain file or of a record of games. Raises ValueError with one line."""
    columns = {"actions": columns.get("joint_action"), **columns}
    needed = ("obs", "actions", "rewards", "next_obs")
    missing = [key for key in needed if columns.get(key) is None]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}; {', '.join(needed)} are needed")
    obs, actions, rewards, next_obs = (columns[key] for key in needed)
    fits = actions.ndim == 2 and obs.ndim == 4 and len(obs) == len(actions)
    fits = fits and rewards.shape == actions.shape and next_obs.shape == obs.shape
    if not (fits and actions.shape[1] + 3 in obs.shape[1::2]):
        shapes = ", ".join(f"{key} {columns[key].shape}" for key in needed)
        raise ValueError(f"{name}: frames (N, n + 3, H, W), actions and rewards (N, n) expected, got {shapes}")
    if not all(values.dtype.kind in "biuf" for values in (obs, actions, rewards, next_obs)):
        raise ValueError(f"{name}: numbers expected in {', '.join(needed)}")
    players = actions.shape[1]
    if obs.shape[1] != players + 3:  # channels last
        obs, next_obs = np.moveaxis(obs, 3, 1), np.moveaxis(next_obs, 3, 1)
    whole = (actions >= -1) & (actions < 1_000) & (actions == np.floor(actions))
    problems = {"rewards that are not finite": ~np.isfinite(rewards).all(1)}
    problems["actions that are not whole numbers from -1 (gone) on"] = ~whole.all(1)
    for key, value in (("obs", obs), ("next_obs", next_obs)):
        problems[f"other values than 0 and 1 in {key}"] = ~np.isin(value, (0, 1)).all((1, 2, 3))
        problems[f"a player's plane with two ones in it in {key}"] = (value[:, :players].sum((2, 3)) > 1).any(1)
    for problem, rows in problems.items():
        if rows.any():
            raise ValueError(f"{name}: {rows.sum()} rows have {problem}")
    game, t = np.arange(len(obs)), np.zeros(len(obs))
    if set(GAME_IDS) <= set(columns):
        changes = np.diff([columns[key].astype(np.int64) for key in GAME_IDS])
        game[1:], t = (changes != [[0], [0], [1]]).any(0).cumsum(), columns["t"]
    values = (obs, actions, rewards, next_obs, game, t)
    types = (np.uint8, np.int64, np.float32, np.uint8, np.int64, np.int64)
    return Transitions(*[torch.from_numpy(v.astype(kind, order="C")) for v, kind in zip(values, types, strict=True)])


def collect(args: Args, config: "stag_hunt.Config", rows: int, seed: int) -> Transitions:
    """Games of Markov Stag-Hunt between scripted and random players; cached under data/. Raises OSError."""
    kind = f"{args.env_id}{'_moving' * args.stag_moves}{f'_{args.n_blocks}blocks' * bool(args.n_blocks)}"
    path = Path("data") / f"markov_stag_hunt_{kind}_limit{args.max_cycles}_{rows}_seed{seed}.npz"
    if not path.exists():
        print(f"collecting {rows:,} transitions into {path}")
        stag_hunt.save_dataset(path, stag_hunt.collect(rows, config, args.max_cycles, ("NS", "NH", "random"), seed))
    return to_transitions(stag_hunt.load_dataset(path, RECORD_FIELDS).arrays, str(path))


def find_data(args: Args) -> tuple[Transitions, Transitions, "stag_hunt.Config | None"]:
    """Training and test transitions, and the game's rules, where they are known. Raises ValueError with one line."""
    columns = {} if args.data is None else read_columns(Path(args.data))
    record, config = "meta" in columns, None
    if "stag_hunt" not in globals() and (args.data is None or record):
        raise ValueError("envs/stag_hunt.py is not here to collect or read games with; pass --data FILE, a plain npz")
    if args.data and (args.stag_moves or args.n_blocks):
        raise ValueError("--stag-moves and --n-blocks are for games that are collected here; leave them out")
    if args.data is None:
        config = stag_hunt.Config(**stag_hunt.PRESETS[args.env_id], n_blocks=args.n_blocks, stag_moves=args.stag_moves)
        try:
            parts = (args.rows, args.seed), (args.test_rows, 1_000_000 + args.seed)
            return *[collect(args, config, *part) for part in parts], config
        except OSError as error:
            raise ValueError(f"cannot write {error.filename}: {error.strerror}; go to a folder of your own") from None
    held_out, few = None, ": too few to hold out a test"
    if record:  # of games: the test split has games of its own
        columns, meta = stag_hunt.load_dataset(Path(args.data), RECORD_FIELDS)
        held_out = columns["split"][columns["episode"]] == 2
        rules = {key: value for key, value in meta.get("env_kwargs", {}).items() if key in stag_hunt.Config._fields}
        config = stag_hunt.Config(**rules) if rules else None  # else it is another game's
    elif set(GAME_IDS) <= set(columns):  # rows are put in order; the last fifth of the games is held out
        for key in GAME_IDS:
            if columns[key].shape != columns[GAME_IDS[0]].shape[:1] or columns[key].dtype.kind not in "iu":
                raise ValueError(f"{args.data}: a whole number in each row of {', '.join(GAME_IDS)} expected")
        order = np.lexsort([columns[key] for key in reversed(GAME_IDS)])
        columns = {k: values[order] if values.shape[:1] == order.shape else values for k, values in columns.items()}
        games = np.unique(columns["episode"])
        held_out = np.isin(columns["episode"], games[len(games) - len(games) // 5 :])
        few = f" of {len(games)} games: too few to hold out a fifth; leave out episode"
    whole = to_transitions(columns, args.data)
    if held_out is None:  # if rows are in order, the last fifth has games of its own, but for one
        held_out = np.arange(len(whole.obs)) >= len(whole.obs) - len(whole.obs) // 5
    if not held_out.any():
        raise ValueError(f"{args.data} has {len(held_out)} rows{few}")
    return whole.select(torch.from_numpy(~held_out)), whole.select(torch.from_numpy(held_out)), config


# Networks ------------------------------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """What a model says of a batch; which fields are there depends on `--model`.

    `planes` (B, C, H, W): values (mse) or logits (cell; entity: obstacles, stags, hares). `entities` (B, E, H W + 1):
    logits of each player's and the single stag's place. `frame` (B, C, H, W) uint8: the next frame that `rewards` go
    with, which are (B, n) values, or (B, n, V) logits. `features` (B, hidden, H, W) are the trunk's.
    """

    planes: Tensor
    entities: Tensor | None
    frame: Tensor
    rewards: Tensor
    features: Tensor


def pick(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Of logits (..., V) the index of the most likely value, or, with `generator`, of one that is drawn."""
    if generator is None:
        return logits.argmax(-1)
    shares = logits.softmax(-1).flatten(0, -2).cpu()
    return torch.multinomial(shares, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)


class WorldModel(nn.Module):
    """Frame (B, C, H, W) and joint action (B, n) -> next frame and rewards.

    A 3 x 3 convolution and a 1 x 1 convolution give each cell its features. What happens to a cell is read there; who
    leaves, and what is paid, from features and inputs at the entity's own cell.
    """

    def __init__(self, game: Game, args: Args) -> None:
        """`args` names the kind of prediction and the sizes."""
        super().__init__()
        self.game, self.kind, self.painted, self.masked = game, args.model, args.action_input == "painted", args.mask
        hidden, n = args.hidden_dim, game.players
        inputs = game.channels + n * game.actions + 1
        layers = [nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU()]
        for _ in range(args.num_layers - 1):
            layers += [nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        entities = len(game.entity_channels) if self.kind == "entity" else 0
        self.cell_head = nn.Conv2d(hidden, game.channels + entities, 1)
        here = hidden + inputs  # with the inputs themselves: several players' actions in one cell crowd its features
        if entities:
            # An output for each own action, which all players share, and one for the stag.
            self.gone_head = nn.Sequential(nn.Linear(here, 64), nn.ReLU(), nn.Linear(64, game.actions + 1))
        # Rewards read what the next state will be: who leaves, and what prey is left in the player's cell.
        next_state, values = (0, 1) if self.kind == "mse" else (n + 2, len(game.reward_values))
        self.reward_head = nn.Sequential(nn.Linear(here + next_state, 64), nn.ReLU(), nn.Linear(64, n * values))
        if args.contrastive_coef > 0.0:
            self.query = nn.Linear(hidden * game.cells, 64)
            convolution = nn.Conv2d(game.channels, 32, 3, padding=1)
            self.key = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(32 * game.cells, 64))
        self.register_buffer("reach", game.reach, persistent=False)
        self.register_buffer("values", torch.tensor(game.reward_values), persistent=False)
        self.to(memory_format=torch.channels_last)  # the convolutions are faster so

    def inputs(self, obs: Tensor, acts: Tensor, where: Tensor) -> Tensor:
        """Planes of frames (B, C, H, W), of one-hot actions (B, n, A), and of ones; `where` (B, E) are the places."""
        game = self.game
        if self.painted:
            cells = F.one_hot(where[:, : game.players], game.cells + 1)[..., :-1].float()  # (B, n, H W)
        else:
            cells = torch.ones(*acts.shape[:2], game.cells, device=obs.device)
        action_planes = (acts[..., None] * cells[:, :, None]).view(len(obs), -1, game.height, game.width)
        inside = torch.ones_like(action_planes[:, :1])  # tells the border from a free cell
        return torch.cat((obs.float(), action_planes, inside), 1)

    def at(self, features: Tensor, where: Tensor) -> Tensor:
        """Features (B, E, hidden) of the cells `where` (B, E); zeros for who is gone."""
        index = where.clamp_max(self.game.cells - 1)[:, None].expand(-1, features.shape[1], -1)
        return features.flatten(2).gather(2, index).transpose(1, 2) * (where < self.game.cells)[:, :, None]

    def forward(
        self, obs: Tensor, actions: Tensor, next_obs: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Prediction:
        """The prediction. Rewards are read off `next_obs`, or, without it, off the predicted (drawn) frame."""
        game, n = self.game, self.game.players
        where = places(obs, game)
        acts = (F.one_hot(actions.clamp_min(0), game.actions) * (actions >= 0)[:, :, None]).float()  # (B, n, A)
        inputs = self.inputs(obs, acts, where)
        features = self.trunk(inputs)
        cells = self.cell_head(features)
        planes, entities = cells[:, : game.channels], None
        own = torch.cat((self.at(features, where), self.at(inputs, where)), 2)
        if self.kind == "entity":
            gone = self.gone_head(own)
            gone = torch.cat(((gone[:, :n, :-1] * acts).sum(2), gone[:, n:, -1]), 1)
            entities = torch.cat((cells[:, game.channels :].flatten(2), gone[:, :, None]), 2)
            if self.masked:
                entities = entities.masked_fill(~self.reach[where], -math.inf)
        # Each player has outputs of its own, so that the head need not find out whose cell it reads.
        own, next_obs = own[:, :n], self.frame(planes, entities, generator) if next_obs is None else next_obs
        if self.kind != "mse":
            gone = (places(next_obs, game)[:, :n] == game.cells).float()[:, None].expand(-1, n, -1)
            own = torch.cat((own, gone, self.at(next_obs[:, -2:].float(), where[:, :n])), 2)
        rewards = self.reward_head(own).unflatten(2, (n, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        return Prediction(planes, entities, next_obs, rewards[..., 0] if self.kind == "mse" else rewards, features)

    def frame(self, planes: Tensor, entities: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The predicted frame (B, C, H, W) uint8: the most likely one, or, with `generator`, one drawn.

        Planes of mse, which are values, are rounded at 0.5 and never drawn.
        """
        if self.kind == "mse" or generator is None:
            frame = planes > (0.5 if self.kind == "mse" else 0.0)
        else:
            frame = torch.rand(planes.shape, generator=generator).to(planes.device) < torch.sigmoid(planes)
        if entities is not None:
            one_hot = F.one_hot(pick(entities, generator), self.game.cells + 1)[..., :-1]
            frame[:, self.game.entity_channels] = one_hot.unflatten(2, frame.shape[2:]).bool()
        return frame.to(torch.uint8)

    @torch.no_grad()
    def predict(self, obs: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The most likely next frames (B, C, H, W) uint8 and rewards (B, n), or, with `generator`, drawn ones."""
        prediction = self(obs.to(self.values.device), actions.to(self.values.device), generator=generator)
        rewards = prediction.rewards if self.kind == "mse" else self.values[pick(prediction.rewards, generator)]
        return prediction.frame.cpu(), rewards.cpu()

    @torch.no_grad()
    def expected(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Expected next frames (B, C, H, W) and rewards (B, n): what has the least squared error."""
        prediction = self(obs.to(self.values.device), actions.to(self.values.device))
        planes, rewards = prediction.planes, prediction.rewards
        if self.kind != "mse":
            planes, rewards = torch.sigmoid(planes), (rewards.softmax(2) * self.values).sum(2)
        if prediction.entities is not None:
            shares = prediction.entities.softmax(2)[..., :-1]
            planes[:, self.game.entity_channels] = shares.unflatten(2, planes.shape[2:])
        return planes.cpu(), rewards.cpu()


# Learning ------------------------------------------------------------------------------------------------------------
class Learner:
    """The model, its one optimizer, and the update, which takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, game: Game, device: torch.device) -> None:
        """Build everything from the game's sizes."""
        self.args, self.game, self.device = args, game, device
        self.model = WorldModel(game, args).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=True)

    def losses(self, batch: Transitions) -> dict[str, Tensor]:
        """The parts of the loss: frame, reward and, where it is asked for, the contrastive term.

        The frame's is summed over a frame and averaged over the batch: a negative log-likelihood in nats, or squares.
        """
        game, model = self.game, self.model
        prediction, target = model(batch.obs, batch.actions, batch.next_obs), batch.next_obs.float()

        def nll(logits: Tensor, value: Tensor) -> Tensor:
            """Of logits (B, K, V) and values (B, K)."""
            error = F.cross_entropy(logits.flatten(0, 1), value.flatten(), reduction="none")
            return error.view(value.shape).sum(1).mean()

        if model.kind == "mse":
            frame = (prediction.planes - target).square().flatten(1).sum(1).mean()
            reward = (prediction.rewards - batch.rewards).square().sum(1).mean()
        else:
            planes = [c for c in range(game.channels) if model.kind == "cell" or c not in game.entity_channels]
            logits, cells = prediction.planes[:, planes], target[:, planes]
            error = F.binary_cross_entropy_with_logits(logits, cells, reduction="none")
            frame = error.flatten(1).sum(1).mean()
            if prediction.entities is not None:
                frame = frame + nll(prediction.entities, places(batch.next_obs, game))
            reward = nll(prediction.rewards, (batch.rewards[:, :, None] - model.values).abs().argmin(2))
        result = {"frame": frame, "reward": reward}
        if self.args.contrastive_coef > 0.0:
            similarity = self.similarity(prediction.features, batch.next_obs)
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
HUNT_STAG, HUNT_HARE = 5, 6  # actions of Markov Stag-Hunt
SAME_REWARD = 0.02  # a regression's rounding is no violation; the game's rewards are at least 0.08 apart
MOST_REWARDS = 100  # more values than that are no rule of a game
RULES = ("duplicated", "jumped", "vanished", "stayed", "reappeared", "in an obstacle", "prey", "obstacles", "reward")


def same_reward(game: Game) -> float:
    """Rewards are the same within this: `SAME_REWARD`, or a quarter of the least gap between those that are paid."""
    gaps = np.diff(game.legal_rewards)
    apart = gaps[gaps > 1e-5 * np.abs(game.legal_rewards).max(initial=0.0)]  # not by rounding alone
    return min(SAME_REWARD, float(apart.min(initial=math.inf)) / 4.0)


def violations(game: Game, obs: Tensor, actions: Tensor, next_obs: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """Which next frames (B,) break which rule of Markov Stag-Hunt, `any`, or `any in the frame`: without the reward.

    Frames are uint8, rewards (B, n).
    """
    n, now, after = game.players, obs.flatten(2).bool(), next_obs.flatten(2).bool()  # (B, C, H W)
    players, next_players = now[:, :n], after[:, :n]
    was, there = players.any(2), next_players.any(2)
    far = ~game.reach[places(obs, game)[:, :n], :-1]  # (B, n, H W)
    together = (players[:, :, None] & players[:, None]).any(3)  # (B, n, n)
    hunters = (together & (actions == HUNT_STAG)[:, None]).sum(2)
    caught, prey_wrong = torch.zeros_like(was), torch.zeros_like(was[:, 0])
    for channel, hunts in ((n + 1, (actions == HUNT_STAG) & (hunters >= 2)), (n + 2, actions == HUNT_HARE)):
        prey, next_prey = now[:, channel], after[:, channel]
        catches = hunts & (players & prey[:, None]).any(2)
        hunted = (players & catches[:, :, None]).any(1)  # cells in which somebody catches
        caught |= catches
        left = prey & ~hunted
        if game.stag_moves and channel == n + 1:  # each is within a step, not in an obstacle nor on a hare
            near = left.float() @ game.reach[:-1, :-1].float() > 0.0
            wrong = next_prey & (~near | now[:, n] | after[:, n + 2])
            prey_wrong |= wrong.any(1) | (left.sum(1) != next_prey.sum(1))
        else:
            prey_wrong |= (next_prey != left).any(1)
    more_stags, legal = after[:, n + 1].sum(1) > now[:, n + 1].sum(1), torch.tensor(game.legal_rewards)
    unpaid = torch.zeros_like(rewards) if not len(legal) else (rewards[:, :, None] - legal).abs().amin(2)
    result = {
        "duplicated": (next_players.sum(2) > 1).any(1) | more_stags,  # a player or the stag is in two cells
        "jumped": (next_players & far & was[:, :, None]).flatten(1).any(1),  # more than one cell
        "vanished": (was & ~there & ~caught).any(1),  # left without catching anything
        "stayed": (caught & there).any(1),  # who catches leaves
        "reappeared": (~was & there).any(1),
        "in an obstacle": (next_players & now[:, n : n + 1]).flatten(1).any(1),
        "prey": prey_wrong,  # came, went without being hunted, jumped, or outlived its hunt
        "obstacles": (after[:, n] != now[:, n]).any(1),  # changed
        "reward": (unpaid > same_reward(game)).any(1),  # is never paid
    }
    in_frame = torch.stack([broken for rule, broken in result.items() if rule != "reward"]).any(0)
    return result | {"any in the frame": in_frame, "any": in_frame | result["reward"]}


def impossible(args: Args, game: Game) -> list[str]:
    """Violations that a model's form rules out: nothing that it is praised for."""
    entity, rules = args.model == "entity", ["reward"] * (args.model != "mse")
    rules += ["duplicated"] * (entity and game.single_stag)  # several stags are predicted cell by cell
    return sorted(rules + ["jumped", "reappeared"] * (entity and args.mask))


def payments(players: int) -> dict[str, float]:
    """What each hunter is paid in Markov Stag-Hunt, by prey and number of hunters."""
    result = {}
    for prey, pay, fewest in (("hare", 1.0, 1), ("stag", 10.0, 2)):
        for hunters in range(fewest, players + 1):
            result[f"{prey}, {hunters} hunter{'s' * (hunters > 1)}"] = pay / hunters
    return result


def measure_frames(game: Game, predict: Predict, data: Transitions) -> dict[str, Any]:
    """Exact frames, violations and rewards of `predict` on `data`, as shares of 1 (see `report` for their names)."""
    events, counts = payments(game.players), {}
    others = [pay for pay in game.legal_rewards if pay and all(abs(pay - known) > 1e-3 for known in events.values())]
    events |= {f"reward {pay:g}": pay for pay in others}
    for batch in data.batches():
        frame, rewards = predict(batch.obs, batch.actions)
        right = (frame == batch.next_obs).flatten(2).all(2)  # (B, C)
        exact, changed = right.all(1), (batch.next_obs != batch.obs).flatten(1).any(1)
        paid, event = ((rewards - batch.rewards).abs() < same_reward(game)).all(1), (batch.rewards != 0).any(1)
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

    `psnr_of_mean` is 10 log10(1 / MSE); `mean_of_psnr` averages over frames, none of which counts above 100 dB.
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
    """Share of exact frames after k steps that see only predicted frames, of those games that last `steps` steps more.

    All games are rolled out together. Starts are where such a game is first seen, and every `steps` steps.
    """
    first = torch.arange(max(len(data.obs) - steps + 1, 0))
    rows = first[(data.game[first] == data.game[first + steps - 1]) & (data.t[first] % steps == 0)]
    frame, result = data.obs[rows], {}
    for k in range(1, steps + 1 if len(rows) else 1):
        parts = zip(frame.split(2_000), data.actions[rows].split(2_000), strict=True)
        frame = torch.cat([predict(*part)[0] for part in parts])
        result[k] = float((frame == data.next_obs[rows]).flatten(1).all(1).float().mean())
        rows = rows + 1
    return result


@torch.no_grad()
def calibration(learner: Learner, data: Transitions, bins: int = 15) -> dict[str, float]:
    """Negative log-likelihood of a next frame in nats, and the expected calibration error of the players' places.

    (With `cell` the error is that of each plane's value in each cell.) Not defined for `mse`.
    """
    n, nll, shares, hits = learner.game.players, 0.0, [], []
    for batch in data.batches():
        batch = batch.to(learner.device)
        nll += float(learner.losses(batch)["frame"]) * len(batch.obs)
        prediction = learner.model(batch.obs, batch.actions)
        if prediction.entities is not None:
            share, place = prediction.entities.softmax(2)[:, :n].max(2)
            right = place == places(batch.next_obs, learner.game)[:, :n]
        else:
            one = torch.sigmoid(prediction.planes[:, :n])
            share, right = torch.maximum(one, 1.0 - one), (one > 0.5) == batch.next_obs[:, :n].bool()
        shares.append(share.flatten().cpu())
        hits.append(right.flatten().float().cpu())
    share, right = torch.cat(shares), torch.cat(hits)
    gap = torch.zeros(bins).index_add_(0, (share * bins).long().clamp_max(bins - 1), share - right)
    return {"nll": nll / len(data.obs), "ece": float(gap.abs().sum() / len(share))}


@torch.no_grad()
def ranking(learner: Learner, data: Transitions, pool: int = 1_000) -> dict[str, float]:
    """Hits@1 and mean reciprocal rank of the true next frame among a pool of as many, by the contrastive similarity."""
    batch = data.spread(pool).to(learner.device)
    similarity = learner.similarity(learner.model(batch.obs, batch.actions).features, batch.next_obs)
    rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    return {"hits_at_1": float((rank == 1).float().mean()), "mrr": float((1.0 / rank).mean()), "pool": len(batch.obs)}


def game_limit(config: "stag_hunt.Config | None", data: Transitions, rows: int = 300, draws: int = 100) -> float:
    """The share of frames that a perfect model's most likely frame hits: 1, unless stags move at random.

    Then the environment is set to the state of some rows again and again, and the commonest outcome counted: the mean
    of the largest probability, estimated (a little above the truth, as a maximum of estimates is).
    """
    if config is None or not config.stag_moves:
        return 1.0
    batch = data.spread(rows)
    return float(stag_hunt.commonest_shares(batch.obs.numpy(), batch.actions.numpy(), config, draws).mean())


class Foreign:
    """Anybody's model, `module:function`: f(obs (B, C, H, W), actions (B, n)) -> (next_obs, rewards), NumPy arrays."""

    def __init__(self, name: str) -> None:
        """Import it. Raises ValueError with one line if it cannot be found."""
        self.name, (module, _, attribute) = name, name.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            self.function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a stranger's module raises
            raise ValueError(f"--load {name} cannot be imported ({type(error).__name__}: {error})") from None

    def expected(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """What it returns. Raises ValueError with one line for wrong shapes or values that are not finite."""
        try:
            outputs = self.function(obs.numpy().astype(np.float32), actions.numpy().copy())
            frame, rewards = (np.asarray(value, np.float32) for value in outputs)
        except Exception as error:
            raise ValueError(f"{self.name} failed ({type(error).__name__}: {error})") from None
        for what, value, shape in (("next_obs", frame, tuple(obs.shape)), ("rewards", rewards, tuple(actions.shape))):
            if value.shape != shape:
                raise ValueError(f"{self.name} returned {what} of shape {value.shape}, {shape} expected")
            if infinite := int((~np.isfinite(value)).sum()):
                raise ValueError(f"{self.name} returned {what} with {infinite} values that are not finite")
        return torch.from_numpy(frame), torch.from_numpy(rewards)

    def predict(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Next frames with zeros and ones, and rewards."""
        frame, rewards = self.expected(obs, actions)
        return (frame > 0.5).to(torch.uint8), rewards


def load_model(path: Path, game: Game, device: torch.device) -> Learner:
    """A model.pt of this script. Raises ValueError with one line if it is none, or of another game."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        learner = Learner(Args(**json.loads(content["arguments"])), Game(**json.loads(content["game"])), device)
        learner.model.load_state_dict(content["model"])
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is not a model of this world_model_test.py ({type(error).__name__})") from None
    shapes = [
        f"frames {(g.channels, g.height, g.width)} of {g.players} players, {g.actions} actions, "
        + ("one stag" if g.single_stag else "several stags")
        for g in (learner.game, game)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} is a model of {shapes[0]}; the data have {shapes[1]}")
    return learner


def measure_all(
    model: WorldModel | Foreign, learner: Learner | None, args: Args, game: Game, train: Transitions,
    test: Transitions, limit: float,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the report, `metrics.json` and the pictures need; `learner` is None for a foreign model."""
    own, mean = learner.args if learner else None, (train.next_obs.float().mean(0), train.rewards.mean(0))
    generator = torch.Generator().manual_seed(args.seed)  # draws have a random stream of their own
    draws = own is not None and own.model != "mse"
    true = ((batch.next_obs, batch.rewards) for batch in test.batches())

    def copy(obs: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return obs, torch.zeros(len(obs), game.players)

    sample = (lambda obs, actions: model.predict(obs, actions, generator)) if draws else None
    ways = {"mode": model.predict, "sample": sample, "copy": copy, "truth": lambda *_: next(true)}
    result: dict[str, Any] = {
        "rows": len(test.obs), "limit": limit, "values": measure_values(model.expected, test),
        "values_copy": measure_values(copy, test),
        "values_mean": measure_values(lambda obs, _: (mean[0].expand(obs.shape), mean[1].expand(len(obs), -1)), test),
        **{way: predict and measure_frames(game, predict, test) for way, predict in ways.items()},
        "open_loop": measure_open_loop(model.predict, test, args.open_loop_steps),
        "open_loop_sample": measure_open_loop(sample, test, args.open_loop_steps) if draws else {},
        "impossible": impossible(own, learner.game) if own else [],
    }  # fmt: skip
    if draws:
        result["calibration"] = calibration(learner, test)
    if own and own.contrastive_coef > 0.0:
        result["ranking"] = ranking(learner, test)
    return result


def report(result: dict[str, Any], game: Game, name: str) -> str:
    """One screen of text."""
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
        rows[f"violation {rule}"] = f"breaks a rule: {rule}{'*' * (rule in result['impossible'])}"
    for key, label in rows.items():
        shares = [result[column][key] for column in columns] + [result["limit"]] * (key == "exact")
        lines.append(f"{label:34}" + "".join(f"{100 * share:10.3f}" for share in shares))
    events = [f"{key} {100 * v['exact']:.1f} % of {v['frames']}" for key, v in result["mode"]["events"].items()]
    lines.append("\nrewards exact: " + "; ".join(events))
    for key in [key for key in ("calibration", "ranking") if key in result]:
        lines.append(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in result[key].items()))
    for key, name in (("open_loop", "most likely"), ("open_loop_sample", "drawn")):
        rolled = ", ".join(f"{k}: {100 * v:.2f}" for k, v in result[key].items() if k in (1, 3, 5, 10, 20))
        if rolled:
            lines.append(f"open loop, {name} frames, % exactly right after k steps: {rolled}")
    return "\n".join(lines)


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
def draw_frame(axis: Any, frame: Tensor, title: str, actions: Tensor | None = None, outlined: bool = False) -> None:
    """A frame (C, H, W): obstacles grey, stag brown, hares green; players as numbers, the ego as 0, with actions."""
    ground = np.array([[255, 255, 255], [141, 144, 150], [217, 180, 140], [191, 227, 201]], np.uint8)
    kind = (frame[-3:].long() * torch.arange(1, 4)[:, None, None]).amax(0)
    axis.pcolormesh(ground[kind], edgecolors="#e4e4e0", linewidth=0.5)
    axis.set(xticks=[], yticks=[], ylim=(len(kind), 0), aspect="equal")
    axis.spines[:].set(color="red" if outlined else "#b0b2b6", linewidth=2.5 if outlined else 1.0)
    axis.set_title(title, fontsize=7)
    for i, row, column in frame[:-3].nonzero().tolist():
        x, y = column + (0.25, 0.75)[i % 2], row + (0.28, 0.72)[i // 2 % 2]
        action = -1 if actions is None else int(actions[i])
        sign = "↑↓←→·SH"[action : action + 1]  # S, H: hunts the stag, a hare; nothing for who does not act
        axis.text(x, y, f"{i}{sign}", color=f"C{i}", fontsize=7, weight="bold", ha="center", va="center")


def draw_transitions(game: Game, predict: Predict, data: Transitions, worst: bool) -> Figure:
    """8 transitions: the frame with the joint action, the true next frame, the predicted one, outlined if unlawful.

    The worst are those that break a rule, then those that are wrong; else they are drawn at random.
    """
    rows = torch.randperm(len(data.obs), generator=torch.Generator().manual_seed(0))[:8]
    if worst:
        scores = []
        for batch in data.batches():
            frame, rewards = predict(batch.obs, batch.actions)
            broken = violations(game, batch.obs, batch.actions, frame, rewards)["any"]
            mispaid = ((rewards - batch.rewards).abs() > same_reward(game)).any(1)
            scores.append((frame != batch.next_obs).flatten(1).sum(1) + 1_000 * broken + mispaid)
        rows = torch.cat(scores).argsort(descending=True, stable=True)[:8]
    batch = data.select(rows)
    frame, rewards = predict(batch.obs, batch.actions)
    broken = violations(game, batch.obs, batch.actions, frame, rewards)
    wrong = (frame != batch.next_obs).flatten(1).any(1)
    mispaid = ((rewards - batch.rewards).abs() > same_reward(game)).any(1)
    figure = Figure(figsize=(9.0, 3.2 * len(rows)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(rows), 3, squeeze=False)):
        verdict = ", ".join(rule for rule in RULES if broken[rule][row])
        true, paid = (", ".join(f"{value:.2f}" for value in pay[row].tolist()) for pay in (batch.rewards, rewards))
        title = f"predicted: {verdict or ('wrong frame' if wrong[row] else 'right frame')}\n"
        title += f"{'wrong ' * bool(mispaid[row])}rewards {paid}"
        draw_frame(axes[0], batch.obs[row], "frame and joint action", batch.actions[row])
        draw_frame(axes[1], batch.next_obs[row], f"true next frame\nrewards {true}")
        draw_frame(axes[2], frame[row], title, outlined=bool(verdict))
    return figure


def draw_summary(result: dict[str, Any], title: str) -> Figure:
    """Violations by rule, and exact frames in open loop with the limit."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    names = [*RULES, "any in the frame", "any"]
    for i, kind in enumerate(kind for kind in ("mode", "sample", "copy") if result[kind]):
        heights = [100 * result[kind][f"violation {name}"] for name in names]
        bars.bar(np.arange(len(names)) + 0.27 * i, heights, 0.25, label=kind)
    bars.set_xticks(np.arange(len(names)) + 0.27, names, rotation=40, ha="right", fontsize=8)
    bars.set(title=title, ylabel="frames that break a rule, %")
    shares = [100 * share for share in result["open_loop"].values()]
    curve.plot(list(result["open_loop"]), shares, marker=".", label="most likely frame")
    curve.axhline(100 * result["limit"], color="black", linestyle="--", linewidth=1, label="limit of the first step")
    curve.set(xlabel="steps without the true frame", ylabel="frames exactly right, %", ylim=(0, 103))
    bars.legend(fontsize=8)
    curve.legend(fontsize=8)
    return figure


# Main ----------------------------------------------------------------------------------------------------------------
def check(args: Args) -> Args:
    """Check all sizes. Raises ValueError with one line."""
    may_be_zero = ("seed", "eval_episodes", "n_blocks", "contrastive_coef")
    for name, value in asdict(args).items():
        least = 0 if name in may_be_zero else 1e-12 if name == "learning_rate" else 1
        most = 2**63 - 1 if type(value) is int else math.inf
        if type(value) in (int, float) and not (math.isfinite(value) and least <= value <= most):
            limits = f"a number of at least {least}{', below 2**63,' * (value > most)}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {limits} expected")
    if args.capture_video:
        raise ValueError("--capture-video: there is nothing to film here; the run folder's pictures show frames")
    return args


def find_game(train: Transitions, test: Transitions, args: Args, config: "stag_hunt.Config | None" = None) -> Game:
    """The game's sizes and rewards. Raises ValueError with one line if a categorical has too many of them."""
    players, seen = train.actions.shape[1], train.rewards.unique().tolist()
    values = sorted({round(value, 4) for value in seen} | {0.0})
    if args.load is None and args.model != "mse" and len(values) > MOST_REWARDS:
        raise ValueError(f"{len(values)} different rewards: too many for a categorical; take --model mse")
    exact = [min(seen, key=lambda own: abs(own - value)) for value in values]
    legal = sorted({0.0, *exact, *test.rewards.unique().tolist()})
    if args.data is None:
        legal = sorted({0.0, *payments(players).values()})
    elif len(legal) > MOST_REWARDS:
        legal = []
    actions = 1 + max(int(train.actions.max()), int(test.actions.max()), HUNT_HARE)
    stags = int(train.obs[:, players + 1].flatten(1).sum(1).max())
    moves = config is not None and config.stag_moves
    return Game(players, *train.obs.shape[2:], actions, exact, stags <= 1, legal, moves)


def check_mask(game: Game, data: Transitions) -> None:
    """Raises ValueError if the mask forbids what happened: then this is another game."""
    if far := int((~game.reach[places(data.obs, game), places(data.next_obs, game)]).any(1).sum()):
        raise ValueError(f"in {far} rows a player moves more than one cell or comes back; add --no-mask")


def main(args: Args) -> Path:
    """Train a model, or take one, test it, and return the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products fail on a GPU
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    torch.manual_seed(args.seed)
    try:
        train, test, config = find_data(check(args))
        game = find_game(train, test, args, config)
        learner = None
        if args.load and ":" in args.load and not Path(args.load).exists():
            model = Foreign(args.load)
            for batch in test.batches():  # does it work on all of them?
                model.predict(batch.obs, batch.actions)
        else:
            learner = Learner(args, game, device) if args.load is None else load_model(Path(args.load), game, device)
            model = learner.model
        if args.load is None and args.model == "entity" and args.mask:
            check_mask(game, train)
    except ValueError as error:
        usage_error(str(error))
    digest = hashlib.sha256()
    for values in (*train, *test):
        digest.update(values.numpy().data)
    digest = digest.hexdigest()
    run = Run(args)
    step = 0
    if run.checkpoint is not None:
        with run.restoring():
            if run.checkpoint["data"] != digest:
                run.close()
                usage_error(f"the data are not those that {run.folder} began with; restore them")
            step = run.checkpoint["step"]
            model.load_state_dict(run.checkpoint["model"])
            learner.optimizer.load_state_dict(run.checkpoint["optimizer"])
        run.restore_random_state()
    on_device, sample = train.to(device), test.spread(5_000)
    for step in range(step + 1, args.total_timesteps + 1 if args.load is None else 0):  # noqa: B020
        batch = on_device.select(torch.randint(len(train.obs), (args.batch_size,), device=device))
        losses = learner.update(batch, (step - 1) / args.total_timesteps)
        last = step == args.total_timesteps
        evaluating, saving = (last or step % often == 0 for often in (args.eval_frequency, args.checkpoint_frequency))
        run.progress(step, f"{100 * run.eval_rows[-1]['exact']:.2f} % exact" if run.eval_rows else "")
        saving = saving or run.signal  # one that comes later is seen in the next step
        if step % 100 == 0 or evaluating or saving:
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            run.log(step, {f"losses/{name}": value for name, value in losses.items()})
            run.log(step, {"charts/transitions_per_second": run.steps_per_second(step) * args.batch_size})
        if evaluating:
            metrics = measure_frames(game, model.predict, sample)
            metrics |= {"any_violation": metrics["violation any"], **measure_values(model.expected, sample)}
            names = ("exact", "exact_changed", "any_violation", "reward_event", "obs_mse")
            run.log_evaluation(step, {name: metrics[name] for name in names})
        if saving:
            state = {"model": model.state_dict(), "optimizer": learner.optimizer.state_dict(), "data": digest}
            run.save_checkpoint(step, state)
            if run.signal and not last:
                run.stop()

    if args.load is None:
        texts = {"arguments": json.dumps(asdict(args)), "game": json.dumps(game._asdict())}
        write_atomically(run.folder / "model.pt", lambda file: torch.save({"model": model.state_dict(), **texts}, file))
    run.at_once = True  # a test may take long, and a resumed run makes it again: no need to wait for its end
    name, step = args.load or f"{args.model}, {args.action_input}", args.total_timesteps
    try:
        if run.signal:
            raise KeyboardInterrupt
        result = measure_all(model, learner, args, game, train, test, game_limit(config, test))
        print(report(result, game, name))
        write_atomically(run.folder / "metrics.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
        run.log(step, {f"test/{k.replace(' ', '_')}": v for k, v in result["mode"].items() if k != "events"})
        run.log_figure(step, "summary", draw_summary(result, name))
        for kind in ("worst", "random"):
            figure = draw_transitions(game, model.predict, test, worst=kind == "worst")
            run.log_figure(step, f"transitions_{kind}", figure)
        run.save_checkpoint(step, {}, finished=True)
    except KeyboardInterrupt:
        run.stop()
    except ValueError as error:  # a foreign function may fail at times
        run.fail(str(error))
    run.close()
    print(f"all figures and pictures: {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
