# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]>=2.30"]
# ///
"""Rolls a trained model out, far beyond its training length, and writes the video as it grows.

    python sample.py --ckpt experiments/balls.pt --frames 256             from nothing
    python sample.py --frames 256 --context clip.mp4                      going on from a clip
    python sample.py --ckpt both.pt --context clip.mp4 --keyframes 0 15   between two frames of it
"""

import contextlib
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.clips import (CODECS, read_actions, read_clip, side_file, to_bytes, to_frames,
                        video_writer)
from diffusion_forcing import (SCHEDULES, SOLVERS, load_checkpoint, need, rollout, sample,
                               scheduling_matrix)

STEPS, UNCERTAINTY = 8, 2.0  # of a frame, of the pyramid: chosen by rollouts
SCHEDULE = {"diffusion": "pyramid", "teacher": "autoregressive", "full_sequence": "full_sequence"}


def generate(model, num_frames, context=None, *, schedule=None, steps=STEPS,
             uncertainty=UNCERTAINTY, keyframes=None, actions=None, **options):
    """-> iterator over num_frames frames (B, C, H, W), context first. num_frames None: endless
    (causal models). schedule None: what suits the model. The rest is as in `sample`, `rollout`."""
    config = model.config
    known = 0 if context is None else context.shape[1]
    need(num_frames is None or num_frames > known, "--frames counts the context: take more")
    if not config.causal:  # frames see later ones, so all of them are made together
        schedule = schedule or "full_sequence"
        matrix = scheduling_matrix(schedule, num_frames - known, steps, uncertainty)
        clip = sample(model, matrix, context, keyframes=keyframes, actions=actions, **options)
        return iter(clip.unbind(1))
    need(not keyframes and schedule != "trapezoid",
         "--keyframes and --schedule trapezoid need a bidirectional model, which looks ahead")
    schedule = schedule or SCHEDULE[config.forcing]
    columns = 1 if schedule in ("autoregressive", "pyramid") else config.clip_frames
    matrix = scheduling_matrix(schedule, columns, steps, uncertainty)
    if context is None and columns == 1:  # no history says where things are: more steps
        first = scheduling_matrix(schedule, 1, 4 * steps)
        action = None if actions is None else actions[:, :1]  # (B,1,A)
        context = sample(model, first, actions=action, **options)  # (B,1,C,H,W)
    period = uncertainty if schedule == "pyramid" else None
    return rollout(model, matrix, num_frames, context, period=period, actions=actions, **options)


def fitting_length(config, num_frames):
    """-> num_frames; or the length of one clip, if the model makes whole clips only."""
    together = config.forcing == "full_sequence" or not config.causal
    return min(config.clip_frames, config.window) if together else num_frames


def load_inputs(args, config):
    """-> context (B,T,C,H,W) or None, keyframes {t: (B,C,H,W)}, actions (B,T,A) or None."""
    known = args.context_frames or (4 if args.context and not args.keyframes else 0)
    length, stride = max([known, *(t + 1 for t in args.keyframes)]), config.stride
    need((args.context or not length) and min(args.keyframes, default=0) >= 0,
         "--context-frames and --keyframes: frames of --context, counted from 0")
    clips = [read_clip(path, config.height, config.width, (length - 1) * stride + 1)[::stride]
             for path in args.context]
    for path, clip in zip(args.context, clips):
        need(len(clip) == length, f"{path}: {len(clip)} of {length} frames (stride {stride})")
    x = to_frames(np.repeat(clips, args.batch, 0), args.device) if clips else None
    context, keyframes = x[:, :known] if known else None, {t: x[:, t] for t in args.keyframes}
    if args.actions == "unknown":
        return context, keyframes, None

    files = [args.actions or side_file(path) for path in args.context] or [args.actions]
    actions = np.zeros((len(files), args.frames, config.action_dim), np.float32)
    for rows, file in zip(actions, files):
        if args.actions or (config.action_dim and file and file.exists()):
            told = read_actions(file, stride)[::stride]  # (T,A)
            need(told.shape[1] == rows.shape[1], f"{file}: rows of {rows.shape[1]} are needed")
            rows[:] = np.resize(told, rows.shape)  # repeated at its end
    return context, keyframes, torch.from_numpy(np.repeat(actions, args.batch, 0)).to(args.device)


def parse_args(argv):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", default="model.pt", help="as written by train.py (%(default)s)")
    add("--frames", type=positive, help="length, context included (256, or one whole clip)")
    add("--out", type=Path, default="rollout.mp4", help=".mp4, .webm, .gif, .npy (%(default)s)")
    add("--context", nargs="+", default=[], metavar="CLIP", help="go on from it, from each of them")
    add("--context-frames", type=positive, help="how many of its first frames are given (4)")
    add("--keyframes", type=int, nargs="+", default=[], metavar="T", help="given frames: 0 15")
    add("--actions", help='.npy (T, A), repeated at its end, or "unknown" (side file, or zeros)')
    add("--schedule", choices=SCHEDULES, help="(the one that suits the model)")
    add("--uncertainty", type=positive_float, default=UNCERTAINTY, help="pyramid: u, calls a frame")
    add("--steps", type=positive, default=STEPS, help="denoising steps of a frame (%(default)s)")
    add("--solver", choices=SOLVERS, default="multistep",
        help="(%(default)s; better where the future is certain: euler)")
    add("--context-noise", type=positive_float, help="sigma of the history (the model's)")
    add("--batch", type=positive, default=1, help="rollouts of each context (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--fps", type=positive_float, default=15, help="frames/s of the video (%(default)s)")
    add("--device", type=working_device, default="auto", help="cuda, cpu or mps (cuda or cpu)")
    add("--show-schedule", action="store_true", help="print the matrix for --frames, and stop")
    return p.parse_args(argv)


def main(argv=None, wrap=None):
    """The command. wrap(model, args) -> what to sample from in place of the model."""
    args = parse_args(argv)
    with mistakes(), contextlib.ExitStack() as stack:  # it finishes all files, in any case
        with mistakes(ValueError):  # before anything is written
            if args.show_schedule:
                matrix = scheduling_matrix(args.schedule or "pyramid", args.frames or 16,
                                           args.steps, args.uncertainty)
                return print("\n".join(" ".join(map(str, row)) for row in matrix.tolist()))
            paths = output_paths(args)
            model, _ = load_checkpoint(args.ckpt, args.device)
            config = model.config
            config.context_noise = args.context_noise or config.context_noise
            args.frames = args.frames or fitting_length(config, 256)
            context, keyframes, actions = load_inputs(args, config)
            model = wrap(model, args) if wrap else model
            stack.enter_context(one_thread(model))
            frames = generate(
                model, args.frames, context, schedule=args.schedule, steps=args.steps,
                uncertainty=args.uncertainty, keyframes=keyframes, actions=actions,
                batch_size=len(paths), solver=args.solver,
                generator=torch.Generator(args.device).manual_seed(args.seed % 2**63))

        writers = [stack.enter_context(video_writer(path, config.height, config.width, args.fps))
                   for path in paths]
        bar = stack.enter_context(tqdm(desc=str(args.out), total=args.frames, unit=" frames"))
        try:
            for frame in frames:
                for write, image in zip(writers, to_bytes(frame)):
                    write(image)
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped: {paths[0]} is whole, with {bar.n} frames")


def output_paths(args):
    """-> NAME_0.mp4, NAME_1.mp4 ..., or NAME.mp4 alone. Raises ValueError for what cannot be."""
    out, count = args.out, args.batch * max(1, len(args.context))
    need(out.suffix.lower() in (*CODECS, ".npy") and out.parent.is_dir(),
         f"--out {out}: .mp4, .webm, .gif or .npy in an existing folder is needed")
    paths = [out.with_stem(f"{out.stem}_{i}") for i in range(count)] if count > 1 else [out]
    inputs = [args.ckpt, args.actions or "", *args.context, *map(side_file, args.context)]
    for path in filter(Path.exists, paths):  # whatever it is called: there are links
        same = [file for file in inputs if Path(file).exists() and path.samefile(file)]
        need(path.is_file() and not same, f"--out {path} is a folder, or an input")
    return paths


def positive(text, kind=int):
    """An argparse type: a number above 0."""
    need(0 < kind(text) < float("inf"), "it is not")
    return kind(text)


def positive_float(text):
    return positive(text, float)


def working_device(name):
    """An argparse type: the device of that name. "auto" is cuda or else cpu, not mps: there,
    PyTorch's GRU is slow (its issue 123148), and was seen to give NaN (94691)."""
    for device in ["cuda", "cpu"] if name == "auto" else [name]:
        with contextlib.suppress(RuntimeError, AssertionError, ImportError):
            torch.zeros(1, device=device).item()
            return device
    raise ValueError


def is_small(model):
    """Whether it is a small model on a CPU: there, one thread may be faster than several."""
    weights = list(model.parameters())
    return weights[0].device.type == "cpu" and sum(w.numel() for w in weights) < 2e6


@contextlib.contextmanager
def one_thread(model):
    """While a small model rolls out on a CPU, one thread: more of them would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if is_small(model) else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def mistakes(*kinds):
    """Errors of files, memory, Ctrl-C and `kinds`: one line, exit status 2. The rest are bugs."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, KeyboardInterrupt, *kinds) as error:
        message = str(error) or "stopped; what was written before is whole"
        if isinstance(error, (MemoryError, RuntimeError)):
            if not (type(error) is MemoryError or re.search("of memory|alloc", message, re.I)):
                raise
            message = "out of memory: a smaller --batch, --size, --clip-frames or --preset helps"
        tqdm.write(f"error: {message.splitlines()[0]}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
