"""How far clips are from two true bouncing balls: what compare.py prints in its tables."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from data.balls import BACKGROUND, COLOURS, RADIUS  # noqa: E402

FASTEST = 2.3  # no ball is faster, not even one with the energy of both: pixels a frame


def find(clip):
    """uint8 (T, H, W, 3) of two balls -> centres (T, ball, xy); which frames have both balls whole,
    each in one piece, its area right to a quarter; how much of a ball is wrong (T,)."""
    cover = np.moveaxis((clip - 1.0 * BACKGROUND) @ np.linalg.pinv(COLOURS), -1, 1)  # (T,ball,H,W)
    y, x = np.mgrid[: clip.shape[1], : clip.shape[2]] + 0.5
    area, weight = np.pi * RADIUS**2, np.where(cover > 0.5, cover, 0)
    for _ in range(3):  # the centre of all pixels above a half, then of all that are near it
        mass = weight.sum((2, 3)) + 1e-9
        px, py = (weight * x).sum((2, 3)) / mass, (weight * y).sum((2, 3)) / mass  # (T,ball)
        distance = np.hypot(x - px[..., None, None], y - py[..., None, None])
        weight = np.where(distance < RADIUS + 2, cover.clip(0, 1), 0)
    solid, near = (cover > 0.5).sum((2, 3)), distance < RADIUS + 2.5
    stray = ((cover > 0.5) & ~near).sum((2, 3))
    good = ((abs(solid / area - 1) <= 0.25) & (stray < 3)).all(1)
    disc = np.clip(RADIUS + 0.5 - distance, 0, 1)
    wrong = (abs(cover - disc) * near).sum((2, 3)).mean(1) / area
    return np.stack([px, py], -1), good, wrong


def free_flight(p, size):
    """Centres (T, ball, xy) -> which steps are free of walls and of the other ball (T-1,); the root
    mean square speed of both balls in each, NaN in the others. Bounces do not change it."""
    gap = abs(np.minimum(p - RADIUS, size - RADIUS - p))  # to a wall
    touch = np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * RADIUS + FASTEST
    # where a ball bounced between two frames, its two gaps add up to less than a step
    free = (gap[1:] + gap[:-1] > FASTEST).all((1, 2)) & ~touch[1:] & ~touch[:-1]
    return free, np.where(free, np.sqrt((np.diff(p, axis=0) ** 2).sum((1, 2)) / 2), np.nan)


def true_speed(clip):
    """The speed of both balls, constant in a real clip (median)."""
    return median(free_flight(find(clip)[0], clip.shape[1])[1])


def physics(clip, true=None):
    """uint8 (T, H, W, 3) of two balls ->
    good    share of frames in which both balls are whole
    shape   how much of a ball's area is wrong, against a true disc at its centre (median)
    vel     change of velocity from step to step in free flight, pixels a frame and axis (median)
    speed   how far the speed of both is from `true`, that of the real clip it continues,
            or else from that of its own first 8 free steps, as a share (median)
    prefix  frames before the first mistake: a ball that is not whole, a step longer than any ball
            can make, a jump in velocity of over a pixel a frame in free flight, or the speed a
            fifth off in two free steps, one after the other"""
    p, good, shape = find(clip)
    free, speed = free_flight(p, clip.shape[1])
    true = median(speed[free][:8]) if true is None else true
    off = abs(speed / max(true, 1e-3) - 1)
    pair = free[1:] & free[:-1]
    jump = np.where(pair[:, None, None], abs(np.diff(p, 2, axis=0)), np.nan)  # (T-2,ball,xy)
    seen = np.flatnonzero(free)  # in the others nobody can tell
    two = (off[seen][1:] > 0.2) & (off[seen][:-1] > 0.2)
    jumps = np.flatnonzero((jump > 1).any((1, 2))) + 2
    far = np.linalg.norm(np.diff(p, axis=0), axis=-1).max(1) > FASTEST
    mistakes = [np.flatnonzero(~good), jumps, seen[1:][two] + 1, np.flatnonzero(far) + 1]
    prefix = min([at[0] for at in mistakes if len(at)], default=len(clip))
    return good.mean(), median(shape), median(jump), median(off), prefix


def median(a):
    return np.nanmedian(a) if np.isfinite(a).any() else np.nan


def push_errors(clip, push, known):
    """Clip (T, H, W, 3) and its pushes (T, 2) -> degrees between each push and the next step of the
    red ball, away from walls and from the other ball, after the first `known` frames."""
    p, size = find(clip)[0], clip.shape[1]
    t = np.flatnonzero(push.any(1))
    t = t[t > known]
    before, step, far = p[t - 1], p[t, 0] - p[t - 1, 0], RADIUS + FASTEST
    clear = ((before[:, 0] > far) & (before[:, 0] < size - far)).all(1)
    clear &= np.linalg.norm(before[:, 0] - before[:, 1], axis=-1) > 2 * far
    length = np.linalg.norm(step, axis=1) * np.linalg.norm(push[t], axis=1)
    cosine = (step * push[t]).sum(1) / np.maximum(length, 1e-9)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))[clear]
