"""Two bouncing balls, one of which is pushed around: the world that train.py learns without --data.

    bouncing_balls  the simulator: pushes in, frames out
    Balls           batches of new clips without end, with random pushes
"""

import numpy as np

RADIUS = 3.5  # pixels
SPEED = (0.6, 1.5)  # pixels a frame, from and to
BACKGROUND = np.array([12, 14, 20])
COLOURS = np.array([[230, 70, 0], [0, 110, 225]])  # of the two balls: added on the background
PUSHED = 1 / 4  # in half of the clips: share of frames with a push; 1 in 9 of them is (0, 0)


def bouncing_balls(num_clips, num_frames, rng, size=32, radius=RADIUS, substeps=8, speed=SPEED,
                   push=None):
    """Two elastic balls of equal mass in a box -> uint8 (N, T, size, size, 3).

    push (N, T, 2) of -1, 0 and 1, to the right and down: where push[:, t] is not (0, 0), the red
    ball gets that direction, and a speed of 1 pixel a frame, before it moves into frame t.
    Raises ValueError for a box that is too small."""
    if size < 4 * radius:
        raise ValueError(f"size is {size}; two balls need {4 * radius:.0f} pixels or more")

    p, v = start(num_clips, rng, size, radius, speed)  # places and speeds (N, ball, xy)
    clips = [draw(p, size, radius)]
    for t in range(1, num_frames):
        if push is not None:
            norm = np.linalg.norm(push[:, t], axis=-1, keepdims=True)  # (N, 1)
            v[:, 0] = np.where(norm > 0, push[:, t] / np.maximum(norm, 1), v[:, 0])
        for _ in range(substeps):
            p, v = move(p, v, substeps, size, radius)
        clips.append(draw(p, size, radius))
    return np.stack(clips, 1)


def start(num_clips, rng, size, radius, speed):
    """-> random places and speeds (N, ball, xy): inside the box, and not on top of each other."""
    angle = rng.uniform(0, 2 * np.pi, (num_clips, 2))
    v = np.stack([np.cos(angle), np.sin(angle)], -1)
    v = v * rng.uniform(*speed, (num_clips, 2, 1))

    p = rng.uniform(radius, size - radius, (num_clips, 2, 2))
    overlap = np.ones(num_clips, bool)
    while overlap.any():
        overlap = np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * radius
        p[overlap] = rng.uniform(radius, size - radius, (overlap.sum(), 2, 2))
    return p, v


def move(p, v, substeps, size, radius):
    """Places and speeds (N, ball, xy) -> those one substep later."""
    p = p + v / substeps
    low, high = p < radius, p > size - radius  # walls mirror
    p = np.where(low, 2 * radius - p, np.where(high, 2 * (size - radius) - p, p))
    v = np.where(low, abs(v), np.where(high, -abs(v), v))

    apart = p[:, 1] - p[:, 0]  # (N, xy)
    distance = np.linalg.norm(apart, axis=-1, keepdims=True)  # (N, 1)
    normal = apart / distance
    approach = ((v[:, 0] - v[:, 1]) * normal).sum(-1, keepdims=True)  # (N, 1)
    swap = np.where((distance < 2 * radius) & (approach > 0), approach, 0) * normal
    return p, v + np.stack([-swap, swap], 1)  # speeds along the line of centres are swapped


def draw(p, size, radius):
    """Places (N, ball, xy) -> uint8 (N, size, size, 3)."""
    pixel = np.arange(size) + 0.5
    dx, dy = pixel - p[..., 0, None], pixel - p[..., 1, None]  # (N, ball, size) each
    distance = np.sqrt(dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2)  # (N, ball, size, size)
    cover = np.clip(radius + 0.5 - distance, 0, 1)  # an edge one pixel wide
    image = BACKGROUND + np.einsum("nkhw,kc->nhwc", cover, COLOURS)
    return np.minimum(image, 255).round().astype(np.uint8)


class Balls:
    """Clips without end. None is ever seen twice, so each is as good as held out."""

    held_out = True

    def __init__(self, size=32, push=True):
        self.size, self.action_dim = size, 2 if push else 0

    def batch(self, rng, n, num_frames, held=False):
        """-> clips (n, T, size, size, 3) uint8, and the pushes (n, T, 2) float32 that led to their
        frames; (n, T, 0) without pushes."""
        push = np.zeros((n, num_frames, self.action_dim), np.float32)
        if not self.action_dim:
            return bouncing_balls(n, num_frames, rng, self.size), push

        # half of the clips have none: the speeds of balls that nobody pushes are learned, too
        share = PUSHED * rng.integers(0, 2, (n, 1, 1))
        push += rng.integers(-1, 2, push.shape) * (rng.random((n, num_frames, 1)) < share)
        return bouncing_balls(n, num_frames, rng, self.size, push=push), push
