"""The outlines of the built-in images' glyphs: polygons in the square [-1, 1]^2, y downwards.

A glyph is a tuple of (role, polygon) parts, drawn in that order; the role names the colour that
the palette gives the part. Every glyph differs from each of its seven flips and rotations.
"""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi, sin

import numpy as np

MAIN, ACCENT, INK, LIGHT = range(4)  # roles: indices into a palette's glyph colours
Polygon = np.ndarray  # float64 [N, 2], (x, y)
Part = tuple[int, Polygon]


def poly(*points: tuple[float, float]) -> Polygon:
    """A polygon with straight sides."""
    return np.asarray(points, float)


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """An upright rectangle."""
    return poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def arc(x: float, y: float, r: float, start: float, stop: float, ry: float | None = None):
    """Points of an elliptic arc; angles in degrees, clockwise on the screen from the right."""
    n = max(4, round(abs(stop - start) / 9)) + 1
    angle = np.linspace(start, stop, n) * pi / 180
    return np.stack([x + r * np.cos(angle), y + (ry or r) * np.sin(angle)], 1)


def disc(x: float, y: float, r: float, ry: float | None = None) -> Polygon:
    """A disc, or an ellipse with half axes r and ry."""
    return arc(x, y, r, 0, 351, ry)


def _catmull_rom(before, a, b, after, n: int = 8):
    t = (np.arange(n) / n)[:, None]
    slope_a, slope_b = (b - before) / 2, (after - a) / 2
    return (
        (2 * t**3 - 3 * t**2 + 1) * a
        + (t**3 - 2 * t**2 + t) * slope_a
        + (3 * t**2 - 2 * t**3) * b
        + (t**3 - t**2) * slope_b
    )


def blob(*points: tuple[float, float]) -> Polygon:
    """The smooth closed curve (Catmull-Rom) through the points."""
    p = np.asarray(points, float)
    n = len(p)
    return np.concatenate(
        [_catmull_rom(p[i - 1], p[i], p[(i + 1) % n], p[(i + 2) % n]) for i in range(n)]
    )


def curve(*points: tuple[float, float]) -> Polygon:
    """The smooth open curve (Catmull-Rom) through the points."""
    p = np.asarray(points, float)
    p = np.concatenate([p[:1], p, p[-1:]])
    parts = [_catmull_rom(*p[i : i + 4]) for i in range(len(p) - 3)]
    return np.concatenate([*parts, p[-1:]])


def stroke(width: float, path: Polygon) -> Polygon:
    """The outline of a pen of that width drawn along the path, with round ends."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = tangent[:, ::-1] * (-1, 1) * (width / 2)

    def cap(point, side):
        angle = np.linspace(0, pi, 7)[1:-1]
        ahead = side[::-1] * (1, -1)
        return [point + side * cos(a) + ahead * sin(a) for a in angle]

    return np.concatenate(
        [
            path + normal,
            cap(path[-1], normal[-1]),
            (path - normal)[::-1],
            cap(path[0], -normal[0]),
        ]
    )


def line(width: float, *points: tuple[float, float]) -> list[Polygon]:
    """A pen of that width drawn along straight segments, one polygon each."""
    return [stroke(width, np.asarray(pair, float)) for pair in pairwise(points)]


def _spiral(x: float, y: float, r: float, turns: float, start: float) -> Polygon:
    t = np.linspace(0.12, 1, 30)
    angle = start + 2 * pi * turns * t
    return np.stack([x + r * t * np.cos(angle), y + r * t * np.sin(angle)], 1)


def _star(x: float, y: float, r: float) -> Polygon:
    angle = -pi / 2 + np.arange(10) * pi / 5
    radius = np.where(np.arange(10) % 2, 0.45 * r, r)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _pen(role: int, polygons: list[Polygon]) -> tuple[Part, ...]:
    return tuple((role, p) for p in polygons)


GLYPHS: dict[str, tuple[Part, ...]] = {
    "fish": (
        (ACCENT, blob((-0.35, -0.3), (-0.15, -0.8), (0.3, -0.75), (0.25, -0.3))),
        (ACCENT, blob((-0.5, 0.02), (-0.95, -0.5), (-0.85, 0.0), (-0.98, 0.42))),
        (
            MAIN,
            blob(
                (-0.62, 0.0), (-0.1, -0.45), (0.5, -0.42), (0.92, 0.05), (0.45, 0.5), (-0.1, 0.42)
            ),
        ),
        (LIGHT, disc(0.5, -0.1, 0.17)),
        (INK, disc(0.54, -0.1, 0.09)),
    ),
    "snail": (
        (INK, stroke(0.09, curve((0.6, 0.2), (0.72, -0.2), (0.9, -0.4)))),
        (INK, stroke(0.09, curve((0.6, 0.2), (0.58, -0.2), (0.62, -0.5)))),
        (
            ACCENT,
            blob(
                (-0.98, 0.68),
                (-0.5, 0.45),
                (0.3, 0.4),
                (0.5, 0.05),
                (0.85, 0.1),
                (0.75, 0.6),
                (0.1, 0.72),
            ),
        ),
        (MAIN, disc(-0.2, -0.08, 0.62)),
        (LIGHT, stroke(0.12, _spiral(-0.2, -0.08, 0.48, 1.6, 0.6))),
    ),
    "boat": (
        (INK, box(-0.09, -0.9, 0.01, 0.4)),
        (ACCENT, poly((0.0, -0.95), (0.36, -0.82), (0.0, -0.7))),
        (LIGHT, poly((0.08, -0.58), (0.82, 0.28), (0.08, 0.28))),
        (ACCENT, poly((-0.16, -0.45), (-0.16, 0.28), (-0.68, 0.28))),
        (MAIN, blob((-0.9, 0.4), (0.0, 0.42), (0.98, 0.36), (0.6, 0.8), (-0.5, 0.82))),
    ),
    "house": (
        (INK, box(0.34, -0.86, 0.64, -0.1)),
        (LIGHT, box(-0.68, -0.15, 0.68, 0.8)),
        (MAIN, poly((-0.95, -0.05), (-0.05, -0.85), (0.95, -0.05))),
        (ACCENT, box(-0.54, 0.2, -0.08, 0.8)),
        (INK, box(0.16, 0.12, 0.52, 0.46)),
    ),
    "mug": (
        (ACCENT, stroke(0.2, arc(0.42, 0.22, 0.38, -80, 80))),
        (
            MAIN,
            blob(
                (-0.72, -0.28),
                (-0.1, -0.24),
                (0.5, -0.28),
                (0.5, 0.5),
                (0.25, 0.82),
                (-0.45, 0.82),
                (-0.7, 0.5),
            ),
        ),
        (INK, disc(-0.11, -0.27, 0.6, 0.13)),
        (LIGHT, stroke(0.12, curve((-0.3, -0.45), (-0.42, -0.6), (-0.22, -0.75), (-0.32, -0.95)))),
        (LIGHT, stroke(0.12, curve((0.1, -0.45), (-0.02, -0.58), (0.12, -0.7)))),
    ),
    "note": (
        (MAIN, stroke(0.18, curve((0.18, -0.8), (0.4, -0.45), (0.75, -0.3), (0.65, 0.1)))),
        *_pen(MAIN, line(0.17, (0.18, -0.82), (0.18, 0.5))),
        (
            MAIN,
            blob(
                (-0.62, 0.62), (-0.3, 0.32), (0.2, 0.35), (0.22, 0.62), (-0.15, 0.9), (-0.5, 0.88)
            ),
        ),
        (LIGHT, disc(-0.28, 0.55, 0.12, 0.08)),
    ),
    "bird": (
        *_pen(INK, line(0.09, (-0.02, 0.5), (-0.1, 0.92))),
        *_pen(INK, line(0.09, (0.22, 0.5), (0.2, 0.92))),
        (ACCENT, poly((0.7, -0.5), (1.0, -0.34), (0.68, -0.24))),
        (
            MAIN,
            blob(
                (-0.98, -0.05),
                (-0.3, -0.05),
                (0.15, -0.35),
                (0.45, -0.72),
                (0.78, -0.45),
                (0.7, 0.2),
                (0.2, 0.6),
                (-0.4, 0.4),
            ),
        ),
        (LIGHT, blob((-0.55, 0.1), (0.1, -0.08), (0.35, 0.1), (0.05, 0.38))),
        (INK, disc(0.53, -0.42, 0.09)),
    ),
    "key": (
        (MAIN, stroke(0.24, arc(-0.5, -0.28, 0.33, 0, 180))),
        (MAIN, stroke(0.24, arc(-0.5, -0.28, 0.33, 180, 360))),
        *_pen(MAIN, line(0.2, (-0.2, -0.12), (0.88, 0.5))),
        *_pen(ACCENT, line(0.18, (0.78, 0.46), (0.58, 0.8))),
        *_pen(ACCENT, line(0.18, (0.42, 0.26), (0.26, 0.54))),
    ),
    "flag": (
        (INK, stroke(0.13, np.array([(-0.7, -0.88), (-0.55, 0.92)]))),
        (
            MAIN,
            np.concatenate(
                [
                    curve((-0.66, -0.82), (-0.2, -0.66), (0.3, -0.86), (0.95, -0.7)),
                    curve((0.6, -0.35), (0.92, 0.08)),
                    curve((0.92, 0.08), (0.3, -0.06), (-0.2, 0.14), (-0.6, 0.0)),
                ]
            ),
        ),
        (LIGHT, disc(-0.22, -0.3, 0.2)),
    ),
    "cactus": (
        (MAIN, stroke(0.3, np.array([(0.0, -0.72), (0.0, 0.5)]))),
        (MAIN, stroke(0.2, curve((0.0, 0.3), (0.45, 0.22), (0.6, 0.0), (0.58, -0.35)))),
        (MAIN, stroke(0.2, curve((0.0, 0.1), (-0.4, 0.02), (-0.5, -0.15)))),
        (LIGHT, disc(0.58, -0.52, 0.15)),
        (ACCENT, poly((-0.45, 0.4), (0.45, 0.4), (0.32, 0.92), (-0.32, 0.92))),
        (INK, box(-0.52, 0.36, 0.52, 0.52)),
    ),
    "whale": (
        (LIGHT, stroke(0.11, curve((0.42, -0.3), (0.4, -0.62), (0.2, -0.8)))),
        (LIGHT, stroke(0.11, curve((0.42, -0.3), (0.48, -0.62), (0.7, -0.76)))),
        (
            MAIN,
            blob(
                (-0.98, -0.62),
                (-0.74, -0.5),
                (-0.5, -0.68),
                (-0.55, -0.2),
                (-0.2, 0.1),
                (0.2, -0.22),
                (0.75, -0.16),
                (0.98, 0.25),
                (0.7, 0.62),
                (-0.1, 0.66),
                (-0.7, 0.2),
            ),
        ),
        (ACCENT, blob((0.95, 0.36), (0.5, 0.4), (0.1, 0.52), (-0.2, 0.6), (0.2, 0.68), (0.7, 0.6))),
        (INK, disc(0.6, 0.1, 0.09)),
    ),
    "teapot": (
        (ACCENT, stroke(0.15, curve((-0.5, -0.18), (-0.9, -0.2), (-0.88, 0.3), (-0.5, 0.45)))),
        (MAIN, poly((0.4, 0.4), (0.72, -0.2), (1.0, -0.4), (0.96, -0.16), (0.6, 0.6))),
        (
            MAIN,
            blob(
                (-0.62, 0.1), (-0.35, -0.32), (0.25, -0.32), (0.55, 0.1), (0.4, 0.62), (-0.45, 0.62)
            ),
        ),
        (ACCENT, blob((-0.4, -0.3), (-0.05, -0.52), (0.32, -0.3), (-0.04, -0.24))),
        (INK, disc(-0.04, -0.55, 0.11)),
        (LIGHT, blob((-0.42, 0.05), (-0.25, -0.14), (-0.24, 0.08), (-0.38, 0.28))),
    ),
    "moon": (
        (
            MAIN,
            np.concatenate([arc(-0.1, 0.1, 0.8, -79.3, -340.2), arc(0.25, -0.1, 0.62, 49.5, 251)]),
        ),
        (LIGHT, _star(0.42, -0.16, 0.36)),
        (ACCENT, _star(0.8, -0.72, 0.2)),
    ),
    "R": (
        *_pen(MAIN, line(0.3, (-0.42, 0.78), (-0.42, -0.72))),
        (
            MAIN,
            stroke(
                0.3,
                np.concatenate(
                    [[(-0.42, -0.72)], arc(0.08, -0.32, 0.42, -90, 90, 0.4), [(-0.42, 0.08)]]
                ),
            ),
        ),
        *_pen(ACCENT, line(0.3, (0.04, 0.14), (0.5, 0.78))),
    ),
    "G": (
        (MAIN, stroke(0.3, arc(-0.02, 0.0, 0.72, -45, -345))),
        *_pen(ACCENT, line(0.26, (0.12, 0.12), (0.7, 0.12), (0.7, 0.7))),
    ),
    "4": (
        *_pen(MAIN, line(0.26, (0.1, -0.78), (-0.62, 0.28), (0.72, 0.28))),
        *_pen(ACCENT, line(0.28, (0.3, -0.2), (0.3, 0.82))),
    ),
}
