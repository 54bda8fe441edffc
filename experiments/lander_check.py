# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[box2d]", "torch", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Measures a model of the lander against the simulator: same starts, same actions.

    python experiments/lander_check.py lander.pt
    python experiments/lander_check.py lander.pt --guidance 1.5    guided by the actions

First, eight flights of 256 frames, none of which lander.py records: the model gets their first four
frames and all actions, and goes on by itself, as sample.py does. Then 48 flights of 10 frames,
after which one engine, or none, is held for 20 frames, as in play.py. Finally, 300 first frames
from nothing. lander.gif shows three of the long flights: real ones above, rollouts below.
"""

import argparse
import itertools
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.clips import to_bytes, to_frames, video_writer  # noqa: E402: found by the line above
from diffusion_forcing import load_checkpoint, need  # noqa: E402
from experiments import lander  # noqa: E402
from experiments.guidance import Guided, without_actions  # noqa: E402
from sample import generate, mistakes, positive_float  # noqa: E402

ENGINES = ("none", "left", "main", "right")
FLIGHTS, LENGTH, CONTEXT, SHOWN = 8, 256, 4, 3
STARTS, BEFORE, HELD, FROM_NOTHING = 48, 10, 20, 300
LAST, SEEDS = slice(-64, None), range(5000, 8000)  # the last quarter; lander.py: below 2999


def fly(env, seed, num_frames, size, engine=None):
    """-> frames (T, H, W, 3) uint8 and actions (T, 4) of a flight; None if it leaves the picture.
    engine: what is held after BEFORE frames, in place of what the pilot does."""
    pilot = lander.pilot(env, np.random.default_rng(seed))
    choose = lambda t, state: pilot(t, state) if engine is None or t < BEFORE else engine
    frames, actions = lander.record(env, seed, choose, num_frames)
    if len(frames) == num_frames:
        x = TF.resize(torch.from_numpy(frames).movedim(-1, 1), list(size)).movedim(1, -1)
        return x.numpy(), actions


def roll(model, schedule, frames, actions, num_context):
    """-> uint8 (N, T, H, W, 3), from the first frames of each flight, with its actions."""
    x = generate(model, frames.shape[1], to_frames(frames[:, :num_context]), schedule=schedule,
                 actions=torch.from_numpy(actions), generator=torch.Generator().manual_seed(0))
    return np.stack([to_bytes(frame) for frame in x], 1)


def body(clips):
    """Of the lander in frames (..., H, W, 3): its area and its centre (x, y), in pixels, y upwards.
    Nothing else has more blue than green."""
    weight = (clips[..., 2].astype(float) - clips[..., 1]) / 128
    weight = np.where(weight > 0.25, weight, 0)
    y, x = np.mgrid[weight.shape[-2] : 0 : -1, : weight.shape[-1]]
    area = weight.sum((-2, -1))
    centre = np.stack([(weight * x).sum((-2, -1)), (weight * y).sum((-2, -1))], -1)
    return area, centre / np.maximum(area, 1e-9)[..., None]


def shows_lander(clips, whole):
    """Frames (..., H, W, 3) -> (...): is one there, .25 to 2 times as large as a whole one?"""
    area = body(clips)[0] / whole
    return (area > 0.25) & (area < 2)


def ground(clips):
    """How many pixels of each column of frames (..., H, W, 3) are white -> (..., W)."""
    return (clips.min(-1) > 128).sum(-2)


def long_flights(model, env, size):
    """Prints the table of the flights of 256 frames -> the area of a whole lander."""
    flights = filter(None, (fly(env, seed, LENGTH, size) for seed in SEEDS))
    real, actions = map(np.stack, zip(*itertools.islice(flights, FLIGHTS)))
    rolled = roll(model, "pyramid", real, actions, CONTEXT)
    both = [np.concatenate([*clips[:SHOWN]], 2) for clips in (real, rolled)]  # (T,H,N*W,3) each
    with video_writer("lander.gif", 2 * size[0], SHOWN * size[1]) as write:
        for frame in np.concatenate(both, 1):  # rounded: faint noise makes a large file
            write((np.minimum(frame, 247) + 8) // 16 * 16)
    whole, truth = np.median(body(real)[0]), np.median(ground(real), 1, keepdims=True)
    print("| | ground off in the last quarter, pixels | frames with a lander | flights with one in "
          "every frame |\n|-|-|-|-|")
    for name, clips in (("simulator", real), ("model", rolled)):
        seen = shows_lander(clips[:, CONTEXT:], whole)
        print(f"| {name} | {abs(ground(clips) - truth)[:, LAST].mean():.2f} | {seen.mean():.3f} | "
              f"{seen.all(1).sum()} of {len(seen)} |")
    return whole


def held_engines(model, env, size):
    """Prints the table of what a held engine does."""
    starts = ([fly(env, seed, BEFORE + HELD, size, engine) for engine in range(len(ENGINES))]
              for seed in SEEDS)
    starts = [*itertools.islice((start for start in starts if all(start)), STARTS)]
    ends = []  # (N, 2, 2) for each engine: simulator and model, x and y
    for flights in zip(*starts):
        real, actions = map(np.stack, zip(*flights))
        rolled = roll(model, "autoregressive", real, actions, BEFORE)
        ends.append(np.stack([body(clips[:, -1])[1] for clips in (real, rolled)], 1))
    print(f"\n| engine, held for {HELD} frames | it moves the simulator's lander: right, up | the "
          "model's | share of the way | model's lander off by, pixels (median) |\n|-|-|-|-|-|")
    for name, end in zip(ENGINES, ends):
        off = np.median(np.linalg.norm(end[:, 0] - end[:, 1], axis=-1))
        way, way_model = (end - ends[0]).mean(0)  # against no engine
        share = f"{way @ way_model / (way @ way):.2f}" if name != "none" else ""
        print("| {} | {:.1f}, {:.1f} | {:.1f}, {:.1f} |".format(name, *way, *way_model),
              f"{share} | {off:.1f} |")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpt", help="as written by train.py")
    p.add_argument("--guidance", type=positive_float, default=1.0, help="weight (1: as trained)")
    args = p.parse_args()
    with mistakes(ValueError):
        model, _ = load_checkpoint(args.ckpt)
        c = model.config
        need((c.action_dim, c.causal, c.stride) == (lander.ENGINES, True, 1),
             f"{args.ckpt}: a causal model of the lander, of stride 1, is needed")
    if args.guidance != 1:
        model = Guided(model, args.guidance, without_actions)
    size = (model.config.height, model.config.width)
    env = gymnasium.make("LunarLander-v3", render_mode="rgb_array").unwrapped
    whole = long_flights(model, env, size)
    held_engines(model, env, size)
    noise = torch.Generator().manual_seed(0)
    first = next(generate(model, None, batch_size=FROM_NOTHING, generator=noise))
    seen = shows_lander(to_bytes(first), whole)
    print(f"\n{seen.sum()} of {FROM_NOTHING} first frames from nothing show a lander")


if __name__ == "__main__":
    main()
