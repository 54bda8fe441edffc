"""Measures the paper's claim on the bouncing balls: trains every paradigm, each for the same time,
rolls it out to 1, 4 and 16 times the training length and prints the table of README.

    python assets/compare.py --minutes 4 --jobs 2 --out runs/      two hours of a core, or one of two

What is in --out already is not made again. Beside it, --out/strip.png: rollouts, a row a paradigm.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from train import bouncing_balls  # noqa: E402: the line above says where it is

DIFFUSION, TEACHER, FULL = (f"--forcing {f}" for f in ("diffusion", "teacher", "full_sequence"))
RUNS = {  # name: options of train.py, seeds, {schedule: options of sample.py}
    "diffusion": (DIFFUSION, (0, 1, 2), {"autoregressive": "", "pyramid": "--uncertainty 3"}),
    "teacher, clean past": (f"{TEACHER} --context-noise 0.002", (0, 1, 2), {"autoregressive": ""}),
    "teacher, noisy past": (f"{TEACHER} --context-noise 0.1", (0, 1, 2), {"autoregressive": ""}),
    "full_sequence": (FULL, (0, 1, 2), {"full_sequence": ""}),
    "diffusion, GRU": (f"{DIFFUSION} --temporal gru", (0,), {"autoregressive": ""}),
    "teacher, clean past, GRU": (f"{TEACHER} --context-noise 0.002 --temporal gru", (0,),
                                 {"autoregressive": ""}),
    "teacher, noisy past, GRU": (f"{TEACHER} --context-noise 0.1 --temporal gru", (0,),
                                 {"autoregressive": ""}),
}
CLIPS, CONTEXT, LENGTHS = 8, 4, (16, 64, 256)
COLUMNS = ("good", "shape", "vel", "speed", "prefix")
RADIUS, BACKGROUND = 3.5, (12, 14, 20)  # as train.py draws them
COLOURS = ((230, 70, 0), (0, 110, 225))


def physics(clip):
    """uint8 (T, H, W, 3) of two balls ->
    good    share of frames in which both balls have their area (within a quarter) in one place
    shape   how much of a disc's area is wrong, against true discs at the centres found (median)
    vel     change of velocity from step to step in free flight, pixels a frame (median)
    speed   how far the root mean square speed of both is from that of the first 8 free steps,
            as a share (median): collisions and walls keep it
    prefix  frames before the first that is not good, a jump in free flight of over a pixel a frame,
            or a speed that is off by a fifth twice running"""
    unmix = np.linalg.pinv(np.array(COLOURS, float))  # (3,2)
    cover = np.moveaxis((clip - np.array(BACKGROUND, float)) @ unmix, -1, 1)  # (T,ball,H,W)
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
    shape = (abs(cover - disc) * near).sum((2, 3)).mean(1) / area
    p = np.stack([px, py], -1)  # (T,ball,xy)
    v, reach = np.diff(p, axis=0), 2.3  # nobody is faster, pixels a frame
    gap = abs(np.minimum(p - RADIUS, clip.shape[1] - RADIUS - p))  # (T,ball,xy), to a wall
    touch = np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * RADIUS + reach  # (T,)
    free = (gap[1:] + gap[:-1] > reach).all((1, 2)) & ~touch[1:] & ~touch[:-1]  # (T-1,)
    pair = free[1:] & free[:-1]
    jump = np.where(pair[:, None, None], abs(np.diff(v, axis=0)), np.nan)  # (T-2,ball,xy)
    rms = np.where(free, np.sqrt((v**2).sum((1, 2)) / 2), np.nan)
    off = abs(rms / np.median(rms[free][:8]) - 1) if free.any() else rms
    wrong = [*np.flatnonzero(~good)[:1], *(np.flatnonzero((jump > 1).any((1, 2)))[:1] + 2)]
    seen = np.flatnonzero(free)  # speed cannot be told in the others
    late = seen[1:][(off[seen][1:] > 0.2) & (off[seen][:-1] > 0.2)] + 1
    prefix = min([*wrong, *late[:1]], default=len(clip))
    median = lambda a: np.nanmedian(a) if np.isfinite(a).any() else np.nan  # noqa: E731
    return good.mean(), np.median(shape), median(jump), median(off), prefix


def call(script, words, log):
    """A script of the product, on one core."""
    with open(log, "w") as f:
        subprocess.run([sys.executable, HERE / script, *map(str, words)], stdout=f, stderr=f,
                       check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(name, seed, args):
    """Trains and rolls out -> {schedule: clips (8, 256, H, W, 3)}; 16 frames of full_sequence."""
    options, _, schedules = RUNS[name]
    folder, clips = args.out / f"{name}, seed {seed}".replace(", ", "-").replace(" ", "_"), {}
    folder.mkdir(exist_ok=True)
    if not (folder / "model.csv").exists() or not list(folder.glob("*.rollout.mp4")):
        call("train.py", [*options.split(), "--minutes", args.minutes, "--seed", seed, "--device",
                          "cpu", "--out", folder / "model.pt", "--overwrite"], folder / "train.txt")
    for schedule, more in schedules.items():
        frames = LENGTHS[0] if schedule == "full_sequence" else LENGTHS[-1]
        start = (["--batch", CLIPS] if schedule == "full_sequence" else
                 ["--context", *sorted(args.out.glob("context_*.npy"))])
        if not (folder / f"{schedule}_{CLIPS - 1}.npy").exists():
            call("sample.py", ["--ckpt", folder / "model.pt", "--frames", frames, *start,
                               "--schedule", schedule, *more.split(), "--steps", args.steps,
                               "--device", "cpu", "--out", folder / f"{schedule}.npy"],
                 folder / f"{schedule}.txt")
        files = [folder / f"{schedule}_{i}.npy" for i in range(CLIPS)]
        clips[schedule] = np.stack([np.load(f, allow_pickle=False) for f in files])
    return clips


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=4, help="of every training (%(default)s)")
    p.add_argument("--steps", type=int, default=10, help="sampling steps a frame (%(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="trainings at once, a core each (1)")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for all of it (runs)")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    real = bouncing_balls(CLIPS, LENGTHS[-1], np.random.default_rng(99))
    for i, clip in enumerate(real):
        np.save(args.out / f"context_{i}.npy", clip[:CONTEXT])
    jobs = [(name, seed) for name, (_, seeds, _) in RUNS.items() for seed in seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(jobs, pool.map(lambda job: run(*job, args), jobs)))
    rows = {("the balls themselves", ""): [real]}
    for (name, seed), clips in done.items():
        for schedule, x in clips.items():
            rows.setdefault((name, schedule), []).append(x)
    print("| training | schedule | length |", *COLUMNS, sep=" | ")
    print("|-|-|-|" + "-|" * len(COLUMNS))
    for (name, schedule), seeds in rows.items():
        for length in [n for n in LENGTHS if n <= seeds[0].shape[1]]:
            each = np.array([np.nanmean([physics(c[:length]) for c in x], 0) for x in seeds])
            figures = [f"{m:.3f} ± {d:.3f}" if len(seeds) > 1 else f"{m:.3f}"
                       for m, d in zip(each.mean(0), each.std(0))]
            print(f"| {name} | {schedule} | {length // LENGTHS[0]}x |", *figures, sep=" | ")
    at = np.linspace(0, LENGTHS[-1] - 1, 16).round().astype(int)
    strips = [x[0][0][at] for x in rows.values() if x[0].shape[1] == LENGTHS[-1]]
    strip = np.concatenate([np.concatenate(s, 1) for s in strips])
    iio.imwrite(args.out / "strip.png", strip.repeat(2, 0).repeat(2, 1))


if __name__ == "__main__":
    main()
