"""What the hybrid-action environments share: reading an action, drawing noise, ending a step.

A hybrid action is a discrete choice together with the real parameters of that choice. The physics
of each environment is in its own file; nothing here depends on it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    from envs.picture import Picture

HybridAction = tuple[int, tuple[np.ndarray, ...] | np.ndarray]
Bounds = tuple[tuple[float, float], ...]
StepResult = tuple[np.ndarray, float, bool, bool, dict[str, Any]]

NOISE_BLOCK = 256


class HybridEnv(gym.Env[np.ndarray, HybridAction]):
    """Base class of the hybrid-action environments.

    `scale_low` and `scale_high`, float64 of the observation's shape, are the bounds with which
    published agents scale observations linearly to [-1, 1]. Observations may leave them; they do
    not leave the observation space.

    A subclass has `_start`, `_observe`, `_draw`, `step`, `get_state` and `set_state`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 5}

    action_names: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        parameter_bounds: Sequence[Bounds],
        observation_space: spaces.Box,
        render_mode: str | None = None,
        shared_parameters: bool = False,
    ) -> None:
        """Make the spaces and start an episode.

        `parameter_bounds` has, for each discrete action, one `(low, high)` pair per parameter; an
        empty tuple for an action without parameters. `observation_space` holds every observation.
        `render_mode` is `None` or `"rgb_array"`; anything else raises `ValueError`. With
        `shared_parameters=False` the action space is `Tuple(Discrete(K), Tuple(Box, ..., Box))`,
        one box per action; with `True` it is `Tuple(Discrete(K), Box)`, one box for all.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}")
        self.render_mode = render_mode
        self._parameter_bounds = parameter_bounds
        self._shared_parameters = shared_parameters
        if shared_parameters:
            parameter_space: spaces.Space[Any] = _box(parameter_bounds[0])
        else:
            parameter_space = spaces.Tuple([_box(bounds) for bounds in parameter_bounds])
        self.action_space = spaces.Tuple((spaces.Discrete(len(parameter_bounds)), parameter_space))
        self.observation_space = observation_space
        self.scale_low, self.scale_high = self._scale()
        self._normals: list[float] = []
        self._uniforms: list[float] = []
        self._forget()
        self._start()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: returns the observation and an empty info. There are no `options`.

        The episode after `reset(seed=s)` is a function of `s` and the actions alone: to resume in
        the middle of one, reset with the same seed and repeat the actions.
        """
        super().reset(seed=seed)
        # Noise left over from the last episode would make this one depend on it.
        self._normals.clear()
        self._uniforms.clear()
        self._forget()
        self._start()
        return self._observe(), {}

    def _forget(self) -> None:
        """Drop what is kept for pictures."""
        self._last_action: tuple[int, list[float]] | None = None
        self._return = 0.0
        self._over = self._success = False
        self._trail: list[tuple[float, ...]] = []

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `scale_low` and `scale_high`."""
        space = self.observation_space
        return space.low.astype(np.float64), space.high.astype(np.float64)

    def _start(self) -> None:
        """Go to the first state of an episode."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        """Return the observation of the current state."""
        raise NotImplementedError

    def _draw(self) -> Picture:
        """Return a picture of the current state."""
        raise NotImplementedError

    # Asking NumPy for one number at a time would cost more than the rest of a sub-step.
    def _normal(self, sigma: float) -> float:
        """Draw from the normal distribution with mean 0 and standard deviation `sigma`."""
        try:
            return sigma * self._normals.pop()
        except IndexError:
            self._normals.extend(self.np_random.standard_normal(NOISE_BLOCK).tolist())
            return sigma * self._normals.pop()

    def _uniform(self, low: float, high: float) -> float:
        """Draw from the uniform distribution on [low, high)."""
        try:
            return low + (high - low) * self._uniforms.pop()
        except IndexError:
            self._uniforms.extend(self.np_random.random(NOISE_BLOCK).tolist())
            return low + (high - low) * self._uniforms.pop()

    def _read_action(self, action: HybridAction) -> tuple[int, list[float]]:
        """Return the discrete choice and its parameters, clipped to their bounds.

        `action` is `(index, parameters)`. `parameters` is what the action space samples; where
        each action has a box of its own (a tuple or list of K arrays), one NumPy array with the
        parameters of the chosen action alone is accepted as well. Raises `ValueError` for anything
        else, an index out of range, or numbers that are not finite.
        """
        try:
            index, parameters = action
        except (TypeError, ValueError):
            raise ValueError(f"an action is a pair (index, parameters), got {action!r}") from None
        try:
            index = operator.index(index)
        except TypeError:
            raise ValueError(f"the discrete action must be an integer, got {index!r}") from None
        size = len(self._parameter_bounds)
        if not 0 <= index < size:
            raise ValueError(f"the discrete action must be in 0..{size - 1}, got {index}")
        bounds = self._parameter_bounds[index]
        if not self._shared_parameters and not isinstance(parameters, np.ndarray):
            if not isinstance(parameters, (tuple, list)) or len(parameters) != size:
                raise ValueError(
                    f"parameters must be a tuple of {size} arrays, one for each action, or the "
                    f"chosen action's own NumPy array, got {parameters!r}"
                )
            parameters = parameters[index]
        try:
            values = np.asarray(parameters, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"the parameters of action {index} must be numbers, got {parameters!r}") from None
        if values.shape != (len(bounds),):
            raise ValueError(f"the parameters of action {index} must have shape {(len(bounds),)}, got {values.shape}")
        clipped = []
        for value, (low, high) in zip(values.tolist(), bounds, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"the parameters of action {index} must be finite, got {values.tolist()}")
            clipped.append(low if value < low else high if value > high else value)
        return index, clipped

    def _result(
        self,
        action: tuple[int, list[float]],
        reward: float,
        terminated: bool,
        truncated: bool,
        success: bool,
        substeps: int = 1,
    ) -> StepResult:
        """Return what `step` returns."""
        info: dict[str, Any] = {"substeps": substeps}
        if terminated or truncated:
            info["is_success"] = success
            self._over, self._success = True, success
        self._last_action = action
        self._return += reward
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """Return a picture of the current state, (height, width, 3) uint8.

        It shows the end of the last action and, as lines, the paths that led there. Returns `None`
        if the environment was made without a render mode.
        """
        if self.render_mode is None:
            gym.logger.warn('render() needs gymnasium.make(..., render_mode="rgb_array")')
            return None
        return self._draw().pixels(self._caption())

    def _caption(self) -> str:
        """Return one line about the last action and the return so far."""
        if self._last_action is None:
            return "start"
        index, parameters = self._last_action
        name = self.action_names[index] if self.action_names else f"action {index}"
        numbers = ", ".join(f"{value:.2f}" for value in parameters)
        caption = f"{name} ({numbers})" if numbers else name
        caption += f"    return {self._return:.2f}"
        if self._over:
            caption += "    success" if self._success else f"    {self._ending()}"
        return caption

    def _ending(self) -> str:
        """Return in few words why an episode ended without success."""
        return "time is up"


def _box(bounds: Bounds) -> spaces.Box:
    """Return the float32 box of some parameters, of shape (0,) if there are none."""
    low = np.array([low for low, _ in bounds], dtype=np.float32)
    high = np.array([high for _, high in bounds], dtype=np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def read_state(state: Mapping[str, np.ndarray], size: int, counters: Sequence[str]) -> tuple[list[float], list[int]]:
    """Take apart what `get_state` returned: the numbers, then the counters (0 if left out).

    Raises `ValueError` for an unknown name or a `state` that is missing, mis-shaped or not finite.
    """
    if "state" not in state or not set(state) <= {"state", *counters}:
        raise ValueError(f"a state has the names {['state', *counters]}, got {sorted(state)}")
    values = np.asarray(state["state"], dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"`state` must be {size} finite numbers, got {state['state']!r}")
    return values.tolist(), [int(np.asarray(state.get(name, 0)).item()) for name in counters]
