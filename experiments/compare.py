"""Measures what README and RESULTS.md claim, on the bouncing balls.

    python experiments/compare.py --minutes 4 --jobs 2      trains every paradigm for the same time,
        each on one core, on clips of 16 frames, rolls out 16, 64 and 256 frames, prints a table
    python experiments/compare.py --ckpt model.pt           rolls a model out in many ways; several
        models are several seeds: each figure is then their mean
    python experiments/compare.py --ckpt model.pt --push    how well it obeys pushes; push.gif
    python experiments/compare.py --ckpt both.pt --between  bidirectional: between two given frames
    python experiments/compare.py --matrix                  draws three scheduling matrices

What it trains and rolls out is kept in --out, and not made again. Its pictures are there, too:
strip.png has frames 0, 17 ... 255 of a rollout, for every row of 256.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from data.balls import bouncing_balls  # noqa: E402: found by the line above
from diffusion_forcing import SCHEDULES, scheduling_matrix  # noqa: E402
from experiments.physics import FASTEST, find, physics, push_errors, true_speed  # noqa: E402

FRAMEWISE, PYRAMID = "--schedule autoregressive", "--schedule pyramid"
SIX, FROM_NOTHING = f"{FRAMEWISE} --steps 6", "--batch 8 --frames 16"
CLEAN = "--forcing teacher --context-noise 0.002"
NOISY = "--forcing teacher --context-noise 0.1"
RUNS = [  # options of train.py, seeds, rollouts as options of sample.py
    ("", (0, 1, 2), (FRAMEWISE, SIX, PYRAMID, FROM_NOTHING,
                    f"--schedule full_sequence {FROM_NOTHING}")),
    (CLEAN, (0, 1, 2), (FRAMEWISE, SIX, PYRAMID)),
    (NOISY, (0, 1, 2), (FRAMEWISE,)),
    ("--forcing full_sequence", (0, 1, 2), (f"--steps 20 {FROM_NOTHING}",)),
    ("--temporal gru", (0,), (FRAMEWISE, PYRAMID)),
    (f"{CLEAN} --temporal gru", (0,), (FRAMEWISE,)),
    (f"{NOISY} --temporal gru", (0,), (FRAMEWISE,)),
]
MATRICES = [*(f"{FRAMEWISE} --steps {s}" for s in (4, 6, 8)),
            *(f"{PYRAMID} --uncertainty {u} --steps {s}" for u in (1, 2, 3) for s in (6, 8))]
WAYS = [*MATRICES, *(f"{way} --batch 64 --frames 16" for way in MATRICES)]  # for all of --ckpt
MORE = [  # for a single one
    *(f"--solver euler {way}" for way in MATRICES if way.startswith(FRAMEWISE)),
    *(f"--context-noise {noise}" for noise in (0.002, 0.01, 0.02, 0.05, 0.2, 0.5))]
CLIPS, LENGTHS, CONTEXT = 8, (16, 64, 256), 4
COLUMNS = ("good", "shape", "vel", "speed", "prefix")


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


def train(options, seed, args, data=("--no-push",)):
    """-> the checkpoint of a run, by default on balls that nobody pushes."""
    path = folder(args, "train", options, "seed", seed)
    call("train.py", [*options.split(), *data, "--minutes", args.minutes, "--seed", seed,
                      "--device", "cpu", "--out", path / "model.pt", "--overwrite"],
         path / "log.txt")
    return path / "model.pt"


def sample(ckpt, options, contexts, name, args):
    """Runs sample.py for 256 frames -> the folder with NAME*.npy, and its log NAME.txt."""
    own = ckpt.is_relative_to(args.out)
    path = folder(args, ckpt.parent.name if own else ckpt, "sample", options)
    given = ["--context", *contexts] if contexts else []
    call("sample.py", ["--ckpt", ckpt, "--frames", LENGTHS[-1], *options.split(), "--device", "cpu",
                       *given, "--out", path / f"{name}.npy"],
         path / f"{name}.txt", after=ckpt.stat().st_mtime)
    return path


def roll_out(ckpt, options, args, context="context", num_clips=CLIPS):
    """-> clips (N, T, H, W, 3), each from 4 real frames or, with --batch, from nothing. Actions are
    in the side files of the contexts, if there are any."""
    contexts = [args.out / f"{context}_{i}.npy" for i in range(num_clips)]
    path = sample(ckpt, options, [] if "--batch" in options else contexts, "r", args)
    files = [path / f"r_{i}.npy" for i in range(len(list(path.glob("r_*.npy"))))]
    return np.stack([np.load(file, allow_pickle=False) for file in files])


def seconds(ckpt, options, args):
    """-> seconds for each frame of one clip, on one core, as the progress bar of sample.py says."""
    path = sample(ckpt, options, [args.out / "context_0.npy"], "one", args)
    return 1 / float(re.findall(r"([\d.]+) frames/s", (path / "one.txt").read_text())[-1])


def pushes(ckpts, args):
    """How well models obey pushes, one in every eighth frame; and a video of it, push.gif."""
    rng = np.random.default_rng(97)
    push = np.array([d for d in itertools.product((-1, 0, 1), repeat=2) if any(d)])
    push = push[rng.integers(8, size=(CLIPS, LENGTHS[-1]))]  # (N,T,2)
    push[:, np.arange(LENGTHS[-1]) % 8 > 0] = 0
    real = bouncing_balls(CLIPS, LENGTHS[-1], rng, push=push)
    for i in range(CLIPS):
        np.save(args.out / f"push_{i}.npy", real[i, :CONTEXT])
        np.save(args.out / f"push_{i}.actions.npy", push[i])
    rows = {("real balls", ""): real} | {
        (ckpt.name, way): roll_out(ckpt, way, args, "push")
        for ckpt in ckpts for way in (FRAMEWISE, PYRAMID)}
    print("| model | sample.py | pushes | degrees off (median) | within 30 degrees |\n|-|-|-|-|-|")
    for (name, way), clips in rows.items():
        off = np.concatenate([push_errors(clip, p, CONTEXT) for clip, p in zip(clips, push)])
        print(f"| {name} | {way} | {len(off)} | {np.median(off):.1f} | {np.mean(off < 30):.3f} |")
    draw_pushes(clips[0], push[0], args.out / "push.gif")


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


def between(ckpts, args):
    """Bidirectional models fill in the 14 frames between the first and the last one of real clips.
    Prints what `physics` says of them, the longest step of a ball, and in how many clips no ball
    jumps; draws the first clip, real and filled in, as keyframes.png."""
    real = bouncing_balls(8 * CLIPS, 16, np.random.default_rng(96))
    for i, clip in enumerate(real):
        np.save(args.out / f"between_{i}.npy", clip)
    others = [f" --schedule {kind}" for kind in SCHEDULES if kind != "full_sequence"]
    ways = ["--keyframes 0 15 --frames 16" + more for more in ("", " --steps 20", *others)]
    rows = {("real balls", ""): real} | {
        (ckpt.name, way): roll_out(ckpt, way, args, "between", len(real))
        for ckpt in ckpts for way in ways}
    print("| model | sample.py | good | shape | vel | longest step | without a jump |\n"
          + "|-" * 7 + "|")
    for (name, way), clips in rows.items():
        good, shape, vel, *_ = np.nanmean([physics(clip) for clip in clips], 0)
        steps = [np.linalg.norm(np.diff(find(c)[0], axis=0), axis=-1).max() for c in clips]
        print(f"| {name} | {way} | {good:.3f} | {shape:.3f} | {vel:.3f} | {max(steps):.2f} | "
              f"{sum(step <= FASTEST for step in steps)} of {len(steps)} |")
    draw_strip([real[0], rows[ckpts[0].name, ways[0]][0]], args.out / "keyframes.png", 16)


def print_table(rows, real, per_frame):
    """rows: {(options of train.py, of sample.py): clips of every seed}. What was given to go on
    from does not count. per_frame: {options of sample.py: seconds for each frame}, or empty."""
    columns = ("train.py", "sample.py", "frames", *COLUMNS, *["s/frame"] * bool(per_frame))
    print("|", " | ".join(columns), "|\n|" + "-|" * len(columns))
    speeds = [true_speed(clip) for clip in real]
    for (name, way), seeds in rows.items():
        start, true = (0, itertools.repeat(None)) if "--batch" in way else (CONTEXT, speeds)
        longest = seeds[0].shape[1]
        for length in [longest] if per_frame else [n for n in LENGTHS if n <= longest]:
            each = np.array([np.nanmean([physics(c[start:length], t) for c, t in zip(x, true)], 0)
                             for x in seeds])
            figures = [f"{each[:, i].mean():.{n}f}" + (f" ± {each[:, i].std(ddof=1):.{n}f}"
                       if len(seeds) > 1 else "") for i, n in enumerate((3, 3, 3, 3, 0))]
            if per_frame:
                figures.append(f"{per_frame[way]:.4f}" if way in per_frame else "")
            what = (name or "(default)", way or "(default)", str(length))
            print("|", " | ".join((*what, *figures)), "|")


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


def draw_strip(clips, path, length=LENGTHS[-1]):
    """16 frames of each clip of this length, one row for each clip."""
    at = np.linspace(0, length - 1, 16).round().astype(int)
    frames = np.stack([clip[at] for clip in clips if len(clip) == length])  # (row,16,H,W,3)
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=90)
    strip = np.concatenate([np.concatenate(row, 1) for row in frames])
    iio.imwrite(path, strip.repeat(2, 0).repeat(2, 1))


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=4.0, help="of every training (%(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="how many at once, each on one core (1)")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for all of it (runs)")
    p.add_argument("--ckpt", type=Path, nargs="+", default=[], help="measure these, train none")
    p.add_argument("--push", action="store_true", help="measure how well --ckpt obeys pushes")
    p.add_argument("--between", action="store_true", help="fill in between two frames with --ckpt")
    p.add_argument("--matrix", action="store_true", help="only draw matrix.png")
    args = p.parse_args()
    if (args.push or args.between) and not args.ckpt:
        p.error("--push and --between measure models: --ckpt is needed")
    args.out = args.out.resolve()
    args.ckpt = [path.resolve() for path in args.ckpt]
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def table(args):
    """Trains all of RUNS, or takes --ckpt; rolls out; prints the table and draws strip.png."""
    real, other = (bouncing_balls(CLIPS, LENGTHS[-1], np.random.default_rng(n)) for n in (99, 98))
    for i, clip in enumerate(real):
        np.save(args.out / f"context_{i}.npy", clip[:CONTEXT])
    names, ways = ", ".join(p.stem for p in args.ckpt), WAYS + MORE * (len(args.ckpt) == 1)
    wanted = [(names, range(len(args.ckpt)), ways)] if args.ckpt else RUNS
    jobs = [(name, way, seed) for name, seeds, ways in wanted for seed in seeds for way in ways]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(dict.fromkeys((name, seed) for name, _, seed in jobs))
        models = dict(zip(runs, args.ckpt or pool.map(lambda run: train(*run, args), runs)))
        clips = pool.map(lambda job: roll_out(models[job[0], job[2]], job[1], args), jobs)
        rows = {("none: real balls", "none"): [real], ("none: other balls", "none"): [other]}
        for (name, way, _), x in zip(jobs, clips):
            rows.setdefault((name, way), []).append(x)
    per_frame = {way: np.mean([seconds(path, way, args) for path in args.ckpt])  # alone
                 for _, _, ways in wanted for way in ways if args.ckpt and "--batch" not in way}
    print_table(rows, real, per_frame)
    draw_strip([x[0][0] for x in rows.values()], args.out / "strip.png")


def main():
    args = parse_args()
    if args.matrix:
        draw_matrices(args.out / "matrix.png")
    elif args.push:
        pushes(args.ckpt, args)
    elif args.between:
        between(args.ckpt, args)
    else:
        table(args)


if __name__ == "__main__":
    main()
