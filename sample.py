# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]>=2.30"]
# ///
"""Rolls a trained model out, far beyond its training length, and writes the video as it grows.

    python sample.py --ckpt assets/balls.pt --frames 256                    from nothing
    python sample.py --ckpt model.pt --frames 256 --context clip.mp4        going on from a clip
    python sample.py --ckpt assets/balls.pt --play                          steer it with the keys
    python sample.py --ckpt two-way.pt --context clip.mp4 --keyframes 0,15  between two frames
    python sample.py --show-schedule --frames 6                             prints the matrix
"""

import argparse
import collections
import contextlib
import itertools
import logging
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import imageio.v2
import imageio.v3 as iio
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from tqdm import tqdm

from diffusion_forcing import (SCHEDULES, SOLVERS, load_checkpoint, need, rollout, sample,
                               scheduling_matrix)

STEPS, UNCERTAINTY, SOLVER = 8, 2.0, "multistep"  # chosen by rollouts of balls and of real clips
FIRST = 4  # times the steps for a first frame from nothing: no history says where things are
SCHEDULE_FOR = {  # what suits each paradigm of training
    "diffusion": "pyramid", "teacher": "autoregressive", "full_sequence": "full_sequence"}
CODECS = {".mp4": ("libx264", ["-crf", "16"]), ".webm": ("libvpx-vp9", ["-crf", "20", "-b:v", "0"])}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# What a video may be, whatever its name: no playlist and no script, which could open other files.
VIDEO = ["-hide_banner", "-xerror", "-protocol_whitelist", "file", "-format_whitelist",
         "mov,matroska,avi"]
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # no warnings: we scale on purpose


def in_words(error, path=None):
    """An error in one line, with its file; path: that file, if the error does not know it."""
    reason, path = getattr(error, "strerror", None), getattr(error, "filename", None) or path
    return f"{path}: {reason or error}" if path else f"{reason or error}"


def fail(error):
    """A user's mistake: one line, and exit status 2."""
    for bar in list(getattr(tqdm, "_instances", [])):  # so that it is a line of its own
        bar.leave = False
        bar.close()
    print("error:", in_words(error), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def mistakes(*kinds):
    """Says in one line what a user can mend: files, memory, and errors of these kinds. Any other
    error is a bug of ours, and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped; what was written before is whole")
    except (OSError, *kinds) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|not enough memory|allocate", str(error)):
            raise
        fail("out of memory: a smaller --batch helps, in training also --size or --clip-frames")


def positive(text, kind=int):
    """An argparse type: a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < kind(text) < float("inf"):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kind.__name__}")


positive_float = lambda text: positive(text, float)


def numbers(text):
    """An argparse type: 0,15 -> [0, 15]."""
    return [int(t) for t in text.split(",")]


def find_device(name=None):
    """The device of that name if it works; by default the first of cuda, mps and cpu that does."""
    for device in [name] if name else ["cuda", "mps", "cpu"]:
        with contextlib.suppress(RuntimeError, AssertionError, ImportError):
            torch.zeros(1, device=device).item()
            return device
    fail(f"--device {name}: there is none on this machine")


# ---- clips ---------------------------------------------------------------------------------------


def to_frames(clip, device="cpu"):
    """uint8 (..., H, W, C) array -> float (..., C, H, W) tensor in [-1, 1]. The device gets bytes,
    a quarter of the floats."""
    return torch.from_numpy(clip).to(device).movedim(-1, -3).float() / 127.5 - 1


def to_bytes(frames):
    """float (..., C, H, W) tensor in [-1, 1] -> uint8 (..., H, W, C) array: rounded, clamped."""
    x = ((frames.float() + 1) * 127.5).round().clamp(0, 255)
    return x.byte().movedim(-3, -1).cpu().numpy()


def read_clip(path, height, width, limit=None):
    """A video, a .npy (T, H, W, 3) of uint8 or of floats in 0..1, or a folder of images -> uint8
    (T, height, width, 3): its first `limit` frames or all, scaled and cropped to the centre. Raises
    ValueError, with the path and the reason."""
    path, clip = Path(path), []
    need(path.is_file() or path.is_dir(), f"{path}: there is no such file or folder")  # or a pipe
    try:
        for frame in itertools.islice(read_frames(path, height, width), limit):
            x = torch.tensor(frame).movedim(-1, 0)  # (3,h,w)
            scale = max(height / x.shape[1], width / x.shape[2])
            size = [max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale))]
            clip.append(TF.center_crop(TF.resize(x, size), [height, width]).movedim(0, -1))
        need(clip, "no frame in it")
        return torch.stack(clip).numpy()
    except Exception as error:  # whatever a foreign or damaged file provokes
        said = re.findall(r"^\[.*?\] (?!Format .* score)(.*)", str(error), re.M)  # by ffmpeg
        reason = [*said, *str(error).splitlines(), repr(error)][0]
        if type(error) is not ValueError:
            reason = f"cannot be read ({reason})"
        raise ValueError(f"{path}: {reason}") from error


def read_frames(path, height, width):
    """-> iterator over the frames (h, w, 3) of a clip: all coded ones, whatever their time stamps.
    Those of a video are already scaled, by ffmpeg: three times as fast as whole frames."""
    if path.is_dir():
        yield from map(read_image, list_images(path))
    elif path.suffix.lower() == ".npy":
        clip = load_npy(path)
        if clip.dtype.kind == "f" and ((clip >= 0) & (clip <= 1)).all():
            clip = (clip * 255).round().astype(np.uint8)
        need(clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3 and clip[:1].size,
             f"{clip.dtype} {clip.shape}; (T, H, W, 3) of uint8, or of floats in 0..1 (no NaN), is "
             "needed")
        yield from clip
    elif path.suffix.lower() == ".gif":
        yield from iio.imiter(path, plugin="pillow", mode="RGB")
    else:
        decode = lambda *how: imageio.v2.get_reader(
            path, format="FFMPEG", input_params=[*VIDEO], output_params=["-vf", *how])
        cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area"
        every, count = ("-fps_mode", "passthrough"), 0
        with decode(cover, *every) as video:
            fps, duration = (video.get_meta_data()[key] for key in ("fps", "duration"))
            for count, frame in enumerate(video, 1):
                yield frame
        if count < fps * duration - 1:  # cut off, the decoder killed, or only a variable rate?
            again, ticks = (sum(1 for _ in decode(*how)) for how in
                            (("scale=2:2", *every), ("fps=20,scale=2:2",)))
            need(count >= again and ticks / 20 >= 0.95 * duration - 0.1,
                 f"{count} frames, {ticks / 20} of {duration} seconds: cut off or damaged (is only "
                 "its sound longer? then ffmpeg -an helps)")


def read_image(path):
    """-> uint8 (h, w, 3), turned upright. Raises ValueError, with the name."""
    try:
        need(path.is_file(), "not a file")
        with iio.imopen(path, "r", plugin="pillow") as file:
            deep = file.metadata(index=0)["mode"].startswith("I")  # Pillow would clip it
            frame = file.read(index=0, rotate=True, mode=None if deep else "RGB")
        return (frame // 257).astype(np.uint8)[..., None].repeat(3, -1) if deep else frame
    except Exception as error:  # whatever a foreign or damaged file provokes
        raise ValueError(f"{path.name} cannot be read ({error})") from error


def load_npy(path):
    """-> an array, memory-mapped. Raises ValueError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        array = None
    need(isinstance(array, np.ndarray), "not a .npy of numbers, or damaged")  # an archive, objects
    return array


def list_images(folder):
    """The images of a folder, hidden ones left out, frame2 before frame10."""
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
    number = lambda p: [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", p.name))]
    return sorted(images, key=number)


def side_file(clip):
    """Where the actions of a clip are, if it has any: NAME.actions.npy beside NAME.mp4."""
    clip = Path(clip)
    return clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.actions.npy"


def read_actions(path, stride=1):
    """.npy (T, A) -> float32 (T, A): row t is the action that leads to frame t. Where only every
    stride-th frame is kept, it is the mean of the rows that lead there. Raises ValueError."""
    try:
        need(Path(path).is_file(), "there is no such file")
        rows = load_npy(path)
        need(rows.ndim == 2 and rows.size and rows.dtype.kind in "biuf",
             f"{rows.dtype} {rows.shape}; numbers (T, A) are needed")
        need((abs(rows) < 1e30).all(), "actions are finite numbers")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rows = rows.astype(np.float32)
    return np.stack([rows[max(0, t - stride + 1) : t + 1].mean(0) for t in range(len(rows))])


@contextlib.contextmanager
def video_writer(path, height, width, fps=15, scale=None):
    """-> write(frame), which writes a uint8 (H, W, 3) frame to .mp4, .webm, .gif or .npy at once;
    only those of a .gif are kept. scale enlarges pixels: by default to a height of 256 or more,
    never in .npy. Raises OSError."""
    suffix, scale = Path(path).suffix.lower(), scale or -(-256 // height)
    if suffix == ".npy":
        head = lambda count: np.lib.format.write_array_header_1_0(file, dict(
            descr="|u1", fortran_order=False, shape=(count, height, width, 3)))
        with open(path, "wb") as file:
            head(0)
            start = file.tell()
            try:
                yield lambda frame: file.write(frame.tobytes())
            finally:  # now that the number of frames is known
                count = (file.tell() - start) // (height * width * 3)
                file.seek(0)
                head(count)
    elif suffix == ".gif":
        frames = []
        try:
            yield lambda frame: frames.append(frame.repeat(scale, 0).repeat(scale, 1))
        finally:
            if frames:
                Path(path).write_bytes(iio.imwrite("<bytes>", np.stack(frames), extension=".gif",
                                                   duration=1000 / fps, loop=0))
    else:
        codec, options = CODECS[suffix]
        even = f"scale=2*ceil(iw*{scale}/2):2*ceil(ih*{scale}/2):flags=neighbor"
        video = imageio.v2.get_writer(path, format="FFMPEG", fps=fps, codec=codec, quality=None,
                                      macro_block_size=1, output_params=[*options, "-vf", even])
        try:
            with video:
                yield video.append_data
            whole = iio.immeta(path, plugin="FFMPEG")["duration"] > 0  # written last, if at all
        except OSError:
            whole = False
        if not whole:  # a failed ffmpeg says nothing when it is closed
            raise OSError("the video could not be written to its end (is the disk full?)")


# ---- the world in the terminal -------------------------------------------------------------------


def draw(image, line):
    """Shows uint8 (H, W, 3) in this terminal, and a line of text below. A half block is two pixels:
    the colour in front is the upper one. In a small window, pixels are left out evenly."""
    columns, lines = os.get_terminal_size()
    zoom = min(columns / image.shape[1], 2 * (lines - 1) / image.shape[0])
    zoom = int(zoom) or zoom
    y, x = ((np.arange(int(n * zoom)) / zoom).astype(int) for n in image.shape[:2])
    many = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    # or else a terminal has 6 levels of each of red, green and blue: to the nearest
    image = image if many else np.searchsorted([48, 116, 156, 196, 236], image, "right")
    colour = lambda r, g, b: f"2;{r};{g};{b}" if many else f"5;{16 + 36 * r + 6 * g + b}"
    image, end = image[y][:, x], "\x1b[0m" + "\x1b[K" * (len(x) < columns) + "\r\n"
    rows = ("".join(f"\x1b[38;{colour(*a)};48;{colour(*b)}m\u2580" for a, b in zip(*two)) + end
            for two in zip(image[::2], image[1::2]))
    print("\x1b[H", *rows, line[: max(columns - 1, 0)], "\x1b[J", sep="", end="", flush=True)


def play(world, action_dim, one_hot, fps, keep):
    """Shows the frames of world(n, actions), at most fps a second, and hands them to `keep`. The
    iterator `actions` says what the keys say, (1, A) for each frame; r goes on to world n + 1."""
    import curses  # not on Windows
    one = torch.eye(action_dim).split(1)
    arrows = (curses.KEY_LEFT, curses.KEY_RIGHT, curses.KEY_UP, curses.KEY_DOWN)  # up is -1
    means = dict(zip(b"0123456789", one) if one_hot else
                 zip(arrows, (sign * row for row in one[:2] for sign in (-1, 1))))
    keys = f"0 to {len(means) - 1}" if one_hot else "arrows"
    idle = chosen = told = one[0] * one_hot  # action 0, or zeros
    anew, paused, due, times = False, False, 0, collections.deque(maxlen=16)

    def actions():  # asked after the last frame was shown; a digit is held, an arrow is not
        nonlocal anew, chosen, told
        anew, chosen, told = False, idle, idle
        while not anew:
            told, chosen = chosen, chosen if one_hot else idle
            yield told

    def loop(screen):
        nonlocal anew, paused, due, chosen
        with contextlib.suppress(curses.error):  # not every terminal can
            curses.curs_set(0)  # no cursor
        worlds = (world(number, actions()) for number in itertools.count())
        for frame in itertools.chain.from_iterable(worlds):
            keep(images := to_bytes(frame))
            times.append(time.monotonic())
            due = max(due + 1 / fps, times[-1])
            rate, key = (len(times) - 1) / max(times[-1] - times[0], 1e-3), None
            while key != -1 or paused or time.monotonic() < due:  # -1: no key was pressed in time
                shown = [told.argmax()] if one_hot else told[0]
                draw(images[0], f"{keys} | space: pause | r: anew | q: end | {rate:.0f} frames/s | "
                     f"action {' '.join(f'{number:g}' for number in shown)}")
                left = due - time.monotonic()
                screen.timeout(100 if paused else max(0, math.ceil(1000 * left)))
                key = screen.getch()
                if key == ord("q"):
                    return
                anew, paused = anew or key == ord("r"), paused ^ (key == ord(" "))
                if key in means:
                    chosen = means[key] if one_hot else (chosen + means[key]).clamp(-1, 1)

    def halt(number, _):  # Ctrl-Z: the shell has its terminal until it lets us go on
        curses.endwin()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, halt)
        curses.doupdate()

    signal.signal(signal.SIGTSTP, halt)  # that of curses runs in any thread, and may never return
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):  # SIGHUP: a closed window
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        curses.wrapper(loop)  # the keyboard, the other screen; at the end, all as it was before
    except KeyboardInterrupt:
        pass
    except curses.error as error:
        fail(f"--play: this terminal cannot show it ({error})")


# ---- the command ---------------------------------------------------------------------------------


def matrix_for(schedule, num_frames, steps=STEPS, uncertainty=UNCERTAINTY, two_way=False):
    """-> the matrix and the period for `rollout`: one column, laid along time without an end; or
    num_frames, which come down together (full_sequence) or see each other (two_way)."""
    if two_way or schedule == "full_sequence":
        return scheduling_matrix(schedule, num_frames, steps, uncertainty), None
    return scheduling_matrix(schedule, 1, steps), uncertainty if schedule == "pyramid" else None


def schedule_for(config):
    """-> the schedule that suits a model: by how it was trained, and whether it looks both ways."""
    return SCHEDULE_FOR[config.forcing if config.causal else "full_sequence"]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", default="model.pt", help="as written by train.py (%(default)s)")
    add("--frames", type=positive, help="length, context included (256; a model of full_sequence, "
        "or a two-way one: one clip)")
    add("--out", type=Path, help=".mp4, .gif, .webm or .npy (rollout.mp4; of --play: none)")
    add("--play", action="store_true", help="steer the world with the keys, in this terminal")
    add("--context", nargs="+", default=[], metavar="CLIP", help="clips to go on from, one rollout "
        "for each")
    add("--context-frames", type=positive, help="how many of its first frames are given (4; with "
        "--keyframes: none)")
    add("--keyframes", type=numbers, default=[], metavar="T,T", help="other given frames of "
        "--context, for a two-way model: 0,15 are the first and the 16th")
    add("--actions", help=".npy (T, A), repeated at its end (the side file of --context)")
    add("--schedule", choices=SCHEDULES, help="by default what suits the --forcing of train.py: "
        + ", ".join(f"{schedule} for {forcing}" for forcing, schedule in SCHEDULE_FOR.items()))
    add("--uncertainty", type=positive_float, default=UNCERTAINTY, help="pyramid: steps between "
        "the starts of two frames, and network calls for each frame (%(default)s)")
    add("--tile", type=positive, help="full_sequence: frames that come down together (as trained)")
    add("--steps", type=positive, default=STEPS, help="denoising steps of a frame (%(default)s; "
        f"{FIRST} times as many for a first frame from nothing)")
    add("--solver", choices=SOLVERS, default=SOLVER, help="multistep keeps variety, and sharpness "
        "with few steps; euler pulls towards the mean (%(default)s)")
    add("--context-noise", type=positive_float, help="sigma of the history: more of it forgives "
        "more errors and remembers less (that of the checkpoint)")
    add("--batch", type=positive, default=1, help="number of rollouts, a file each (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--fps", type=positive_float, default=15, help="frames/s of the video (%(default)s)")
    add("--scale", type=positive, help="enlarge pixels, never in .npy (to a height of 256 or more)")
    add("--device", help="cuda, mps or cpu (the first of them that is there)")
    add("--show-schedule", action="store_true", help="print the matrix for --frames, and stop")
    return p.parse_args()


def load_inputs(args, config):
    """-> context (batch, context_frames, C, H, W) or None, keyframes {t: (batch, C, H, W)}, actions
    [(batch, A), one for each frame] or None."""
    context, keyframes, stride = None, {}, config.stride
    if args.context:
        length = max(args.context_frames, *(t + 1 for t in args.keyframes), 1)
        clips = [read_clip(c, config.height, config.width, (length - 1) * stride + 1)[::stride]
                 for c in args.context]
        for path, clip in zip(args.context, clips):
            need(len(clip) == length, f"{path} is too short: --context-frames and --keyframes need "
                 f"{length} frames" + f", every {stride}th of the clip" * (stride > 1))
        clip = to_frames(np.stack([clips[i % len(clips)] for i in range(args.batch)]), args.device)
        context, keyframes = clip[:, : args.context_frames], {t: clip[:, t] for t in args.keyframes}
    if not config.action_dim:
        need(not args.actions, f"{args.actions}: the model was trained without actions")
        return context, keyframes, None
    num_frames = args.frames or args.context_frames
    actions = np.zeros((args.batch, num_frames, config.action_dim), np.float32)
    files = [Path(args.actions)] if args.actions else [*map(side_file, args.context)]
    for row, file in zip(actions, itertools.cycle(files)):
        if args.actions or file.exists():
            told = read_actions(file, stride)[::stride]
            need(told.shape[1] == config.action_dim,
                 f"{file}: the model needs {config.action_dim} numbers for each frame")
            row[:] = np.resize(told, row.shape)  # repeated at its end
    return context, keyframes, torch.from_numpy(actions).to(args.device).unbind(1)


def check(args):
    """-> the paths to write to. Raises ValueError for what does not fit together."""
    need(args.context or not args.keyframes, "--keyframes: frames of which --context?")
    if args.play:
        need(os.name == "posix", "--play needs a terminal of Linux or macOS")
        need(os.isatty(0) and os.isatty(1), "--play needs a terminal, not a pipe")
        need(not args.actions, "--actions: with --play, the keys are the actions")
        need(args.schedule in (None, "autoregressive"), "--play: only --schedule autoregressive")
        if not args.out:
            return []
    known = args.out.suffix.lower() in (*CODECS, ".gif", ".npy")
    need(known and args.out.parent.is_dir() and not args.out.is_dir(),
         f"--out {args.out}: .mp4, .webm, .gif or .npy in an existing folder is needed")
    paths = [args.out]
    if args.batch > 1 and not args.play:
        paths = [args.out.with_stem(f"{args.out.stem}_{i}") for i in range(args.batch)]
    inputs = [*args.context, *map(side_file, args.context), *filter(None, [args.actions])]
    need(not {p.resolve() for p in paths} & {Path(i).resolve() for i in inputs},
         f"--out {args.out} would overwrite what the rollout is made from")
    return paths


def choose_matrix(args, config):
    """-> matrix and period for `rollout`, and the number of frames, as they suit the model where
    nothing else is asked for. Raises ValueError for what it cannot do."""
    schedule, num_frames = args.schedule or schedule_for(config), args.frames
    if args.play:
        need(config.action_dim, f"--play: {args.ckpt} was trained without actions")
        need(config.causal, f"--play: {args.ckpt} looks both ways, and makes whole clips only")
        schedule = "autoregressive"  # only so does an action show in the next frame
    elif not num_frames:
        whole = config.forcing == "full_sequence" or not config.causal
        num_frames = config.clip_frames if whole else 256
    need(schedule == "full_sequence" or not args.tile,
         f"--tile is for --schedule full_sequence only, not for {schedule}")
    tile = args.tile or config.clip_frames
    if not config.causal:
        tile = num_frames - args.context_frames  # two-way: all that is new
        need(tile > 0, f"--frames {num_frames}: it counts the {args.context_frames} of the context")
    return *matrix_for(schedule, tile, args.steps, args.uncertainty, not config.causal), num_frames


def main():
    args = parse_args()
    args.batch = max(args.batch, len(args.context))
    args.context_frames = args.context_frames or (4 if args.context and not args.keyframes else 0)
    args.out = args.out or (None if args.play else Path("rollout.mp4"))
    with mistakes(ValueError):
        if args.show_schedule:
            num_frames = (args.frames or 16) - args.context_frames
            need(num_frames > 0, f"--frames {args.frames}: it counts the frames of context, too")
            matrix = scheduling_matrix(args.schedule or SCHEDULE_FOR["diffusion"], num_frames,
                                       args.steps, args.uncertainty)
            return [print(*[0] * args.context_frames, *row) for row in matrix.tolist()]
        paths = check(args)
        args.device = find_device(args.device)
        model, extra = load_checkpoint(args.ckpt, args.device)
        config = model.config
        config.context_noise = args.context_noise or config.context_noise
        matrix, period, args.frames = choose_matrix(args, config)
        context, keyframes, actions = load_inputs(args, config)
        need(not (config.causal and keyframes), f"--keyframes: {args.ckpt} is not a two-way model")

        def roll(context, actions, seed, batch_size):
            how = dict(batch_size=batch_size, solver=args.solver,
                       generator=torch.Generator(args.device).manual_seed(seed))
            if not config.causal:
                told = None if actions is None else torch.stack(list(actions), 1)
                return sample(model, matrix, context, keyframes=keyframes, actions=told,
                              **how).unbind(1)
            if context is None and len(matrix[0]) == 1:  # the first frame alone, then go on from it
                first = scheduling_matrix("autoregressive", 1, FIRST * args.steps)
                now, actions = itertools.tee(actions) if config.action_dim else (None, None)
                context = next(rollout(model, first, 1, actions=now, **how))[:, None]
            return rollout(model, matrix, args.frames, context, period=period, actions=actions,
                           **how)

        def world(number, keys):  # the next context, or the next seed
            i = slice(number % args.batch, number % args.batch + 1)
            given = (row[i].cpu() for row in actions[: args.context_frames])
            return roll(None if context is None else context[i], itertools.chain(given, keys),
                        args.seed + number, 1)

        # raises at once what is wrong; --play has its own rollouts, with actions from the keys
        nothing = args.play and context is None  # then it would make a first frame in vain
        frames = [] if nothing else roll(context, actions, args.seed, args.batch)

    bar = tqdm(frames, desc=str(args.out), total=args.frames, unit=" frames", disable=args.play)
    with mistakes():
        try:
            with contextlib.ExitStack() as stack:  # finishes all files, whatever happens
                writers = [stack.enter_context(video_writer(
                    path, config.height, config.width, args.fps, args.scale)) for path in paths]
                keep = lambda images: [write(image) for write, image in zip(writers, images)]
                if args.play:
                    return play(world, config.action_dim, extra.get("one_hot", False), args.fps,
                                keep)
                for frame in bar:
                    keep(to_bytes(frame))
        except OSError as error:
            fail(in_words(error, args.out))
        except KeyboardInterrupt:
            fail(f"stopped after {bar.n} of {args.frames} frames; those are written")


if __name__ == "__main__":
    with mistakes():
        main()
