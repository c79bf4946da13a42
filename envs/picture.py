"""Pictures of the environments, drawn with pygame in memory: no display is needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (38, 42, 51)
PAPER: Colour = (250, 249, 246)
GREY: Colour = (176, 178, 182)
BLUE: Colour = (31, 105, 200)
RED: Colour = (205, 62, 50)
GREEN: Colour = (46, 140, 87)

CAPTION_HEIGHT = 32
SUPERSAMPLING = 2  # drawn twice as large and then scaled down, for smooth edges


class Picture:
    """A picture of a part of the plane, y upwards, above a line of text."""

    def __init__(self, low: Point, high: Point, scale: float, background: Colour = PAPER) -> None:
        """Begin a picture of the rectangle from `low` to `high`, with `scale` pixels per unit.

        Choose them so that the size in pixels is a multiple of 16, as video encoders like it.
        """
        self._pygame = import_pygame()
        self._left, self._top = low[0], high[1]
        self._size = round((high[0] - low[0]) * scale), round((high[1] - low[1]) * scale)
        self._scale = scale * SUPERSAMPLING
        width, height = self._size[0], self._size[1] + CAPTION_HEIGHT
        self._surface = self._pygame.Surface((width * SUPERSAMPLING, height * SUPERSAMPLING))
        self._surface.fill(background)

    def _pixel(self, point: Point) -> Point:
        x, y = point
        return (x - self._left) * self._scale, (self._top - y) * self._scale

    def box(self, low: Point, high: Point, colour: Colour, outline: int = 0) -> None:
        """Draw the rectangle between two corners, or its outline, `outline` pixels wide."""
        (left, bottom), (right, top) = self._pixel(low), self._pixel(high)
        rectangle = self._pygame.Rect(left, top, right - left, bottom - top)
        self._pygame.draw.rect(self._surface, colour, rectangle, outline * SUPERSAMPLING)

    def disc(self, centre: Point, radius: float, colour: Colour, outline: int = 0) -> None:
        """Draw a disc, or a ring, `outline` pixels wide."""
        self._pygame.draw.circle(
            self._surface,
            colour,
            self._pixel(centre),
            max(radius * self._scale, 2.0),
            outline * SUPERSAMPLING,
        )

    def path(self, points: Sequence[Point], colour: Colour, width: int = 2) -> None:
        """Draw a line through points."""
        if len(points) > 1:
            pixels = [self._pixel(point) for point in points]
            self._pygame.draw.lines(self._surface, colour, False, pixels, width * SUPERSAMPLING)

    def text(self, words: str, at: Point, colour: Colour = INK, size: int = 18) -> None:
        """Write words to the right of a point, which is at half their height."""
        self._write(words, self._pixel(at), colour, size)

    def _write(self, words: str, at: Point, colour: Colour, size: int) -> None:
        self._pygame.font.init()
        font = self._pygame.font.Font(None, size * SUPERSAMPLING)
        image = font.render(words, True, colour)
        self._surface.blit(image, (at[0], at[1] - image.get_height() / 2))

    def pixels(self, caption: str) -> np.ndarray:
        """Return the picture with a caption, (height, width, 3) uint8."""
        width, height = self._size[0], self._size[1] + CAPTION_HEIGHT
        strip = (0, self._size[1] * SUPERSAMPLING, width * SUPERSAMPLING, CAPTION_HEIGHT * SUPERSAMPLING)
        self._pygame.draw.rect(self._surface, INK, strip)
        middle = (self._size[1] + CAPTION_HEIGHT / 2) * SUPERSAMPLING
        self._write(caption, (10 * SUPERSAMPLING, middle), PAPER, 20)
        small = self._pygame.transform.smoothscale(self._surface, (width, height))
        return np.ascontiguousarray(self._pygame.surfarray.array3d(small).transpose(1, 0, 2))


def import_pygame() -> ModuleType:
    """Import pygame, which only pictures need, without its greeting."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports the deprecated pkg_resources
        import pygame
    return pygame
