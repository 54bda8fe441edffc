# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Rolls a trained model out, far beyond its training length, and writes the video as it grows.

    python sample.py --ckpt assets/balls.pt --frames 256 --steps 8              from nothing
    python sample.py --ckpt model.pt --frames 256 --context clip.mp4            going on from a clip
    python sample.py --show-schedule --schedule pyramid --uncertainty 2         the matrix, as text
"""

import argparse
import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from diffusion_forcing import SCHEDULES, SOLVERS, load_checkpoint, rollout, scheduling_matrix

STEPS, SOLVER = 6, "multistep"  # chosen by rollouts of balls and of real clips, which gain from 10
PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"  # one a frame
CODECS = {  # suffix: codec, pixel format, options
    ".mp4": ("libx264", "yuv420p", ["-crf", "16"]),
    ".webm": ("libvpx-vp9", "yuv420p", ["-crf", "20", "-b:v", "0"]),
    ".gif": ("gif", "pal8", ["-vf", PALETTE]),
}
RAW = ("-f", "rawvideo", "-pix_fmt", "rgb24")  # frames as bytes, into ffmpeg or out of it
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# What a file may be, whatever its name: no playlist, no script, nothing that opens other files.
DEMUXERS = "mov,matroska,avi,gif,png_pipe,jpeg_pipe,mjpeg,bmp_pipe,webp_pipe"


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def explain(error):
    """One line on what a user can mend: files, disks, memory. Other errors are ours: raised."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    told = isinstance(error, (OSError, ValueError, FloatingPointError))
    if told or "ffmpeg" in str(error):  # a RuntimeError, where there is no ffmpeg
        return str(error)
    short = re.search("out of memory|not enough memory|allocate memory", str(error))
    if not short and not isinstance(error, MemoryError):
        raise error
    return "out of memory: lower --batch (or, in training, --size, --clip-frames, --preset)"


def to_frames(clip):
    """uint8 (..., H, W, C) array -> float (..., C, H, W) tensor in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clip)).movedim(-1, -3).float() / 127.5 - 1


def to_bytes(frames):
    """float (..., C, H, W) tensor in [-1, 1] -> uint8 (..., H, W, C) array: rounded, clamped."""
    x = ((frames.float() + 1) * 127.5).round().clamp(0, 255)
    return x.byte().movedim(-3, -1).cpu().numpy()


def load_npy(path, ndim, **options):
    """A .npy file of ndim axes. Raises ValueError with the file and the reason."""
    try:
        array = np.load(path, allow_pickle=False, **options)
    except OSError as error:
        raise ValueError(explain(error)) from None
    except (ValueError, EOFError):
        raise ValueError(f"{path}: not an array of numbers, or damaged") from None
    if not isinstance(array, np.ndarray) or array.ndim != ndim or not array.size:
        raise ValueError(f"{path}: shape {np.shape(array)}; a .npy of {ndim} axes is needed")
    return array


def read_clip(path, height, width, limit=None):
    """A video, a .npy (T, H, W, 3) (uint8, or floats in 0..1) or a folder of images -> uint8 (T,
    height, width, 3), its first `limit` frames or all.

    ffmpeg decodes, scales and crops to the centre, so that no video is ever held at full size;
    every coded frame comes through, whatever its time stamp. Raises ValueError with the file and
    the reason."""
    path, data = Path(path), None
    source, url = ["-protocol_whitelist", "file", "-format_whitelist", DEMUXERS], f"file:{path}"
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: neither a file nor a folder")  # a pipe would never end
    if path.suffix.lower() == ".npy" and not path.is_dir():
        clip = load_npy(path, 4, mmap_mode="r")[:limit]
        if clip.dtype.kind == "f" and ((clip >= 0) & (clip <= 1)).all():
            clip = (clip * 255).round().astype(np.uint8)
        if clip.dtype != np.uint8 or clip.shape[-1] != 3:
            raise ValueError(f"{path}: {clip.dtype} {clip.shape}; (T, H, W, 3) of uint8, or of "
                             "floats in 0..1 (no NaN), is needed")
        size = f"{clip.shape[2]}x{clip.shape[1]}"
        source, url = [*RAW, "-s", size], "pipe:"
        data = np.ascontiguousarray(clip).reshape(-1).data  # flat: pipes count in bytes
    elif path.is_dir():
        images = list_images(path)[:limit]
        source[1], url, data = "pipe", "pipe:", b"".join(p.read_bytes() for p in images)
    fit = f"{width}:{height}:force_original_aspect_ratio=increase:flags=area,crop={width}:{height}"
    first = ["-frames:v", str(limit)] if limit else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-i", url, *first,
               "-vf", f"scale={fit}", "-fps_mode", "passthrough", *RAW, "-"]
    done = subprocess.run(command, input=data or b"", capture_output=True)
    num_frames = len(done.stdout) // (height * width * 3)
    if num_frames == 0:
        said = re.sub(r"^\[.*?\] ", "", done.stderr.decode(errors="replace")).split("\n")
        raise ValueError(f"{path}: {said[0] or 'no frame in it'}")  # the first line is the cause
    if path.is_dir() and num_frames != len(images):
        raise ValueError(f"{path}: {num_frames} of {len(images)} images: all must be of one kind")
    frames = np.frombuffer(done.stdout, np.uint8)[: num_frames * height * width * 3]
    return frames.reshape(num_frames, height, width, 3)


def list_images(folder):
    """The images of a folder, those that are not hidden, frame2 before frame10."""
    images = [p for p in folder.iterdir()
              if p.suffix.lower() in IMAGES and p.name[0] != "." and p.is_file()]
    number = lambda p: [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", p.name))]
    return sorted(images, key=number)


def side_file(clip):
    """Where the actions of a clip are, if it has any: NAME.actions.npy beside NAME.mp4."""
    clip = Path(clip)
    return clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.actions.npy"


def read_actions(path, stride=1):
    """.npy (T, A) -> float32 (T, A): row t drives the change into frame t. Where only every
    stride-th frame is kept, it is the mean of the rows that lead there."""
    rows = load_npy(path, 2)
    if rows.dtype.kind not in "biuf" or not np.isfinite(rows := rows.astype(np.float32)).all():
        raise ValueError(f"{path}: actions are finite numbers")
    return np.stack([rows[max(0, t - stride + 1) : t + 1].mean(0) for t in range(len(rows))])


class VideoWriter:
    """Writes uint8 (H, W, 3) frames to a video or a .npy as they come and keeps none of them."""

    def __init__(self, path, height, width, fps=15, scale=1):
        suffix, self.scale = Path(path).suffix.lower(), scale
        self.count, self.size = 0, (height, width)
        self.npy = open(path, "wb") if suffix == ".npy" else None
        if self.npy:
            return self.write_header()
        codec, pixels, options = CODECS[suffix]
        size = f"{width * scale}x{height * scale}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *RAW, "-s", size,
                   "-r", str(fps), "-i", "pipe:", "-c:v", codec, "-pix_fmt", pixels, *options,
                   f"file:{path}"]
        self.encoder = subprocess.Popen(command, stdin=subprocess.PIPE,
                                        start_new_session=True)  # Ctrl-C is for us alone

    def write_header(self):
        self.npy.seek(0)
        about = dict(descr="|u1", fortran_order=False, shape=(self.count, *self.size, 3))
        np.lib.format.write_array_header_1_0(self.npy, about)

    def write(self, frame):
        if self.npy:
            self.npy.write(frame.tobytes())
        else:
            self.encoder.stdin.write(frame.repeat(self.scale, 0).repeat(self.scale, 1).tobytes())
        self.count += 1

    def close(self):
        if self.npy:
            self.write_header()  # now that the number of frames is known
            self.npy.close()
        else:
            self.encoder.communicate()  # ends the pipe, waits
            if self.encoder.returncode:
                raise OSError("ffmpeg could not write the video (it says why above)")


def find_device(name):
    """The device of that name if there is one; by default the first of cuda, mps, cpu."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = name or ("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError):
        fail(f"--device {name}: there is none on this machine")
    return name


def peak_memory(device):
    """The most memory that this process had, in words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in kB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"


def positive(text, kind=int):
    """An argparse type: a number above 0."""
    if not 0 < kind(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return kind(text)


def positive_float(text):
    return positive(text, float)


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = p.add_argument
    add("--ckpt", default="model.pt", help="as written by train.py (%(default)s)")
    add("--frames", type=positive, default=256, help="length, context included (%(default)s)")
    add("--out", type=Path, default="rollout.mp4", help=".mp4, .gif, .webm or .npy (%(default)s)")
    add("--context", nargs="+", default=[], metavar="CLIP", help="go on from it; several: one each")
    add("--context-frames", type=positive, help="how many of its first frames are given (4)")
    add("--actions", help=".npy (T, A), repeated at its end (the side file of --context)")
    add("--schedule", choices=SCHEDULES, default="autoregressive", help="(%(default)s)")
    add("--uncertainty", type=float, default=1.0, help="pyramid: levels a frame (%(default)s)")
    add("--tile", type=positive, help="frames of one matrix (autoregressive: 1, else as trained)")
    add("--steps", type=positive, default=STEPS, help="denoising steps of a frame (%(default)s)")
    add("--solver", choices=SOLVERS, default=SOLVER, help="multistep keeps variety, and sharpness "
        "with few steps; euler pulls towards the mean (%(default)s)")
    add("--context-noise", type=positive_float, help="sigma with which frames enter the memory: "
        "more of it forgives more errors and remembers less (as in the checkpoint: 0.05)")
    add("--batch", type=positive, default=1, help="number of rollouts, a file each (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--fps", type=positive_float, default=15, help="frames a second of the video (%(default)s)")
    add("--scale", type=positive, help="enlarge pixels, never in .npy (to a height of 256 or more)")
    add("--device", help="cuda, mps or cpu (the first of them that is there)")
    add("--show-schedule", action="store_true", help="print the matrix of every tile (16 frames "
        "but for autoregressive, or --tile), and stop")
    return p.parse_args()


def load_inputs(args, config, stride):
    """-> context (batch, context_frames, C, H, W) or None, actions (batch, frames, A) or None."""
    clips, wanted, context = args.context, args.context_frames, None
    if clips:
        span = (wanted - 1) * stride + 1
        frames = [read_clip(c, config.height, config.width, span)[::stride] for c in clips]
        for clip, f in zip(clips, frames):
            if len(f) < wanted:
                raise ValueError(f"{clip} has {len(f)} frames; --context-frames is {wanted}")
        frames = [frames[i % len(frames)] for i in range(args.batch)]
        context = to_frames(np.stack(frames)).to(args.device)
    if not config.action_dim:
        if args.actions:
            raise ValueError(f"{args.actions}: the model was trained without actions")
        return context, None
    actions = np.zeros((args.batch, args.frames, config.action_dim), np.float32)
    for i in range(args.batch):
        file = args.actions or (side_file(clips[i % len(clips)]) if clips else None)
        if args.actions or file and file.exists():
            rows = read_actions(file, stride)[::stride]
            if rows.shape[1] != config.action_dim:
                raise ValueError(f"{file}: the model needs {config.action_dim} numbers a frame")
            actions[i] = np.resize(rows, actions[i].shape)  # repeated at its end
    return context, torch.from_numpy(actions).to(args.device)


def main():
    args = parse_args()
    args.device, args.batch = find_device(args.device), max(args.batch, len(args.context))
    args.context_frames = args.context_frames or (4 if args.context else 0)
    if args.out.suffix.lower() not in (*CODECS, ".npy") or not args.out.parent.is_dir():
        fail(f"--out {args.out}: a {', '.join(CODECS)} or .npy in an existing folder is needed")
    paths = [args.out]
    if args.batch > 1:
        paths = [args.out.with_stem(f"{args.out.stem}_{i}") for i in range(args.batch)]
    inputs = [*args.context, *map(side_file, args.context), *filter(None, [args.actions])]
    if {p.resolve() for p in paths} & {Path(i).resolve() for i in inputs}:
        fail(f"--out {args.out} would overwrite what the rollout is made from")
    try:
        if args.show_schedule:
            return show_schedule(args)
        model, extra = load_checkpoint(args.ckpt, args.device)
        model.config.context_noise = args.context_noise or model.config.context_noise
        context, actions = load_inputs(args, model.config, extra.get("stride", 1))
        frames = rollout(model, schedule(args, model.config.clip_frames), args.frames, context,
                         batch_size=args.batch, actions=actions, solver=args.solver,
                         generator=torch.Generator(args.device).manual_seed(args.seed))
        height, width, scale = model.config.height, model.config.width, args.scale
        writers = [VideoWriter(path, height, width, args.fps, scale or -(-256 // height))
                   for path in paths]
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        fail(explain(error))
    bar = tqdm(frames, total=args.frames, unit=" frames", desc=str(args.out))
    try:
        seconds = write(bar, writers)[args.context_frames :]
    except KeyboardInterrupt:
        fail(f"stopped after {writers[0].count} of {args.frames} frames; those are written")
    except (OSError, RuntimeError, MemoryError) as error:
        bar.close()
        fail(f"{args.out}, frame {writers[0].count}: {explain(error)}")
    if seconds:  # frames of a tile come in a burst: only the mean is fair to every schedule
        tenth = -(-len(seconds) // 10)
        print(f"{np.mean(seconds):.3f} s a frame (median {np.median(seconds):.3f}, mean of the "
              f"first tenth {np.mean(seconds[:tenth]):.3f}, of the last "
              f"{np.mean(seconds[-tenth:]):.3f}), {peak_memory(args.device)}")


def write(frames, writers):
    """-> seconds that each frame took."""
    seconds, since = [], time.perf_counter()
    with contextlib.ExitStack() as stack:  # closes all, whatever happens
        for writer in writers:
            stack.callback(writer.close)
        for frame in frames:
            for writer, image in zip(writers, to_bytes(frame)):
                writer.write(image)
            seconds.append(time.perf_counter() - since)
            since += seconds[-1]
    return seconds


def schedule(args, clip_frames):
    tile = args.tile or (1 if args.schedule == "autoregressive" else clip_frames)
    return scheduling_matrix(args.schedule, tile, args.steps, args.uncertainty)


def show_schedule(args):
    """The matrix of every tile, with zeros in front for the context and the tiles already done."""
    matrix = schedule(args, 16)
    for done in range(args.context_frames, args.frames, matrix.shape[1]):
        for row in matrix[:, : args.frames - done].unique_consecutive(dim=0).tolist():
            print(*[0] * done, *row)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped")
