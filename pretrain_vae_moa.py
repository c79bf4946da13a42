"""Pre-train a VAE on records of a multi-agent game, judged against what can be known at all.

The encoder turns a player's view into a latent z; from z a policy head predicts what that player does next (the
"modelling other agents" objective) and a decoder draws the view again. The scripted players of Markov Stag-Hunt tell
their exact probabilities, so every score stands beside the exact Bayes ceiling on the same rows.

The game and the setting: Huang et al., "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent
Modeling and Planning", ICML 2024, https://arxiv.org/abs/2406.08002. The VAE over opponents: Yu et al., "Opponent
Modeling based on Subgoal Inference", NeurIPS 2024.

    python pretrain_vae_moa.py
    python pretrain_vae_moa.py --objective moa --context history --rows 600000 --run-name mine --resume
    python pretrain_vae_moa.py --env sisl/pursuit-v5 --rows 5000 --total-timesteps 2000 --eval-frequency 500

Docs: docs/pretrain_vae_moa.md
"""

import contextlib
import csv
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import pettingzoo
import PIL.Image
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
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "4p5b8x8"
    """the game: 4p5b8x8, 4p6b8x8 or 4p5b4x4 (stag hunts), another PettingZoo parallel id, or `module:callable`"""
    total_timesteps: int = 25_000
    """gradient steps; --eval-frequency of them make an epoch, so these are 10 epochs"""
    dataset: str | None = None
    """a dataset file to read (default: play --rows rows, and keep them in --data-dir)"""
    data_dir: str = "data"
    """the folder that collected datasets are kept in"""
    data_seed: int = 1
    """seed of the collected games and of their split; runs with other --seed share one dataset"""
    rows: int = 107_010
    """rows to collect: what one player sees and does at one step"""
    max_cycles: int = 18
    """time limit of the collected games, in steps"""
    load: str | None = None
    """a model.pt to start from; with --total-timesteps 0 it is evaluated only"""
    objective: str = "both"
    """what is learnt beside alpha KL: reconstruction, moa (the player's action), or both"""
    head_input: str = "z"
    """what the policy head sees beside time and legal actions: z, state, or state+z"""
    context: str = "1"
    """what the encoder sees: 1 frame, the last 4, or the whole history"""
    latent_dim: int = 16
    """size of the latent z"""
    learning_rate: float = 5e-4
    """learning rate at the start"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls to 0 over the run along half a cosine"""
    adam_epsilon: float = 1e-5
    """epsilon of Adam"""
    max_grad_norm: float = 10.0
    """the gradient is scaled down to this norm"""
    batch_size: int = 128
    """rows in a batch; with --context history about so many, in whole sequences"""
    kl_weight: float = 1e-4
    """weight alpha of the KL divergence (sum over dimensions) after its warm-up"""
    kl_warmup: int = 20_000
    """gradient steps of the warm-up: alpha = kl_weight (1 - exp(-step / kl_warmup))"""
    reconstruction_weight: float = 0.05
    """weight of the reconstruction's cross-entropy (sum over planes and cells, in nats)"""
    augment: bool = True
    """if toggled, rows are mirrored and turned at random, the others' order changed (stag hunts only)"""
    reference_steps: int = 3_000
    """gradient steps of the single-frame strategy classifier in the table of ceilings (0: leave it out)"""
    probe_rows: int = 20_000
    """training rows that the linear probes are fitted to"""


USED = {  # objective -> the networks that it trains
    "reconstruction": ("encoder", "decoder"),
    "moa": ("encoder", "head"),
    "both": ("encoder", "decoder", "head"),
}
CHOICES = {"objective": tuple(USED), "head_input": ("z", "state", "state+z"), "context": ("1", "4", "history")}
LOSSES = ("loss", "policy", "reconstruction", "kl")  # of the objective, and its parts
HIDDEN = 128  # width of the hidden layers that are not convolutions
POSITION_PLANES = 2  # row and column, beside the planes of an observation
FIELDS = (
    "obs", "action", "action_mask", "t", "episode", "agent", "prev_actions", "strategy", "policy_probs", "split",
    "episode_seed",
)  # fmt: skip
Arrays = dict[str, np.ndarray]


# Data ----------------------------------------------------------------------------------------------------------------
def make_env(env_id: str) -> Any:
    """Make a PettingZoo parallel environment. Raises ValueError with one line, if it cannot be had or does not fit."""
    module, colon, name = env_id.partition(":")
    try:
        env = getattr(importlib.import_module(module), name)() if colon else pettingzoo.make("parallel", env_id)
    except Exception as error:  # whatever a third party's environment raises, it is about this id
        known = [key.removesuffix("-v0") for key in pettingzoo.parallel_registry]
        near = difflib.get_close_matches(env_id, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "ids look like sisl/pursuit-v5 or module:callable"
        reason = str(error).split(" Available environments")[0].rstrip(".")
        raise ValueError(f"could not make {env_id}: {type(error).__name__}: {reason}; {hint}") from None
    if not hasattr(env, "possible_agents") or hasattr(env, "agent_iter"):
        raise ValueError(f"a PettingZoo parallel environment expected, {env_id} is a {type(env).__name__}")
    kinds = set()
    for agent in env.possible_agents:
        action, observation = env.action_space(agent), env.observation_space(agent)
        if isinstance(observation, gym.spaces.Dict):
            observation = observation.spaces.get("observation", observation)
        if not isinstance(action, gym.spaces.Discrete):
            raise ValueError(f"discrete actions expected, {agent} of {env_id} has {action}")
        if not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 3:
            raise ValueError(f"image-like observations (a Box with 3 axes) expected, {agent} has {observation}")
        kinds.add((observation.shape, int(action.n)))
    if len(kinds) > 1:
        raise ValueError(f"agents of one kind expected, those of {env_id} differ: {sorted(kinds)}")
    return env


def to_channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The order of axes that makes (channels, height, width) of an image: the axis that is unlike the other two."""
    first = shape[1] == shape[2] != shape[0] or (len(set(shape)) == 3 and shape[0] == min(shape))
    return (0, 1, 2) if first else (2, 0, 1)


def picture_of(seen: Any) -> np.ndarray:
    """A copy (C, H, W) of an agent's picture, which may come with a mask in a dict."""
    picture = np.array(seen["observation"] if isinstance(seen, dict) else seen)
    return picture.transpose(to_channels_first(picture.shape))


def legal_actions(seen: Any, info: dict[str, Any], actions: int) -> np.ndarray:
    """Which actions (A,) an agent has: told beside its picture, or in its info, or else all."""
    mask = (seen if isinstance(seen, dict) else info).get("action_mask")
    return np.ones(actions, bool) if mask is None else np.array(mask, bool)


def play_randomly(env: Any, rows: int, max_cycles: int, seed: int) -> tuple[Arrays, dict[str, Any]]:
    """Arrays (the format's fields) and meta data of a third party's environment, played by random legal actions.

    Pictures of another type than uint8 are scaled to 0..255.
    """
    agents, generator = env.possible_agents, np.random.default_rng([seed, 2])
    n, actions, start = len(agents), int(env.action_space(agents[0]).n), int(env.action_space(agents[0]).start)
    table, episode = [], 0
    while len(table) < rows:
        observations, infos = env.reset(seed=episode_seed(seed, episode))
        previous = np.full(n, -1)
        for t in range(max_cycles):
            before = {agent: picture_of(observations[agent]) for agent in env.agents}
            masks = {agent: legal_actions(observations[agent], infos[agent], actions) for agent in before}
            chosen = {agent: int(generator.choice(np.flatnonzero(mask))) for agent, mask in masks.items()}
            if not chosen:
                break
            observations, rewards, terminated, truncated, infos = env.step({a: k + start for a, k in chosen.items()})
            joint = np.array([chosen.get(agent, -1) for agent in agents])
            paid = np.array([rewards.get(agent, 0.0) for agent in agents])
            for agent, action in chosen.items():
                i = agents.index(agent)
                table.append({
                    "obs": before[agent], "next_obs": picture_of(observations[agent]), "action": action,
                    "action_mask": masks[agent], "t": t, "episode": episode, "agent": i,
                    "prev_actions": np.roll(previous, -i), "joint_action": np.roll(joint, -i),
                    "reward": paid[i], "rewards": np.roll(paid, -i), "terminated": terminated[agent],
                    "truncated": truncated[agent] or t == max_cycles - 1,
                })  # fmt: skip
            previous = joint
        episode += 1
    table = sorted(table[:rows], key=lambda row: (row["episode"], row["agent"], row["t"]))
    arrays = {name: np.array([row[name] for row in table]) for name in table[0]}
    arrays |= {"strategy": np.full(rows, -1), "roster": np.full((episode, n), -1), "split": np.zeros(episode, int)}
    arrays["episode_seed"] = np.array([episode_seed(seed, i) for i in range(episode)])
    held_out, order = max(1, round(episode / 10)), np.random.default_rng([seed, 1]).permutation(episode)
    arrays["split"][order[:held_out]], arrays["split"][order[held_out : 2 * held_out]] = 2, 1
    pictures, bytes_already = (arrays["obs"], arrays["next_obs"]), arrays["obs"].dtype == np.uint8
    low, high = min(float(values.min()) for values in pictures), max(float(values.max()) for values in pictures)
    if not bytes_already:
        for name in ("obs", "next_obs"):
            scaled = (arrays[name].astype(float) - low) / max(high - low, 1e-9) * 255
            arrays[name] = np.rint(scaled).clip(0, 255).astype(np.uint8)
    meta = {"env_kwargs": {"max_cycles": max_cycles}, "seed": seed, "observation_range": [low, high]}
    return arrays, {**meta, "observation_scale": 1 if bytes_already and high <= 1 else 255}


def open_dataset(args: Args) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and meta data of `--dataset`, of the file collected earlier, or of games played now.

    Raises ValueError with one line.
    """
    if args.dataset:
        if stag_hunt is None:
            raise ValueError("--dataset needs the folder envs beside this script")
        return stag_hunt.load_dataset(Path(args.dataset), FIELDS)
    env = make_env(args.env_id)
    name = args.env_id.replace("/", "-").replace(":", "-")
    path = Path(args.data_dir) / f"{name}__{args.max_cycles}__{args.rows}__{args.data_seed}.npz"
    if stag_hunt is not None and path.exists():
        return stag_hunt.load_dataset(path, FIELDS)
    if stag_hunt is not None and isinstance(env, stag_hunt.StagHunt):
        arrays, meta = stag_hunt.collect(args.rows, env.config, args.max_cycles, seed=args.data_seed)
    else:
        arrays, meta = play_randomly(env, args.rows, args.max_cycles, args.data_seed)
    env.close()
    if (games := len(arrays["split"])) < 3:
        raise ValueError(f"--rows {args.rows} are {games} games: at least 3 are needed, to train, validate and test on")
    if stag_hunt is None:
        return arrays, meta
    record = stag_hunt.make_dataset(arrays, {**meta, "env_id": args.env_id, "command": sys.argv})
    try:
        stag_hunt.save_dataset(path, record)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another --data-dir") from None
    print(f"{args.rows:,} rows of {games:,} games collected, kept in {path}")
    return stag_hunt.load_dataset(path, FIELDS)  # exactly what a resumed run will have


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
    action one-hot, ego first, its last place for none; and `slot` (R,), a row's place in a table of `sequences` x
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
    """The 8 ways to mirror and turn a square board, for games like the stag hunt.

    Actions 0..3 are up, down, left, right. The position planes are turned as well, so that a rule that depends on the
    place on the board (which of two hares as near comes first) stays true.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        """Tables of where each cell comes from (8, H W), of turned position planes (8, 2, H, W), of actions (8, A + 1).

        `becomes` says what becomes of each action, and that none stays none; `been` (8, A) which action was each.
        """
        self.players, self.things = sizes.players, torch.arange(sizes.players, sizes.channels, device=device)
        tables = stag_hunt.symmetries(sizes.height, sizes.actions + 1)
        self.cells, self.becomes = (torch.from_numpy(table).to(device) for table in tables)
        self.been = self.becomes[:, :-1].argsort(1)
        places = position_planes(sizes).to(device)
        self.places = places.flatten(1)[:, self.cells].transpose(0, 1).unflatten(2, places.shape[1:])

    def draw(self, units: int) -> tuple[Tensor, Tensor]:
        """A random turn (U,) for each unit, and order of the players (U, n), ego first."""
        order = torch.rand(units, self.players)
        order[:, 0] = -1.0
        return torch.randint(8, (units,)), order.argsort(1)


class Records:
    """All rows on the device, in order, so that a batch is a gather; and where episodes and sequences lie.

    A sequence is the rows of one player in one episode.
    """

    def __init__(self, arrays: Arrays, meta: dict[str, Any], context: str, device: torch.device) -> None:
        """Copy what the training reads to the device."""
        self.arrays, self.meta, self.context = arrays, meta, context
        _, channels, height, width = arrays["obs"].shape
        actions, players = arrays["action_mask"].shape[1], arrays["prev_actions"].shape[1]
        steps = meta.get("env_kwargs", {}).get("max_cycles") or arrays["t"].max() + 1
        pixel_scale = float(meta.get("observation_scale", 255 if arrays["obs"].max() > 1 else 1))
        self.sizes = Sizes(channels, height, width, actions, players, pixel_scale, float(steps))
        known = (arrays["strategy"] >= 0).all()
        self.strategies = list(meta.get("strategies", [])) if known else []
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
        # Only of the stag hunt it is known what turning the board does to the actions.
        self.is_stag_hunt = stag_hunt is not None and names == list(stag_hunt.ACTION_NAMES)
        self.symmetry = Symmetry(self.sizes, device) if self.is_stag_hunt and height == width else None
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
        return stag_hunt.ceilings(stag_hunt.Dataset(self.arrays, self.meta))

    def fingerprint(self) -> str:
        """What tells whether a resumed run still has the dataset that it began with."""
        hashes, obs, action = self.meta.get("sha256", {}), self.arrays["obs"], self.arrays["action"]
        split = int(self.arrays["split"].astype(int) @ np.arange(len(self.arrays["split"])))
        return json.dumps([hashes, split, obs.shape, int(action.sum())])

    def rows(self, split: int, episodes: int | None = None) -> np.ndarray:
        """Row numbers of a split (0 train, 1 validation, 2 test), or of its first episodes."""
        chosen = self.split == split
        if episodes is not None:
            chosen &= np.isin(self.arrays["episode"], np.unique(self.arrays["episode"][chosen])[:episodes])
        return np.flatnonzero(chosen)

    def probe_rows(self, count: int) -> np.ndarray:
        """The first rows of the training split, which probes are fitted to: whole episodes, at least one."""
        rows = self.rows(0)
        episodes = self.arrays["episode"][rows]
        return rows[episodes <= episodes[min(count, len(rows)) - 1]]

    def units(self, rows: np.ndarray) -> np.ndarray:
        """What batches are drawn from: the rows themselves, or with history the numbers of their sequences."""
        return np.flatnonzero(np.isin(self.starts, rows)) if self.context == "history" else rows

    def rows_of(self, units: Tensor) -> tuple[Tensor, Tensor, int]:
        """The rows (R,) of some units (U,), each row's slot (R,) in a table of units by steps, and its steps."""
        device = self.obs.device
        if self.context != "history":
            return units.to(device), torch.arange(len(units), device=device), 1
        starts, lengths = (torch.from_numpy(values)[units] for values in (self.starts, self.lengths))
        sequence, longest = torch.repeat_interleave(torch.arange(len(units)), lengths), int(lengths.max())
        place = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
        return (starts[sequence] + place).to(device), (sequence * longest + place).to(device), longest

    def batch(self, units: Tensor, world: tuple[Tensor, Tensor] | None = None) -> Batch:
        """Gather a batch of these rows or sequences (U,) (on the CPU).

        With a `world` of `Symmetry.draw`, unit u is turned by world[0] (U,) and its players are in the order of
        world[1] (U, n), planes and actions alike.
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
            becomes = self.symmetry.becomes[turn]
            mask, action = mask.gather(1, self.symmetry.been[turn]), becomes.gather(1, action[:, None])[:, 0]
        if self.context == "4":  # there are no frames before the first
            frames = frames * (back <= self.position[rows, None])[:, :, None, None, None]
        frames = frames.flatten(1, 2).float().div_(self.sizes.pixel_scale)
        batch = Batch(torch.cat((frames, places), 1), self.time[rows], mask, action)
        if self.context != "history":
            return batch
        previous = self.previous[rows]
        previous = previous if world is None else becomes.gather(1, previous.gather(1, order))
        previous = F.one_hot(previous, self.sizes.actions + 1).float()
        return batch._replace(previous=previous, slot=slot, sequences=len(units), length=length)


class Sampler:
    """Batches in a new order at each pass: pure functions of the seed and the step, so there is nothing to save."""

    def __init__(self, records: Records, rows: np.ndarray, batch_size: int, seed: int) -> None:
        """Draw from these rows; with history, so many sequences a batch as have `batch_size` rows on average."""
        self.records, self.seed = records, seed
        self.units = torch.from_numpy(records.units(rows))
        self.size = min(max(1, round(batch_size * len(self.units) / len(rows))), len(self.units))
        self.batches = len(self.units) // self.size
        self.passes, self.order = -1, self.units

    def draw(self, step: int) -> Tensor:
        """The units of a step's batch, counted from 0. What is left over at the end of a pass is left out."""
        passes, number = divmod(step, self.batches)
        if passes != self.passes:
            generator = torch.Generator().manual_seed(episode_seed(self.seed, passes, stream=2))
            self.passes, self.order = passes, self.units[torch.randperm(len(self.units), generator=generator)]
        return self.order[number * self.size : (number + 1) * self.size]

    def batch(self, step: int, augment: bool) -> Batch:
        """A step's batch, its boards turned and its players reordered at random where that is known to be right."""
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
        # What follows a sequence's end in the table comes after it, so it cannot reach it.
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
    """p(frame | z), the encoder mirrored, with a sub-pixel convolution (Shi et al., 2016) for the stride.

    Always the current frame alone.
    """

    def __init__(self, sizes: Sizes, latent_dim: int) -> None:
        """Two layers, then 3x3 convolutions at half the size; the last makes four cells of one."""
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
        return frame[:, :, : self.sizes.height, : self.sizes.width]  # half an odd size was rounded up


class PolicyHead(nn.Module):
    """p(action | z, time, legal actions): what the player does next."""

    def __init__(self, sizes: Sizes, head_input: str, context: str, latent_dim: int) -> None:
        """`head_input` is "z", "state" (the view through a trunk of its own) or "state+z"."""
        super().__init__()
        self.uses_z = "z" in head_input
        self.trunk = Trunk(sizes, context) if "state" in head_input else None
        inputs = self.uses_z * latent_dim + (self.trunk is not None) * HIDDEN + 1 + sizes.actions
        self.layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.ReLU(True), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(True),
            nn.Linear(HIDDEN, sizes.actions),
        )  # fmt: skip

    def forward(self, z: Tensor, batch: Batch) -> Tensor:
        """Masked logits (R, A): -inf where an action is illegal. They go into the cross-entropy as they are.

        A softmax here, and the one inside of the cross-entropy on top, would keep the loss above
        ln(e + A - 1) - 1: 1.165 for 7 actions, however certain and right the prediction.
        """
        inputs = [z] * self.uses_z + ([] if self.trunk is None else [self.trunk(batch)])
        logits = self.layers(torch.cat((*inputs, batch.time[:, None], batch.mask.float()), 1))
        return logits.masked_fill(~batch.mask, -math.inf)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The KL divergence (R,) of q(z | view) from the standard normal, both (R, latent), summed over dimensions."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)


# Learning ------------------------------------------------------------------------------------------------------------
class MOA:
    """The networks, one Adam over all that the objective uses, and the update."""

    def __init__(self, args: Args, sizes: Sizes, device: torch.device) -> None:
        """Build everything; `args` has been checked (see `check`)."""
        self.args, self.sizes, self.device = args, sizes, device
        self.encoder = Encoder(sizes, args.context, args.latent_dim).to(device)
        self.decoder = Decoder(sizes, args.latent_dim).to(device)
        self.head = PolicyHead(sizes, args.head_input, args.context, args.latent_dim).to(device)
        self.used: dict[str, nn.Module] = {name: getattr(self, name) for name in USED[args.objective]}
        self.parameters = [parameter for module in self.used.values() for parameter in module.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=args.learning_rate, eps=args.adam_epsilon, fused=True)

    def policy_loss(self, logits: Tensor, action: Tensor) -> Tensor:
        """The cross-entropy (scalar) of masked logits (R, A) and what was done (R,)."""
        return F.cross_entropy(logits, action)

    def losses(self, batch: Batch, alpha: float, noise: Tensor | None = None) -> dict[str, Tensor]:
        """`total` of the objective, and its parts unweighted; `noise` (R, latent) is standard normal."""
        mean, log_variance = self.encoder(batch)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (0.5 * log_variance).exp() * noise
        losses = {"kl": divergence(mean, log_variance).mean()}
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
        """The KL weight of a step: 0 at the start."""
        return self.args.kl_weight * (1.0 - math.exp(-step / max(self.args.kl_warmup, 1e-9)))

    def update(self, batch: Batch, step: int = 0, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One step of Adam on the objective at gradient step `step`, counted from 0."""
        args = self.args
        losses = self.losses(batch, self.alpha(step), noise)
        share = 0.5 * (1.0 + math.cos(math.pi * step / max(args.total_timesteps, 1))) if args.anneal_lr else 1.0
        self.optimizer.param_groups[0]["lr"] = share * args.learning_rate  # which never costs Adam its moments
        self.optimizer.zero_grad()
        losses["total"].backward()
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def encode(self, observation: Tensor) -> Tensor:
        """The latent mean (B, latent) of single frames (B, C, H, W), scaled as the records are, for use elsewhere.

        Gradients flow, so that it can be tuned further; call it in `torch.no_grad()` to have it frozen.
        Raises ValueError for a model that needs more than one frame.
        """
        if self.args.context != "1":
            raise ValueError("one frame is not enough for a model with --context 4 or history; call encoder(Batch)")
        places = position_planes(self.sizes).to(observation.device).expand(len(observation), -1, -1, -1)
        frames = torch.cat((observation.float() / self.sizes.pixel_scale, places), 1)
        nothing = frames.new_zeros(len(frames))
        return self.encoder(Batch(frames, nothing, nothing, nothing))[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        names = "encoder", "decoder", "head", "optimizer"
        return {name: getattr(self, name).state_dict() for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s, or a model file's, which has no optimizer."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> MOA:
    """The model of a `model.pt`. Raises ValueError with one line, if the file is not one."""
    if not Path(path).is_file():
        raise ValueError(f"there is no model {path}; a run writes model.pt at its end, best_model.pt before")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        args, sizes = (json.loads(content.pop(name)) for name in ("arguments", "sizes"))
        model = MOA(Args(**args), Sizes(*sizes), torch.device(device))
        model.load_state_dict(content)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is not a model of {Path(__file__).name} ({type(error).__name__})") from None
    return model


def save_model(model: MOA, path: Path) -> None:
    """Write the weights alone, and the arguments and sizes that `load_model` builds the networks from."""
    state = {name: part for name, part in model.state_dict().items() if name != "optimizer"}
    about = {"arguments": json.dumps(asdict(model.args)), "sizes": json.dumps(model.sizes)}
    write_atomically(path, lambda file: torch.save({**state, **about}, file))


# Evaluation ----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def predict(model: MOA, records: Records, rows: np.ndarray, size: int = 2_048) -> Arrays:
    """For each row: latent `mean` (R, latent), `kl`, the head's `q` (R, A), the decoder's `frame_nll` and `frame_mse`.

    Without noise; what the objective does not train is left out.
    """
    units = torch.from_numpy(records.units(rows))
    parts: dict[str, list[Tensor]] = {}
    for part in units.split(max(1, size * len(units) // len(rows))):
        batch = records.batch(part)
        mean, log_variance = model.encoder(batch)
        values = {"mean": mean, "kl": divergence(mean, log_variance)}
        if "head" in model.used:
            values["q"] = model.head(mean, batch).softmax(1)
        if "decoder" in model.used:
            frame, logits = batch.frames[:, : model.sizes.channels], model.decoder(mean)
            nll = F.binary_cross_entropy_with_logits(logits, frame, reduction="none")
            values["frame_nll"] = nll.sum((1, 2, 3))
            values["frame_mse"] = (logits.sigmoid() - frame).square().mean((1, 2, 3))
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def fit_probe(inputs: Tensor, target: Tensor, classes: int, legal: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A linear classifier of frozen features (R, D) by L-BFGS; returns a function (R, D), legal -> log-probabilities.

    `legal` (R, classes or 1) are the possible classes. The features are standardised first.
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


def probe(
    model: MOA, records: Records, rows: np.ndarray, mean: np.ndarray, more: dict[str, tuple[Tensor, int]] | None = None
) -> dict[str, Tensor]:
    """Log-probabilities (R, classes) by linear probes of the latent `mean` (R, latent) of these rows: of the action.

    And of `more`: by name, each row's class (N,) and how many there are.
    """
    fit_rows, action = records.probe_rows(model.args.probe_rows), (records.action.cpu(), records.sizes.actions)
    fitted, found = torch.from_numpy(predict(model, records, fit_rows)["mean"]), {}
    for name, (target, classes) in {"action": action, **(more or {})}.items():
        legal = records.mask.cpu() if name == "action" else torch.ones(len(target), 1, dtype=torch.bool)
        classify = fit_probe(fitted, target[fit_rows], classes, legal[fit_rows])
        found[name] = classify(torch.from_numpy(mean), legal[rows])
    return found


class Evaluation(NamedTuple):
    """Predictions `q` (R, A) for `rows` (R,), and everything else that `predict` returns for them."""

    rows: np.ndarray
    q: np.ndarray
    values: Arrays


def evaluate(model: MOA, records: Records, rows: np.ndarray) -> Evaluation:
    """Predict rows with the policy head, or, where the objective trains none, with a linear probe of the latent."""
    values = predict(model, records, rows)
    q = values.pop("q", None)
    if q is None:
        q = probe(model, records, rows, values["mean"])["action"].exp().numpy()
    return Evaluation(rows, q.astype(np.float64), values)


def run_probes(model: MOA, records: Records, result: Evaluation) -> dict[str, float]:
    """Accuracy of linear probes from the frozen latent mean: action, strategy, and where things are on the board."""
    names, cells, targets = records.channel_names, records.places[0].numel(), {}
    if len(records.strategies) > 1:
        targets["strategy"] = records.strategy.cpu(), len(records.strategies)
    for name in [name for name in ("self", "stag") if name in names]:
        plane = records.obs[:, names.index(name)].flatten(1).cpu()
        targets[f"{name}'s cell"] = torch.where((plane > 0).any(1), plane.argmax(1), cells), cells + 1
    found, accuracy = probe(model, records, result.rows, result.values["mean"], targets), {}
    for name, guess in found.items():
        truth = targets[name][0] if name in targets else records.action.cpu()
        accuracy[name] = float((guess.argmax(1) == truth[result.rows]).float().mean())
    return {"latent KL": float(result.values["kl"].mean()), **accuracy}


def reference_strategy(records: Records, rows: np.ndarray, args: Args) -> np.ndarray:
    """P(strategy | one frame) (R, K) by a classifier of its own, trained on the true strategies of the training rows.

    Mixed with the known policies this estimates the single-frame ceiling. Leaves the run's random stream alone.
    """
    device = records.obs.device
    records = Records(records.arrays, records.meta, "1", device)
    sampler = Sampler(records, records.rows(0), 256, seed=0)

    def log_probabilities(batch: Batch) -> Tensor:
        return layer(torch.cat((trunk(batch), batch.time[:, None]), 1)).log_softmax(1)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        trunk, layer = Trunk(records.sizes, "1").to(device), nn.Linear(HIDDEN + 1, len(records.strategies)).to(device)
        optimizer = torch.optim.Adam([*trunk.parameters(), *layer.parameters()], fused=True)
        for step in range(args.reference_steps):
            optimizer.param_groups[0]["lr"] = 5e-4 * (1.0 + math.cos(math.pi * step / args.reference_steps))
            strategy = records.strategy[sampler.draw(step)]
            loss = F.nll_loss(log_probabilities(sampler.batch(step, args.augment)), strategy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        batches = [records.batch(part) for part in torch.from_numpy(rows).split(2_048)]
        return torch.cat([log_probabilities(batch).exp().cpu() for batch in batches]).numpy()


def surprise(probabilities: np.ndarray) -> np.ndarray:
    """-log p, infinite for 0."""
    with np.errstate(divide="ignore"):
        return -np.log(probabilities.astype(np.float64))


def expected_nll(q: np.ndarray, true: np.ndarray) -> float:
    """The mean negative log-likelihood of q (R, A), with actions weighted by their true probabilities (R, A)."""
    return float((true * np.where(true > 0, surprise(q), 0.0)).sum(1).mean())


def confusion(q: np.ndarray, records: Records, rows: np.ndarray) -> np.ndarray:
    """Counts (A, A): what was done, by what was predicted."""
    size = records.sizes.actions
    pairs = records.arrays["action"][rows].astype(int) * size + q.argmax(1)
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def recalls(counts: np.ndarray) -> np.ndarray:
    """The share (A,) of each action's rows that was predicted, from a confusion matrix; nan where there are none."""
    return np.diag(counts) / np.where(counts.sum(1) > 0, counts.sum(1), np.nan)


def score(q: np.ndarray, records: Records, rows: np.ndarray) -> dict[str, float]:
    """Scores of predictions (R, A) on these rows.

    `top1`, `top3`, `balanced_accuracy`, `macro_f1`, `nll`, `ece` (15 bins) are about what was done. Where the policies
    are known, `expected_top1` is the mean probability of the predicted action, the top-1 accuracy without the luck of
    the draw, and `regret` the expected NLL above that of history Bayes; else both are nan.
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
        "nll": surprise(q[every, action]).mean(), "regret": math.nan, "ece": np.abs(gaps).sum(),
    }  # fmt: skip
    if records.ceilings:
        true, best = records.ceilings["oracle"][rows], records.ceilings["history Bayes"][rows]
        result["expected_top1"] = true[every, guess].mean()
        result["regret"] = expected_nll(q, true) - expected_nll(best, true)
    return {name: float(value) for name, value in result.items()}


def baselines(records: Records, rows: np.ndarray) -> Arrays:
    """Predictions (R, A) without looking: the training rows' class shares, as they are and among the legal actions."""
    shares = np.bincount(records.arrays["action"][records.rows(0)], minlength=records.sizes.actions) + 1.0
    shares /= shares.sum()
    legal = np.where(records.arrays["action_mask"][rows], shares, 0.0)
    return {"majority": np.tile(shares, (len(rows), 1)), "prior + mask": legal / legal.sum(1, keepdims=True)}


def difference(
    first: np.ndarray, second: np.ndarray, records: Records, rows: np.ndarray, done: bool = False
) -> tuple[float, float]:
    """Expected accuracy of predictions (R, A) minus that of others, and its standard error.

    The error is clustered by episode: rows of one game are not independent. The policies must be known. With `done` it
    is the accuracy on what was done, luck and all: only this one rises where predictions have seen the labels.
    """
    every, action = np.arange(len(rows)), records.arrays["action"][rows].astype(int)
    true = np.eye(records.sizes.actions)[action] if done else records.ceilings["oracle"][rows]
    gain = true[every, first.argmax(1)] - true[every, second.argmax(1)]
    sums = np.bincount(records.arrays["episode"][rows], weights=gain - gain.mean())
    return float(gain.mean()), float(np.sqrt(np.square(sums).sum()) / len(rows))


def subsets(records: Records, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Positions in `rows` by name: all of them, then those of each strategy that is among them."""
    yield "all", np.arange(len(rows))
    for k, name in enumerate(records.strategies):
        part = np.flatnonzero(records.arrays["strategy"][rows] == k)
        if len(part):
            yield name, part


def score_subsets(q: np.ndarray, records: Records, rows: np.ndarray) -> list[dict[str, Any]]:
    """`score` of all rows and of each strategy's, one dict each."""
    return [{"subset": name, **score(q[part], records, rows[part])} for name, part in subsets(records, rows)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts with the same keys as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def evaluate_epoch(model: MOA, records: Records, train: dict[str, float]) -> tuple[dict[str, float], Evaluation]:
    """Losses on validation games and scores of the first test games; `train` are this epoch's mean training losses."""
    seen, rows = predict(model, records, records.rows(1)), records.rows(1)
    parts = {"kl": (seen["kl"], model.args.kl_weight)}  # the final weight, so that epochs compare
    if "q" in seen:
        parts["policy"] = surprise(seen["q"][np.arange(len(rows)), records.arrays["action"][rows]]), 1.0
    if "frame_nll" in seen:
        parts["reconstruction"] = seen["frame_nll"], model.args.reconstruction_weight
    losses = {name: float(values.mean()) for name, (values, _) in parts.items()}
    losses["loss"] = sum(weight * losses[name] for name, (_, weight) in parts.items())
    metrics = {f"train_{name}": train.get(name, math.nan) for name in LOSSES}
    metrics |= {f"validation_{name}": losses.get(name, math.nan) for name in LOSSES}
    result = evaluate(model, records, records.rows(2, model.args.eval_episodes))
    for row in score_subsets(result.q, records, result.rows):
        prefix = "" if row["subset"] == "all" else f"{row['subset']}_"
        metrics |= {f"{prefix}{name}": value for name, value in row.items() if name not in ("subset", "rows")}
    metrics["frame_mse"] = float(result.values["frame_mse"].mean()) if "frame_mse" in result.values else math.nan
    return metrics, result


def write_epoch(folder: Path, epoch: int, result: Evaluation, records: Records) -> None:
    """`moa_eval_epoch{k}.csv`: scores and recall by strategy; `.npz`: predictions and latents, row by row."""
    table = score_subsets(result.q, records, result.rows)
    for row, (_, part) in zip(table, subsets(records, result.rows), strict=True):
        recall = recalls(confusion(result.q[part], records, result.rows[part])).tolist()
        row |= {f"recall {name}": value for name, value in zip(records.action_names, recall, strict=True)}
    write_csv(folder / f"moa_eval_epoch{epoch}.csv", table)
    content = {"row": result.rows, "q": result.q.astype(np.float32), **result.values}
    content |= {name: records.arrays[name][result.rows] for name in ("action", "strategy")}
    content["confusion"] = confusion(result.q, records, result.rows)
    write_atomically(folder / f"moa_eval_epoch{epoch}.npz", lambda file: np.savez_compressed(file, **content))


def record_videos(result: Evaluation, records: Records, folder: Path, step: int, games: int = 3) -> list[Path]:
    """Write mp4 videos of the first held-out games, with what is predicted for each player, and return their paths."""
    from moviepy import ImageSequenceClip  # slow to import, and only needed here

    arrays, names, paths = records.arrays, records.action_names, []

    def caption(row: int) -> str:
        q = result.q[np.searchsorted(result.rows, row)]
        likely = ", ".join(f"{names[a]} {q[a]:.0%}" for a in np.argsort(-q)[:3] if q[a] >= 0.005)
        player = str(arrays["agent"][row])
        player += f" ({records.strategies[arrays['strategy'][row]]})" if records.strategies else ""
        return f"{player} does {names[arrays['action'][row]]}; predicted: {likely}"

    (folder / "videos").mkdir(exist_ok=True)
    for episode in np.unique(arrays["episode"][result.rows])[:games]:
        frames = list(stag_hunt.replay(stag_hunt.Dataset(arrays, records.meta), episode, caption))
        paths.append(folder / "videos" / f"step{step}-game{episode}.mp4")
        ImageSequenceClip(frames, fps=2).write_videofile(str(paths[-1]), logger=None)
    return paths


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
def new_figure(columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure of its own (no pyplot, so no global state), with an array (columns,) of axes."""
    figure = Figure(figsize=(4.0 * columns + 0.6, 3.9), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_losses(rows: list[dict[str, float]], title: str) -> Figure:
    """The objective's loss and its parts, unweighted: means over an epoch's batches, and on validation games."""
    names = [name for name in LOSSES if not math.isnan(rows[-1][f"validation_{name}"])]
    figure, axes = new_figure(len(names), title)
    steps = [row["step"] for row in rows]
    for axis, name in zip(axes, names, strict=True):
        for part in ("train", "validation"):
            axis.plot(steps, [row[f"{part}_{name}"] for row in rows], ".-", label=f"{part} rows")
        axis.set(xlabel="gradient steps", ylabel=f"{name} (nats)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def draw_confusion(result: Evaluation, records: Records) -> Figure:
    """Of each action's rows the share, in %, that was predicted as each other, for all rows and for each strategy."""
    parts, names = list(subsets(records, result.rows)), records.action_names
    figure, axes = new_figure(len(parts), "What was done (rows) and what was predicted (columns)")
    for axis, (name, part) in zip(axes, parts, strict=True):
        counts = confusion(result.q[part], records, result.rows[part])
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axis.set(title=f"{name}, {len(part):,} rows", yticks=range(len(names)), yticklabels=names)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
            color = "white" if shares[row, column] > 60 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_recall_and_calibration(q: Arrays, records: Records, rows: np.ndarray) -> Figure:
    """Recall of each action, and how often predictions of some certainty are right, for each of `q` (R, A) by name."""
    figure, axes = new_figure(2, "Recall of each action, and calibration")
    action, places, width = records.arrays["action"][rows], np.arange(records.sizes.actions), 0.8 / len(q)
    for i, (name, values) in enumerate(q.items()):
        axes[0].bar(places + (i - (len(q) - 1) / 2) * width, recalls(confusion(values, records, rows)), width)
        sure, hit = values.max(1), values.argmax(1) == action
        bins = np.minimum((sure * 15).astype(int), 14)
        parts = [part for part in (bins == k for k in range(15)) if part.sum() >= 20]
        axes[1].plot([sure[part].mean() for part in parts], [hit[part].mean() for part in parts], ".-", label=name)
    axes[0].set(ylabel="recall", ylim=(0, 1.02))
    axes[0].set_xticks(places, records.action_names, rotation=60, ha="right")
    axes[1].plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    axes[1].set(xlabel="probability of the predicted action", ylabel="how often it was taken")
    axes[1].legend(fontsize=8)
    return figure


def draw_latent(result: Evaluation, records: Records, count: int = 3_000) -> Figure:
    """The latent means of some rows in their two main directions, coloured by strategy and by action."""
    chosen = np.random.default_rng(0).permutation(len(result.rows))[:count]
    z = result.values["mean"][chosen].astype(np.float64)
    _, strength, directions = np.linalg.svd(z - z.mean(0), full_matrices=False)
    points = (z - z.mean(0)) @ directions[:2].T
    share = np.square(strength[:2]).sum() / max(np.square(strength).sum(), 1e-12)
    colours = {"strategy": records.strategies} if records.strategies else {}
    colours["action"] = records.action_names
    figure, axes = new_figure(len(colours), f"Latent z in two main directions ({share:.0%} of its variance)")
    for axis, (name, labels) in zip(axes, colours.items(), strict=True):
        for number, label in enumerate(labels):
            here = points[records.arrays[name][result.rows[chosen]] == number]
            axis.scatter(here[:, 0], here[:, -1], s=3, alpha=0.5, color=f"C{number}", label=label)
        axis.set(title=f"by {name}", xlabel="first main direction", ylabel="second main direction")
        axis.legend(fontsize=7, markerscale=4)
    return figure


@torch.inference_mode()
def draw_reconstructions(model: MOA, records: Records, rows: np.ndarray, count: int = 4) -> Figure:
    """Planes of some frames (upper rows), and what the decoder makes of their latent (lower rows)."""
    units = torch.from_numpy(records.units(rows))
    batch = records.batch(units[torch.linspace(0, len(units) - 1, count).long()])
    chosen = torch.linspace(0, len(batch.time) - 1, count).long()  # with history a unit is a sequence of rows
    frames = batch.frames[:, : records.sizes.channels]
    pairs = torch.stack((frames, model.decoder(model.encoder(batch)[0]).sigmoid()), 1).cpu()[chosen]
    pairs = F.pad(pairs, (0, 1, 0, 1), value=math.nan)  # (count, 2, C, H + 1, W + 1)
    _, _, channels, height, width = pairs.shape
    figure = Figure(figsize=(1.1 * channels + 0.8, 2.2 * count + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(pairs.transpose(2, 3).reshape(2 * count * height, -1).numpy(), cmap="magma", vmin=0, vmax=1)
    axis.set_title("Frames, and what the decoder makes of their z")
    axis.set_xticks((np.arange(channels) + 0.5) * width - 1, records.channel_names)
    axis.set_yticks((np.arange(2 * count) + 0.5) * height - 1, ["frame", "decoded"] * count)
    return figure


# Main ----------------------------------------------------------------------------------------------------------------
def check(args: Args) -> None:
    """Check all that can be checked without the data. Raises ValueError with one line."""
    may_be_zero = {
        "seed", "data_seed", "kl_weight", "kl_warmup", "reconstruction_weight", "reference_steps", "total_timesteps",
    }  # fmt: skip
    for name, value in asdict(args).items():
        flag, choices = f"--{name.replace('_', '-')} {value}", CHOICES.get(name, (value,))
        if value not in choices:
            near = difflib.get_close_matches(value, choices, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{flag}: one of {', '.join(choices)} expected{hint}")
        most = 2**63 if type(value) is int else math.inf
        if type(value) in (int, float) and not (0 < value < most or (value == 0 and name in may_be_zero)):
            raise ValueError(f"{flag}: a positive number{' or 0' * (name in may_be_zero)} below {most} expected")
    if args.total_timesteps == 0 and not args.load:
        raise ValueError("--total-timesteps 0 without --load: there would be nothing to evaluate")


def check_shape(model: MOA, args: Args, sizes: Sizes) -> None:
    """Raise ValueError, with both shapes, if the model of `--load` does not fit the arguments and the data."""
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


def final_table(result: Evaluation, records: Records, args: Args) -> Arrays:
    """Predictions (R, A) by name for the table: baselines, the model, estimates and ceilings, on the same rows."""
    rows, predictions = result.rows, baselines(records, result.rows)
    device = records.obs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(episode_seed(args.seed, 0, stream=3))
        untrained = MOA(replace(args, objective="reconstruction"), records.sizes, device)
    predictions["random encoder + probe"] = evaluate(untrained, records, rows).q
    name = {"moa": "MOA", "both": "MOA + reconstruction"}.get(args.objective, "reconstruction + probe")
    predictions[f"{name}, {args.head_input} head, context {args.context}"] = result.q
    if records.ceilings and args.reference_steps:
        strategy, policies = reference_strategy(records, rows, args), records.arrays["policy_probs"][rows]
        predictions["single frame, knows the policies"] = np.einsum("rk,rka->ra", strategy, policies.astype(float))
    return predictions | {name: values[rows] for name, values in records.ceilings.items()}


LEAK_ERRORS = 3.0  # standard errors above a ceiling: by chance, once in some hundred reports of a perfect model


def report(run: "Run", step: int, model: MOA, records: Records) -> None:
    """Score the model on all held-out games: print and write the table, the probes, the pictures and the videos."""
    args, rows = model.args, records.rows(2)
    result = evaluate(model, records, rows)
    predictions = final_table(result, records, args)
    table = [{"name": name, **row} for name, q in predictions.items() for row in score_subsets(q, records, rows)]
    for row in table:
        value = {other["name"]: other["expected_top1"] for other in table if other["subset"] == row["subset"]}
        room = value.get("history Bayes", math.nan) - value["majority"]
        row["achieved"] = (row["expected_top1"] - value["majority"]) / room if room else math.nan
    write_csv(run.folder / "table.csv", table)
    probes = run_probes(model, records, result)
    write_csv(run.folder / "probes.csv", [probes])

    games = len(np.unique(records.arrays["episode"][rows]))
    print(f"\n{len(rows):,} held-out rows of {games:,} games")
    columns = ("expected_top1", "top1", "top3", "balanced_accuracy", "nll", "regret", "ece", "achieved")
    columns = [name for name in columns if not math.isnan(table[0][name])]
    width = max(map(len, predictions)) + 2
    print(" " * width + "".join(f"{name.replace('_', ' ').replace('accuracy', 'acc.'):>15}" for name in columns))
    for row in table:
        label = row["name"] if row["subset"] == "all" else f"  {row['subset']}"
        print(label.ljust(width) + "".join(f"{row[column]:15.3f}" for column in columns))
    for name in records.ceilings:
        gain, error = difference(result.q, predictions[name], records, rows)
        print(f"expected accuracy minus that of {name}: {gain:.4f} ± {error:.4f} (standard error, by game)")
        lucky, luck = difference(result.q, predictions[name], records, rows, done=True)
        above = max(gain / max(error, 1e-9), lucky / max(luck, 1e-9))
        if games >= 10 and above > LEAK_ERRORS:  # of fewer games the errors are not known
            print(f"warning: better than {name} can be: the labels must have leaked into what the model sees")
    print("linear probes of z: " + ", ".join(f"{name} {value:.3f}" for name, value in probes.items()))

    shown = {"model": result.q, **{name: predictions[name] for name in records.ceilings}}
    figures = {
        "confusion_matrix": draw_confusion(result, records),
        "recall_and_calibration": draw_recall_and_calibration(shown, records, rows),
        "latent": draw_latent(result, records),
    }  # fmt: skip
    if "decoder" in model.used:
        figures["reconstructions"] = draw_reconstructions(model, records, rows)
    for name, figure in figures.items():
        run.log_figure(step, name, figure)
    if args.capture_video:
        run.log_videos(step, record_videos(result, records, run.folder, step))


def main(args: Args) -> Path:
    """Pre-train one model, evaluate it, and return its run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products fail on a GPU
    try:
        check(args)
        records = Records(*open_dataset(args), args.context, device)
        if args.capture_video and not records.is_stag_hunt:
            raise ValueError("--capture-video draws games of the stag hunt; these are of another one")
        loaded = load_model(args.load) if args.load else None
        if loaded:
            check_shape(loaded, args, records.sizes)
    except ValueError as error:
        usage_error(str(error))
    run = Run(args)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more do not pay; OMP_NUM_THREADS=1 for runs side by side
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    model = MOA(args, records.sizes, device)
    if loaded:
        model.load_state_dict({name: module.state_dict() for name, module in loaded.used.items()})
    sampler = Sampler(records, records.rows(0), args.batch_size, args.seed)
    passes = args.total_timesteps / sampler.batches
    print(f"{run.name}: {len(records.rows(0)):,} training rows, {passes:.1f} passes, {sampler.size} units a batch")
    step, sums = 0, {}
    if run.checkpoint is not None:
        state = run.checkpoint
        with run.restoring():
            if state["dataset"] != records.fingerprint():
                run.close()
                usage_error(f"{run.folder} began with another dataset; restore it, or start another run")
            step, sums = state["step"], state["sums"]
            if missing := model.state_dict().keys() - state["model"].keys():
                raise LookupError(f"without {missing}")
            model.load_state_dict(state["model"])
        run.restore_random_state()

    last = step == args.total_timesteps
    while not last:
        losses = model.update(sampler.batch(step, args.augment), step)
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}  # without waiting for the device
        step += 1

        last = step == args.total_timesteps
        evaluating = last or step % args.eval_frequency == 0
        saving = evaluating or step % args.checkpoint_frequency == 0 or run.signal
        run.progress(step, "")
        if saving or step % 500 == 0:
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            speed = run.steps_per_second(step)
            run.log(step, {
                **{f"losses/{name}": value for name, value in losses.items()}, "charts/SPS": speed,
                "charts/rows_per_second": speed * args.batch_size, "charts/alpha": model.alpha(step),
                "charts/learning_rate": model.optimizer.param_groups[0]["lr"],
            })  # fmt: skip
        if evaluating:
            epoch, steps = math.ceil(step / args.eval_frequency), (step - 1) % args.eval_frequency + 1
            train = {name: float(value) / steps for name, value in sums.items()}
            metrics, result = evaluate_epoch(model, records, train | {"loss": train["total"]})
            sums = {}
            run.log_evaluation(step, metrics)
            write_epoch(run.folder, epoch, result, records)
            run.log_figure(step, "vae_loss_curve", draw_losses(run.eval_rows, run.name))
            run.log_figure(step, "confusion_matrix", draw_confusion(result, records))
            names = {"balanced_accuracy": "balanced accuracy", "nll": "NLL", "regret": "regret", "ece": "ECE"}
            print(f"[MOA] epoch {epoch}: top1={metrics['top1']:.4f}, top3={metrics['top3']:.4f}, " + ", ".join(
                f"{label}={metrics[name]:.4f}" for name, label in names.items() if not math.isnan(metrics[name])
            ))  # fmt: skip
            if metrics["validation_loss"] <= min(row["validation_loss"] for row in run.eval_rows):
                save_model(model, run.folder / "best_model.pt")
        if saving:
            content = {"model": model.state_dict(), "sums": sums, "dataset": records.fingerprint()}
            run.save_checkpoint(step, content)
            if run.signal and not last:
                run.stop()

    save_model(model, run.folder / "model.pt")
    if not run.eval_rows:  # --total-timesteps 0
        run.log_evaluation(step, evaluate_epoch(model, records, {})[0])
        save_model(model, run.folder / "best_model.pt")
    best = load_model(run.folder / "best_model.pt", device)  # the least validation loss; test rows have no say in it
    run.at_once = True  # a report may take long, and a resumed run makes it again: no need to wait for its end
    try:
        if run.signal:
            raise KeyboardInterrupt
        report(run, step, best, records)
        run.save_checkpoint(step, {"model": model.state_dict(), "dataset": records.fingerprint()}, finished=True)
    except KeyboardInterrupt:
        run.stop()
    run.close()
    print(f"see {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
