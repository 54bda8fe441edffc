"""Measures what README and RESULTS.md claim.

    python experiments/compare.py --jobs 2      trains every paradigm on the bouncing balls, with
        three seeds, each for four minutes on one core; measures 16, 64 and 256 frames; prints a
        table of how good the balls are (physics.py)
    python experiments/compare.py --data clips/ --jobs 2    the same on a folder of clips, for
        fifteen minutes; continues held-out clips to 256 frames; measures how far they drift
        from real ones (drift.py)
    python experiments/compare.py --ckpt model.pt           rolls a model out in many ways, with
        three seeds, or several models, with one seed each; figures are means over these
    python experiments/compare.py --ckpt model.pt --push    how well it obeys pushes; push.gif
    python experiments/compare.py --ckpt both.pt --between  bidirectional: between two given frames
    python experiments/compare.py --ckpt model.pt --pyramid  draws the pyramid at work: pyramid.gif
    python experiments/compare.py --matrix                  draws three scheduling matrices

--out keeps what is trained and rolled out, to use it again, and strip.png: a rollout of each way.
"""

import argparse
import hashlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from data.balls import bouncing_balls  # noqa: E402: found by the line above
from data.clips import Clips, side_file, to_frames  # noqa: E402
from diffusion_forcing import SCHEDULES, load_checkpoint, need  # noqa: E402
from experiments.drift import Drift  # noqa: E402
from experiments.physics import FASTEST, find, physics, push_errors, true_speed  # noqa: E402
from experiments.pictures import draw_matrices, draw_pushes, draw_pyramid, draw_strip  # noqa: E402
from sample import mistakes, positive  # noqa: E402

FRAMEWISE, PYRAMID = "--schedule autoregressive", "--schedule pyramid"
FROM_NOTHING = "--batch 8 --frames 16 --actions unknown"
CLEAN = "--forcing teacher --context-noise 0.002"
NOISY = "--forcing teacher --context-noise 0.1"
RUNS = {  # options of train.py, rollouts as options of sample.py
    "Diffusion Forcing": ("", (FRAMEWISE, PYRAMID, FROM_NOTHING,
                               f"--schedule full_sequence {FROM_NOTHING}")),
    "teacher forcing": (CLEAN, (FRAMEWISE, PYRAMID)),
    "teacher forcing, noisy history": (NOISY, (FRAMEWISE, PYRAMID)),
    "full sequence, bidirectional": ("--forcing full_sequence", (f"--steps 20 {FROM_NOTHING}",)),
}
SEEDS = (0, 1, 2)
MATRICES = [f"{FRAMEWISE} --steps 4", f"{FRAMEWISE} --steps 8",
            *(f"{PYRAMID} --uncertainty {u}" for u in (1, 2, 4)), "--schedule full_sequence"]
WAYS = [*MATRICES, *(f"{way} --batch 64 --frames 16" for way in MATRICES)]  # for all of --ckpt
MORE = [*(f"--solver euler {way}" for way in (*MATRICES[:-1], f"{PYRAMID} --steps 4")),
        *(f"--context-noise {noise}" for noise in (0.002, 0.02, 0.2, 0.5))]  # for a single one
CLIPS, LENGTHS, CONTEXT = 8, (16, 64, 256), 4
COLUMNS = ("good", "shape", "vel", "speed", "prefix")
DRIFT = ("distance: 1st quarter", "2nd", "3rd", "last", "sharp", "motion")


def call(script, words, log, after=""):
    """Runs a script on one core, unless its log says that exactly this was done before."""
    words = [sys.executable, str(HERE / script), *map(str, words)]
    title, aside = f"{shlex.join(words)} # {after}\n", log.with_suffix(".tmp")
    if not log.exists() or not log.read_text().startswith(title):
        with open(aside, "w") as f:
            print(title, end="", file=f, flush=True)
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


def train(options, seed, args):
    """-> the checkpoint of a run: on a folder of clips, or on balls that nobody pushes. All have
    attention, for bidirectional models need it: so only the paradigm differs."""
    path = folder(args, "train", options, "seed", seed)
    data = ["--data", args.data, "--size", args.size] if args.data else ["--no-push"]
    call("train.py", [*options.split(), *data, "--minutes", args.minutes, "--seed", seed,
                      "--preset", "small", "--temporal", "attention", "--device", "cpu",
                      "--out", path / "model.pt", "--overwrite"], path / "log.txt")
    return path / "model.pt"


def sample(ckpt, options, contexts, name, args):
    """Runs sample.py for 256 frames -> the folder with NAME*.npy, and its log NAME.txt. What was
    rolled out from other contexts, or by another model of this name, is made again."""
    own = ckpt.is_relative_to(args.out) and ckpt.name == "model.pt"
    path = folder(args, ckpt.parent.name if own else ckpt, "sample", options)
    given = ["--context", *contexts] if contexts else []
    files = [file for path in contexts for file in (path, side_file(path)) if file.exists()]
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    call("sample.py", ["--ckpt", ckpt, "--frames", LENGTHS[-1], *options.split(), "--device", "cpu",
                       *given, "--out", path / f"{name}.npy"],
         path / f"{name}.txt", after=f"{ckpt.stat().st_mtime} {content}")
    return path


def roll_out(ckpt, options, args, context="context"):
    """-> clips (N, T, H, W, 3), each from 4 real frames or, with --batch, from nothing. Actions are
    in the side files of the contexts, if there are any."""
    batch = re.search(r"--batch (\d+)", options)
    contexts = [] if batch else sorted(args.out.glob(f"{context}_*[0-9][0-9].npy"))
    path = sample(ckpt, options, contexts, "r", args)
    count = int(batch[1]) if batch else len(contexts)
    files = [path / f"r_{i}.npy" for i in range(count)] if count > 1 else [path / "r.npy"]
    return np.stack([np.load(file, allow_pickle=False) for file in files])


def seconds(ckpt, options, args):
    """-> seconds for each frame of one clip, on one core, as the progress bar of sample.py says."""
    path = sample(ckpt, options, [args.out / "context_00.npy"], "one", args)
    return 1 / float(re.findall(r"([\d.]+) frames/s", (path / "one.txt").read_text())[-1])


def pushes(ckpts, args):
    """How well models obey pushes, one in every eighth frame; and a video of it, push.gif."""
    rng = np.random.default_rng(97)
    push = np.array([d for d in itertools.product((-1, 0, 1), repeat=2) if any(d)])
    push = push[rng.integers(8, size=(CLIPS, LENGTHS[-1]))]  # (N,T,2)
    push[:, np.arange(LENGTHS[-1]) % 8 > 0] = 0
    real = bouncing_balls(CLIPS, LENGTHS[-1], rng, push=push)
    for i in range(CLIPS):
        np.save(args.out / f"push_{i:02}.npy", real[i, :CONTEXT])
        np.save(args.out / f"push_{i:02}.actions.npy", push[i])
    rows = {("real balls", ""): real} | {
        (os.path.relpath(ckpt), way): roll_out(ckpt, way, args, "push")
        for ckpt in ckpts for way in (FRAMEWISE, PYRAMID)}
    print("| model | sample.py | pushes | degrees off (median) | within 30 degrees |\n|-|-|-|-|-|")
    for (name, way), clips in rows.items():
        off = np.concatenate([push_errors(clip, p, CONTEXT) for clip, p in zip(clips, push)])
        print(f"| {name} | {way} | {len(off)} | {np.median(off):.1f} | {np.mean(off < 30):.3f} |")
    draw_pushes(clips[0], push[0], args.out / "push.gif")


def between(ckpts, args):
    """Bidirectional models fill in 14 frames between two real ones. Prints `physics` of them, the
    longest move of a ball, and how many clips have no jump; draws one clip as keyframes.png."""
    real = bouncing_balls(8 * CLIPS, 16, np.random.default_rng(96))
    for i, clip in enumerate(real):
        np.save(args.out / f"between_{i:02}.npy", clip)
    others = [f" --schedule {kind}" for kind in SCHEDULES if kind != "full_sequence"]
    ways = ["--keyframes 0 15 --frames 16" + more for more in ("", " --steps 20", *others)]
    rows = {("real balls", ""): real} | {
        (os.path.relpath(ckpt), way): roll_out(ckpt, way, args, "between")
        for ckpt in ckpts for way in ways}
    print("| model | sample.py | good | shape | vel | longest move | without a jump |\n"
          + "|-" * 7 + "|")
    for (name, way), clips in rows.items():
        good, shape, vel, *_ = np.nanmean([physics(clip) for clip in clips], 0)
        steps = [np.linalg.norm(np.diff(find(c)[0], axis=0), axis=-1).max() for c in clips]
        print(f"| {name} | {way} | {good:.3f} | {shape:.3f} | {vel:.3f} | {max(steps):.2f} | "
              f"{sum(step <= FASTEST for step in steps)} of {len(steps)} |")
    draw_strip([x[0] for x in [*rows.values()][:2]], args.out / "keyframes.png", 16)


def spread(values, digits):
    """Mean over seeds, ± the standard deviation if several."""
    values = np.array(values, float)
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def physics_table(rows, real, per_frame):
    """rows: {(paradigm, options of sample.py): clips of every seed}. Given frames do not count.
    per_frame: {options of sample.py: seconds for each frame}, or empty."""
    columns = ("trained", "sample.py", "frames", *COLUMNS, *["s/frame"] * bool(per_frame))
    print("|", " | ".join(columns), "|\n|" + "-|" * len(columns))
    speeds = [true_speed(clip) for clip in real]
    for (name, way), seeds in rows.items():
        start, true = (0, itertools.repeat(None)) if "--batch" in way else (CONTEXT, speeds)
        longest = len(seeds[0][0])
        for length in [longest] if per_frame else [n for n in LENGTHS if n <= longest]:
            each = np.array([np.nanmean([physics(c[start:length], t) for c, t in zip(x, true)], 0)
                             for x in seeds])
            figures = [spread(each[:, i], n) for i, n in enumerate((3, 3, 3, 3, 0))]
            if per_frame:
                figures.append(f"{per_frame[way]:.4f}" if way in per_frame else "")
            print("|", " | ".join((name, way or "(default)", str(length), *figures)), "|")


def drift_table(rows, others, args):
    """The same for a folder: the distance to the other clips in each quarter of what is new; then
    how sharp the last quarter is, how much it moves and, with --lander, how often one is seen. The
    quarters of real clips, and of rollouts from nothing, have lengths of their own."""
    drift, columns = Drift(others), ("trained", "sample.py", "frames", *DRIFT)
    if args.lander:
        from experiments.lander_check import body, shows_lander
        columns += ("lander",)
        whole = np.median(np.concatenate([body(clip)[0] for clip in others]))
    print("|", " | ".join(columns), "|\n|" + "-|" * len(columns))
    for (name, way), seeds in rows.items():
        figures = []
        for clips in seeds:
            new = [clip[0 if "--batch" in way else CONTEXT :] for clip in clips]
            quarters = [[np.array_split(clip, 4)[i] for clip in new] for i in range(4)]
            distances, details, motion = zip(*map(drift, quarters))
            figures.append([*distances, details[-1], motion[-1]])
            if args.lander:
                seen = [shows_lander(clip, whole) for clip in quarters[-1]]
                figures[-1].append(np.concatenate(seen).mean())
        length = f"{max(map(len, seeds[0]))}"
        print("|", " | ".join((name, way, length, *(spread(f, 2) for f in zip(*figures)))), "|")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="a folder of clips (default: the bouncing balls)")
    p.add_argument("--size", type=int, default=32, help="of the clips of --data (%(default)s)")
    p.add_argument("--lander", action="store_true", help="--data is the lander: look for it, too")
    p.add_argument("--minutes", type=float, help="of every training (4; with --data, 15)")
    p.add_argument("--jobs", type=positive, default=1, help="at once, each on one core (1)")
    p.add_argument("--out", type=Path, help="output folder (runs; with --data, runs/NAME)")
    p.add_argument("--ckpt", type=Path, nargs="+", default=[], help="measure these, train none")
    p.add_argument("--push", action="store_true", help="measure how well --ckpt obeys pushes")
    p.add_argument("--between", action="store_true", help="fill in between two frames with --ckpt")
    p.add_argument("--pyramid", action="store_true", help="only draw pyramid.gif, with --ckpt")
    p.add_argument("--matrix", action="store_true", help="only draw matrix.png")
    args = p.parse_args()
    if (args.push or args.between or args.pyramid) and not args.ckpt:
        p.error("--push, --between and --pyramid need a model: --ckpt")
    if args.lander and not (args.data and find_spec("Box2D")):
        p.error('--lander needs --data, and `pip install "gymnasium[box2d]"`')
    args.minutes = args.minutes or (15 if args.data else 4)
    args.data = args.data and args.data.resolve()
    args.out = (args.out or Path("runs", args.data.name if args.data else "")).resolve()
    args.ckpt = [path.resolve() for path in args.ckpt]
    args.configs = [load_checkpoint(path)[0].config for path in args.ckpt]
    ours = all(c.height == 32 and c.action_dim in (2, 2 * args.push) for c in args.configs)
    need(args.data or ours, "--ckpt: no model of the balls (--push: with pushes)")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def real_clips(args):
    """-> real clips, the first frames of which are kept as contexts; and others. Of a folder, the
    longest held-out clips. Where the actions of a clip end, the last one goes on."""
    for old in args.out.glob("context_*.npy"):
        old.unlink()
    if not args.data:
        rngs = np.random.default_rng(99), np.random.default_rng(98)
        real, other = (bouncing_balls(CLIPS, LENGTHS[-1], rng) for rng in rngs)
        actions = [None] * CLIPS
    else:
        sizes = {(c.height, c.width, c.stride) for c in args.configs} or {(args.size, args.size, 1)}
        need(len(sizes) == 1 and min(sizes)[2] == 1, "--ckpt: models need equal sizes, stride 1")
        data = Clips(args.data, *sizes.pop()[:2], 16)
        need(data.held_out, f"--data {args.data}: ten clips are needed, to hold one out")
        clips = [np.load(path, mmap_mode="r", allow_pickle=False) for path, *_ in data.clips]
        flies = lambda rows: args.lander and rows is not None and not rows[-1, 0]  # until its end
        held = sorted(np.flatnonzero(data.weight[True]),
                      key=lambda i: (flies(data.clips[i][2]), -len(clips[i])))[:CLIPS]
        real, actions = [clips[i] for i in held], [data.clips[i][2] for i in held]
        other = [clips[i] for i in np.flatnonzero(data.weight[False])]
    for i, (clip, rows) in enumerate(zip(real, actions)):
        np.save(args.out / f"context_{i:02}.npy", clip[:CONTEXT])
        if rows is not None:
            rows = np.pad(rows, ((0, max(0, LENGTHS[-1] - len(rows))), (0, 0)), "edge")
            np.save(args.out / f"context_{i:02}.actions.npy", rows)
    return real, other


def table(args):
    """Trains all of RUNS, or takes --ckpt; rolls out; prints the table and draws strip.png."""
    with mistakes(ValueError):
        real, other = real_clips(args)
    single, names = len(args.ckpt) == 1, ", ".join(p.stem for p in args.ckpt)
    wanted = {names: ("", WAYS + MORE * single)} if args.ckpt else RUNS
    given = args.ckpt * (len(SEEDS) if single else 1)
    seeds = range(len(given)) or SEEDS  # of a single model, these are seeds of sample.py
    runs = [(name, seed) for seed in seeds for name in wanted]
    jobs = [(name, way, seed) for name, seed in runs for way in wanted[name][1]]

    def rolled(job):
        name, way, seed = job
        return roll_out(models[name, seed], way + f" --seed {seed}" * single, args)

    with ThreadPoolExecutor(args.jobs) as pool:
        paths = given or pool.map(lambda run: train(wanted[run[0]][0], run[1], args), runs)
        models = dict(zip(runs, paths))
        clips = pool.map(rolled, jobs)
        rows = {("none: these clips", "none"): [real]}
        if not args.data:  # drift is how far a clip is from the others
            rows["none: others", "none"] = [other]
        for (name, way, _), x in zip(jobs, clips):
            rows.setdefault((name, way), []).append(x)
    if args.data:
        drift_table(rows, other, args)
    else:
        per_frame = {way: np.mean([seconds(path, way, args) for path in args.ckpt])  # alone
                     for _, way in rows if args.ckpt and "none" not in way and "--batch" not in way}
        physics_table(rows, real, per_frame)
    labels = [f"{name}\n{way.replace(FROM_NOTHING, 'from nothing').replace('--', '')}"
              for name, way in rows]
    draw_strip([x[0][0] for x in rows.values()], args.out / "strip.png", 5 if args.data else 12,
               labels)


def main():
    with mistakes(ValueError):
        args = parse_args()
    if args.matrix:
        draw_matrices(args.out / "matrix.png")
    elif args.pyramid:
        clip = to_frames(bouncing_balls(1, CONTEXT, np.random.default_rng(99)))
        draw_pyramid(load_checkpoint(args.ckpt[0])[0], clip, args.out / "pyramid.gif")
    elif args.push:
        pushes(args.ckpt, args)
    elif args.between:
        between(args.ckpt, args)
    else:
        table(args)


if __name__ == "__main__":
    main()
