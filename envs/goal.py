"""Goal: dribble a ball past a keeper and shoot it into the goal. And Hard Goal, with 11 actions.

Goal is from "Reinforcement Learning with Parameterized Actions" (Masson, Ranchod, Konidaris, AAAI
2016), with the constants of the widely used `gym-goal`, which go back to the RoboCup 2D soccer
server. Hard Goal is from "HyAR" (Li et al., ICLR 2022). Written from a description of the
dynamics; no code was copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import atan2, cos, hypot, pi, sin
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.hybrid import Bounds, HybridAction, HybridEnv, StepResult, read_state
from envs.picture import BLUE, INK, RED, Picture

KICK_TO, SHOOT_LEFT, SHOOT_RIGHT = 0, 1, 2
TIME_LIMIT = 100  # environment steps

# The field is x in [0, 20], y in [-15, 15]; the goal is on the line x = 20.
FIELD_LENGTH, FIELD_HALF_WIDTH = 20.0, 15.0
GOAL_WIDTH, GOAL_DEPTH = 14.02, 2.44
POST = GOAL_WIDTH / 2.0
AREA_LEFT, AREA_HALF_WIDTH = FIELD_LENGTH - 5.5, 9.16  # the keeper's area
KICK_TO_BOUNDS = ((0.0, 40.0), (-FIELD_HALF_WIDTH, FIELD_HALF_WIDTH))
SHOOT_BOUNDS = ((-POST, POST),)
SHOOT_TARGET_X = 20.4

PERSON_SIZE, BALL_SIZE = 0.9, 0.4  # radii
PERSON_DECAY, BALL_DECAY = 0.4, 0.94  # of the speed, per sub-step
PERSON_NOISE, BALL_NOISE = 0.1, 0.05
BALL_POWER, MAX_KICK_POWER, MAX_BALL_SPEED = 0.027, 100.0, 2.7
# Speed gained per sub-step. The greatest speed of a person, 1, is out of reach with these.
DASH, KEEPER_RUN, KEEPER_SAVE = 0.06, 0.048, 0.12
INERTIA = 5.0  # against turning while running
KICKABLE, CATCHABLE = 1.6, 2.0  # distances
KEEPER_GUARDS = POST + 2.0
SLOW_BALL = 0.1
GOAL_REWARD = 50.0

GRASS, NET, WHITE, YELLOW = (74, 134, 80), (120, 165, 124), (255, 255, 255), (250, 206, 70)

# An observation is: player x, y, vx, vy, orientation; the keeper's; ball x, y, vx, vy; the unit
# vector from keeper to ball; the y at which the line through both meets the goal line.
# Published agents use these bounds to scale it linearly to [-1, 1] (or somewhat beyond). The last
# one ought to be 7.01, but results depend on the scale of the features.
_PERSON_SCALE = (20.0, 15.0, 1.0, 1.0, pi)
SCALE_HIGH = np.array([*_PERSON_SCALE * 2, 20.0, 15.0, 3.0, 3.0, 1.0, 1.0, GOAL_WIDTH])
SCALE_LOW = -SCALE_HIGH
SCALE_LOW[[0, 5, 10]] = 0.0
SCALE_LOW[16] = -POST

# And these are the bounds of the observation space, which do hold. The ball is outside the field
# when an episode ends, by less than 5; the keeper may wait for it there, and players push each
# other. The player's orientation isn't wrapped and may gain a turn in each step.
_MARGIN = 10.0
_WINDING = 2.0 * pi * TIME_LIMIT
SPACE_HIGH = SCALE_HIGH.copy()
SPACE_HIGH[[0, 1, 5, 6, 10, 11]] += _MARGIN
SPACE_HIGH[4] = _WINDING
SPACE_LOW = SCALE_LOW.copy()
SPACE_LOW[[0, 1, 5, 6, 10, 11]] -= _MARGIN
SPACE_LOW[4] = -_WINDING


class GoalEnv(HybridEnv):
    """Goal (Masson et al. 2016).

    Observation: 17 numbers, float32, unscaled: x, y, vx, vy and orientation of the player, the
    same of the keeper, x, y, vx, vy of the ball, the unit vector from keeper to ball, and the y at
    which the line through both meets the goal line. Units are metres and radians. The field is
    [0, 20] x [-15, 15], but bodies may leave it: the observation space's bounds are wider.
    `scale_low` and `scale_high` are the bounds that published agents scale with.

    Actions: `Tuple(Discrete(3), Tuple(Box(2), Box(1), Box(1)))`. Kick the ball to a point in
    [0, 40] x [-15, 15], until it lies still near the player; shoot-left or shoot-right at height y
    in [-7.01, 7.01] of the goal line, until the ball is in the goal, caught or out. Parameters
    out of range are clipped. Instead of three arrays, the chosen action's own array may be passed.
    As in the original implementation, kicking goes to the point (x, x) instead of (x, y), and
    there is no difference between the two shots.

    Reward: 50 for a goal; minus the ball's distance to the goal when it is caught or out and when
    time is up; else 0. Terminated by a goal, a catch or the ball out; truncated at the 100th
    step, in which nothing moves. `info` has `substeps` at each step and `is_success` at the last.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = ("kick to", "shoot left", "shoot right")
    parameter_bounds: ClassVar[tuple[Bounds, ...]] = (KICK_TO_BOUNDS, SHOOT_BOUNDS, SHOOT_BOUNDS)

    def __init__(self, render_mode: str | None = None) -> None:
        """Make the environment; `render_mode` is `None` or `"rgb_array"`."""
        low, high = SPACE_LOW.astype(np.float32), SPACE_HIGH.astype(np.float32)
        space = spaces.Box(low, high, dtype=np.float32)
        super().__init__(self.parameter_bounds, space, render_mode)

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        return SCALE_LOW.copy(), SCALE_HIGH.copy()

    def _start(self) -> None:
        y = self._uniform(-FIELD_HALF_WIDTH, FIELD_HALF_WIDTH)
        orientation = atan2(-y, FIELD_LENGTH)
        self._player = (0.0, y, 0.0, 0.0, orientation)  # x, y, vx, vy, orientation
        reach = KICKABLE - 1e-12
        ball_x, ball_y = reach * cos(orientation), y + reach * sin(orientation)
        self._ball = (ball_x, ball_y, 0.0, 0.0)  # x, y, vx, vy
        # The keeper stands at the edge of its area, between the ball and the goal's centre.
        slope = -ball_y / (FIELD_LENGTH - ball_x)
        keeper_y = _clip(ball_y + slope * (AREA_LEFT - ball_x), AREA_HALF_WIDTH)
        direction = atan2(ball_y - keeper_y, ball_x - AREA_LEFT)
        self._keeper = (AREA_LEFT, keeper_y, 0.0, 0.0, direction)
        self._time = 0

    def _target(self, index: int, parameters: list[float]) -> tuple[bool, float, float]:
        """Return whether the action is a shot, and the point that it aims at."""
        if index == KICK_TO:
            # In the original implementation only the first parameter arrives, as both
            # coordinates. Published results depend on it.
            return False, parameters[0], parameters[0]
        # Shoot-left and shoot-right are the same action there; published results depend on it.
        return True, SHOOT_TARGET_X, parameters[0]

    def step(self, action: HybridAction) -> StepResult:
        """Carry out an action to its end.

        Returns the observation (17,) float32, reward, terminated, truncated and info. Raises
        `ValueError` if the action is malformed.
        """
        index, parameters = self._read_action(action)
        self._time += 1
        if self._time >= TIME_LIMIT:
            terminated, substeps, reward = False, 0, -_goal_distance(*self._ball[:2])
        else:
            terminated, reward, substeps = self._simulate(*self._target(index, parameters))
        return self._result(
            (index, parameters),
            reward,
            terminated,
            self._time >= TIME_LIMIT,
            reward == GOAL_REWARD,
            substeps,
        )

    def _simulate(self, shot: bool, target_x: float, target_y: float) -> tuple[bool, float, int]:
        """Run sub-steps until the action ends: returns whether the episode did, reward, sub-steps.

        One function with local variables only: it runs up to hundreds of times per environment
        step. Draws per sub-step, in this order: three for the player's kick or dash (none if it
        turns), three for the keeper's, one for the catch.
        """
        uniform = self._uniform
        trail: list[tuple[float, ...]] | None = [] if self.render_mode else None
        x, y, vx, vy, orientation = self._player
        keeper_x, keeper_y, keeper_vx, keeper_vy, keeper_orientation = self._keeper
        ball_x, ball_y, ball_vx, ball_vy = self._ball
        terminated, reward, substeps = False, 0.0, 0
        while True:
            substeps += 1
            # The player kicks the ball if near it, turns if it faces away, or else runs.
            distance = hypot(ball_x - x, ball_y - y)
            off = atan2(ball_y - y, ball_x - x) - orientation
            if not -pi <= off <= pi:
                off = _wrap(off)
            if distance <= KICKABLE:
                # The ball should get the speed with which it comes to rest at the target.
                ax = (1.0 - BALL_DECAY) * (target_x - x) - ball_vx
                ay = (1.0 - BALL_DECAY) * (target_y - y) - ball_vy
                efficiency = 1.0 - 0.25 * abs(off) / pi - 0.25 * distance / KICKABLE
                power = min(hypot(ax, ay) / (efficiency * BALL_POWER), MAX_KICK_POWER)
                thrust = power * efficiency * BALL_POWER
                # The angles' noise is relative: a push along x is exact, as in the original
                # implementation.
                angle = atan2(ay, ax) * (1.0 + uniform(-BALL_NOISE, BALL_NOISE))
                noise = BALL_NOISE * hypot(ball_vx, ball_vy)
                ball_vx += _clip(thrust * cos(angle) + uniform(-noise, noise), MAX_BALL_SPEED)
                ball_vy += _clip(thrust * sin(angle) + uniform(-noise, noise), MAX_BALL_SPEED)
                ball_vx = _clip(ball_vx, MAX_BALL_SPEED)
                ball_vy = _clip(ball_vy, MAX_BALL_SPEED)
            elif abs(off) < pi / 8.0:
                angle = orientation * (1.0 + uniform(-PERSON_NOISE, PERSON_NOISE))
                noise = PERSON_NOISE * hypot(vx, vy)
                vx += DASH * cos(angle) + uniform(-noise, noise)
                vy += DASH * sin(angle) + uniform(-noise, noise)
            else:
                orientation += off / (1.0 + INERTIA * hypot(vx, vy))

            # The keeper runs to the ball's path if it leads into the goal, or else where the ball
            # will come to rest.
            dx, dy = ball_vx / (1.0 - BALL_DECAY), ball_vy / (1.0 - BALL_DECAY)
            end_x, end_y = ball_x + dx, ball_y + dy
            thrust = KEEPER_RUN
            if end_x > FIELD_LENGTH and dx and dy:
                slope = dy / dx
                intercept = ball_y - slope * ball_x
                if abs(FIELD_LENGTH * slope + intercept) <= KEEPER_GUARDS:
                    normal_slope = -1.0 / slope
                    normal_intercept = keeper_y - normal_slope * keeper_x
                    end_x = (normal_intercept - intercept) / (slope - normal_slope)
                    end_y = slope * end_x + intercept
                    thrust = KEEPER_SAVE
            keeper_orientation = atan2(end_y - keeper_y, end_x - keeper_x)
            angle = keeper_orientation * (1.0 + uniform(-PERSON_NOISE, PERSON_NOISE))
            noise = PERSON_NOISE * hypot(keeper_vx, keeper_vy)
            keeper_vx += thrust * cos(angle) + uniform(-noise, noise)
            keeper_vy += thrust * sin(angle) + uniform(-noise, noise)

            # All move.
            x += vx
            y += vy
            vx *= PERSON_DECAY
            vy *= PERSON_DECAY
            keeper_x += keeper_vx
            keeper_y += keeper_vy
            keeper_vx *= PERSON_DECAY
            keeper_vy *= PERSON_DECAY
            ball_x += ball_vx
            ball_y += ball_vy
            ball_vx *= BALL_DECAY
            ball_vy *= BALL_DECAY

            # Bodies that overlap are pushed apart and turn back.
            gap = hypot(x - keeper_x, y - keeper_y) - 2.0 * PERSON_SIZE
            if gap < 0.0:
                x, y, keeper_x, keeper_y = _push_apart(x, y, keeper_x, keeper_y, gap)
                vx, vy, keeper_vx, keeper_vy = -vx, -vy, -keeper_vx, -keeper_vy
            gap = hypot(x - ball_x, y - ball_y) - PERSON_SIZE - BALL_SIZE
            if gap < 0.0:
                x, y, ball_x, ball_y = _push_apart(x, y, ball_x, ball_y, gap)
                vx, vy, ball_vx, ball_vy = -vx, -vy, -ball_vx, -ball_vy
            keeper_distance = hypot(keeper_x - ball_x, keeper_y - ball_y)
            gap = keeper_distance - PERSON_SIZE - BALL_SIZE
            if gap < 0.0:
                keeper_x, keeper_y, ball_x, ball_y = _push_apart(keeper_x, keeper_y, ball_x, ball_y, gap)
                keeper_vx, keeper_vy, ball_vx, ball_vy = -keeper_vx, -keeper_vy, -ball_vx, -ball_vy
                keeper_distance = hypot(keeper_x - ball_x, keeper_y - ball_y)

            if trail is not None:
                trail.append((x, y, keeper_x, keeper_y, ball_x, ball_y))
            if FIELD_LENGTH <= ball_x <= FIELD_LENGTH + GOAL_DEPTH and abs(ball_y) <= POST:
                terminated, reward = True, GOAL_REWARD
                break
            uniform(0.0, 1.0)  # the keeper's catch, which always succeeds
            if keeper_distance < CATCHABLE or not 0.0 <= ball_x <= FIELD_LENGTH or abs(ball_y) > FIELD_HALF_WIDTH:
                terminated, reward = True, -_goal_distance(ball_x, ball_y)
                break
            if not shot and hypot(ball_vx, ball_vy) <= SLOW_BALL and hypot(ball_x - x, ball_y - y) <= KICKABLE:
                break
        self._player = (x, y, vx, vy, orientation)
        self._keeper = (keeper_x, keeper_y, keeper_vx, keeper_vy, keeper_orientation)
        self._ball = (ball_x, ball_y, ball_vx, ball_vy)
        self._trail = trail or []
        return terminated, reward, substeps

    def _observe(self) -> np.ndarray:
        keeper_x, keeper_y = self._keeper[:2]
        ball_x, ball_y = self._ball[:2]
        dx, dy = ball_x - keeper_x, ball_y - keeper_y
        distance = hypot(dx, dy) or 1.0
        if dx:
            crossing = keeper_y + dy / dx * (FIELD_LENGTH - keeper_x)
            # The upper bound is twice the post's, as in the original implementation.
            crossing = min(max(crossing, -POST), GOAL_WIDTH)
        else:
            crossing = -POST if dy < 0.0 else POST
        return np.array(
            (*self._player, *self._keeper, *self._ball, dx / distance, dy / distance, crossing),
            dtype=np.float32,
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Return the physical state: `state` (14,) float64 and `time`, the steps taken so far.

        `state` is x, y, vx, vy, orientation of the player, the same of the keeper, x, y, vx, vy of
        the ball. Future noise is not part of it.
        """
        values = (*self._player, *self._keeper, *self._ball)
        return {"state": np.array(values), "time": np.array(self._time)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go to a physical state that `get_state` returned (`time` is 0 if left out).

        Raises `ValueError` for unknown names or a `state` that isn't fourteen finite numbers.
        """
        values, (self._time,) = read_state(state, 14, ("time",))
        self._player = (*values[:5],)
        self._keeper = (*values[5:10],)
        self._ball = (*values[10:],)
        self._forget()

    def _draw(self) -> Picture:
        picture = Picture((-1.5, -16.0), (23.5, 16.0), 16.0, GRASS)
        picture.box((0.0, -FIELD_HALF_WIDTH), (FIELD_LENGTH, FIELD_HALF_WIDTH), WHITE, 2)
        area = (AREA_LEFT, -AREA_HALF_WIDTH), (FIELD_LENGTH, AREA_HALF_WIDTH)
        picture.box(*area, WHITE, 2)
        picture.box((FIELD_LENGTH, -POST), (FIELD_LENGTH + GOAL_DEPTH, POST), NET)
        picture.box((FIELD_LENGTH, -POST), (FIELD_LENGTH + GOAL_DEPTH, POST), WHITE, 3)
        for first, colour in ((0, BLUE), (2, RED), (4, WHITE)):
            picture.path([(step[first], step[first + 1]) for step in self._trail], colour)
        for (x, y, _, _, orientation), colour in ((self._player, BLUE), (self._keeper, RED)):
            picture.disc((x, y), PERSON_SIZE, colour)
            nose = x + PERSON_SIZE * cos(orientation), y + PERSON_SIZE * sin(orientation)
            picture.path([(x, y), nose], WHITE, 3)
        picture.disc(self._ball[:2], BALL_SIZE, WHITE)
        picture.disc(self._ball[:2], BALL_SIZE, INK, 2)
        if self._last_action is not None:
            _, x, y = self._target(*self._last_action)
            for tilt in (-0.4, 0.4):
                picture.path([(x - 0.4, y - tilt), (x + 0.4, y + tilt)], YELLOW, 3)
        picture.text("player", (self._player[0] - 1.3, self._player[1] - 1.5), WHITE)
        picture.text("keeper", (self._keeper[0] - 1.3, self._keeper[1] + 1.5), WHITE)
        return picture

    def _ending(self) -> str:
        ball_x, ball_y = self._ball[:2]
        if hypot(ball_x - self._keeper[0], ball_y - self._keeper[1]) < CATCHABLE:
            return "the keeper has it"
        inside = 0.0 <= ball_x <= FIELD_LENGTH and abs(ball_y) <= FIELD_HALF_WIDTH
        return "time is up" if inside else "the ball is out"


def _wrap(angle: float) -> float:
    """Return the same direction as an angle in [-pi, pi]."""
    while angle > pi:
        angle -= 2.0 * pi
    while angle < -pi:
        angle += 2.0 * pi
    return angle


def _clip(value: float, limit: float) -> float:
    """Return the number in [-limit, limit] nearest to a value."""
    return -limit if value < -limit else limit if value > limit else value


def _push_apart(x1: float, y1: float, x2: float, y2: float, gap: float) -> tuple[float, float, float, float]:
    """Move two bodies apart along the line through their centres, each by half their negative gap."""
    angle = atan2(y2 - y1, x2 - x1)
    dx, dy = 0.5 * gap * cos(angle), 0.5 * gap * sin(angle)
    return x1 + dx, y1 + dy, x2 - dx, y2 - dy


def _goal_distance(ball_x: float, ball_y: float) -> float:
    """Return the distance from the ball to the goal, as the original implementation counts it."""
    if ball_x < FIELD_LENGTH:
        if ball_y > POST:
            return hypot(FIELD_LENGTH - ball_x, ball_y - POST)
        if ball_y < -POST:
            return hypot(FIELD_LENGTH - ball_x, ball_y + POST)
        return FIELD_LENGTH - ball_x
    if ball_y < -POST:
        # 14.02 too much: a sign error there, on which published results depend.
        return POST - ball_y
    if ball_y > POST:
        return ball_y - POST
    return 0.0


# Where a normalised parameter p in [-1, 1] aims: at the first number of its bin for p = 1, at the
# second for p = -1, in halves of the goal's width. The third bin was surely meant to be
# (-0.2, 0.2): as it stands both of its actions always aim at y = 1.402, and the middle of the goal
# is out of reach. Published results depend on it.
HARD_GOAL_BINS = ((-1.0, -0.6), (-0.6, -0.2), (0.2, 0.2), (0.2, 0.6), (0.6, 1.0))
# The original implementation takes the goal's half width from a float32 box.
HARD_GOAL_POST = float(np.float32(POST))


class HardGoalEnv(GoalEnv):
    """Hard Goal (Li et al. 2022): Goal with 11 actions and normalised parameters.

    Observation, reward and the end of an episode are Goal's.

    Actions: `Tuple(Discrete(11), Tuple(Box(2), Box(1), ..., Box(1)))`, all parameters in [-1, 1].
    0 kicks the ball to a point, which the parameters scale to [0, 40] x [-15, 15]; 1 to 5 shoot
    left and 6 to 10 shoot right, each at a fifth of the goal line: from p = -1 to p = 1 the y goes
    from -4.206 to -7.01, from -1.402 to -4.206, stays at 1.402, goes from 4.206 to 1.402 and from
    7.01 to 4.206.
    """

    parameter_bounds = (((-1.0, 1.0), (-1.0, 1.0)), *(((-1.0, 1.0),),) * 10)
    action_names = (
        "kick to",
        *(f"shoot {side}, part {part}" for side in ("left", "right") for part in range(1, 6)),
    )

    def _target(self, index: int, parameters: list[float]) -> tuple[bool, float, float]:
        if index == KICK_TO:
            scaled = [
                low + (high - low) * (value + 1.0) / 2.0
                for value, (low, high) in zip(parameters, KICK_TO_BOUNDS, strict=True)
            ]
            return super()._target(KICK_TO, scaled)
        first, second = HARD_GOAL_BINS[(index - 1) % 5]
        half = (first - second) / 2.0
        position = parameters[0] * half + first - half
        y = -HARD_GOAL_POST + 2.0 * HARD_GOAL_POST * (position + 1.0) / 2.0
        return super()._target(SHOOT_LEFT, [_clip(y, POST)])
