"""How far rollouts drift from real clips: what compare.py prints of a folder of clips.

distance  Frechet distance (as in FID, but of pixels) between patches of the rollouts and of real
          clips: 8x8 pixels of two frames, along the 64 directions in which real patches differ
          most, each divided by its standard deviation. 0 if both are distributed alike
sharp     energy of the finest details, over that of real clips: below 1 is blur, above it grain
motion    how much a frame differs from the next, over that of real clips: near 0, nothing moves
"""

import numpy as np

PATCH, DIRECTIONS = 8, 64


def patches(clips, count):
    """-> (count, 2*8*8*3): equally many of each clip (T, H, W, 3), at random places."""
    rng, found, n = np.random.default_rng(0), [], -(-count // len(clips))
    for clip in clips:
        T, H, W, _ = clip.shape
        at = rng.integers((T - 1, H - PATCH + 1, W - PATCH + 1), size=(n, 3))
        found += [clip[t : t + 2, y : y + PATCH, x : x + PATCH].ravel() for t, y, x in at]
    return np.array(found, np.float32)


def frechet(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A^1/2 B A^1/2)^1/2), for two Gaussians."""
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * common


def details(clips):
    return np.mean([(np.diff(np.diff(1.0 * x, axis=1), axis=2) ** 2).mean() for x in clips])


def motion(clips):
    return np.mean([abs(np.diff(1.0 * x, axis=0)).mean() for x in clips])


class Drift:
    """How far clips, lists of uint8 (T, H, W, 3), are from the first list: real ones."""

    def __init__(self, real, count=40_000):
        self.count, z = count, patches(real, count)
        variance, directions = np.linalg.eigh(np.cov(z.T))  # in increasing order
        scale = np.sqrt(variance[-DIRECTIONS:] + 1)  # + 1: a floor of one level
        self.directions = directions[:, -DIRECTIONS:] / scale
        self.real = self.gaussian(z)
        self.details, self.motion = details(real), motion(real)

    def gaussian(self, z):
        z = z @ self.directions
        return z.mean(0), np.cov(z.T)

    def __call__(self, clips):
        """-> distance, sharp, motion of a list of clips."""
        distance = frechet(*self.real, *self.gaussian(patches(clips, self.count)))
        return distance, details(clips) / self.details, motion(clips) / self.motion
