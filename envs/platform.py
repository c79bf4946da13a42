"""Platform: run, hop and leap over two gaps and past two enemies to the end of the level.

From "Reinforcement Learning with Parameterized Actions" (Masson, Ranchod, Konidaris, AAAI 2016),
with the constants of the widely used `gym-platform`. Written from a description of the dynamics;
no code was copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.hybrid import HybridAction, HybridEnv, StepResult, read_state
from envs.picture import BLUE, GREEN, GREY, INK, RED, Picture

RUN, HOP, LEAP = 0, 1, 2
PARAMETER_BOUNDS = (((0.0, 30.0),), ((0.0, 720.0),), ((0.0, 430.0),))
TIME_LIMIT = 200  # environment steps

# Lengths are in pixels of the original game; y grows upwards; positions are lower left corners.
PLATFORMS = ((0.0, 250.0), (475.0, 275.0), (985.0, 50.0))  # (left end, width)
PLATFORM_HEIGHT = 40.0
LEVEL_END = 1035.0
WIDTH, HEIGHT = 20.0, 30.0  # of the player and of an enemy
# What is seen from the first, second and third platform: its width, the next one's width, the gap
# between them, its left end, the difference in height.
SEGMENTS = (
    (250.0, 275.0, 225.0, 0.0, 0.0),
    (275.0, 50.0, 235.0, 475.0, 0.0),
    (50.0, 0.0, 0.0, 985.0, 0.0),
)

DT = 0.05  # seconds in a sub-step
RUN_SUBSTEPS = 20
GRAVITY = 9.8
# Height that a jump gains, its greatest change of speed and its duration in seconds.
JUMPS = {jump: (height, 200.0 - height, 2.0 * height / GRAVITY + 1.0) for jump, height in ((HOP, 35.0), (LEAP, 25.0))}
JUMP_NOISE, SPEED_NOISE, ENEMY_NOISE = 1.0, 0.025, 0.025
MAX_ACCELERATION_X, MAX_ACCELERATION_Y = 600.0, 4000.0
MAX_SPEED_X, MAX_SPEED_Y, MAX_SPEED_ON_GROUND = 100.0, 200.0, 70.0
DAMPING = 0.99
ENEMY_SPEED = 30.0

SKY, EARTH, GRASS = (222, 236, 245), (128, 96, 72), (96, 150, 80)


class PlatformEnv(HybridEnv):
    """Platform (Masson et al. 2016).

    Observation: 9 numbers in [0, 1], float32: the player's x and vx, the x and vx of the enemy on
    this platform (the second platform's once x > 475), the width of this platform and of the
    next, the gap between them, where this platform begins, their difference in height (always 0).

    Actions: `Tuple(Discrete(3), Tuple(Box(1), Box(1), Box(1)))`. Run with speed gain p in [0, 30]
    for one second; hop with p in [0, 720] or leap with p in [0, 430] until the player lands or
    dies. Parameters out of range are clipped. Instead of three arrays, the chosen action's own
    array of shape (1,) may be passed.

    Reward: the distance covered in this step over the length of the level, so the return of a
    finished level is 1. Terminated on falling, touching an enemy or reaching the end; truncated
    after 200 steps. `info` has `substeps` at each step and `is_success` at the last.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 5}
    action_names = ("run", "hop", "leap")

    def __init__(self, render_mode: str | None = None) -> None:
        """Make the environment; `render_mode` is `None` or `"rgb_array"`."""
        super().__init__(PARAMETER_BOUNDS, spaces.Box(0.0, 1.0, (9,), np.float32), render_mode)

    def _start(self) -> None:
        self._player = (0.0, PLATFORM_HEIGHT, 0.0, 0.0)  # x, y, vx, vy
        self._enemies = [  # x, y, vx
            (left + width - WIDTH, PLATFORM_HEIGHT, -ENEMY_SPEED) for left, width in PLATFORMS[:2]
        ]
        self._ep_step = 0

    def step(self, action: HybridAction) -> StepResult:
        """Carry out an action to its end.

        Returns the observation (9,) float32, reward, terminated, truncated and info. Raises
        `ValueError` if the action is malformed.
        """
        index, parameters = self._read_action(action)
        x_before = self._player[0]
        dead, substeps = self._simulate(index, parameters[0])
        x = self._player[0]
        success = x >= LEVEL_END
        # Dying still pays for the distance covered, as in the original implementation.
        reward = ((LEVEL_END if success else x) - x_before) / LEVEL_END
        self._ep_step += 1
        terminated = dead or success
        truncated = not terminated and self._ep_step >= TIME_LIMIT
        return self._result((index, parameters), reward, terminated, truncated, success, substeps)

    def _simulate(self, action: int, parameter: float) -> tuple[bool, int]:
        """Run sub-steps until the action ends: returns whether the player died, and their number.

        One function with local variables only: it runs about 75 times per environment step.
        Draws per sub-step, in this order: two for a jump's take-off, one for the player's speed,
        one for the enemy's.
        """
        normal = self._normal
        trail: list[tuple[float, ...]] | None = [] if self.render_mode else None
        x, y, vx, vy = self._player
        enemies = self._enemies
        on_ground = _on_platform(x, y)
        substeps = 0
        while True:
            substeps += 1
            # The player accelerates. Jumps act at take-off only; in the air there is just gravity.
            if on_ground:
                if action == RUN:
                    acceleration_x, acceleration_y = parameter / DT, 0.0
                else:
                    height, max_gain, duration = JUMPS[action]
                    gain = min(max(parameter / duration - vx, -MAX_ACCELERATION_X), max_gain)
                    acceleration_x = (gain - abs(normal(JUMP_NOISE))) / DT
                    acceleration_y = (height - abs(normal(JUMP_NOISE))) / DT
                vx += min(max(acceleration_x, -MAX_ACCELERATION_X), MAX_ACCELERATION_X) * DT
                vy += min(max(acceleration_y, -MAX_ACCELERATION_Y), MAX_ACCELERATION_Y) * DT
            else:
                vy -= GRAVITY * DT
            vx -= abs(normal(SPEED_NOISE))
            # Also caps the speed at take-off.
            max_speed_x = MAX_SPEED_ON_GROUND if on_ground else MAX_SPEED_X
            if vx < 0.0:
                vx = 0.0
            elif vx > max_speed_x:
                vx = max_speed_x
            if vy < -MAX_SPEED_Y:
                vy = -MAX_SPEED_Y
            elif vy > MAX_SPEED_Y:
                vy = MAX_SPEED_Y

            # Player and enemy move. The enemy of the platform where the player isn't stands still.
            active = 1 if x > PLATFORMS[1][0] else 0
            x += vx * DT
            y += vy * DT
            if x < 0.0:
                x = 0.0
            elif x > LEVEL_END:
                x = LEVEL_END
            vx *= DAMPING
            enemy_x, enemy_y, enemy_vx = enemies[active]
            left, width = PLATFORMS[active]
            right = left + width - WIDTH
            if not left < enemy_x < right:
                enemy_vx = -enemy_vx
            enemy_vx += normal(ENEMY_NOISE)
            if enemy_vx < -ENEMY_SPEED:
                enemy_vx = -ENEMY_SPEED
            elif enemy_vx > ENEMY_SPEED:
                enemy_vx = ENEMY_SPEED
            enemy_x += enemy_vx * DT
            if enemy_x < left:
                enemy_x = left
            elif enemy_x > right:
                enemy_x = right
            enemies[active] = (enemy_x, enemy_y, enemy_vx)

            # Platforms stop the player; nothing overlaps one at their height or above.
            if y < PLATFORM_HEIGHT:
                x, y, vx, vy = _push_out(x, y, vx, vy)
            dead = y < PLATFORM_HEIGHT
            for enemy_x, enemy_y, _ in enemies:
                if abs(x - enemy_x) < WIDTH and abs(y - enemy_y) < HEIGHT:
                    dead = True
            on_ground = _on_platform(x, y)
            if trail is not None:
                trail.append((x, y))
            finished = substeps >= RUN_SUBSTEPS if action == RUN else on_ground
            if finished or dead or x >= LEVEL_END:
                break
        self._player = (x, y, vx, vy)
        self._trail = trail or []
        return dead, substeps

    def _observe(self) -> np.ndarray:
        x, _, vx, _ = self._player
        enemy_x, _, enemy_vx = self._enemies[1 if x > PLATFORMS[1][0] else 0]
        segment = SEGMENTS[0 if x < PLATFORMS[1][0] else 1 if x < PLATFORMS[2][0] else 2]
        width, next_width, gap, left, difference = segment
        return np.array(
            (
                (x + WIDTH) / (LEVEL_END + WIDTH),
                vx / MAX_SPEED_X,
                enemy_x / LEVEL_END,
                (enemy_vx + ENEMY_SPEED) / (2.0 * ENEMY_SPEED),
                width / 275.0,
                next_width / 275.0,
                gap / 235.0,
                left / LEVEL_END,
                difference,
            ),
            dtype=np.float32,
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Return the physical state: `state` (10,) float64 and `ep_step`, the steps taken so far.

        `state` is the player's x, y, vx, vy, then each enemy's x, y, vx. Future noise is not part
        of it.
        """
        values = (*self._player, *self._enemies[0], *self._enemies[1])
        return {"state": np.array(values), "ep_step": np.array(self._ep_step)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go to a physical state that `get_state` returned (`ep_step` is 0 if left out).

        Raises `ValueError` for unknown names or a `state` that isn't ten finite numbers.
        """
        values, (self._ep_step,) = read_state(state, 10, ("ep_step",))
        x, y, vx, vy, *enemies = values
        self._player = (x, y, vx, vy)
        self._enemies = [(*enemies[:3],), (*enemies[3:],)]
        self._forget()

    def _draw(self) -> Picture:
        picture = Picture((-20.0, -40.0), (1080.0, 158.0), 800 / 1100, SKY)
        for left, width in PLATFORMS:
            picture.box((left, -60.0), (left + width, PLATFORM_HEIGHT), EARTH)
            picture.box((left, PLATFORM_HEIGHT - 6.0), (left + width, PLATFORM_HEIGHT), GRASS)
        picture.path([(LEVEL_END, PLATFORM_HEIGHT), (LEVEL_END, 110.0)], INK)
        picture.box((LEVEL_END, 90.0), (LEVEL_END + 32.0, 110.0), GREEN)
        for x, y, _ in self._enemies:
            picture.box((x, y), (x + WIDTH, y + HEIGHT), RED)
            _draw_eyes(picture, x + WIDTH / 2, y)
        half = WIDTH / 2
        picture.path([(x + half, y + HEIGHT / 2) for x, y in self._trail], GREY)
        x, y = self._player[:2]
        picture.box((x, y), (x + WIDTH, y + HEIGHT), BLUE)
        _draw_eyes(picture, x + half + 2.0, y)
        return picture

    def _ending(self) -> str:
        if self._ep_step >= TIME_LIMIT:
            return "time is up"
        return "fell" if self._player[1] < PLATFORM_HEIGHT else "met an enemy"


def _draw_eyes(picture: Picture, x: float, y: float) -> None:
    for side in (-4.0, 4.0):
        picture.disc((x + side, y + HEIGHT - 9.0), 2.5, (255, 255, 255))


def _on_platform(x: float, y: float) -> bool:
    """Tell whether a player at (x, y) stands on a platform, if only with a corner."""
    # `PLATFORMS` with the player's width added on the left; written out, as it is called so often.
    return y == PLATFORM_HEIGHT and (x <= 250.0 or 455.0 <= x <= 750.0 or 965.0 <= x <= 1035.0)


def _push_out(x: float, y: float, vx: float, vy: float) -> tuple[float, float, float, float]:
    """Move a player who overlaps platforms to the nearest side of each, and stop it."""
    for left, width in PLATFORMS:
        if x < left + width and x + WIDTH > left and y < PLATFORM_HEIGHT and y + HEIGHT > 0.0:
            right = left + width
            new_x = left - WIDTH if x < left else right if x > right - WIDTH else x
            new_y = -HEIGHT if y < 0.0 else PLATFORM_HEIGHT if y > PLATFORM_HEIGHT - HEIGHT else y
            if new_x == x:
                y, vy = new_y, 0.0
            elif new_y == y or abs(x - new_x) < abs(y - new_y):
                x = new_x
            else:
                y, vy = new_y, 0.0
            vx = 0.0
    return x, y, vx, vy
