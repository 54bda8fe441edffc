"""The pictures that compare.py draws."""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw  # comes with imageio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from diffusion_forcing import scheduling_matrix  # noqa: E402: found by the line above
from experiments.physics import find  # noqa: E402


def draw_pushes(clip, push, path, scale=4, frames=4):
    """A clip as .gif. An arrow shows a push for some frames, from the middle of the red ball on."""
    p, video = find(clip)[0], clip.repeat(scale, 1).repeat(scale, 2)
    along = np.linspace(0, 1, 40)[:, None]
    for t in np.flatnonzero(push.any(1)):
        for image, centre in zip(video[t : t + frames], p[t : t + frames, 0]):
            ahead = push[t] / np.linalg.norm(push[t])
            side, tip = ahead[::-1] * (1, -1), centre + 7 * ahead
            for tail in (centre, tip - 2 * ahead + 2 * side, tip - 2 * ahead - 2 * side):
                x, y = (scale * (tail + along * (tip - tail))).round().astype(int).T
                inside = (x >= 0) & (y >= 0) & (x < image.shape[1]) & (y < image.shape[0])
                image[y[inside], x[inside]] = 255
    iio.imwrite(path, video, duration=1000 / 15, loop=0)


def draw_matrices(path, num_steps=8, num_frames=12, rows=28, cell=9):
    """The first rows of three matrices as grey values: black is pure noise, white a clean frame.
    The first two columns are context."""
    panels = []
    for kind in ("autoregressive", "pyramid", "full_sequence"):
        matrix = scheduling_matrix(kind, num_frames, num_steps, uncertainty=2)[:rows].numpy()
        matrix = np.pad(matrix, ((0, rows - len(matrix)), (2, 0)))
        grey = (255 - matrix * 255 // num_steps).repeat(cell, 0).repeat(cell, 1)
        grey[::cell], grey[:, ::cell] = 128, 128
        grey = np.pad(grey, ((0, 1), (0, 1)), constant_values=128)
        panels.append(np.pad(grey, ((0, 0), (0, 3 * cell)), constant_values=255))
    iio.imwrite(path, np.concatenate(panels, 1)[:, : -3 * cell].astype(np.uint8))


def draw_strip(clips, path, count, labels=None, scale=2):
    """A row of `count` frames for each clip, from its first to its last one; labels are beside."""
    rows = []
    for clip, label in zip(clips, labels or [""] * len(clips)):
        frames = clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]
        frames = frames.repeat(scale, 1).repeat(scale, 2)  # (count,H,W,3)
        frames = np.pad(frames, ((0, 0), (0, scale), (0, scale), (0, 0)), constant_values=90)
        margin = Image.new("RGB", (170 if labels else 0, frames.shape[1]), "white")
        if labels:
            ImageDraw.Draw(margin).multiline_text((4, 8), label, "black")
        rows.append(np.concatenate([np.array(margin).reshape(len(frames[0]), -1, 3), *frames], 1))
    iio.imwrite(path, np.concatenate(rows))
