"""Measures what README claims, on the bouncing balls.

    python assets/compare.py --minutes 4 --jobs 2        trains every paradigm for the same time, a
        core each on clips of 16 frames, rolls out 16, 64 and 256 and prints a table
    python assets/compare.py --ckpt assets/balls.pt      rolls one model out in many ways
    python assets/compare.py --slow                      balls that hardly move: how far they get

What it trains and rolls out is kept in --out, and not made again. So is strip.png: frames 0, 17 ...
255 of a rollout, for every row of 256.
"""

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from train import (BACKGROUND, COLOURS, CONTEXT, RADIUS, SPEED,  # noqa: E402: found by the above
                   bouncing_balls)

PYRAMID, FROM_NOTHING = "--schedule pyramid --uncertainty 2", "--batch 8 --frames 16"
CLEAN = "--forcing teacher --context-noise 0.002"
NOISY = "--forcing teacher --context-noise 0.1"
RUNS = [  # options of train.py, seeds, rollouts as options of sample.py
    ("", (0, 1, 2), ("", PYRAMID, FROM_NOTHING)),
    (CLEAN, (0, 1, 2), ("", PYRAMID)),
    (NOISY, (0, 1, 2), ("",)),
    ("--forcing full_sequence", (0, 1, 2),
     (f"--schedule full_sequence --steps 20 {FROM_NOTHING}",)),
    ("--temporal gru", (0,), ("",)),
    (f"{CLEAN} --temporal gru", (0,), ("",)),
    (f"{NOISY} --temporal gru", (0,), ("",)),
]
WAYS = [  # to roll out --ckpt: steps, solvers, pyramids, noise on the history, from nothing
    "--steps 3", "--steps 4", "", "--steps 10", "--solver euler --steps 4", "--solver euler",
    "--solver euler --steps 10",
    *(f"--schedule pyramid --uncertainty {u} --steps {s}" for u in (1, 2, 3) for s in (6, 8)),
    *(f"--context-noise {noise}" for noise in (0.002, 0.02, 0.2, 0.5)), FROM_NOTHING,
    "--steps 8 --context-noise 0.02", f"--steps 8 --context-noise 0.02 {FROM_NOTHING}"]
CLIPS, LENGTHS = 8, (16, 64, 256)
FASTEST = 2.3  # no ball is faster, not even one with the energy of both: pixels a frame
COLUMNS = ("good", "shape", "vel", "speed", "prefix")


def find(clip):
    """uint8 (T, H, W, 3) of two balls -> centres (T, ball, xy); which frames have both balls whole,
    in one place and with their area (within a quarter); how much of a ball is wrong (T,)."""
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
    mean square speed of both balls in each, NaN in the others. Walls and collisions keep it."""
    gap = abs(np.minimum(p - RADIUS, size - RADIUS - p))  # to a wall
    touch = np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * RADIUS + FASTEST
    # a ball that bounced between two frames was, in sum, nearer to the wall than a step
    free = (gap[1:] + gap[:-1] > FASTEST).all((1, 2)) & ~touch[1:] & ~touch[:-1]
    return free, np.where(free, np.sqrt((np.diff(p, axis=0) ** 2).sum((1, 2)) / 2), np.nan)


def true_speed(clip):
    """The speed of both balls of a real clip, which it keeps (median)."""
    return median(free_flight(find(clip)[0], clip.shape[1])[1])


def physics(clip, true=None):
    """uint8 (T, H, W, 3) of two balls ->
    good    share of frames in which both balls are whole
    shape   how much of a ball's area is wrong, against a true disc at its centre (median)
    vel     change of velocity from step to step in free flight, pixels a frame and axis (median)
    speed   how far the speed of both is from `true`, that of the clip that was to be gone on from,
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


def call(script, words, log, after=""):
    """A script of the product, on one core, unless its log says that just this was done before."""
    words = [sys.executable, str(HERE / script), *map(str, words)]
    title, aside = f"{shlex.join(words)} # {after}\n", log.with_suffix(".tmp")
    if not log.exists() or not log.read_text().startswith(title):
        with open(aside, "w") as f:
            f.write(title)
            f.flush()
            done = subprocess.run(words, stdout=f, stderr=f,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{script} failed; what it said is in {aside}")
        aside.rename(log)


def folder(args, *names):
    """A folder in --out, named after what is in it."""
    words = "_".join(map(str, names)).replace("--", "").replace("/", " ").split()
    path = args.out / "_".join(words)
    path.mkdir(exist_ok=True)
    return path


def train(options, seed, args, data=()):
    """-> the checkpoint of a run."""
    path = folder(args, "train", options, "seed", seed)
    call("train.py", [*options.split(), *data, "--minutes", args.minutes, "--seed", seed,
                      "--device", "cpu", "--out", path / "model.pt", "--overwrite"],
         path / "log.txt")
    return path / "model.pt"


def roll_out(ckpt, options, args, context="context"):
    """-> clips (8, T, H, W, 3), each from 4 real frames or, with --batch, from nothing."""
    own = ckpt.is_relative_to(args.out)
    path = folder(args, ckpt.parent.name if own else ckpt, "sample", options)
    clips = [] if "--batch" in options else [args.out / f"{context}_{i}.npy" for i in range(CLIPS)]
    call("sample.py", ["--ckpt", ckpt, "--frames", LENGTHS[-1], *options.split(), "--device", "cpu",
                       *(["--context", *clips] if clips else []), "--out", path / "r.npy"],
         path / "log.txt", after=ckpt.stat().st_mtime)
    return np.stack([np.load(path / f"r_{i}.npy", allow_pickle=False) for i in range(CLIPS)])


def slow(args):
    """Balls at an eighth of the speed: how far they get in the time of 8 frames, as a share of how
    far real ones get; with every frame shown to the network, and with every eighth."""
    clips = bouncing_balls(64 + CLIPS, 200, np.random.default_rng(5), speed=np.array(SPEED) / 8)
    data = folder(args, "slow")
    for i, clip in enumerate(clips):
        path = data / f"{i}.npy" if i < 64 else args.out / f"slow_context_{i - 64}.npy"
        if not path.exists():
            np.save(path, clip)
    for stride in (1, 8):
        ckpt = train(f"--stride {stride}", 0, args, ["--data", data, "--cache", args.out / "cache"])
        step = 8 // stride
        for noise in (0.05, 0.2):
            rolled = roll_out(ckpt, f"--context-noise {noise} --frames 128", args, "slow_context")
            far = [np.linalg.norm(p[step:] - p[:-step], axis=-1).mean() for p in
                   (find(c)[0][CONTEXT:] for c in (*rolled, *clips[64:, ::stride]))]
            print(f"--stride {stride} --context-noise {noise}: "
                  f"{np.mean(far[:CLIPS]) / np.mean(far[CLIPS:]):.2f} of the way")


def print_table(rows, real):
    """rows: {(options of train.py, of sample.py): clips of every seed}. What was given to go on
    from does not count."""
    print("|", " | ".join(("train.py", "sample.py", "frames", *COLUMNS)), "|")
    print("|-|-|-|" + "-|" * len(COLUMNS))
    speeds = [true_speed(clip) for clip in real]
    for (name, way), seeds in rows.items():
        start, true = (0, [None] * CLIPS) if "--batch" in way else (CONTEXT, speeds)
        for length in [n for n in LENGTHS if n <= seeds[0].shape[1]]:
            each = np.array([np.nanmean([physics(c[start:length], t) for c, t in zip(x, true)], 0)
                             for x in seeds])
            figures = [f"{each[:, i].mean():.{n}f}" + (f" ± {each[:, i].std(ddof=1):.{n}f}"
                       if len(seeds) > 1 else "") for i, n in enumerate((3, 3, 3, 3, 0))]
            what = (name or "(default)", way or "(default)", str(length))
            print("|", " | ".join((*what, *figures)), "|")


def draw_strip(clips, path):
    """16 frames of each clip of full length, a row a clip."""
    at = np.linspace(0, LENGTHS[-1] - 1, 16).round().astype(int)
    frames = np.stack([clip[at] for clip in clips if len(clip) == LENGTHS[-1]])  # (row,16,H,W,3)
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=90)
    strip = np.concatenate([np.concatenate(row, 1) for row in frames])
    iio.imwrite(path, strip.repeat(2, 0).repeat(2, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=4.0, help="of every training (%(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="how many at once, a core each (1)")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for all of it (runs)")
    p.add_argument("--ckpt", type=Path, help="measure this model of the balls, and train none")
    p.add_argument("--slow", action="store_true", help="measure balls that hardly move instead")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.slow:
        return slow(args)
    real, other = (bouncing_balls(CLIPS, LENGTHS[-1], np.random.default_rng(n)) for n in (99, 98))
    for i, clip in enumerate(real):
        np.save(args.out / f"context_{i}.npy", clip[:CONTEXT])
    wanted = [(str(args.ckpt), (0,), WAYS)] if args.ckpt else RUNS
    jobs = [(name, way, seed) for name, seeds, ways in wanted for seed in seeds for way in ways]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(dict.fromkeys((name, seed) for name, _, seed in jobs))
        ckpts = dict(zip(runs, pool.map(
            lambda run: args.ckpt.resolve() if args.ckpt else train(*run, args), runs)))
        clips = pool.map(lambda job: roll_out(ckpts[job[0], job[2]], job[1], args), jobs)
        rows = {("none: real balls", "none"): [real], ("none: other balls", "none"): [other]}
        for (name, way, _), x in zip(jobs, clips):
            rows.setdefault((name, way), []).append(x)
    print_table(rows, real)
    draw_strip([x[0][0] for x in rows.values()], args.out / "strip.png")


if __name__ == "__main__":
    main()
