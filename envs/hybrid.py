"""What the hybrid-action environments share: reading an action, drawing noise, drawing a picture.

A hybrid action is a discrete choice together with the real parameters of that choice. The physics
of each environment is in its own file; nothing here depends on it.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    import pygame

HybridAction = tuple[int, "tuple[np.ndarray, ...] | np.ndarray"]
Bounds = tuple[tuple[float, float], ...]

INK = (38, 42, 51)
PAPER = (250, 249, 246)
NOISE_BLOCK = 256


class HybridEnv(gym.Env[np.ndarray, HybridAction]):
    """Base class of the hybrid-action environments.

    Args:
        parameter_bounds: for each discrete action, one `(low, high)` pair per parameter; an empty
            tuple for an action without parameters.
        observation_space: the box that holds every observation.
        render_mode: `None` or `"rgb_array"`.
        shared_parameters: `False` gives `Tuple(Discrete(K), Tuple(Box, ..., Box))`, one box per
            action; `True` gives `Tuple(Discrete(K), Box)`, one box that all K actions share.

    Raises:
        ValueError: if `render_mode` is not one of the above.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 5}

    action_names: Sequence[str] = ()

    def __init__(
        self,
        parameter_bounds: Sequence[Bounds],
        observation_space: spaces.Box,
        render_mode: str | None = None,
        shared_parameters: bool = False,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode must be None or one of {self.metadata['render_modes']}, "
                f"got {render_mode!r}"
            )
        self.render_mode = render_mode
        self._parameter_bounds = list(parameter_bounds)
        self._shared_parameters = shared_parameters
        self._discrete_size = len(self._parameter_bounds)
        if shared_parameters:
            parameter_space: spaces.Space[Any] = _box(self._parameter_bounds[0])
        else:
            parameter_space = spaces.Tuple([_box(bounds) for bounds in self._parameter_bounds])
        self.action_space = spaces.Tuple((spaces.Discrete(self._discrete_size), parameter_space))
        self.observation_space = observation_space
        self._normals: list[float] = []
        self._uniforms: list[float] = []
        self._last_action: tuple[int, list[float]] | None = None
        self._return = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: returns the observation and an empty info.

        The episode after `reset(seed=s)` is a function of `s` and the actions alone, so resetting
        with the same seed and repeating the actions leads to the same place.
        """
        super().reset(seed=seed)
        # Noise left from the last episode would make this one depend on it.
        self._normals.clear()
        self._uniforms.clear()
        self._last_action = None
        self._return = 0.0
        self._start()
        return self._observe(), {}

    def _start(self) -> None:
        """Put the environment in the first state of an episode."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        """Return the observation of the present state."""
        raise NotImplementedError

    # Calling NumPy for one number costs more than a whole sub-step, hence the blocks.
    def _normal(self, sigma: float) -> float:
        """Draw from a normal distribution with mean 0 and standard deviation `sigma`."""
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
        each action has a box of its own (a tuple or list of K arrays), a single array with the
        parameters of the chosen action is taken as well.

        Raises:
            ValueError: for anything else, an index out of range, or numbers that are not finite.
        """
        try:
            index, parameters = action
        except (TypeError, ValueError):
            raise ValueError(f"an action is a pair (index, parameters), got {action!r}") from None
        try:
            index = operator.index(index)
        except TypeError:
            raise ValueError(f"the discrete action must be an integer, got {index!r}") from None
        if not 0 <= index < self._discrete_size:
            raise ValueError(
                f"the discrete action must be in 0..{self._discrete_size - 1}, got {index}"
            )
        bounds = self._parameter_bounds[index]
        chosen = parameters
        if not self._shared_parameters and isinstance(parameters, (tuple, list)):
            if len(parameters) != self._discrete_size:
                raise ValueError(
                    f"parameters given as a {type(parameters).__name__} must have one array for "
                    f"each of the {self._discrete_size} actions, got {len(parameters)}; to give "
                    "the chosen action's alone, pass them as one NumPy array"
                )
            chosen = parameters[index]
        try:
            values = np.asarray(chosen, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"the parameters of action {index} are not an array of numbers: {chosen!r}"
            ) from None
        if values.shape != (len(bounds),):
            raise ValueError(
                f"the parameters of action {index} must have shape {(len(bounds),)}, "
                f"got {values.shape}"
            )
        clipped = []
        for value, (low, high) in zip(values.tolist(), bounds, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"the parameters of action {index} must be finite, got {chosen}")
            clipped.append(low if value < low else high if value > high else value)
        return index, clipped

    def render(self) -> np.ndarray | None:
        """Return a picture of the present state, (height, width, 3) uint8; `None` without a mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs gymnasium.make(..., render_mode="rgb_array")')
            return None
        canvas = self._draw()
        return np.ascontiguousarray(_pygame().surfarray.array3d(canvas).transpose(1, 0, 2))

    def _draw(self) -> pygame.Surface:
        """Return a surface with the picture."""
        raise NotImplementedError

    def _caption(self) -> str:
        """Return one line about the last action and the return so far."""
        if self._last_action is None:
            return "start"
        index, parameters = self._last_action
        name = self.action_names[index] if self.action_names else f"action {index}"
        numbers = ", ".join(f"{value:.2f}" for value in parameters)
        return f"{name}({numbers})   return {self._return:.3f}"


def _box(bounds: Bounds) -> spaces.Box:
    """Return the float32 box of some parameters, of shape (0,) if there are none."""
    low = np.array([low for low, _ in bounds], dtype=np.float32)
    high = np.array([high for _, high in bounds], dtype=np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def read_state(
    state: Mapping[str, np.ndarray], size: int, counters: Sequence[str]
) -> tuple[list[float], list[int]]:
    """Take apart what `get_state` returned: the numbers, then the counters (0 if left out).

    Raises:
        ValueError: for an unknown name, or a `state` that is missing, mis-shaped or not finite.
    """
    unknown = sorted(set(state) - {"state", *counters})
    if unknown or "state" not in state:
        raise ValueError(f"a state has the names {['state', *counters]}, got {sorted(state)}")
    values = np.asarray(state["state"], dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"`state` must be {size} finite numbers, got {state['state']!r}")
    return values.tolist(), [int(state.get(name, 0)) for name in counters]


def _pygame() -> Any:
    """Import pygame, which only pictures need, without its greeting."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports the deprecated pkg_resources
        import pygame
    return pygame
