# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Rolls a trained model out, far beyond its training length, and writes the video while it grows.

    python sample.py --ckpt assets/balls.pt --frames 256                                  from nothing
    python sample.py --ckpt model.pt --frames 256 --context clip.mp4 --out rollout.gif    going on from a clip
    python sample.py --show-schedule --schedule pyramid --uncertainty 2 --frames 16       the matrix, as text
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from diffusion_forcing import SCHEDULES, SOLVERS, load_checkpoint, rollout, scheduling_matrix

CODECS = {  # suffix: codec, pixel format, further options. A gif gets a palette a frame, so that it can be streamed.
    ".mp4": ("libx264", "yuv420p", ["-crf", "16"]),
    ".webm": ("libvpx-vp9", "yuv420p", ["-crf", "20", "-b:v", "0"]),
    ".gif": ("gif", "pal8", ["-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"]),
}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


# ---- clips: bytes (T, H, W, 3) in files, floats (T, 3, H, W) in [-1, 1] for the model -------------------------------


def to_frames(clip):
    """uint8 (..., H, W, C) array -> float (..., C, H, W) tensor in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clip)).movedim(-1, -3).float() / 127.5 - 1


def to_bytes(frames):
    """float (..., C, H, W) tensor in [-1, 1] -> uint8 (..., H, W, C) array: rounded, clamped."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()


def natural(path):
    """Sort key that puts frame2 before frame10."""
    return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", path.name)]


def read_clip(path, height, width):
    """A video, a .npy (uint8, (T, H, W, 3)) or a folder of numbered images -> uint8 (T, height, width, 3).

    ffmpeg decodes, scales and crops to the centre, so that no clip is ever held at full size; every coded frame comes
    through, whatever its time stamp. Raises ValueError, with the file and the reason, for what cannot be read."""
    path, data = Path(path), None
    if path.suffix == ".npy":
        try:
            clip = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            raise ValueError(f"{path}: {clip.dtype} {clip.shape}; uint8 (T, H, W, 3) is needed")
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clip.shape[2]}x{clip.shape[1]}"]
        data = np.ascontiguousarray(clip).data
    elif path.is_dir():
        source = []
        data = b"".join(p.read_bytes() for p in sorted(path.iterdir(), key=natural) if p.suffix.lower() in IMAGES)
    else:
        source = ["-protocol_whitelist", "file"]
    fit = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=area,crop={width}:{height}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-i", f"file:{path}" if data is None else "pipe:",
               "-vf", fit, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
    done = subprocess.run(command, input=data, stdin=None if data else subprocess.DEVNULL, capture_output=True)
    clip = np.frombuffer(done.stdout, np.uint8)
    size = height * width * 3
    if len(clip) < size:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise ValueError(f"{path}: {reason or 'no frame in it'}")
    return clip[: len(clip) // size * size].reshape(-1, height, width, 3)


def actions_of(clip):
    """The side file of a clip NAME.*, which may or may not exist."""
    return Path(clip).with_suffix(".actions.npy")


def read_actions(path, stride=1):
    """.npy (T, A) -> float32 (T, A). Row t drives the change into frame t; where only every stride-th frame is kept,
    row t is the mean of the last `stride` rows. Raises ValueError with the file and the reason."""
    try:
        rows = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{path}: shape {rows.shape}; (T, A) is needed")
    return np.stack([rows[max(0, t - stride + 1) : t + 1].mean(0) for t in range(len(rows))])


class VideoWriter:
    """Writes uint8 (H, W, 3) frames to a video or .npy file as they come; nothing is kept in memory."""

    def __init__(self, path, num_frames, height, width, fps=15, scale=1):
        path = Path(path)
        if path.suffix == ".npy":
            self.file = np.lib.format.open_memmap(path, "w+", np.uint8, (num_frames, height, width, 3))
        else:
            codec, pixels, options = CODECS[path.suffix]
            self.file = imageio_ffmpeg.write_frames(
                str(path), (width * scale, height * scale), fps=fps, codec=codec, pix_fmt_out=pixels,
                output_params=options, macro_block_size=1, ffmpeg_log_level="error")
            self.file.send(None)  # starts the generator
        self.scale, self.count = scale, 0

    def write(self, frame):
        if isinstance(self.file, np.ndarray):
            self.file[self.count] = frame
        else:
            self.file.send(frame.repeat(self.scale, 0).repeat(self.scale, 1).tobytes())
        self.count += 1

    def close(self):
        self.file.flush() if isinstance(self.file, np.ndarray) else self.file.close()


# ---- the command ----------------------------------------------------------------------------------------------------


def fail(message):
    """One line for a user's mistake, exit status 2."""
    sys.exit(print(f"error: {message}", file=sys.stderr) or 2)


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="model.pt, as written by train.py")
    p.add_argument("--frames", type=int, default=256, help="length of the video, context included (%(default)s)")
    p.add_argument("--out", type=Path, default="rollout.mp4", help=".mp4, .gif, .webm or .npy (%(default)s)")
    p.add_argument("--context", nargs="+", metavar="CLIP", help="go on from this clip (from nothing); several for --batch")
    p.add_argument("--context-frames", type=int, help="how many of its first frames are given (4)")
    p.add_argument("--actions", help=".npy (T, A) for a model with actions, repeated at its end (those of the context)")
    p.add_argument("--schedule", choices=SCHEDULES, default="autoregressive", help="scheduling matrix (%(default)s)")
    p.add_argument("--uncertainty", type=float, default=1.0, help="pyramid: levels from frame to frame (%(default)s)")
    p.add_argument("--tile", type=int, help="frames of one matrix (1 if autoregressive, else the training length)")
    p.add_argument("--steps", type=int, default=10, help="denoising steps of each frame (%(default)s)")
    p.add_argument("--solver", choices=SOLVERS, default="euler", help="(%(default)s)")
    p.add_argument("--batch", type=int, default=1, help="number of rollouts, one file each (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    p.add_argument("--fps", type=float, default=15, help="frames a second of the video (%(default)s)")
    p.add_argument("--scale", type=int, help="enlarge each pixel, but never in .npy (to 256 or more in height)")
    p.add_argument("--device", default=default_device(), help="cuda, mps or cpu (%(default)s)")
    p.add_argument("--show-schedule", action="store_true", help="print the matrix of every tile as text, and stop")
    args = p.parse_args()
    args.out = Path(args.out)
    if args.ckpt is None and not args.show_schedule:
        fail("--ckpt model.pt is needed; assets/balls.pt is one")
    for name in ("frames", "steps", "batch", "tile", "scale"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} is {getattr(args, name)}; at least 1 is needed")
    if args.out.suffix not in (*CODECS, ".npy"):
        fail(f"--out {args.out}: the suffix must be one of {', '.join((*CODECS, '.npy'))}")
    if not args.out.parent.is_dir():
        fail(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.context_frames is None:
        args.context_frames = 4 if args.context else 0
    if not 0 <= args.context_frames <= args.frames:
        fail(f"--context-frames {args.context_frames}: between 0 and --frames {args.frames} is needed")
    return args


def show_schedule(matrix, num_frames, context_frames):
    """Prints the matrix of every tile, with zeros in front for the context and the tiles already done."""
    for done in range(context_frames, num_frames, matrix.shape[1]):
        for row in matrix[:, : num_frames - done].unique_consecutive(dim=0).tolist():
            print(*[0] * done, *row)


def load_context(args, config, stride):
    """-> frames (batch, context_frames, C, H, W) or None, actions (batch, frames, A) or None."""
    if not args.context:
        clips = None
    else:
        clips = [read_clip(c, config.height, config.width)[::stride][: args.context_frames] for c in args.context]
        for path, clip in zip(args.context, clips):
            if len(clip) < args.context_frames:
                raise ValueError(f"{path} has {len(clip)} frames; --context-frames asks for {args.context_frames}")
        clips = to_frames(np.stack([clips[i % len(clips)] for i in range(args.batch)]))
    files = [args.actions] if args.actions else [f for f in map(actions_of, args.context or []) if f.exists()]
    if not config.action_dim or not files:
        return clips, None
    rows = [read_actions(f, stride)[::stride] for f in files]
    for path, r in zip(files, rows):
        if r.shape[1] != config.action_dim:
            raise ValueError(f"{path} has {r.shape[1]} numbers a frame; the model was trained with {config.action_dim}")
    rows = [np.resize(r, (args.frames, config.action_dim)) for r in rows]  # repeated at the end
    return clips, torch.from_numpy(np.stack([rows[i % len(rows)] for i in range(args.batch)]))


def main():
    args = parse_args()
    try:
        if args.ckpt:
            model, extra = load_checkpoint(args.ckpt, args.device)
        training_length = model.config.clip_frames if args.ckpt else 16
        tile = args.tile or (1 if args.schedule == "autoregressive" else training_length)
        matrix = scheduling_matrix(args.schedule, tile, args.steps, args.uncertainty)
        if args.show_schedule:
            return show_schedule(matrix, args.frames, args.context_frames)
        context, actions = load_context(args, model.config, extra.get("stride", 1))
    except (OSError, ValueError) as error:
        fail(error)
    if context is not None:
        context = context.to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    height, width = model.config.height, model.config.width
    scale = args.scale or -(-256 // height)
    paths = [args.out.with_stem(f"{args.out.stem}_{i}") if args.batch > 1 else args.out for i in range(args.batch)]
    writers = [VideoWriter(path, args.frames, height, width, args.fps, scale) for path in paths]
    frames = rollout(model, matrix, args.frames, context, batch_size=args.batch, actions=actions, solver=args.solver,
                     generator=generator)
    try:
        for frame in tqdm(frames, total=args.frames, unit="frame", desc=str(args.out)):
            for writer, image in zip(writers, to_bytes(frame)):
                writer.write(image)
    except KeyboardInterrupt:
        print(f"\nstopped after {writers[0].count} of {args.frames} frames, which are in {paths[0]}")
    finally:
        for writer in writers:
            writer.close()


if __name__ == "__main__":
    main()
