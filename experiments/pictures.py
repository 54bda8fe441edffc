"""The pictures that compare.py draws."""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw  # comes with imageio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from data.clips import to_bytes  # noqa: E402: found by the line above
from diffusion_forcing import per_frame, sample, scheduling_matrix  # noqa: E402
from experiments.physics import find  # noqa: E402


def draw_pushes(clip, push, path, scale=4, frames=4):
    """A clip as .gif. For some frames, an arrow from the middle of the red ball shows a push."""
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
    titles = {"autoregressive": "frame by frame", "pyramid": "pyramid",
              "full_sequence": "all together"}
    columns, top, gap = 2 + num_frames, 20, 50
    panel = columns * cell + 1
    bottom = top + rows * cell
    picture = Image.new("RGB", (3 * (gap + panel) + 10, bottom + 20), "white")
    draw = ImageDraw.Draw(picture)
    for i, (kind, title) in enumerate(titles.items()):
        matrix = scheduling_matrix(kind, num_frames, num_steps, uncertainty=2)[:rows].numpy()
        matrix = np.pad(matrix, ((0, rows - len(matrix)), (2, 0)))
        left = gap + i * (gap + panel)
        for (m, t), level in np.ndenumerate(matrix):
            x, y = left + t * cell, top + m * cell
            grey = 255 - int(level) * 255 // num_steps
            draw.rectangle((x, y, x + cell, y + cell), (grey,) * 3, "grey")
        draw.text((left + panel / 2, top - 6), title, "black", anchor="ms")
        for x, text in ((0.5, "0"), (columns / 2, "frame"), (columns - 0.5, str(columns - 1))):
            draw.text((left + x * cell, bottom + 14), text, "black", anchor="ms")
        for y, text in ((0.5, "0"), (rows / 2, "step"), (rows - 0.5, str(rows - 1))):
            draw.text((left - 6, top + y * cell), text, "black", anchor="rm")
    picture.save(path)


def draw_strip(clips, path, count, labels=None, scale=2):
    """A row of `count` frames for each clip, from its first to its last; labels on the left."""
    rows, labels = [], labels or [""] * len(clips)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    for clip, label in zip(clips, labels):
        frames = clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]
        frames = frames.repeat(scale, 1).repeat(scale, 2)  # (count,H,W,3)
        frames = np.pad(frames, ((0, 0), (0, scale), (0, scale), (0, 0)), constant_values=90)
        margin = Image.new("RGB", (6 * longest + 8 if longest else 0, frames.shape[1]), "white")
        if label:
            ImageDraw.Draw(margin).multiline_text((4, 8), label, "black")
        rows.append(np.concatenate([np.array(margin).reshape(len(frames[0]), -1, 3), *frames], 1))
    iio.imwrite(path, np.concatenate(rows))


def draw_pyramid(model, context, path, num_frames=20, shown=8, num_steps=8, u=2, scale=2):
    """Sampling by the pyramid as .gif, a picture for each call of the network. Frames slide by from
    right to left as they come down; below each is its level. Noisy ones are shown as bright as
    clean ones: else nearly all of their pixels would be black or white."""
    config, calls = model.config, []

    def spy(x, sigma, **more):
        size = per_frame((1 + (sigma / config.sigma_data) ** 2).sqrt())
        calls.append(to_bytes((x - model.data_mean) / size + model.data_mean)[0])
        return model(x, sigma, **more)

    matrix = scheduling_matrix("pyramid", num_frames, num_steps, u)
    actions = torch.zeros(1, context.shape[1] + num_frames, config.action_dim)  # nobody pushes
    sample(spy, matrix, context, actions=actions, config=config,
           generator=torch.Generator().manual_seed(0))
    levels = np.pad(matrix.numpy(), ((0, 0), (context.shape[1], 0)))  # (M+1,T)
    step, pictures = scale * config.width + 2, []
    for m in range(4 * u, u * num_frames):
        picture = Image.new("RGB", (shown * step - 2, scale * config.height + 14), "white")
        draw = ImageDraw.Draw(picture)
        for t, image in enumerate(calls[m]):
            left = round((t - context.shape[1] - m / u + shown - 1.5) * step)
            large = image.repeat(scale, 0).repeat(scale, 1)
            picture.paste(Image.fromarray(large), (left, 0))
            draw.text((left + step / 2, picture.height), str(levels[m, t]), "black", anchor="md")
        pictures.append(picture.convert("P", dither=Image.Dither.NONE))  # 216 colours: small
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200, loop=0)
