# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]>=2.30"]
# ///
"""Trains Diffusion Forcing on a folder of clips, or on two bouncing balls drawn on the fly.

    python train.py                   the balls: ten minutes on two CPU cores, nothing to download
    python train.py --data clips/     mp4, mov, avi, mkv, webm, gif, npy, folders of images; a side
                                      file NAME.actions.npy (T, A) holds the actions of NAME.mp4
    python train.py --resume          goes on where an interrupted run stopped

Beside --out model.pt it writes model.resume.pt (what --resume needs), model.csv (the log),
model.preview.mp4 (real clips above, rollouts from their first frames below) and, at the end,
model.rollout.mp4 (the same for 256 frames). The log has the training loss (each frame counts as
loss / E + ln E, where E is the loss to be expected of it, so it soon falls below zero) and, every
500 steps, the plain loss of held-out clips at low, middle and high noise.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid
from tqdm import tqdm

from diffusion_forcing import (FORCINGS, MIXERS, Config, Denoiser, atomic_write,
                               diffusion_forcing_loss, edm_scalings, load_checkpoint, need,
                               rollout, sample, save_checkpoint, zero)
from sample import (SOLVER, fail, find_device, in_words, list_images, matrix_for, mistakes,
                    positive, positive_float, read_actions, read_clip, schedule_for, side_file,
                    to_bytes, to_frames, video_writer)

RANK, WORLD = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
PRESETS = {  # small: runs anywhere. base: some tens of millions of parameters, for a GPU.
    "small": dict(size=(32, 32), batch=2, lr=3e-3, warmup=100, ema=0.995, minutes=8.0, dim=32,
                  dim_mults=(1, 2), fast=False, save_minutes=2),
    "base": dict(size=(64, 64), batch=32, lr=3e-4, warmup=1000, ema=0.9995, steps=200_000, dim=128,
                 dim_mults=(1, 2, 3, 4), fast=True, save_minutes=10),
}
SUITS = {  # what each paradigm, and --two-way, changes in Config: chosen by rollouts
    "diffusion": {},
    "two_way": dict(P_mean=0.6, P_std=2.0, causal=False),
    "teacher": dict(P_std=1.6),
    "full_sequence": dict(P_mean=0.4, P_std=1.6, causal=False),
}
FIXED = ("size", "clip_frames", "stride", "batch", "window", "temporal", "forcing", "two_way",
         "context_noise", "seed")  # what --resume cannot change
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif", ".npy")
NO_CLIPS = (".actions.npy", ".preview.mp4", ".rollout.mp4")  # the last two are our own
HELD_OUT = 10  # every tenth clip is held out from training
CONTEXT = 4  # real frames that a preview goes on from
PARTS = 2**16  # for draw(): part p of step i has number i * PARTS + p; no step reaches these:
MEASURE, PREVIEW, VALIDATE = 2**60, 2**61, 2**62
LOG = "step,loss,learning_rate,low_noise,middle_noise,high_noise,frames_per_second,seconds\n"
RADIUS, SPEED = 3.5, (0.6, 1.5)  # of the balls: pixels; pixels a frame, from and to
PUSHED = 1 / 4  # in half of the clips: share of the frames with a push, uniform over the nine
BACKGROUND, COLOURS = np.array([12, 14, 20]), np.array([[230, 70, 0], [0, 110, 225]])  # added on it


# ---- data: batch(rng, n, T, held) -> clips (n, T, H, W, 3) uint8, actions (n, T, A) float32 ------


def bouncing_balls(num_clips, num_frames, rng, size=32, radius=RADIUS, substeps=8, speed=SPEED,
                   push=None):
    """Two elastic balls of equal mass in a box -> uint8 (N, T, size, size, 3). push (N, T, 2) of
    -1, 0 and 1, to the right and down: where push[:, t] is not (0, 0), the red ball turns to that
    direction, with a speed of 1 pixel a frame, before it moves into frame t."""
    need(size >= 4 * radius, f"size is {size}; two balls need {4 * radius:.0f} pixels or more")
    angle = rng.uniform(0, 2 * np.pi, (num_clips, 2))
    v = np.stack([np.cos(angle), np.sin(angle)], -1)  # (N, ball, xy)
    v = v * rng.uniform(*speed, (num_clips, 2, 1))
    p = rng.uniform(radius, size - radius, (num_clips, 2, 2))
    while (overlap := np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * radius).any():
        p[overlap] = rng.uniform(radius, size - radius, (overlap.sum(), 2, 2))
    pixel, clips = np.arange(size) + 0.5, []
    for t in range(num_frames):
        if push is not None and t > 0:
            norm = np.linalg.norm(push[:, t], axis=-1, keepdims=True)  # (N, 1)
            v[:, 0] = np.where(norm > 0, push[:, t] / np.maximum(norm, 1), v[:, 0])
        for _ in range(substeps if t > 0 else 0):
            p = p + v / substeps
            low, high = p < radius, p > size - radius  # walls mirror
            p = np.where(low, 2 * radius - p, np.where(high, 2 * (size - radius) - p, p))
            v = np.where(low, abs(v), np.where(high, -abs(v), v))
            apart = p[:, 1] - p[:, 0]
            distance = np.linalg.norm(apart, axis=-1, keepdims=True)
            normal = apart / distance
            approach = ((v[:, 0] - v[:, 1]) * normal).sum(-1, keepdims=True)
            swap = np.where((distance < 2 * radius) & (approach > 0), approach, 0) * normal
            v = v + np.stack([-swap, swap], 1)  # speeds along the line of centres are swapped
        dx, dy = pixel - p[..., 0, None], pixel - p[..., 1, None]  # (N, ball, size) each
        distance = np.sqrt(dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2)
        cover = np.clip(radius + 0.5 - distance, 0, 1)  # an edge one pixel wide
        image = BACKGROUND + np.einsum("nkhw,kc->nhwc", cover, COLOURS)
        clips.append(np.minimum(image, 255).round().astype(np.uint8))
    return np.stack(clips, 1)


class Balls:
    held_out = True  # no clip is ever seen twice: each is as good as held out

    def __init__(self, s):
        need(s.size[0] == s.size[1], f"--size {s.size}: the box of the balls is a square")
        need(s.stride == 1, "--stride: only clips of --data have a stride")
        self.size, self.action_dim, self.one_hot = s.size[0], 0 if s.no_push else 2, False

    def batch(self, rng, n, num_frames, held=False):
        push = np.zeros((n, num_frames, self.action_dim), np.float32)
        if self.action_dim:
            # half of the clips have none: the speeds of balls that nobody pushes are learned, too
            share = PUSHED * rng.integers(0, 2, (n, 1, 1))
            push += rng.integers(-1, 2, push.shape) * (rng.random((n, num_frames, 1)) < share)
        clips = bouncing_balls(n, num_frames, rng, self.size, push=push if push.size else None)
        return clips, push


class Clips:
    """A folder of clips. Each is decoded once and memory-mapped: training waits for no decoder."""

    def __init__(self, s):
        need(Path(s.data).is_dir(), f"--data {s.data} is not a folder")
        for left in Path(s.cache).glob("?" * 24 + ".npy.*.tmp"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink(missing_ok=True)
        self.stride, self.clips, skipped = s.stride, [], 0  # clips: (path, length, actions)
        one_hot = True  # is each action a choice of one? sample.py --play asks
        self.span = (s.clip_frames - 1) * s.stride + 1  # frames that a training clip covers
        files = find_clips(s.data, s.cache)
        for file in tqdm(files, f"decoding to {s.cache}", unit=" clips", disable=RANK > 0):
            try:
                (path, length), side = cached_clip(file, s.size, Path(s.cache)), side_file(file)
                rows = read_actions(side, s.stride) if os.path.lexists(side) else None
                need(length >= self.span, f"{file}: {length} frames; {self.span} are needed")
                need(rows is None or len(rows) >= length,
                     f"{side}: {0 if rows is None else len(rows)} rows for {length} frames")
                self.clips.append((path, length, rows))
                if rows is not None:
                    told = read_actions(side)  # without stride, which takes means
                    one_hot &= bool(((told == 0) | (told == 1)).all() and (told.sum(1) == 1).all())
            except (OSError, ValueError) as error:
                tqdm.write(f"skipped {in_words(error)}", sys.stdout)
                skipped += 1
        widths = {rows.shape[1] for *_, rows in self.clips if rows is not None}
        need(self.clips, f"--data {s.data}: no clip of {self.span} or more frames")
        need(len(widths) < 2, f"--data {s.data}: actions of different widths, {sorted(widths)}")
        self.action_dim, self.one_hot = max(widths, default=0), one_hot and bool(widths)
        starts = np.array([length - self.span + 1 for _, length, _ in self.clips])
        held = np.arange(1, len(starts) + 1) % HELD_OUT == 0  # whole clips
        self.held_out = bool(held.any())
        self.share = {h: w / w.sum() for h, w in ((False, starts * ~held), (True, starts * held))
                      if w.any()}  # how often each clip is drawn: by its length
        acted = sum(rows is not None for *_, rows in self.clips)
        print(f"{len(starts)} clips ({held.sum()} held out, {acted} with actions), "
              f"{sum(length for _, length, _ in self.clips)} frames; {skipped} skipped")

    def batch(self, rng, n, num_frames, held=False):
        clips, actions = [], np.zeros((n, num_frames, self.action_dim), np.float32)
        for row, i in zip(actions, rng.choice(len(self.clips), n, p=self.share[held])):
            path, length, rows = self.clips[i]
            at = rng.integers(length - self.span + 1) + np.arange(num_frames) * self.stride
            at = np.minimum(at, length - 1)  # only previews are so long: then it stands still
            # opened anew each time: thousands of open files are more than systems allow
            clips.append(np.load(path, mmap_mode="r", allow_pickle=False)[at])
            row[:] = 0 if rows is None else rows[at]
        return np.stack(clips), actions


def find_clips(folder, cache):
    """Videos, .npy files and folders of images at any depth, each once, hidden ones left out."""
    found, seen = {}, {os.path.realpath(cache)}  # seen: folders, so that a loop of links ends
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in sorted(folders) if name[0] != "."]
        for name in [".", *sorted(files)]:
            path = Path(parent, name)
            if (len(list_images(path)) > 1 if name == "." else name[0] != "." and
                    name.lower().endswith(VIDEOS) and not name.endswith(NO_CLIPS)):
                found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def cached_clip(file, size, cache):
    """-> path and length of a .npy, uint8 (T, H, W, 3), named by all that it was made from."""
    parts = list_images(file) if file.is_dir() else [file]
    made_from = [(os.path.abspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    path = cache / (hashlib.sha256(f"{made_from} {size}".encode()).hexdigest()[:24] + ".npy")
    with contextlib.suppress(OSError, ValueError, EOFError):  # it is not there yet, or damaged
        return path, len(np.load(path, mmap_mode="r", allow_pickle=False))
    clip = read_clip(file, *size)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, f".{os.getpid()}") as temporary, open(temporary, "wb") as f:
            np.save(f, clip)  # another process may decode the same clip: each has its own file
    except OSError as error:
        fail(f"--cache {cache} cannot be written: {error.strerror or error}")
    return path, len(clip)


def draw(data, s, n, num_frames, at, held=False):
    """The only way from the data to a batch -> clips (n, T, H, W, 3) uint8, actions (n, T, A), and
    a seed for the noise. All that is random depends on (seed, at) alone, so that neither a restart
    nor the number of processes changes a batch. It uses numpy only: it runs in a second thread,
    and torch in that thread would slow down the training step."""
    rng = np.random.default_rng((s.seed, at))
    seed = int(rng.integers(2**62))
    return *data.batch(rng, n, num_frames, held), seed


def to_device(batch, s):
    """What was drawn -> x (n, T, C, H, W) in [-1, 1], actions (n, T, A), and a generator."""
    clips, actions, seed = batch
    generator = torch.Generator(s.device).manual_seed(seed)
    return to_frames(clips, s.device), torch.from_numpy(actions).to(s.device), generator


def measure(data, s):
    """-> what Config wants to know of the data, from 256 clips: the mean of each channel, the
    standard deviation around it, the root mean square of each action."""
    mean, square, action_square = 0, 0, 0
    for i in range(16):  # 16 clips at a time: all of them could be too large for a GPU
        x, actions, _ = to_device(draw(data, s, 16, s.clip_frames, MEASURE + i), s)
        mean, square = mean + x.mean((0, 1, 3, 4)) / 16, square + x.square().mean() / 16  # (C,), ()
        action_square = action_square + actions.square().mean((0, 1)) / 16  # (A,)
    deviation = (square - mean.square().mean()).clamp(min=0).sqrt().item()
    return dict(data_mean=tuple(mean.tolist()), sigma_data=deviation,
                action_scale=tuple(a or 1.0 for a in action_square.sqrt().tolist()))


# ---- the run -------------------------------------------------------------------------------------


class ExpectedLoss(nn.Module):
    """-> (B, T), the logarithm of the loss to be expected of a frame, from its own sigma (B, T) and
    from sigma_past (B, T) of the four frames before it (two-way: and of the four after).

    A frame with little noise, or after nearly clean ones, often has a far smaller loss than others.
    In a plain mean such frames hardly count, but a rollout needs them. Divided by what is expected,
    every mixture counts the same. The optimal denoiser stays what it was, as this does not depend
    on what frames show. (Kendall et al., arXiv 1705.07115; EDM2.) The paper's fused SNR weighting
    is a formula for this. With it, balls move less smoothly and obey fewer pushes. But in short
    trainings on flights of a lander, fewer landers fade away (assets/RESULTS.md).
    """

    def __init__(self, config, past=4, width=64):
        super().__init__()
        self.config, self.past, self.ahead = config, past, 0 if config.causal else past
        self.layers = nn.Sequential(nn.Linear(past + 1 + self.ahead, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), zero(nn.Linear(width, 1)))

    def forward(self, sigma, sigma_past):
        unknown = self.config.in_frame_units(self.config.sigma_max)  # beyond the clip: pure noise
        seen = F.pad(sigma_past, (self.past, self.ahead), value=unknown)
        sigmas = seen.unfold(1, self.past + 1 + self.ahead, 1).clone()  # (B,T,past+1+ahead)
        sigmas[..., self.past] = sigma
        *_, c_noise = edm_scalings(sigmas, self.config.sigma_data)
        with torch.autocast(sigma.device.type, enabled=False):
            return self.layers(2 * c_noise)[..., 0]  # times 2: about unit variance


def height_width(text):
    """An argparse type: 64 or 64x112 -> (height, width)."""
    height, *width = [positive(n) for n in text.lower().split("x")]
    return (height, *(width or [height]))[:2]


def parse_args():
    """-> the settings of the run, from the command line, --resume, --init and --preset; the model
    to start from, if there is one; what else --resume finds saved."""
    p = argparse.ArgumentParser(description=__doc__, epilog="presets: " + "; ".join(
        f"{name}: " + ", ".join(f"{k}={v}" for k, v in preset.items()) for name, preset in
        PRESETS.items()), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", help="folder of clips, any depth (default: the bouncing balls)")
    add("--out", default="model.pt", help="checkpoint (%(default)s)")
    add("--preset", choices=PRESETS, help="default: base with --data and CUDA, else small")
    add("--size", type=height_width, help="pixels: 64, or 64x112, height first (of the preset)")
    add("--clip-frames", type=positive, default=16, help="frames of a training clip (%(default)s)")
    add("--stride", type=positive, default=1, help="take every n-th frame of a clip (%(default)s)")
    add("--batch", type=positive, help="clips of one pass (of the preset)")
    add("--accumulate", type=positive, default=WORLD, help="passes of a step, over all processes "
        "together: a step has batch x accumulate clips (one pass in each process)")
    add("--steps", type=positive, help="length of the run in steps (of the preset)")
    add("--minutes", type=positive_float, help="length in minutes (of the preset); the learning "
        "rate follows the clock, so that only --steps makes a run that can be repeated")
    add("--lr", type=positive_float, help="learning rate (of the preset)")
    add("--no-push", action="store_true", help="balls that nobody pushes, and no actions")
    add("--window", type=positive, help="frames that attention sees (--clip-frames)")
    add("--temporal", choices=MIXERS, default="attention", help="(%(default)s)")
    add("--forcing", choices=FORCINGS, default="diffusion", help="paradigm (%(default)s)")
    add("--two-way", action="store_true", help="frames also see later ones: for sample.py "
        "--keyframes, within one clip")
    add("--context-noise", type=positive_float, default=0.05, help="sigma of the history: in "
        "rollouts, and as the past in teacher forcing (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (%(default)s)")
    add("--device", help="cuda, mps or cpu (the first of them that is there)")
    add("--cache", default=os.path.expanduser("~/.cache/diffusion_forcing"),
        help="folder for decoded clips (%(default)s)")
    add("--init", help="checkpoint to start from: its weights; by default also its size, clip "
        "length, window, network and context noise")
    add("--resume", action="store_true", help="go on from --out's .resume.pt")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    given = p.parse_args()
    out = Path(given.out)
    need(out.suffix == ".pt" and not out.is_dir() and out.parent.is_dir(),
         f"--out {out}: a .pt file in an existing folder is needed")
    resume = out.with_suffix(".resume.pt")
    existing = [path for path in (out, resume) if path.exists()]
    need(not existing or given.resume or given.overwrite, f"{[*existing, ''][0]} exists: "
         + "--resume goes on with it, " * resume.exists() + "--overwrite starts anew")
    device, model, saved = find_device(given.device), None, {}
    if given.resume:
        need(resume.exists(), f"--resume: there is no {resume}; a new run starts without --resume")
        model, saved = load_checkpoint(resume)
        need("log" in saved, f"{resume} is not of this train.py: --overwrite starts anew")
        p.set_defaults(**saved["settings"])
    else:
        base = given.data and device.startswith("cuda")
        preset = given.preset or ("base" if base else "small")
        p.set_defaults(window=given.clip_frames, preset=preset, **PRESETS[preset])
        if given.init:
            model, _ = load_checkpoint(given.init)
            c = dataclasses.asdict(model.config)
            same = ("clip_frames", "window", "temporal", "context_noise", "dim", "dim_mults")
            p.set_defaults(size=(c["height"], c["width"]), **{k: c[k] for k in same})
    if given.steps or given.minutes:  # the length that is asked for, and no other
        p.set_defaults(steps=None, minutes=None)
    s = p.parse_args()
    s.device = device
    for k in FIXED:
        was = saved["settings"][k] if saved else getattr(s, k)
        need(getattr(s, k) == was, f"--{k.replace('_', '-')} cannot change: {resume} has {was}")
    need(s.seed >= 0, f"--seed {s.seed}: at least 0 is needed")
    need(not given.init or s.temporal == model.config.temporal,
         f"--temporal {s.temporal}: {given.init} has another")
    need(not s.two_way or (s.forcing, s.temporal) == ("diffusion", "attention"),
         "--two-way is for --forcing diffusion and --temporal attention")
    need(s.accumulate % WORLD == 0,
         f"--accumulate {s.accumulate}: a multiple of the {WORLD} processes is needed")
    dataclasses.replace(model.config if model else Config(), height=s.size[0], width=s.size[1],
                        dim=s.dim, dim_mults=s.dim_mults)  # raises at once for a bad --size
    return s, model, saved


def new_model(s, data, init):
    """-> a Denoiser for these settings and this data, with the weights of `init`, if any."""
    suits = dict(P_mean=Config.P_mean, P_std=Config.P_std, causal=True)
    suits |= SUITS["two_way" if s.two_way else s.forcing]
    suits["causal"] |= s.temporal == "gru"  # a GRU never looks ahead, even with full_sequence
    config = dataclasses.replace(
        init.config if init else Config(dim=s.dim, dim_mults=s.dim_mults), height=s.size[0],
        width=s.size[1], action_dim=data.action_dim, clip_frames=s.clip_frames, window=s.window,
        temporal=s.temporal, context_noise=s.context_noise, forcing=s.forcing, stride=s.stride,
        **suits, **measure(data, s))
    torch.manual_seed(s.seed)
    model = Denoiser(config)
    own, old = model.state_dict(), init.state_dict() if init else {}
    fit = {k: w for k, w in old.items() if k in own and w.shape == own[k].shape}
    model.load_state_dict(fit, strict=False)  # all but the weights of other actions
    return model


def preview(path, model, data, s, num_frames):
    """Writes a video: four real clips above, rollouts from their first frames below. A model of
    full_sequence can only make one whole clip from nothing, and a two-way one only one clip."""
    if s.two_way or s.forcing == "full_sequence":
        num_frames = min(s.clip_frames, s.window)
    context = 0 if s.forcing == "full_sequence" else min(CONTEXT, num_frames - 1)
    causal = model.config.causal
    matrix, period = matrix_for(schedule_for(model.config), num_frames - context,
                                two_way=not causal)
    x, actions, generator = to_device(draw(data, s, 4, num_frames, PREVIEW, data.held_out), s)
    how = dict(actions=actions, solver=SOLVER, generator=generator)
    frames = (rollout(model, matrix, num_frames, x[:, :context], period=period, **how) if causal
              else sample(model, matrix, x[:, :context], **how).unbind(1))
    bar = tqdm(frames, str(path), num_frames, leave=False, unit=" frames")
    try:
        with video_writer(path, 2 * s.size[0], 4 * s.size[1]) as write:
            for real, rolled in zip(x.unbind(1), bar):
                write(to_bytes(make_grid([*real, *rolled], nrow=4, padding=0)))
    except OSError as error:  # no reason to end a training
        print(in_words(error, path))


@torch.no_grad()
def validate(model, data, s):
    """-> the losses of held-out clips, always the same, at low, middle and high noise: ln sigma is
    P_mean - P_std, P_mean and P_mean + P_std. NaN if no clip is held out."""
    if not data.held_out:
        return [math.nan] * 3
    losses, config, batch = [], model.config, draw(data, s, 16, s.clip_frames, VALIDATE, held=True)
    for shift in (-1, 0, 1):
        x, actions, generator = to_device(batch, s)
        sigma = config.in_frame_units(math.exp(config.P_mean + shift * config.P_std))
        losses.append(diffusion_forcing_loss(
            model, x, config, sigma=x.new_full(x.shape[:2], sigma), actions=actions,
            generator=generator).item())
    return losses


def everywhere(value, op=dist.ReduceOp.MAX):
    """The largest (or the sum) of a number over all processes, which wait for each other here."""
    value = torch.tensor(float(value), dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(value, op)
    return value.item()


def main():
    # under torchrun: several processes, of which the first prints and saves
    if WORLD > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(days=1))  # decoding may take that long
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout

    # the data, the model, its moving average, the optimizer: new, or as saved
    with mistakes(ValueError):
        s, model, saved = parse_args()
        for turn in (True, False):  # the first process of a machine decodes, then come the others
            if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
                data = Clips(s) if s.data else Balls(s)
            everywhere(0)
        model = model if saved else new_model(s, data, model)
        need(data.action_dim == model.config.action_dim,
             f"actions of {data.action_dim} numbers, but the run began with "
             f"{model.config.action_dim}: other clips, or another --no-push?")
    config = model.config
    model = model.to(s.device).train()
    ema = copy.deepcopy(model).to(s.device).eval()  # .to packs the weights of a GRU again
    expected_loss = ExpectedLoss(config).to(s.device)
    weights = [*model.parameters(), *expected_loss.parameters()]
    optimizer = torch.optim.AdamW(weights, s.lr, betas=(0.9, 0.99))
    parts = dict(ema=ema, expected_loss=expected_loss, optimizer=optimizer)
    step, elapsed, log = 0, 0.0, LOG
    total, count = 0.0, 0  # sum and number of the losses since the last row of the log
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step, elapsed, log, total, count = (saved[k] for k in ("step", "elapsed", "log", "total",
                                                               "count"))
    saved.clear()  # frees its memory

    # bfloat16, and a compiled network, where the GPU is made for it
    cuda = s.device.startswith("cuda")
    fast = s.fast and cuda and torch.cuda.get_device_capability(s.device) >= (8, 0)
    network, expect = model, expected_loss
    if fast and s.temporal == "attention" and sys.platform != "win32":  # a GRU stops it
        network = torch.compile(network)  # TORCH_COMPILE_DISABLE=1 switches it off
    if WORLD > 1:
        network, expect = DistributedDataParallel(network), DistributedDataParallel(expect)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, preset {s.preset} "
          f"on {s.device} in {'bfloat16' if fast else 'float32'}")

    # Ctrl-C: the step is finished, and saved; a second one ends at once (torchrun itself sends two)
    def ask_to_stop(number, _):
        stop.append(number)
        if WORLD == 1:
            os.write(2, b"\nstopping after this step; once more stops at once\n")
            signal.signal(number, signal.SIG_DFL)

    stop, out, resume = [], Path(s.out), Path(s.out).with_suffix(".resume.pt")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    progress = lambda: min(1, max(step / s.steps if s.steps else 0,
                                  elapsed / 60 / s.minutes if s.minutes else 0))
    bar = tqdm(total=1.0, initial=progress(), disable=RANK > 0,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    pool, start = ThreadPoolExecutor(1), time.monotonic() - elapsed
    row_step, row_time, save_time = step, elapsed, elapsed  # of the last log row, and checkpoint
    prepare = lambda step: [  # the batches of this process for a step
        draw(data, s, s.batch, s.clip_frames, step * PARTS + part)
        for part in range(RANK, s.accumulate, WORLD)]
    upcoming = pool.submit(prepare, step)
    while True:
        # every 20 steps: a row of the log, and when due a checkpoint and a preview; at the end: a
        # checkpoint. Both only if the losses are numbers
        done = progress()
        end = everywhere(len(stop)) > 0 or done == 1
        if count and (end or step % 20 == 0):
            loss = everywhere(total / count, dist.ReduceOp.SUM) / WORLD  # this waits for a GPU
            elapsed = everywhere(time.monotonic() - start)
            if not math.isfinite(loss):
                fail(f"the loss of steps {step - count} to {step} is {loss}: a lower --lr may help"
                     + f". {resume} is whole, and --resume goes on with it" * (save_time > 0))
        if count and step % 20 == 0:
            clips = (step - row_step) * s.accumulate * s.batch
            speed = clips * s.clip_frames / (elapsed - row_time)
            losses = validate(ema, data, s) if step % 500 == 0 else [math.nan] * 3
            log += ",".join(f"{v:.6g}" for v in (step, loss, lr, *losses, speed, elapsed)) + "\n"
            bar.set_postfix_str(f"step {step}, loss {loss:.4f}, {speed:.0f} frames/s")
            bar.update(done - bar.n)
            total, count, row_step, row_time = 0.0, 0, step, time.monotonic() - start
        if RANK == 0 and (end or step % 20 == 0 and elapsed - save_time > 60 * s.save_minutes):
            settings = {k: v for k, v in vars(s).items()
                        if k not in ("out", "device", "init", "resume", "overwrite")}
            save_checkpoint(resume, config, model.state_dict(), step=step, elapsed=elapsed, log=log,
                            total=float(total), count=count, settings=settings,
                            **{name: part.state_dict() for name, part in parts.items()})
            save_checkpoint(out, config, ema.state_dict(), step=step, one_hot=data.one_hot)
            with contextlib.suppress(OSError):  # it may be open in another program
                out.with_suffix(".csv").write_text(log)
            save_time = elapsed
            if not end:
                preview(out.with_suffix(".preview.mp4"), ema, data, s, 2 * s.clip_frames)
                row_time = time.monotonic() - start  # previews do not count
        if end:
            break

        # one step: the losses of all passes, AdamW, the moving average
        batches, upcoming = upcoming.result(), pool.submit(prepare, step + 1)  # during this step
        for i, batch in enumerate(batches, 1):
            x, actions, generator = to_device(batch, s)
            for module in (network, expect):  # processes exchange gradients once for each step
                module.require_backward_grad_sync = i == len(batches)
            with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=fast):
                loss = diffusion_forcing_loss(
                    network, x, config, actions=actions, generator=generator,
                    expected_loss=expect) / len(batches)
            loss.backward()
            total = total + loss.detach()
        lr = s.lr * min(1, (step + 1) / s.warmup) * min(1, 2 * (1 - done))  # up, constant, down
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(s.ema, (step + 1) / (step + 10))  # a short memory at first
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)
        step, count, elapsed = step + 1, count + 1, everywhere(time.monotonic() - start)

    # the end: of the run, or until it is resumed
    bar.close()
    pool.shutdown()
    everywhere(0)  # nobody leaves before all is saved
    if WORLD > 1:
        dist.destroy_process_group()  # threads that outlive Python abort the process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop:
        sys.exit(f"stopped and saved at step {step}; the same command with --resume goes on")
    if RANK == 0:
        preview(out.with_suffix(".rollout.mp4"), ema, data, s, 256)
    print(f"{out}: {step} steps in {elapsed / 60:.1f} minutes; a rollout is in "
          f"{out.with_suffix('.rollout.mp4')}\nmore of them: python sample.py --ckpt {out}")


if __name__ == "__main__":
    with mistakes():
        main()
