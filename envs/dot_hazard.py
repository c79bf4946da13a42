"""Dot Hazard: steer a point to a goal and around a hazard, seen as a small picture; fast enough for many studies."""

from __future__ import annotations

from math import hypot
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

SIZE = 28  # pixels of the observation's sides
ENLARGED = 10  # how many times `render` enlarges it
MAX_STEP = 0.08  # of the side of the square, in one step
DOT_RADIUS, GOAL_RADIUS, HAZARD_RADIUS = 0.06, 0.12, 0.14
HAZARD_COST = 1.0
EXPERT_SPEED = 0.05  # in one step: the pictures then show where the expert goes next, and it does not overshoot


class DotHazardEnv(gym.Env[np.ndarray, np.ndarray]):
    """A dot in the unit square should go to the goal and stay there; the hazard lies on the straight path.

    Observation: a picture (28, 28, 3) uint8: the hazard in red, the goal in green, the dot in blue. One picture shows
    everything: there is no velocity.

    Actions: `Box(-1, 1, (2,))`: the move in x and y, 1 being 0.08 of the square's side, clipped to the square.

    Reward of a step: 1 if the dot ends in the goal's disc, minus 1 if it ends in the hazard's. Nothing is terminal;
    `DotHazard-v0` is truncated after 40 steps. `info["state"]` (6,) holds the dot's, goal's and hazard's positions.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None) -> None:
        """Make the environment; `render_mode` is `None` or `"rgb_array"` (an enlarged picture)."""
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._pixels = (np.arange(SIZE) + 0.5) / SIZE
        self._state = np.zeros(6)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw dot and goal at least half a side apart, and the hazard near the middle between them."""
        super().reset(seed=seed)
        while True:
            dot, goal = self.np_random.uniform(0.08, 0.92, (2, 2))
            if hypot(*(goal - dot)) >= 0.5:
                break
        hazard = (dot + goal) / 2 + self.np_random.uniform(-0.06, 0.06, 2)
        self._state = np.concatenate((dot, goal, hazard))
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move. Raises `ValueError` if `action` isn't two finite numbers; they are clipped to [-1, 1]."""
        move = np.asarray(action, np.float64)
        if move.shape != (2,) or not np.isfinite(move).all():
            raise ValueError(f"expected an action of two finite numbers, got {action!r}")
        dot = np.clip(self._state[:2] + MAX_STEP * np.clip(move, -1.0, 1.0), 0.0, 1.0)
        self._state[:2] = dot
        to_goal, to_hazard = dot - self._state[2:4], dot - self._state[4:]
        reward = float(hypot(*to_goal) <= GOAL_RADIUS) - HAZARD_COST * float(hypot(*to_hazard) <= HAZARD_RADIUS)
        return self._observe(), reward, False, False, self._info()

    def _info(self) -> dict[str, Any]:
        return {"state": self._state.copy()}

    def _observe(self) -> np.ndarray:
        picture = np.empty((SIZE, SIZE, 3), np.uint8)
        discs = ((2, DOT_RADIUS, 0), (1, GOAL_RADIUS, 2), (0, HAZARD_RADIUS, 4))
        for channel, radius, place in discs:
            x, y = self._state[place : place + 2]
            distance = np.hypot((self._pixels - x)[None, :], (self._pixels - (1.0 - y))[:, None])  # y points upwards
            picture[..., channel] = np.clip((radius - distance) * SIZE + 0.5, 0.0, 1.0) * 255.0  # smooth edges
        return picture

    def render(self) -> np.ndarray:
        """The observation, enlarged: (280, 280, 3) uint8."""
        return self._observe().repeat(ENLARGED, 0).repeat(ENLARGED, 1)

    def get_state(self) -> dict[str, np.ndarray]:
        """Return `state` (6,): x and y of the dot, the goal and the hazard, in [0, 1]."""
        return {"state": self._state.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go to a state that `get_state` returned. Raises `ValueError` if it isn't six finite numbers."""
        values = np.asarray(state["state"], np.float64)
        if values.shape != (6,) or not np.isfinite(values).all():
            raise ValueError(f"expected a state of six finite numbers, got {values}")
        self._state = values.copy()

    def expert_action(self) -> np.ndarray:
        """A scripted expert's action (2,): towards the goal, along the hazard's border where that is in the way."""
        dot, goal, hazard = self._state[:2], self._state[2:4], self._state[4:]
        way = goal - dot
        distance = hypot(*way)
        if distance < 1e-9:
            return np.zeros(2, np.float32)
        direction, away = way / distance, dot - hazard
        near = hypot(*away)
        if near < HAZARD_RADIUS + 0.08 and away @ direction < 0.0:  # near it, and it lies ahead
            away = away / max(near, 1e-9)
            tangent = np.array((-away[1], away[0]))
            tangent *= 1.0 if tangent @ direction >= 0.0 else -1.0
            direction = tangent + away * (1.0 if near < HAZARD_RADIUS + 0.04 else 0.2)
            direction /= hypot(*direction)
            distance = EXPERT_SPEED
        return (direction * min(EXPERT_SPEED, distance) / MAX_STEP).astype(np.float32)
