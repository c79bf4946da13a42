"""Point-mass environments: Catch Point, Hard Move and Simple Move.

From "HyAR: Addressing Discrete-Continuous Action Reinforcement Learning via Hybrid Action
Representation" (Li et al., ICLR 2022), where they are variants of the multi-agent particle
environments. Written from a description of the dynamics; no code was copied.

In all three an agent with some inertia should reach a landmark; both begin anywhere in
[-1, 1] x [-1, 1] and there are no walls. Being within 0.2 of it counts as being there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import cos, pi, sin

import numpy as np
from gymnasium import spaces

from envs.hybrid import Bounds, HybridAction, HybridEnv, StepResult, read_state
from envs.picture import BLUE, GREEN, GREY, INK, Picture

UNIT: Bounds = ((-1.0, 1.0),)
DT = 0.1
KEPT_SPEED = 0.75  # per step
FORCE = 2.0
MAX_SPEED = DT * FORCE / (1.0 - KEPT_SPEED)  # a limit that is never reached
NEAR, NEAR_SQUARED = 0.2, 0.04
PRIZE = 20.0
SUCCESS = 4.0  # a step with a greater reward is a success; others are negative or 0
MAX_TRIES = 10  # failed catches; one more ends the episode
MOVE, CATCH = 0, 1


class PointMassEnv(HybridEnv):
    """Base class: a point of mass 1 that is pushed, and a landmark."""

    def __init__(
        self,
        parameter_bounds: Sequence[Bounds],
        time_limit: int,
        render_mode: str | None,
        shared_parameters: bool,
    ) -> None:
        """Make the environment; `time_limit` is in steps, the rest as in `HybridEnv`."""
        self._time_limit = time_limit
        furthest = 2.0 + DT * MAX_SPEED * time_limit
        high = np.array((MAX_SPEED, MAX_SPEED, furthest, furthest), dtype=np.float32)
        space = spaces.Box(-high, high, dtype=np.float32)
        super().__init__(parameter_bounds, space, render_mode, shared_parameters)

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        return -np.ones(4), np.ones(4)  # published agents take these observations as they are

    def _start(self) -> None:
        self._agent = (self._uniform(-1.0, 1.0), self._uniform(-1.0, 1.0), 0.0, 0.0)
        self._landmark = (self._uniform(-1.0, 1.0), self._uniform(-1.0, 1.0))
        self._valid_time = 0  # failed catches so far
        self._ep_step = 0
        self._force = (0.0, 0.0)

    def _push(self, force_x: float, force_y: float) -> float:
        """Move for one step under a force: returns the squared distance to the landmark afterwards."""
        x, y, vx, vy = self._agent
        if self.render_mode:
            self._trail.append((x, y))
        vx = KEPT_SPEED * vx + DT * force_x
        vy = KEPT_SPEED * vy + DT * force_y
        x += DT * vx
        y += DT * vy
        self._agent = (x, y, vx, vy)
        self._force = (force_x, force_y)
        self._ep_step += 1
        landmark_x, landmark_y = self._landmark
        return (landmark_x - x) ** 2 + (landmark_y - y) ** 2

    def _end(self, action: tuple[int, list[float]], reward: float, given_up: bool = False) -> StepResult:
        """Return what `step` returns."""
        success = reward > SUCCESS
        terminated = success or given_up
        truncated = not terminated and self._ep_step >= self._time_limit
        return self._result(action, reward, terminated, truncated, success)

    def _observe(self) -> np.ndarray:
        x, y, vx, vy = self._agent
        landmark_x, landmark_y = self._landmark
        return np.array((vx, vy, landmark_x - x, landmark_y - y), dtype=np.float32)

    def get_state(self) -> dict[str, np.ndarray]:
        """Return the physical state: `state` (6,) float64, `valid_time` and `ep_step`.

        `state` is the agent's x, y, vx, vy and the landmark's x, y; `valid_time` the number of
        failed catches (0 except in Catch Point), `ep_step` that of the steps taken.
        """
        return {
            "state": np.array((*self._agent, *self._landmark)),
            "valid_time": np.array(self._valid_time),
            "ep_step": np.array(self._ep_step),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go to a state that `get_state` returned (the two counters are 0 if left out).

        Raises `ValueError` for unknown names or a `state` that isn't six finite numbers.
        """
        counters = ("valid_time", "ep_step")
        values, (self._valid_time, self._ep_step) = read_state(state, 6, counters)
        self._agent = (*values[:4],)
        self._landmark = (*values[4:],)
        self._force = (0.0, 0.0)
        self._forget()

    def _draw(self) -> Picture:
        x, y = self._agent[:2]
        # The square in which episodes begin, or more if the agent left it.
        view = max(1.25, abs(x) + 0.3, abs(y) + 0.3)
        unit = view / 1.25
        picture = Picture((-view, -view), (view, view), 400.0 / (2.0 * view))
        picture.box((-1.0, -1.0), (1.0, 1.0), (225, 224, 220), 2)
        picture.disc(self._landmark, NEAR, (190, 226, 200))
        picture.disc(self._landmark, NEAR, GREEN, 2)
        picture.disc(self._landmark, 0.02 * unit, GREEN)
        picture.path([*self._trail, (x, y)], GREY)
        self._draw_actuators(picture, 0.15 * unit)
        force_x, force_y = self._force
        picture.path([(x, y), (x + 0.15 * unit * force_x, y + 0.15 * unit * force_y)], BLUE, 3)
        picture.disc((x, y), 0.05 * unit, BLUE)
        return picture

    def _draw_actuators(self, picture: Picture, length: float) -> None:
        """Add to the picture what can push the agent."""


class CatchPointEnv(PointMassEnv):
    """Catch Point (Li et al. 2022): go to the landmark, then catch it.

    Observation: 4 numbers, float32: the agent's vx, vy and the landmark's x, y relative to it.

    Actions: `Tuple(Discrete(2), Tuple(Box(1), Box(0)))`. Move with force 2 in a direction p in
    [-1, 1], where p * pi is the angle clockwise from the y axis; or catch, without parameters,
    while drifting on. Instead of two arrays, the chosen action's own may be passed.

    Reward: minus the squared distance, plus 20 for a catch within 0.2 of the landmark; 0 for
    whatever is done after 11 failed catches. Terminated by the catch, or by that 0; truncated
    after 25 steps. `info` has `substeps` (1) at each step and `is_success` at the last.
    """

    action_names = ("move", "catch")

    def __init__(self, render_mode: str | None = None) -> None:
        """Make the environment; `render_mode` is `None` or `"rgb_array"`."""
        super().__init__((UNIT, ()), 25, render_mode, shared_parameters=False)

    def step(self, action: HybridAction) -> StepResult:
        """Move or catch.

        Returns the observation (4,) float32, reward, terminated, truncated and info. Raises
        `ValueError` if the action is malformed.
        """
        index, parameters = self._read_action(action)
        if index == MOVE:
            angle = pi * parameters[0]
            squared_distance = self._push(FORCE * sin(angle), FORCE * cos(angle))
        else:
            squared_distance = self._push(0.0, 0.0)
        if self._valid_time > MAX_TRIES:
            return self._end((index, parameters), 0.0, given_up=True)
        reward = -squared_distance
        if index == CATCH:
            if squared_distance <= NEAR_SQUARED:
                reward += PRIZE
            else:
                self._valid_time += 1
        return self._end((index, parameters), reward)

    def _draw(self) -> Picture:
        picture = super()._draw()
        if self._last_action is not None and self._last_action[0] == CATCH:
            picture.disc(self._agent[:2], NEAR, BLUE, 2)
        return picture

    def _ending(self) -> str:
        return "time is up" if self._ep_step >= self._time_limit else "out of tries"

    def _caption(self) -> str:
        return f"{super()._caption()}    {MAX_TRIES + 1 - self._valid_time} tries left"


class MoveEnv(PointMassEnv):
    """Base class of the environments where being near the landmark is enough."""

    def __init__(self, motions: Sequence[tuple[float, float]], render_mode: str | None) -> None:
        """Make the environment from the push (x, y) of each discrete action."""
        self._motions = motions
        super().__init__((UNIT,) * len(motions), 30, render_mode, shared_parameters=True)

    def step(self, action: HybridAction) -> StepResult:
        """Push.

        Returns the observation (4,) float32, reward, terminated, truncated and info. Raises
        `ValueError` if the action is malformed.
        """
        index, parameters = self._read_action(action)
        motion_x, motion_y = self._motions[index]
        force = FORCE * parameters[0]
        squared_distance = self._push(force * motion_x, force * motion_y)
        reward = -squared_distance
        if squared_distance <= NEAR_SQUARED:
            reward += PRIZE
        return self._end((index, parameters), reward)


class HardMoveEnv(MoveEnv):
    """Hard Move (Li et al. 2022): n actuators around the agent, one action per subset of them.

    Observation: 4 numbers, float32: the agent's vx, vy and the landmark's x, y relative to it.

    Actions: `Tuple(Discrete(2**n), Box(1))`. The bits of the discrete action, the most significant
    one first, tell which actuators push; the parameter in [-1, 1], clipped, how strongly. Many of
    the actions have the same effect, or none.

    Reward: minus the squared distance, plus 20 within 0.2 of the landmark. Terminated there;
    truncated after 30 steps. `info` has `substeps` (1) at each step and `is_success` at the last.
    """

    def __init__(self, n: int = 4, render_mode: str | None = None) -> None:
        """Make the environment with `n` actuators; raises `ValueError` if not 1 <= n <= 16."""
        if not 1 <= n <= 16:
            raise ValueError(f"n, the number of actuators, must be in 1..16, got {n}")
        self._n = n
        super().__init__(actuator_motions(n), render_mode)

    def _draw_actuators(self, picture: Picture, length: float) -> None:
        x, y = self._agent[:2]
        on = _bits(self._last_action[0] if self._last_action is not None else 0, self._n)
        for (dx, dy), bit in zip(_actuators(self._n), on, strict=True):
            end = (x + length * dx, y + length * dy)
            picture.path([(x, y), end], INK if bit else GREY, 3 if bit else 1)

    def _caption(self) -> str:
        if self._last_action is None:
            return super()._caption()
        index = self._last_action[0]
        return super()._caption().replace(f"action {index}", f"actuators {index:0{self._n}b}")


class SimpleMoveEnv(MoveEnv):
    """Simple Move (Li et al. 2022): left, right, down or up, and how strongly.

    Observation, reward, termination and truncation are Hard Move's.

    Actions: `Tuple(Discrete(4), Box(1))`, the parameter in [-1, 1], clipped. A negative one pushes
    the other way.
    """

    action_names = ("left", "right", "down", "up")

    def __init__(self, render_mode: str | None = None) -> None:
        """Make the environment; `render_mode` is `None` or `"rgb_array"`."""
        super().__init__(((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)), render_mode)


def _bits(index: int, n: int) -> list[int]:
    """Return the n bits of an action, the most significant one first."""
    return [index >> (n - 1 - position) & 1 for position in range(n)]


def _actuators(n: int) -> list[tuple[float, float]]:
    """Return the actuators' directions, rounded as in the original implementation."""
    angles = [2.0 * pi * number / n for number in range(n)]
    return [(round(cos(angle), 3), round(sin(angle), 3)) for angle in angles]


@cache
def actuator_motions(n: int) -> tuple[tuple[float, float], ...]:
    """Return the push of each of the 2**n subsets of n actuators, as (x, y).

    It is the sum of the actuators' directions; the strongest of all pushes has the norm 1.
    """
    on = np.array([_bits(index, n) for index in range(2**n)], dtype=np.float64)
    motions = on @ np.array(_actuators(n))
    motions /= np.linalg.norm(motions, axis=1).max()
    return tuple((x, y) for x, y in motions.tolist())
