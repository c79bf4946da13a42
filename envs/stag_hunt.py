"""Markov Stag-Hunt: a grid game in which hunting the large prey takes two.

From "Efficient Adaptation in Mixed-Motive Environments via Hierarchical Opponent Modeling and
Planning" (HOP; Huang et al., ICML 2024, https://arxiv.org/abs/2406.08002). Written from a
description of the rules; no code was copied.

`StagHunt` is a PettingZoo environment, for anyone's agents. `VectorStagHunt` plays thousands of
games at once, for collecting data, with scripted policies whose exact probabilities are known. Both
read the same rule table, both take every random number of a game from its seed (`uniforms`), and
tests check that they agree. `collect` makes records of games (envs/records.py says what they are),
`history_posterior` says exactly what an observer of a whole game can know about its players, and
`commonest_shares` how well the next state can be predicted if stags move at random.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
from gymnasium import spaces
from gymnasium.utils import seeding
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import wrappers
from pettingzoo.utils.conversions import parallel_to_aec

from envs.picture import BLUE, GREEN, GREY, INK, PAPER, RED, Picture
from envs.records import (
    FIELDS,
    Arrays,
    Record,
    check_records,
    episode_seeds,
    make_records,
    read_records,
    save_records,
    split_episodes,
)

Dataset, check_dataset, make_dataset = Record, check_records, make_records  # older names
load_dataset, save_dataset = read_records, save_records

UP, DOWN, LEFT, RIGHT, STAY, HUNT_STAG, HUNT_HARE = range(7)
ACTION_NAMES = ("up", "down", "left", "right", "stay", "hunt stag", "hunt hare")
NUM_ACTIONS = len(ACTION_NAMES)
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # (rows, columns) of up, down, left, right, stay
HUNTED = {"NS": [HUNT_STAG], "NH": [HUNT_HARE], "NA": [HUNT_STAG, HUNT_HARE]}  # nearest stag, hare, any prey
STRATEGIES = ("NS", "NH", "random", "NA")  # random: uniform over legal actions

PRESETS: dict[str, dict[str, int]] = {  # players, beasts, size, as they are named in the HOP code
    "4p5b8x8": {"size": 8, "n_players": 4, "n_stags": 1, "n_hares": 4},
    "4p6b8x8": {"size": 8, "n_players": 4, "n_stags": 2, "n_hares": 4},
    "4p5b4x4": {"size": 4, "n_players": 4, "n_stags": 1, "n_hares": 4},
}

FAR = 10_000  # a distance that no path has


# The rules ------------------------------------------------------------------------------------------------------------
class Config(NamedTuple):
    """A game's sizes and pay. A place is a cell `row * size + column`, or `size * size` for "gone"."""

    size: int = 8
    n_players: int = 4
    n_stags: int = 1
    n_hares: int = 4
    n_blocks: int = 0
    stag_reward: float = 10.0
    hare_reward: float = 1.0
    stag_moves: bool = False

    @property
    def cells(self) -> int:
        """Number of cells; as a place it means "gone", as a destination "off the board"."""
        return self.size**2

    @property
    def channels(self) -> int:
        """Planes of an observation: the players, obstacles, stags, hares."""
        return self.n_players + 3

    @property
    def channel_names(self) -> list[str]:
        """Names of the planes, ego first."""
        others = [f"other {i}" for i in range(1, self.n_players)]
        return ["self", *others, "obstacles", "stag", "hare"]

    @property
    def payments(self) -> dict[str, float]:
        """What each hunter of a prey is paid, by the prey and the number of its hunters."""
        result = {}
        for prey, pay, fewest in (("hare", self.hare_reward, 1), ("stag", self.stag_reward, 2)):
            for hunters in range(fewest, self.n_players + 1):
                result[f"{prey}, {hunters} hunter{'s' if hunters > 1 else ''}"] = pay / hunters
        return result

    def limit(self, obs: np.ndarray, actions: np.ndarray, draws: int = 100) -> float:
        """The share of next frames that a perfect model's most likely one matches: 1, unless stags move at random.

        If they do, it is estimated from these frames (N, C, H, W) and joint actions (N, n): see `commonest_shares`.
        """
        return float(commonest_shares(obs, actions, self, draws).mean()) if self.stag_moves else 1.0

    def check(self) -> Config:
        """Raise ValueError, with what was expected, if there can be no such game."""
        if self.size < 2 or self.n_players < 1 or min(self.n_stags, self.n_hares, self.n_blocks) < 0:
            raise ValueError(f"expected a board of at least 2x2, a player and no negative numbers, got {self}")
        if self.n_stags + self.n_hares + 4 * self.n_blocks > self.cells:
            raise ValueError(f"{self.size}x{self.size} cells have no room for all prey and obstacles of {self}")
        return self


@functools.lru_cache
def destinations(size: int) -> np.ndarray:
    """Where up, down, left, right, stay lead (cells + 1, 5); `size * size` is off the board, or gone."""
    table = np.full((size * size + 1, 5), size * size, np.int64)
    for row, column, (action, (down, right)) in itertools.product(range(size), range(size), enumerate(STEPS)):
        if 0 <= row + down < size and 0 <= column + right < size:
            table[row * size + column, action] = (row + down) * size + column + right
    return table


def distances(blocked: np.ndarray, size: int) -> np.ndarray:
    """Length of the shortest path between any two places (B, cells + 1, cells + 1) on boards (B, cells + 1).

    Grows a circle around each cell, one step at a time; `FAR` where there is no path, as from and to "gone".
    """
    free = ~blocked
    reached = np.eye(free.shape[1], dtype=bool) & free[:, :, None]
    result = np.where(reached, 0, FAR)
    for step in range(1, free.shape[1]):
        wider = (reached | reached[:, :, destinations(size)[:, :STAY]].any(3)) & free[:, None, :]
        result[wider & ~reached] = step
        if (wider == reached).all():
            break
        reached = wider
    return result


@functools.lru_cache
def pieces(size: int) -> np.ndarray:
    """All places and rotations of an obstacle of 3 or 4 cells (I, L, and I, L, O, T, S) as masks (pieces, cells)."""
    shapes = ("xxx", "xx/x.", "xxxx", "xxx/x..", "xx/xx", "xxx/.x.", "xx./.xx")
    found = set()
    for text, turn, mirror in itertools.product(shapes, range(4), (False, True)):
        shape = np.array([[letter == "x" for letter in line] for line in text.split("/")])
        shape = np.rot90(shape[:, ::-1] if mirror else shape, turn)
        height, width = shape.shape
        for row, column in itertools.product(range(size - height + 1), range(size - width + 1)):
            mask = np.zeros((size, size), bool)
            mask[row : row + height, column : column + width] = shape
            found.add(tuple(np.flatnonzero(mask).tolist()))
    masks = np.zeros((len(found), size * size), bool)
    for mask, cells in zip(masks, sorted(found), strict=True):
        mask[list(cells)] = True
    return masks


def symmetries(size: int, actions: int = NUM_ACTIONS) -> tuple[np.ndarray, np.ndarray]:
    """The 8 ways to mirror and rotate a board: where each cell comes from (8, cells), what actions become (8, actions).

    Actions other than the four moves stay what they are.
    """
    cells, becomes = [], []
    for transposed, mirrored, upside_down in itertools.product((False, True), repeat=3):
        board, action = np.arange(size * size).reshape(size, size), np.arange(actions)
        if transposed:
            board, action[:4] = board.T, np.array([LEFT, RIGHT, UP, DOWN])[action[:4]]
        if upside_down:
            board, action[:4] = board[::-1], np.array([DOWN, UP, LEFT, RIGHT])[action[:4]]
        if mirrored:
            board, action[:4] = board[:, ::-1], np.array([UP, DOWN, RIGHT, LEFT])[action[:4]]
        cells.append(board.flatten())
        becomes.append(action)
    return np.stack(cells), np.stack(becomes)


# Random numbers of a game ---------------------------------------------------------------------------------------------
LAYOUT, ROSTER, ACTIONS, STAG_MOVES, BLOCKS = range(5)  # streams of a game's seed


def uniforms(seeds: np.ndarray, stream: int, first: int, count: int) -> np.ndarray:
    """Numbers (B, count) in [0, 1) that depend on nothing but the game's seed (B,), the stream and the index.

    SplitMix64 (Steele, Lea and Flood, 2014), counted from `first`: NumPy's generators give a whole batch of games one
    stream, so a game could not be played again without its neighbours.
    """
    step = 0x9E3779B97F4A7C15
    gamma = np.uint64(step)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.asarray(seeds, np.int64).astype(np.uint64) + gamma)
    key = mix(key ^ np.uint64((stream + 1) * step % 2**64))
    index = np.arange(first + 1, first + count + 1, dtype=np.uint64) * gamma
    return (mix(key[:, None] + index) >> np.uint64(11)) * 2.0**-53


def connected(free: np.ndarray, size: int) -> np.ndarray:
    """Whether the free cells (B, cells) of each board are connected, by flooding from the first one."""
    reached = np.zeros_like(free)
    reached[np.arange(len(free)), free.argmax(1)] = True
    padded = np.pad(reached, ((0, 0), (0, 1)))
    for _ in range(size * size):
        spread = padded[:, destinations(size)[:-1]].any(2) & free
        if (spread == padded[:, :-1]).all():
            break
        padded[:, :-1] = spread
    return (padded[:, :-1] == free).all(1)


def draw_blocks(seeds: np.ndarray, config: Config) -> np.ndarray:
    """Obstacles (B, cells): `n_blocks` pieces that do not overlap, drawn anew until the free cells are connected."""
    blocks = np.zeros((len(seeds), config.cells), bool)
    if config.n_blocks == 0:
        return blocks
    masks, left = pieces(config.size), np.arange(len(seeds))
    for attempt in range(1_000):
        u = uniforms(seeds[left], BLOCKS, attempt * config.n_blocks, config.n_blocks)
        covered = masks[(u * len(masks)).astype(np.int64)].sum(1)
        blocks[left] = covered > 0
        left = left[(covered.max(1) > 1) | ~connected(covered == 0, config.size)]
        if not len(left):
            return blocks
    raise ValueError(f"found no connected board with {config.n_blocks} obstacles on {config.size}x{config.size} cells")


def draw_layouts(seeds: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial positions of games: blocked cells (B, cells + 1), prey (B, stags + hares) and players (B, n).

    Prey are on distinct free cells, players on any free cells. "Off the board" counts as blocked.
    """
    blocked = np.ones((len(seeds), config.cells + 1), bool)
    blocked[:, :-1] = draw_blocks(seeds, config)
    beasts = config.n_stags + config.n_hares
    u = uniforms(seeds, LAYOUT, 0, config.n_players + config.cells)
    order = np.argsort(blocked[:, :-1] + u[:, config.n_players :], axis=1)  # free cells first, shuffled
    free = config.cells - blocked[:, :-1].sum(1)
    players = np.argsort(blocked[:, :-1], axis=1, kind="stable")[
        np.arange(len(seeds))[:, None], (u[:, : config.n_players] * free[:, None]).astype(np.int64)
    ]
    return blocked, order[:, :beasts].astype(np.int64), players.astype(np.int64)


# Many games at once ---------------------------------------------------------------------------------------------------
class VectorStagHunt:
    """B games in lock-step. Arrays: `players` (B, n), `stags` (B, S), `hares` (B, H) places; `t` counts steps."""

    def __init__(self, config: Config, seeds: np.ndarray) -> None:
        """Begin the games of these seeds (B,)."""
        self.config, self.seeds = config.check(), np.asarray(seeds, np.int64)
        self.blocked, prey, self.players = draw_layouts(self.seeds, config)
        self.stags, self.hares = prey[:, : config.n_stags].copy(), prey[:, config.n_stags :].copy()
        self.t = 0
        self.table = destinations(config.size)
        self.games = np.arange(len(self.seeds))[:, None]
        # Without obstacles all games share one board.
        self.boards = self.games if config.n_blocks else np.zeros_like(self.games)
        self.distances = distances(self.blocked if config.n_blocks else self.blocked[:1], config.size)

    @property
    def alive(self) -> np.ndarray:
        """Players that are still in the game (B, n)."""
        return self.players < self.config.cells

    def legal(self) -> np.ndarray:
        """Legal actions (B, n, 7); for a player who is gone only "stay"."""
        players, alive = self.players, self.alive
        mask = np.empty((*players.shape, NUM_ACTIONS), bool)
        mask[..., :STAY] = ~self.blocked[self.games[:, :, None], self.table[players, :STAY]]
        mask[..., STAY] = True
        together = (players[:, :, None] == players[:, None, :]).sum(2) >= 2
        mask[..., HUNT_STAG] = (players[:, :, None] == self.stags[:, None, :]).any(2) & alive & together
        mask[..., HUNT_HARE] = (players[:, :, None] == self.hares[:, None, :]).any(2) & alive
        return mask

    def step(self, actions: np.ndarray, legal: np.ndarray | None = None) -> np.ndarray:
        """Carry out a joint action (B, n) in each game and return the rewards (B, n).

        An illegal action acts as "stay", one of a player who is gone does nothing. `legal` saves computing it again.
        """
        config, players = self.config, self.players
        legal = self.legal() if legal is None else legal
        allowed = np.take_along_axis(legal, np.asarray(actions)[:, :, None], 2)[:, :, 0]
        actions = np.where(allowed, actions, STAY)
        same = players[:, :, None] == players[:, None, :]
        for_hare, for_stag = actions == HUNT_HARE, actions == HUNT_STAG
        hare_hunters = (same & for_hare[:, None, :]).sum(2)
        stag_hunters = (same & for_stag[:, None, :]).sum(2)
        for_stag &= stag_hunters >= 2
        caught = for_hare | for_stag
        rewards = np.zeros(players.shape)
        rewards[for_hare] = config.hare_reward / hare_hunters[for_hare]
        rewards[for_stag] = config.stag_reward / stag_hunters[for_stag]

        changed = np.flatnonzero(caught.any(1))
        for prey, hunters in ((self.stags, for_stag), (self.hares, for_hare)):
            taken = (prey[changed, :, None] == players[changed, None, :]) & hunters[changed, None, :]
            prey[changed] = np.where(taken.any(2), config.cells, prey[changed])
        self.players = np.where(caught, config.cells, self.table[players, np.minimum(actions, STAY)])
        if config.stag_moves:
            self._move_stags()
        self.t += 1
        return rewards

    def _move_stags(self) -> None:
        """Each stag in turn goes up, down, left, right or stays; it stays where the way is blocked or leads to prey."""
        stags = self.config.n_stags
        moves = (uniforms(self.seeds, STAG_MOVES, self.t * stags, stags) * 5).astype(np.int64)
        for j in range(stags):
            to = self.table[self.stags[:, j], moves[:, j]]
            others = np.concatenate((np.delete(self.stags, j, 1), self.hares), 1)
            stays = self.blocked[self.games[:, 0], to] | (others == to[:, None]).any(1)
            self.stags[:, j] = np.where(stays, self.stags[:, j], to)

    def _nearest(self, prey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each player (B, n): the distance to the nearest of `prey` (B, P), and its place; `FAR` if none."""
        if prey.shape[1] == 0:
            return np.full(self.players.shape, FAR), self.players
        far = self.distances[self.boards[:, :, None], self.players[:, :, None], prey[:, None, :]]  # (B, n, P)
        best = (far * (self.config.cells + 1) + prey[:, None, :]).argmin(2)
        return np.take_along_axis(far, best[:, :, None], 2)[:, :, 0], np.take_along_axis(prey, best, 1)

    def policy_probabilities(
        self, strategies: Sequence[str], legal: np.ndarray, tie_break: str = "random", epsilon: float = 0.0
    ) -> np.ndarray:
        """Probabilities (B, n, K, 7) float32 with which each strategy acts for each player.

        NS and NH go to the nearest prey of their kind, NA to the nearest of either kind; of several equally near, to
        the first in reading order. They take a step that shortens the path there, all such steps being equally likely
        (or always the first of them, with `tie_break` "first"); when there they hunt if that is legal and stay
        otherwise; if no prey is left they stay. With probability `epsilon` any legal action is taken.
        """
        players, kinds = self.players, {HUNT_STAG: self.stags, HUNT_HARE: self.hares}
        around = self.table[players, :STAY]
        uniform = legal / legal.sum(2, dtype=np.float32, keepdims=True)
        result = np.zeros((*players.shape, len(strategies), NUM_ACTIONS), np.float32)
        for k, strategy in enumerate(strategies):
            if strategy == "random":
                result[:, :, k] = uniform
                continue
            hunted = HUNTED[strategy]
            here, target = self._nearest(np.concatenate([kinds[hunt] for hunt in hunted], 1))
            further = self.distances[self.boards[:, :, None], around, target[:, :, None]]
            nearer = (further < here[:, :, None]) & (here < FAR)[:, :, None]
            if tie_break == "first":
                nearer &= nearer.cumsum(2) == 1
            ways = nearer.sum(2)
            result[:, :, k, :STAY] = nearer / np.maximum(ways, 1)[:, :, None]
            hunts = (here == 0)[:, :, None] & legal[:, :, hunted]
            result[:, :, k, hunted] = hunts
            result[:, :, k, STAY] = (ways == 0) & ~hunts.any(2)
        if epsilon > 0.0:
            result = (1.0 - epsilon) * result + epsilon * uniform[:, :, None]
        return result

    def sample(self, probabilities: np.ndarray) -> np.ndarray:
        """Actions (B, n) drawn from (B, n, 7) with this step's own random numbers."""
        n = self.config.n_players
        u = uniforms(self.seeds, ACTIONS, self.t * n, n)
        total = probabilities.cumsum(2, dtype=np.float64)
        return (total <= (u * total[:, :, -1])[:, :, None]).sum(2)


def planes(
    players: np.ndarray, stags: np.ndarray, hares: np.ndarray, blocked: np.ndarray, config: Config
) -> np.ndarray:
    """Observations (N, n + 3, H, W) uint8 of rows of places (N, n), (N, S), (N, H) and blocked cells (N, cells + 1).

    The players of a row come ego first (see `ego_first`).
    """
    n, size = config.n_players, config.size
    result = np.zeros((len(players), config.channels, config.cells + 1), np.uint8)
    np.put_along_axis(result[:, :n], players[:, :, None], 1, 2)
    result[:, n] = blocked
    np.put_along_axis(result[:, n + 1], stags, 1, 1)
    np.put_along_axis(result[:, n + 2], hares, 1, 1)
    return result[:, :, :-1].reshape(len(players), config.channels, size, size)


def ego_first(values: np.ndarray, agents: np.ndarray) -> np.ndarray:
    """Rotate the columns of `values` (N, n, ...) so that a row begins with its agent (N,), and the others follow."""
    n = values.shape[1]
    order = (agents[:, None] + np.arange(n)) % n
    return values[np.arange(len(values))[:, None], order]


# One game, for PettingZoo ---------------------------------------------------------------------------------------------
class StagHunt(ParallelEnv):
    """Markov Stag-Hunt as a PettingZoo parallel environment.

    Players walk on a `size` x `size` board, all at once; several may share a cell. Actions: up, down, left, right,
    stay, hunt stag, hunt hare. Walking off the board or into an obstacle is illegal, as are hunting what is not in
    one's own cell, and hunting a stag without another player there; an illegal action acts as "stay". All who hunt a
    hare share `hare_reward`; two or more who hunt a stag in the same step share `stag_reward`. Prey and hunters then
    leave: a player is terminated at its one catch, and truncated after `max_cycles` steps. With `stag_moves` each stag
    walks at random, which makes the game stochastic.

    Observation: `observation` (n_players + 3, size, size) uint8, planes of 0 and 1: the players, ego first, then
    obstacles, stags, hares; and `action_mask` (7,) int8. `infos` hold `previous_actions` (n,), ego first: the joint
    action of the step before, -1 for none or gone, and `t`, the steps so far.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "name": "markov_stag_hunt_v0",
        "render_modes": ["human", "rgb_array", "ansi"],
        "is_parallelizable": True,
        "render_fps": 4,
    }
    action_names = ACTION_NAMES

    def __init__(
        self,
        size: int = 8,
        n_players: int = 4,
        n_stags: int = 1,
        n_hares: int = 4,
        n_blocks: int = 0,
        stag_reward: float = 10.0,
        hare_reward: float = 1.0,
        max_cycles: int = 35,
        stag_moves: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Make a game; `n_blocks` is the number of obstacles of 3 or 4 cells. Raises ValueError for impossible ones."""
        self.config = Config(
            size, n_players, n_stags, n_hares, n_blocks, stag_reward, hare_reward, stag_moves
        ).check()  # fmt: skip
        if max_cycles < 1:
            raise ValueError(f"max_cycles {max_cycles}: expected at least 1")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode {render_mode!r}: expected one of {self.metadata['render_modes']}")
        self.max_cycles, self.render_mode = max_cycles, render_mode
        self.possible_agents = [f"player_{i}" for i in range(n_players)]
        self.agents: list[str] = []
        self.channel_names = self.config.channel_names
        shape = (self.config.channels, size, size)
        self.observation_spaces = {
            agent: spaces.Dict({
                "observation": spaces.Box(0, 1, shape, np.uint8), "action_mask": spaces.MultiBinary(NUM_ACTIONS),
            })
            for agent in self.possible_agents
        }  # fmt: skip
        self.action_spaces = {agent: spaces.Discrete(NUM_ACTIONS) for agent in self.possible_agents}
        self._table = destinations(size).tolist()
        self._random, _ = seeding.np_random(None)

    def observation_space(self, agent: str) -> spaces.Space:
        """The agent's observation space, always the same object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        """The agent's action space, always the same object."""
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin a game and return all observations and infos; a seed always begins the same one."""
        if seed is not None:
            self._random, _ = seeding.np_random(seed)
        self._seed = int(self._random.integers(2**31)) if seed is None else int(seed)
        blocked, prey, players = draw_layouts(np.array([self._seed]), self.config)
        self._blocked = blocked[0].tolist()
        self._stags, self._hares = prey[0, : self.config.n_stags].tolist(), prey[0, self.config.n_stags :].tolist()
        self._players, self._t = players[0].tolist(), 0
        self._previous = [-1] * self.config.n_players
        self._rewards = [0.0] * self.config.n_players
        self.agents = self.possible_agents[:]
        return self._observe(self.agents), self._infos(self.agents)

    def _legal(self, i: int) -> list[int]:
        place, players = self._players[i], self._players
        if place == self.config.cells:
            return [0, 0, 0, 0, 1, 0, 0]
        moves = [int(not self._blocked[to]) for to in self._table[place][:STAY]]
        return [*moves, 1, int(place in self._stags and players.count(place) >= 2), int(place in self._hares)]

    def step(self, actions: Mapping[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """Carry out the actions of all living agents. Raises ValueError for a missing or an unknown action."""
        config, players, gone = self.config, self._players, self.config.cells
        acting = [int(name.split("_")[1]) for name in self.agents]
        done = [STAY] * config.n_players
        self._previous = [-1] * config.n_players
        for i, name in zip(acting, self.agents, strict=True):
            action = actions.get(name)
            if action is None or not 0 <= action < NUM_ACTIONS:
                raise ValueError(f"{name}: expected an action from 0 to {NUM_ACTIONS - 1}, got {action}")
            self._previous[i] = int(action)
            done[i] = int(action) if self._legal(i)[action] else STAY
        hunters: dict[tuple[int, int], list[int]] = {}  # (kind of hunt, cell) -> who
        for i in acting:
            if done[i] > STAY:
                hunters.setdefault((done[i], players[i]), []).append(i)
        after = [self._table[place][min(action, STAY)] for place, action in zip(players, done, strict=True)]
        self._rewards = [0.0] * config.n_players
        for (kind, cell), who in hunters.items():
            if kind == HUNT_STAG and len(who) < 2:
                continue
            prey, pay = (
                (self._stags, config.stag_reward) if kind == HUNT_STAG else (self._hares, config.hare_reward)
            )  # fmt: skip
            prey[prey.index(cell)] = gone
            for i in who:
                self._rewards[i], after[i] = pay / len(who), gone
        self._players = after
        if config.stag_moves:
            self._move_stags()
        self._t += 1

        names = self.agents
        over = self._t >= self.max_cycles
        terminations = {name: after[i] == gone for i, name in zip(acting, names, strict=True)}
        truncations = {name: over and not terminations[name] for name in names}
        self.agents = [name for name in names if not (terminations[name] or truncations[name])]
        rewards = {name: self._rewards[i] for i, name in zip(acting, names, strict=True)}
        return self._observe(names), rewards, terminations, truncations, self._infos(names)

    def _move_stags(self) -> None:
        count = self.config.n_stags
        moves = (uniforms(np.array([self._seed]), STAG_MOVES, self._t * count, count)[0] * 5).astype(int)
        for j, move in enumerate(moves):
            to = self._table[self._stags[j]][move]
            if not (self._blocked[to] or to in self._hares or to in self._stags[:j] + self._stags[j + 1 :]):
                self._stags[j] = to

    def _observe(self, names: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
        n, cells = self.config.n_players, self.config.cells
        flat = np.zeros((self.config.channels, cells + 1), np.uint8)
        flat[range(n), self._players] = 1
        flat[n] = self._blocked
        flat[n + 1, self._stags] = 1
        flat[n + 2, self._hares] = 1
        flat = flat[:, :-1].reshape(-1, self.config.size, self.config.size)
        result = {}
        for name in names:
            i = int(name.split("_")[1])
            mine = flat.copy()
            mine[:n] = np.concatenate((flat[i:n], flat[:i]))
            result[name] = {"observation": mine, "action_mask": np.array(self._legal(i), np.int8)}
        return result

    def _infos(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        numbers = [int(name.split("_")[1]) for name in names]
        previous = {i: np.array(self._previous[i:] + self._previous[:i], np.int8) for i in numbers}
        return {f"player_{i}": {"previous_actions": previous[i], "t": self._t} for i in numbers}

    def get_state(self) -> dict[str, np.ndarray]:
        """The whole state: places of `players`, `stags`, `hares` (cells = gone), `blocks` (cells,), `t`, `seed`.

        `seed` is what the steps of stags with `stag_moves` depend on; `previous_actions` (n,) begins with player 0.
        """
        return {
            "players": np.array(self._players), "stags": np.array(self._stags, int),
            "hares": np.array(self._hares, int), "blocks": np.array(self._blocked[:-1]),
            "t": np.array(self._t), "seed": np.array(self._seed),
            "previous_actions": np.array(self._previous, np.int8),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
        """Go to a state that `get_state` returned and return all living agents' observations and infos.

        `blocks`, `t` (0), `previous_actions` and `seed` (drawn anew) may be left out. Raises ValueError for unknown
        names, wrong shapes, or places off the board.
        """
        config = self.config
        shapes = {
            "players": (config.n_players,), "stags": (config.n_stags,), "hares": (config.n_hares,),
            "blocks": (config.cells,), "t": (), "seed": (), "previous_actions": (config.n_players,),
        }  # fmt: skip
        values = {name: np.asarray(value) for name, value in state.items()}
        if set(values) - set(shapes) or not {"players", "stags", "hares"} <= set(values):
            raise ValueError(f"expected a state of {', '.join(shapes)}, got {', '.join(values)}")
        for name, value in values.items():
            if value.shape != shapes[name]:
                raise ValueError(f"state: expected {name} of shape {shapes[name]}, got {value.shape}")
        for name in ("players", "stags", "hares"):
            if ((values[name] < 0) | (values[name] > config.cells)).any():
                raise ValueError(f"state: expected {name} at places from 0 to {config.cells}, got {values[name]}")
        self._players, self._stags, self._hares = (
            values[k].astype(int).tolist() for k in ("players", "stags", "hares")
        )
        self._blocked = [*np.asarray(values.get("blocks", np.zeros(config.cells))).astype(bool).tolist(), True]
        self._t, self._seed = int(values.get("t", 0)), int(values.get("seed", self._random.integers(2**31)))
        self._previous = np.asarray(values.get("previous_actions", [-1] * config.n_players)).astype(int).tolist()
        self._rewards = [0.0] * config.n_players
        over = self._t >= self.max_cycles
        pairs = zip(self.possible_agents, self._players, strict=True)
        self.agents = [name for name, place in pairs if place < config.cells and not over]
        return self._observe(self.agents), self._infos(self.agents)

    def render(self) -> np.ndarray | str | None:
        """A picture (height, width, 3) uint8, a text, or (with "human") the text on the terminal."""
        if self.render_mode == "rgb_array":
            return self._draw().pixels(self._caption())
        text = self._text()
        if self.render_mode == "human":
            print(text)
        return text if self.render_mode == "ansi" else None

    def _caption(self) -> str:
        acts = [ACTION_NAMES[action] if action >= 0 else "-" for action in self._previous]
        pay = [f" +{reward:g}" if reward else "" for reward in self._rewards]
        last = ", ".join(f"{i} {act}{got}" for i, (act, got) in enumerate(zip(acts, pay, strict=True)))
        return f"step {self._t} of {self.max_cycles}" + (f": {last}" if self._t else "")

    def _text(self) -> str:
        """The board as text: a digit per player, S stag, h hare, # obstacle."""
        cells = ["#" if blocked else "" for blocked in self._blocked[:-1]]
        for letters, places in (("S", self._stags), ("h", self._hares), (None, self._players)):
            for i, place in enumerate(places):
                if place < self.config.cells:
                    cells[place] += letters or str(i)
        width = max(2, *(len(cell) for cell in cells))
        size = self.config.size
        rows = [
            " ".join((cell or ".").ljust(width) for cell in cells[i : i + size]).rstrip()
            for i in range(0, len(cells), size)
        ]
        return "\n".join([*rows, self._caption()])

    def _draw(self) -> Picture:
        size = self.config.size
        picture = Picture((0.0, 0.0), (float(size), float(size)), max(48, 16 * math.ceil(26 / size)))

        def corner(place: int) -> tuple[float, float]:
            return float(place % size), float(size - 1 - place // size)

        for place, blocked in enumerate(self._blocked[:-1]):
            x, y = corner(place)
            picture.box((x, y), (x + 1.0, y + 1.0), GREY, 0 if blocked else 1)
        for places, colour, letter in ((self._stags, GREEN, "S"), (self._hares, (214, 150, 40), "h")):
            for place in places:
                if place < self.config.cells:
                    x, y = corner(place)
                    picture.box((x + 0.08, y + 0.08), (x + 0.92, y + 0.92), colour)
                    picture.text(letter, (x + 0.16, y + 0.76), PAPER, 20)
        colours = (BLUE, RED, (120, 70, 160), (20, 140, 150))
        for i, place in enumerate(self._players):
            if place < self.config.cells:
                x, y = corner(place)
                here = [j for j, other in enumerate(self._players) if other == place]
                angle = 2.0 * math.pi * here.index(i) / len(here)
                off = 0.22 if len(here) > 1 else 0.0
                x, y = x + 0.54 + off * math.cos(angle), y + 0.44 + off * math.sin(angle)
                picture.disc((x, y), 0.2, PAPER)
                picture.disc((x, y), 0.18, colours[i % len(colours)])
                picture.text(str(i), (x - 0.07, y), PAPER, 18)
        if not any(place < self.config.cells for place in self._players):
            picture.text("all players have gone", (0.3, size / 2), INK)
        return picture


def parallel_env(**kwargs: Any) -> StagHunt:
    """The game for agents that act at the same time; arguments of `StagHunt`."""
    return StagHunt(**kwargs)


def raw_env(**kwargs: Any) -> AECEnv:
    """The game in PettingZoo's turn-by-turn form, without wrappers."""
    return parallel_to_aec(StagHunt(**kwargs))


def env(**kwargs: Any) -> AECEnv:
    """The game in PettingZoo's turn-by-turn form, with its usual wrappers."""
    return wrappers.OrderEnforcingWrapper(wrappers.AssertOutOfBoundsWrapper(raw_env(**kwargs)))


# Records of games -----------------------------------------------------------------------------------------------------
def rosters(strategies: int, n_players: int) -> tuple[np.ndarray, np.ndarray]:
    """All assignments (V, n) of strategies to seats and their probabilities (V,).

    Each number of players of each strategy is equally likely (with two strategies, 0 to n of the first), and then each
    order of the seats: fixed seats would give the strategy away.
    """
    seats = np.array(list(itertools.product(range(strategies), repeat=n_players)))
    _, kind, count = np.unique(np.sort(seats, 1), axis=0, return_inverse=True, return_counts=True)
    return seats, 1.0 / (len(count) * count[kind.reshape(-1)])


def draw_rosters(seeds: np.ndarray, seats: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The roster (B, n) of each game of these seeds (B,): one of `seats` (V, n), with probabilities like `prior`."""
    u = uniforms(seeds, ROSTER, 0, 1)[:, 0]
    return seats[np.searchsorted(prior.cumsum(), u * prior.sum(), "right")]


def collect(
    rows: int = 107_010,
    config: Config = Config(),  # noqa: B008  (immutable)
    max_cycles: int = 18,
    strategies: Sequence[str] = ("NS", "NH"),
    seed: int = 1,
    tie_break: str = "random",
    epsilon: float = 0.0,
    games: int = 1_024,
) -> Record:
    """Play scripted policies with each other until there are exactly `rows` rows (the last game is cut short).

    A row is what one living player saw and did at one step. `games` are played at once; their number does not change
    the record. 8x8 with 18 steps has the class shares of the published note on this data. Raises ValueError for sizes
    that make no sense.
    """
    if rows < 1 or max_cycles < 1 or set(strategies) - set(STRATEGIES) or not strategies:
        raise ValueError(f"expected at least one row and step, and strategies of {STRATEGIES}, got {strategies}")
    seats, prior = rosters(len(strategies), config.n_players)
    parts, rosters_played, seeds_played, missing = [], [], [], rows
    while missing > 0:
        first = sum(len(part) for part in seeds_played)
        # No more games than may be needed: a player has at most max_cycles rows.
        count = min(games, max(16, math.ceil(1.5 * missing / (config.n_players * max_cycles))))
        seeds = episode_seeds(seed, first, count)
        roster = draw_rosters(seeds, seats, prior)
        part = play(VectorStagHunt(config, seeds), roster, max_cycles, strategies, tie_break, epsilon)
        enough = np.searchsorted(np.bincount(part["episode"], minlength=count).cumsum(), missing) + 1
        if enough <= count:
            part, count = cut(part, missing), int(enough)
        part["episode"] += first
        missing -= len(part["episode"])
        parts.append(part)
        rosters_played.append(roster[:count])
        seeds_played.append(seeds[:count])
    arrays = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    arrays |= {"roster": np.concatenate(rosters_played), "episode_seed": np.concatenate(seeds_played)}
    arrays["split"] = split_episodes(len(arrays["roster"]), seed)
    meta = {
        "env_id": "markov_stag_hunt-v0", "env_kwargs": {**config._asdict(), "max_cycles": max_cycles},
        "strategies": list(strategies), "action_names": list(ACTION_NAMES), "channel_names": config.channel_names,
        "roster_prior": "each number of players of each strategy equally likely, then each order of seats",
        "tie_break": tie_break, "epsilon": epsilon, "seed": seed, "observation_scale": 1,
    }  # fmt: skip
    return Record({name: arrays[name].astype(FIELDS[name].dtype, copy=False) for name in FIELDS}, meta)


def play(
    games: VectorStagHunt,
    roster: np.ndarray,
    max_cycles: int,
    strategies: Sequence[str],
    tie_break: str,
    epsilon: float,
) -> Arrays:
    """Play games to their end, seats as in `roster` (B, n), and return their rows by episode, agent and step."""
    history: list[Arrays] = []
    previous = np.full(roster.shape, -1, np.int8)
    for _ in range(max_cycles):
        alive = games.alive
        if not alive.any():
            break
        legal = games.legal()
        probabilities = games.policy_probabilities(strategies, legal, tie_break, epsilon)
        own = np.take_along_axis(probabilities, roster[:, :, None, None], 2)[:, :, 0]
        actions = np.where(alive, games.sample(own), -1)
        before = {"players": games.players, "stags": games.stags.copy(), "hares": games.hares.copy()}
        rewards = games.step(np.where(alive, actions, STAY), legal)
        history.append({
            **before, "alive": alive, "legal": legal, "probabilities": probabilities,
            "actions": actions.astype(np.int8), "previous": previous,
            "rewards": rewards.astype(np.float32), "next_players": games.players,
            "next_stags": games.stags.copy(), "next_hares": games.hares.copy(),
        })  # fmt: skip
        previous = actions.astype(np.int8)
    steps = {name: np.stack([step[name] for step in history]) for name in history[0]}  # (T, B, ...)
    episode, agent, t = np.nonzero(steps["alive"].transpose(1, 2, 0))
    row = {name: values[t, episode] for name, values in steps.items() if values.ndim == 3 and name != "alive"}
    turned = {
        name: ego_first(row[name], agent) for name in ("players", "next_players", "actions", "previous", "rewards")
    }
    blocked, ended = games.blocked[episode], turned["next_players"][:, 0] == games.config.cells
    return {
        "obs": planes(turned["players"], row["stags"], row["hares"], blocked, games.config),
        "action": turned["actions"][:, 0], "action_mask": steps["legal"][t, episode, agent],
        "t": t.astype(np.int16), "episode": episode.astype(np.int32), "agent": agent.astype(np.int8),
        "reward": turned["rewards"][:, 0], "terminated": ended, "truncated": ~ended & (t == max_cycles - 1),
        "prev_actions": turned["previous"], "joint_action": turned["actions"], "rewards": turned["rewards"],
        "next_obs": planes(turned["next_players"], row["next_stags"], row["next_hares"], blocked, games.config),
        "strategy": roster[episode, agent], "policy_probs": steps["probabilities"][t, episode, agent],
    }  # fmt: skip


def cut(part: Arrays, rows: int) -> Arrays:
    """The first `rows` rows, in the order episode, step, agent: of the last game, the beginning, with all players."""
    order = np.lexsort((part["agent"], part["t"], part["episode"]))
    chosen = np.sort(order[:rows])
    return {name: values[chosen] for name, values in part.items()}


def replay(data: Record, episode: int, caption: Callable[[int], str]) -> Iterator[np.ndarray]:
    """Play a recorded game again: the picture (height, width, 3) uint8 before each step of it, as far as it goes.

    Under the board is a line for each living player: the caption of its row (a number from 0 to N - 1).
    """
    arrays, game = data.arrays, StagHunt(**data.meta["env_kwargs"], render_mode="rgb_array")
    game.reset(seed=int(arrays["episode_seed"][episode]))
    for t in itertools.count():
        rows = np.flatnonzero((arrays["episode"] == episode) & (arrays["t"] == t))
        if not game.agents or len(rows) < len(game.agents):
            return
        below, text = 16 * (game.config.n_players + 1), "\n".join(caption(row) for row in rows)
        picture = PIL.ImageOps.expand(PIL.Image.fromarray(game.render()), (0, 0, 0, below), "white")
        PIL.ImageDraw.Draw(picture).multiline_text((10, picture.height - below + 6), text, "black", spacing=3)
        yield np.asarray(picture)
        game.step({f"player_{arrays['agent'][row]}": arrays["action"][row] for row in rows})


# What can be known ----------------------------------------------------------------------------------------------------
def history_posterior(data: Record, policies: np.ndarray | None = None) -> np.ndarray:
    """The exact probability (N, K) that the acting agent has each strategy, given all that happened before the row.

    Bayes' rule over all rosters: the prior, times the probability that each would have acted as it was seen to. The
    game itself does not depend on the roster, given the actions, so it cancels. Needs the rows of all players.
    `policies` (N, K, A) are what each strategy would have done (if left out: the record's).
    """
    arrays = data.arrays
    probabilities = arrays["policy_probs"] if policies is None else policies
    n = arrays["prev_actions"].shape[1]
    rows, strategies, _ = probabilities.shape
    seats, prior = rosters(strategies, n)
    holds = (seats[:, :, None] == np.arange(strategies)).astype(np.float64)  # (V, n, K)
    episode, t, agent = arrays["episode"].astype(np.int64), arrays["t"].astype(np.int64), arrays["agent"].astype(int)
    _, episode = np.unique(episode, return_inverse=True)
    likelihood = np.zeros((episode.max() + 1, t.max() + 1, n, strategies))
    acted = probabilities[np.arange(rows), :, arrays["action"]].astype(np.float64)
    likelihood[episode, t, agent] = np.log(np.maximum(acted, 1e-300))  # players who are gone add nothing
    before = np.zeros_like(likelihood)
    before[:, 1:] = likelihood.cumsum(1)[:, :-1]
    score = before.reshape(*before.shape[:2], -1) @ holds.reshape(len(seats), -1).T + np.log(prior)
    score = np.exp(score - score.max(2, keepdims=True))
    marginal = np.einsum("etv,vnk->etnk", score / score.sum(2, keepdims=True), holds, optimize=True)
    return marginal[episode, t, agent]


def commonest_shares(obs: np.ndarray, actions: np.ndarray, config: Config, draws: int = 100) -> np.ndarray:
    """How often (N,) the most common next state follows frames (N, C, H, W) and joint actions (N, n), -1 for gone.

    Only stags that move leave anything to chance. Each state is set `draws` times, each time with a new seed, so the
    share of the commonest outcome is, on average, a little above its probability, as a maximum of estimates is.
    """
    game, shares = StagHunt(**config._asdict(), max_cycles=2), np.zeros(len(obs))

    def places(plane: np.ndarray, count: int) -> np.ndarray:
        there = np.flatnonzero(plane)
        return np.pad(there, (0, count - len(there)), constant_values=config.cells)

    for row, planes in enumerate(obs.reshape(*obs.shape[:2], -1)):
        *players, blocks, stags, hares = planes
        state = {
            "players": np.concatenate([places(plane, 1) for plane in players]), "blocks": blocks,
            "stags": places(stags, config.n_stags), "hares": places(hares, config.n_hares),
        }  # fmt: skip
        outcomes: Counter[tuple[int, ...]] = Counter()
        for seed in range(draws):
            game.set_state({**state, "seed": np.array(seed)})
            game.step({name: int(actions[row, int(name.split("_")[1])]) for name in game.agents})
            outcomes[tuple(sorted(game.get_state()["stags"].tolist()))] += 1
        shares[row] = max(outcomes.values()) / draws
    return shares


def history_bayes(data: Record, known: Sequence[str] | None = None, slip: float = 0.0) -> np.ndarray:
    """Predictions (N, A), by Bayes' rule, of an observer of the whole game who knows the strategies `known`.

    The observer assumes that all players have one of these (if left out: one of the record's), and that with
    probability `slip` they take any legal action. Without slips, an action that none of these would take is impossible.
    """
    policies = data.arrays["policy_probs"].astype(np.float64)
    if known is not None:
        policies = policies[:, [data.meta["strategies"].index(name) for name in known]]
    if slip > 0.0:
        legal = data.arrays["action_mask"]
        policies = (1.0 - slip) * policies + slip * (legal / legal.sum(1, keepdims=True))[:, None]
    return np.einsum("rk,rka->ra", history_posterior(data, policies), policies)


def ceilings(data: Record) -> dict[str, np.ndarray]:
    """Predictions (N, A) by observers who know the policies: `history Bayes`; `oracle`, who also knows the strategy.

    Nobody who sees the whole game can do better than the first, and nobody at all better than the second.
    """
    rows = np.arange(len(data.arrays["strategy"]))
    oracle = data.arrays["policy_probs"][rows, data.arrays["strategy"]].astype(np.float64)
    return {"history Bayes": history_bayes(data), "oracle": oracle}
