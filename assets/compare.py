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

CLEAN, NOISY = (f"--forcing teacher --context-noise {noise}" for noise in (0.002, 0.1))
RUNS = {  # name: options of train.py, seeds, rollouts
    "diffusion": ("", (0, 1, 2), ("autoregressive", "pyramid", "from nothing")),
    "teacher, clean past": (CLEAN, (0, 1, 2), ("autoregressive", "pyramid")),
    "teacher, noisy past": (NOISY, (0, 1, 2), ("autoregressive",)),
    "full_sequence": ("--forcing full_sequence", (0, 1, 2), ("full sequence, from nothing",)),
    "diffusion, GRU": ("--temporal gru", (0,), ("autoregressive",)),
    "teacher, clean past, GRU": (f"{CLEAN} --temporal gru", (0,), ("autoregressive",)),
    "teacher, noisy past, GRU": (f"{NOISY} --temporal gru", (0,), ("autoregressive",)),
}
ROLLOUTS = {  # name: options of sample.py. From nothing: as long as a training clip
    "autoregressive": "--schedule autoregressive",
    "pyramid": "--schedule pyramid --uncertainty 3",
    "from nothing": "--schedule autoregressive",
    "full sequence, from nothing": "--schedule full_sequence --steps 20",
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
    """A script of the product, on one core, unless its log says that it is done."""
    aside = log.with_suffix(".tmp")
    if not log.exists():
        with open(aside, "w") as f:
            subprocess.run([sys.executable, HERE / script, *map(str, words)], stdout=f, stderr=f,
                           check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        aside.rename(log)


def run(name, seed, args):
    """Trains and rolls out -> {rollout: clips (8, T, H, W, 3)}."""
    options, _, rollouts = RUNS[name]
    folder, clips = args.out / f"{name} {seed}".replace(",", "").replace(" ", "_"), {}
    folder.mkdir(exist_ok=True)
    call("train.py", [*options.split(), "--minutes", args.minutes, "--seed", seed, "--device",
                      "cpu", "--out", folder / "model.pt", "--overwrite"], folder / "train.txt")
    for rollout in rollouts:
        stem, nothing = rollout.split(",")[0].replace(" ", "_"), "nothing" in rollout
        start = ["--batch", CLIPS] if nothing else [
            "--context", *(args.out / f"context_{i}.npy" for i in range(CLIPS))]
        call("sample.py", [*ROLLOUTS[rollout].split(), "--ckpt", folder / "model.pt", *start,
                           "--frames", LENGTHS[0] if nothing else LENGTHS[-1], "--device", "cpu",
                           "--out", folder / f"{stem}.npy"], folder / f"{stem}.txt")
        clips[rollout] = np.stack([np.load(folder / f"{stem}_{i}.npy", allow_pickle=False)
                                   for i in range(CLIPS)])
    return clips


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=4, help="of every training (%(default)s)")
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
        for rollout, x in clips.items():
            rows.setdefault((name, rollout), []).append(x)
    print("| training | rollout | length", *COLUMNS, "", sep=" | ")
    print("|-|-|-|" + "-|" * len(COLUMNS))
    for (name, rollout), seeds in rows.items():
        for length in [n for n in LENGTHS if n <= seeds[0].shape[1]]:
            each = np.array([np.nanmean([physics(c[:length]) for c in x], 0) for x in seeds])
            figures = [f"{m:.{n}f}" + f" ± {d:.{n}f}" * (len(seeds) > 1)
                       for m, d, n in zip(each.mean(0), each.std(0), (3, 3, 3, 3, 0))]
            print(f"| {name} | {rollout} | {length // LENGTHS[0]}x", *figures, "", sep=" | ")
    at = np.linspace(0, LENGTHS[-1] - 1, 16).round().astype(int)
    strips = [x[0][0][at] for x in rows.values() if x[0].shape[1] == LENGTHS[-1]]
    strip = np.concatenate([np.concatenate(s, 1) for s in strips])
    iio.imwrite(args.out / "strip.png", strip.repeat(2, 0).repeat(2, 1))


if __name__ == "__main__":
    main()
