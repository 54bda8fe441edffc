# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Trains Diffusion Forcing on a folder of clips, or on two bouncing balls drawn on the fly.

    python train.py                   the balls: ten minutes on two CPU cores, nothing to download
    python train.py --data clips/     mp4, mov, avi, mkv, webm, gif, npy, folders of images; a side
                                      file NAME.actions.npy (T, A) holds the actions of NAME.mp4
    python train.py --resume          goes on where an interrupted run stopped

Beside --out model.pt it writes model.resume.pt (what --resume needs), model.csv (the log),
model.preview.mp4 (real clips above, rollouts from their first frames below, both twice as long as
a training clip) and, at the end, model.rollout.mp4 (the same for 256 frames). Losses in the log:
of training (loss / exp(u) + u: soon below zero); then, plain, of held-out clips in three bands of
noise.
"""

import argparse
import copy
import dataclasses
import datetime
import glob
import hashlib
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from diffusion_forcing import (FORCINGS, Config, Denoiser, ExpectedLoss, aside,
                               diffusion_forcing_loss, load_checkpoint, rollout,
                               sample_noise_levels, save_checkpoint, scheduling_matrix)
from sample import (SOLVER, STEPS, VideoWriter, explain, fail, find_device, list_images,
                    load_npy, peak_memory, positive, positive_float, read_actions, read_clip,
                    side_file, to_bytes, to_frames)

RANK, WORLD = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
DEFAULTS = dict(data=None, clip_frames=16, stride=1, temporal="attention", forcing="diffusion",
                context_noise=0.05, seed=0, val=0.1, accumulate=WORLD,
                cache=os.path.expanduser("~/.cache/diffusion_forcing"))
PRESETS = {  # small: for anything, and for the balls. base: some tens of millions, for a GPU.
    "small": dict(size=32, batch=2, lr=3e-3, warmup=100, ema=0.995, steps=None, minutes=8.0,
                  dim=32, dim_mults=(1, 2), fast=False, save_minutes=2),
    "base": dict(size=64, batch=32, lr=3e-4, warmup=1000, ema=0.9995, steps=200_000, minutes=None,
                 dim=128, dim_mults=(1, 2, 3, 4), fast=True, save_minutes=10),
}
SUITS = {  # what each paradigm changes in Config, chosen by rollouts
    "diffusion": {},
    "teacher": dict(P_std=1.6),  # no frame's past is a mixture of levels
    "full_sequence": dict(P_mean=0.4, P_std=1.6, causal=False),  # frames tell of each other
}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
NO_CLIPS = (".actions.npy", ".preview.mp4", ".rollout.mp4")  # the last two are our own
# What may change on --resume:
FREE = ("data", "steps", "minutes", "lr", "accumulate", "device", "cache", "no_compile")
CONTEXT = 4  # real frames that a preview goes on from
RADIUS, SPEED = 3.5, (0.6, 1.5)  # of the balls: pixels; pixels a frame, from and to
BACKGROUND, COLOURS = np.array([12, 14, 20]), np.array([[230, 70, 0], [0, 110, 225]])  # added on it


# ---- data: batch(rng, n) -> clips (n, T, H, W, 3) uint8, actions (n, T, A) or None. held=True: of
#      the clips that are held out from training ---------------------------------------------------


def bouncing_balls(num_clips, num_frames, rng, size=32, radius=RADIUS, substeps=8, speed=SPEED):
    """Two elastic balls of equal mass in a box -> uint8 (N, T, size, size, 3)."""
    if size < 4 * radius:
        raise ValueError(f"size is {size}; two balls need {4 * radius:.0f} pixels or more")
    angle = rng.uniform(0, 2 * np.pi, (num_clips, 2))
    v = np.stack([np.cos(angle), np.sin(angle)], -1)  # (N, ball, xy)
    v = v * rng.uniform(*speed, (num_clips, 2, 1))
    p = rng.uniform(radius, size - radius, (num_clips, 2, 2))
    while (overlap := np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * radius).any():
        p[overlap] = rng.uniform(radius, size - radius, (overlap.sum(), 2, 2))
    pixel, clips = np.arange(size) + 0.5, []
    for _ in range(num_frames):
        dx, dy = pixel - p[..., 0, None], pixel - p[..., 1, None]  # (N, ball, size) each
        distance = np.sqrt(dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2)
        cover = np.clip(radius + 0.5 - distance, 0, 1)  # an edge one pixel wide
        image = BACKGROUND + np.einsum("nkhw,kc->nhwc", cover, COLOURS)
        clips.append(np.minimum(image, 255).round().astype(np.uint8))
        for _ in range(substeps):
            p = p + v / substeps
            low, high = p < radius, p > size - radius  # walls mirror
            p = np.where(low, 2 * radius - p, np.where(high, 2 * (size - radius) - p, p))
            v = np.where(low, abs(v), np.where(high, -abs(v), v))
            apart = p[:, 1] - p[:, 0]
            distance = np.linalg.norm(apart, axis=-1, keepdims=True)
            normal = apart / distance
            closing = ((v[:, 0] - v[:, 1]) * normal).sum(-1, keepdims=True)
            swap = np.where((distance < 2 * radius) & (closing > 0), closing, 0) * normal
            v = v + np.stack([-swap, swap], 1)  # speeds along the line of centres are swapped
    return np.stack(clips, 1)


class Balls:
    action_dim, mark = 0, "balls"

    def __init__(self, num_frames, size):
        self.num_frames, self.size = num_frames, size

    def names(self, rng, n):
        return ["two balls"] * n

    def batch(self, rng, n, num_frames=None, held=False):  # no clip is ever seen twice
        return bouncing_balls(n, num_frames or self.num_frames, rng, self.size), None


class Clips:
    """A folder of clips. Each is decoded once and memory-mapped: training waits for no decoder."""

    def __init__(self, folder, num_frames, size, stride, cache, val):
        self.num_frames, self.stride = num_frames, stride
        self.clips, self.lengths, self.actions = [], [], []  # clips: (file, decoded file)
        self.need = (num_frames - 1) * stride + 1  # frames of a clip that a training clip spans
        if not Path(folder).is_dir():
            fail(f"--data {folder}: there is no such folder")
        files, skipped = find_clips(folder), []
        if files:
            print(f"{len(files)} clips, each decoded once to {size}x{size} in {cache} "
                  f"({3 * size**2 / 1e3:.0f} MB for 1000 frames)")
        for file in tqdm(files, unit=" clips", desc="clips", disable=RANK > 0):
            try:
                path, side = cached_clip(file, size, cache), side_file(file)
                clip = load_npy(path, 4, mmap_mode="r")
                if len(clip) < self.need:
                    raise ValueError(f"{file}: {len(clip)} frames; {self.need} are needed")
                rows = read_actions(side, stride) if side.exists() else None
                if rows is not None and len(rows) < len(clip):
                    raise ValueError(f"{side}: {len(rows)} rows for {len(clip)} frames")
            except (OSError, ValueError) as error:
                skipped.append(explain(error))
            else:
                self.clips.append((file, path))
                self.lengths.append(len(clip))
                self.actions.append(rows)
        print(*(f"skipped {reason}" for reason in skipped), sep="\n", end="\n" if skipped else "")
        widths = {rows.shape[1] for rows in self.actions if rows is not None}
        if not self.clips or len(widths) > 1:
            fail(f"{folder}: actions of different widths {sorted(widths)}" if self.clips else
                 f"{folder}: no clip of {self.need} or more frames")
        self.action_dim = max(widths, default=0)
        windows = np.array(self.lengths) - self.need + 1
        every = round(1 / val) if val else len(windows) + 1
        held = (np.arange(len(windows)) + 1) % every == 0  # whole clips
        share = {False: windows * ~held, True: windows * held if held.any() else windows}
        self.share = {k: w / w.sum() for k, w in share.items()}  # by length
        clips = repr([path.name for _, path in self.clips])  # these tell when a clip has changed
        self.mark = hashlib.sha256(clips.encode()).hexdigest()
        print(f"{len(self.clips)} clips ({held.sum()} held out), {sum(self.lengths)} frames, "
              f"{self.action_dim} actions; {len(skipped)} skipped")

    def choose(self, rng, n, held=False):
        return rng.choice(len(self.clips), n, p=self.share[held])

    def names(self, rng, n):
        """The files that batch(rng, n) would take."""
        return [str(self.clips[i][0]) for i in self.choose(rng, n)]

    def batch(self, rng, n, num_frames=None, held=False):
        clips, actions = [], []
        for i in self.choose(rng, n, held):
            rows, length = self.actions[i], self.lengths[i]
            start = rng.integers(length - self.need + 1)
            at = start + np.arange(num_frames or self.num_frames) * self.stride
            at = np.minimum(at, length - 1)  # too short for a preview: it stands still
            # opened anew each time: thousands of open files are more than systems allow
            clips.append(np.load(self.clips[i][1], mmap_mode="r", allow_pickle=False)[at])
            actions.append(np.zeros((len(at), self.action_dim)) if rows is None else rows[at])
        return np.stack(clips), np.stack(actions).astype(np.float32) if self.action_dim else None


def find_clips(folder):
    """Videos, .npy files and folders of images at any depth, hidden ones left out, in order."""
    found = []
    pattern = os.path.join(glob.escape(str(folder)), "**")  # unlike Path's, follows links
    for path in sorted(map(Path, glob.glob(pattern, recursive=True))):
        if path.is_dir():
            found += [path] * (len(list_images(path)) > 1)
        elif path.suffix.lower() in (*VIDEOS, ".npy") and not path.name.endswith(NO_CLIPS):
            found.append(path)
    return found


def cached_clip(file, size, cache):
    """-> path of a .npy, uint8 (T, size, size, 3), named by all that its content depends on."""
    parts = list_images(file) if file.is_dir() else [file]
    about = [(os.path.abspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    key = f"{about} {size}"
    path = cache / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npy")
    if not path.exists():
        clip = read_clip(file, size, size)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with aside(path) as temporary, open(temporary, "wb") as f:
                np.save(f, clip)
        except OSError:
            fail(f"--cache {cache}: {path.name} cannot be written (is the disk full?)")
    return path


def dice(seed, step, part=0):
    """All that is random in a batch, from (seed, step, part): for the noise, for the clips. The
    parts of a step are shared out to the processes, so that their number changes nothing."""
    rng = np.random.default_rng((seed, step, part))
    return int(rng.integers(2**62)), rng


def draw(data, seed, step, batch, part=0, held=False):
    """-> noise seed, clips, actions of a part of a step."""
    noise_seed, rng = dice(seed, step, part)
    return noise_seed, *data.batch(rng, batch, held=held)


def draw_step(data, s, step):
    """-> the batches that this process takes of a step."""
    return [draw(data, s.seed, step, s.batch, part) for part in range(RANK, s.accumulate, WORLD)]


def to_tensors(clips, actions, device):
    """A batch -> frames (B, T, C, H, W) in [-1, 1], actions (B, T, A) or None."""
    actions = None if actions is None else torch.from_numpy(actions).to(device)
    return to_frames(clips).to(device), actions


def measure(data, seed):
    """-> what Config wants to know of the data, from 256 clips, 16 at a time: the mean of each
    channel, the standard deviation around it, the root mean square of each action. They are drawn
    as a part that no step reaches."""
    rng, mean, square, action_square = np.random.default_rng((seed, 0, 2**31)), 0, 0, 0
    for _ in range(16):
        x, actions = to_tensors(*data.batch(rng, 16), "cpu")
        mean, square = mean + x.mean((0, 1, 3, 4)) / 16, square + x.square().mean() / 16  # (C,), ()
        action_square += 0 if actions is None else actions.square().mean((0, 1)) / 16  # (A,)
    scale = action_square.sqrt().tolist() if data.action_dim else []
    return dict(data_mean=tuple(mean.tolist()), action_scale=tuple(a or 1.0 for a in scale),
                sigma_data=(square - mean.square().mean()).sqrt().item())


# ---- the run -------------------------------------------------------------------------------------


def agree(*values):
    """The largest of each number over all processes, which wait for each other here."""
    shared = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, epilog="presets: " + "; ".join(
        f"{name}: " + ", ".join(f"{k}={v}" for k, v in preset.items() if v) for name, preset in
        PRESETS.items()), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", help="folder of clips, any depth (default: the bouncing balls)")
    add("--out", type=Path, default=Path("model.pt"), help="checkpoint (default: model.pt)")
    add("--preset", choices=PRESETS, help="default: base with --data and CUDA, else small")
    add("--size", type=positive, help="height and width in pixels (default: the preset's)")
    add("--clip-frames", type=positive, help="frames of a training clip (default: 16)")
    add("--stride", type=positive, help="take every n-th frame of a clip (default: 1)")
    add("--batch", type=positive, help="clips of one pass (default: the preset's)")
    add("--accumulate", type=positive, help="passes of a step, over all processes together: "
        "a step has batch x accumulate clips (default: one pass in each process)")
    add("--steps", type=positive, help="length of the run in steps (default: the preset's)")
    add("--minutes", type=positive_float, help="length in minutes (default: the preset's); the "
        "learning rate follows the clock, so that only --steps makes a run that can be repeated")
    add("--lr", type=positive_float, help="learning rate (default: the preset's)")
    add("--window", type=positive, help="frames that attention sees (default: --clip-frames)")
    add("--temporal", choices=("attention", "gru"), help="temporal mixer (default: attention)")
    add("--forcing", choices=FORCINGS, help="training paradigm (default: diffusion)")
    add("--context-noise", type=positive_float, help="sigma with which frames enter the memory: "
        "in rollouts, and as the past in teacher forcing (default: 0.05)")
    add("--seed", type=int, help="of weights, batches and noise (default: 0)")
    add("--val", type=float, help="share of clips held out for validation: every n-th, n being "
        "1 / val, rounded (default: 0.1)")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--cache", help="folder of decoded clips (default: ~/.cache/diffusion_forcing)")
    add("--no-compile", action="store_true", default=None,
        help="do not compile the network (default: base on CUDA is compiled, if of attention)")
    add("--resume", action="store_true", help="go on from --out's .resume.pt (default: start)")
    add("--overwrite", action="store_true", help="replace --out if it exists (default: do not)")
    return p.parse_args()


def settle(args):
    """-> the settings of the run, plain values that travel in the checkpoint; its path; what is in
    it, with --resume."""
    if args.out.suffix != ".pt" or not args.out.parent.is_dir():
        fail(f"--out {args.out}: a .pt file in an existing folder is needed")
    given = {k: v for k, v in vars(args).items() if v is not None} | dict(out=str(args.out))
    device, resume, saved = find_device(args.device), args.out.with_suffix(".resume.pt"), None
    preset = args.preset or ("base" if args.data and device.startswith("cuda") else "small")
    stored = DEFAULTS | PRESETS[preset] | dict(preset=preset, no_compile=False)
    there = [str(path) for path in (args.out, resume) if path.exists()]
    if there and not (args.resume or args.overwrite):
        fail(f"{there[0]} exists: --resume goes on with it, --overwrite starts anew")
    if args.resume:
        try:
            model, saved = load_checkpoint(resume)
            saved["model"] = model
        except (OSError, ValueError) as error:
            fail(explain(error))
        if "expected_loss" not in saved:
            fail(f"{resume} is not of this version of train.py: --overwrite starts anew")
        stored = saved["settings"]
        differ = [f"--{k.replace('_', '-')} {stored[k]}, not {v}" for k, v in given.items()
                  if k not in (*FREE, "out", "resume", "overwrite") and v != stored.get(k)]
        if differ:
            fail(f"{resume} was made with {'; '.join(differ)}. What may change on the way: "
                 f"--{', --'.join(FREE).replace('_', '-')}")
    if args.steps or args.minutes:  # the length that is asked for, and no other
        stored = stored | dict(steps=None, minutes=None)
    window = args.clip_frames or stored["clip_frames"]
    s = argparse.Namespace(**(dict(window=window) | stored | given | dict(device=device)))
    if s.accumulate % WORLD:
        fail(f"--accumulate {s.accumulate}: a multiple of the {WORLD} processes is needed")
    if not 0 <= s.val <= 0.5:
        fail(f"--val {s.val}: a share between 0 and 0.5 is needed")
    try:
        Config(height=s.size, width=s.size, dim=s.dim, dim_mults=s.dim_mults)
    except ValueError as error:  # told now, and not when all clips are decoded
        fail(error)
    return s, resume, saved


def build(s, data, saved):
    """-> the run: model, moving average, optimizer, step, elapsed seconds; new, or as saved."""
    run = argparse.Namespace(step=0, elapsed=0.0, losses=[])  # losses since the last row of the log
    torch.manual_seed(s.seed)
    if saved:
        run.model = saved["model"].to(s.device)
        run.step, run.elapsed, run.losses = saved["step"], saved["elapsed"], saved["losses"]
        if saved["mark"] != data.mark:
            print(f"note: the clips in {s.data} have changed since this run began")
        if data.action_dim != run.model.config.action_dim:
            fail(f"{s.data} has {data.action_dim} actions a frame, unlike when the run began")
    else:
        suits = SUITS[s.forcing] | (dict(causal=True) if s.temporal == "gru" else {})
        try:
            config = Config(height=s.size, width=s.size, action_dim=data.action_dim, dim=s.dim,
                            clip_frames=s.clip_frames, temporal=s.temporal, window=s.window,
                            dim_mults=s.dim_mults, context_noise=s.context_noise, **suits,
                            **measure(data, s.seed))
        except ValueError as error:
            fail(error)
        run.model = Denoiser(config).to(s.device)
    run.ema = copy.deepcopy(run.model).to(s.device).eval()  # .to: a GRU's copy is in pieces before
    run.model.train()
    run.expected_loss = ExpectedLoss(run.model.config).to(s.device)
    run.weights = [*run.model.parameters(), *run.expected_loss.parameters()]
    run.optimizer = torch.optim.AdamW(run.weights, s.lr, betas=(0.9, 0.99))
    if saved:
        run.ema.load_state_dict(saved["ema"])
        run.expected_loss.load_state_dict(saved["expected_loss"])
        run.optimizer.load_state_dict(saved["optimizer"])
    on_cuda = s.device.startswith("cuda")
    run.bfloat16 = s.fast and on_cuda and torch.cuda.get_device_capability(s.device) >= (8, 0)
    if s.fast and not run.bfloat16:
        print(f"no bfloat16 on {s.device}: training in float32")
    compiled = (s.fast and on_cuda and not s.no_compile and sys.platform != "win32"  # no Triton
                and s.temporal == "attention")  # a graph ends at every GRU
    run.network = torch.compile(run.model) if compiled else run.model
    if WORLD > 1:
        run.network, run.expected_loss = map(DistributedDataParallel,
                                             (run.network, run.expected_loss))
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{count / 1e6:.2f} M parameters, preset {s.preset}, {s.device}")
    return run


def learning_rate(step, progress, s):
    """Linear warm-up, constant, linear to zero over the second half. progress: 0 to 1."""
    return s.lr * min(1, (step + 1) / s.warmup) * min(1, 2 * (1 - progress))


def train_step(run, s, batches, lr):
    """One step of AdamW and of the moving average -> the mean loss, still on the device."""
    total = 0
    for i, (noise_seed, clips, actions) in enumerate(batches, 1):
        x, actions = to_tensors(clips, actions, s.device)
        generator = torch.Generator(s.device).manual_seed(noise_seed)
        for module in (run.network, run.expected_loss):  # processes exchange gradients once a step
            module.require_backward_grad_sync = i == len(batches)
        with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=run.bfloat16):
            loss = diffusion_forcing_loss(
                run.network, x, run.model.config, forcing=s.forcing, actions=actions,
                generator=generator, expected_loss=run.expected_loss) / len(batches)
        loss.backward()
        total = total + loss.detach()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_(run.weights, 10.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    decay = min(s.ema, (run.step + 1) / (run.step + 10))  # short memory at first
    with torch.no_grad():
        torch._foreach_lerp_([*run.ema.parameters()], [*run.model.parameters()], 1 - decay)
    run.step += 1
    return total


def check(run, s, data):
    """Raises FloatingPointError, before anything is saved, if a loss is no number."""
    losses = torch.tensor([float(loss) for loss in run.losses])
    if WORLD > 1:
        dist.all_reduce(losses)
    run.losses = (losses / WORLD).tolist()
    wrong = [i for i, loss in enumerate(run.losses) if not math.isfinite(loss)]
    if wrong:
        step = run.step - len(run.losses) + wrong[0]
        drawn = [dice(s.seed, step, part) for part in range(s.accumulate)]
        sigma = torch.stack([sample_noise_levels(
            s.batch, s.clip_frames, run.model.config, s.forcing,
            torch.Generator(s.device).manual_seed(noise_seed)) for noise_seed, _ in drawn])
        clips = ", ".join(name for _, rng in drawn for name in data.names(rng, s.batch))
        raise FloatingPointError(
            f"the loss of step {step} is {run.losses[wrong[0]]} (clips: {clips}; sigma "
            f"{sigma.min():.3g} to {sigma.max():.3g}): a lower --lr may help")


def save(run, s, data, resume):
    check(run, s, data)
    if RANK:
        return
    config, bare = run.model.config, getattr(run.expected_loss, "module", run.expected_loss)
    save_checkpoint(resume, config, run.model.state_dict(), ema=run.ema.state_dict(), step=run.step,
                    expected_loss=bare.state_dict(), optimizer=run.optimizer.state_dict(),
                    elapsed=run.elapsed, settings=vars(s), losses=run.losses, mark=data.mark)
    save_checkpoint(s.out, config, run.ema.state_dict(), step=run.step, stride=s.stride)


def preview(name, model, data, num_frames, s, columns=4):
    """Writes a video: real clips above, rollouts from their first frames below.

    What a model of full_sequence knows is a whole clip, from nothing: that is what it shows."""
    if RANK:
        return None
    path = Path(s.out).with_suffix(f".{name}.mp4")
    real, actions = data.batch(np.random.default_rng(0), columns, num_frames, held=True)
    context, actions = to_tensors(real[:, :CONTEXT], actions, s.device)
    K = scheduling_matrix("autoregressive", 1, STEPS)
    if s.forcing == "full_sequence":
        context, num_frames = None, s.clip_frames
        K = scheduling_matrix("full_sequence", num_frames, STEPS)
    height, width = 2 * model.config.height, columns * model.config.width
    frames = rollout(model, K, num_frames, context, batch_size=columns, actions=actions,
                     solver=SOLVER)
    bar = tqdm(frames, str(path), num_frames, leave=False, unit=" frames")
    try:
        with closing(VideoWriter(path, height, width, scale=-(-256 // height))) as video:
            for above, below in zip(real.swapaxes(0, 1), bar):
                rows = [np.concatenate(row, 1) for row in (above, to_bytes(below))]
                video.write(np.concatenate(rows))
    except OSError as error:  # no reason to end a training
        print(f"{path} could not be written: {error}")
    return path


def progress(run, s):
    """How much of the run is done, by steps or by the clock: 0 to 1."""
    by_clock = run.elapsed / (60 * s.minutes) if s.minutes else 0
    return max(by_clock, run.step / s.steps if s.steps else 0)


@torch.no_grad()
def validate(run, s, data):
    """-> losses of the moving average on held-out clips in three bands of noise: ln sigma about
    P_mean - P_std, P_mean and P_mean + P_std. Always the same clips and noise, of a part that no
    step reaches."""
    config, losses = run.model.config, []
    noise_seed, clips, actions = draw(data, s.seed, 0, 16, part=2**31 + 1, held=True)
    x, actions = to_tensors(clips, actions, s.device)
    for shift in (-1, 0, 1):
        band = dataclasses.replace(config, P_mean=config.P_mean + shift * config.P_std,
                                   P_std=config.P_std / 3)
        generator = torch.Generator(s.device).manual_seed(noise_seed)
        losses.append(diffusion_forcing_loss(run.ema, x, band, forcing=s.forcing, actions=actions,
                                             generator=generator).item())
    return losses


def open_log(path, s, step):
    """The log, cut to the steps that the checkpoint knows of."""
    rows = path.read_text().splitlines(True) if s.resume and path.exists() else []
    rows = [r for r in rows[1:] if r.endswith("\n") and int(r.split(",")[0]) <= step]
    names = "step,loss,learning_rate,low_noise,middle_noise,high_noise,frames_per_second,seconds\n"
    with aside(path) as temporary:
        temporary.write_text(names + "".join(rows))
    return open(path, "a")


def report(run, s, data, log, bar, since, lr):
    """A row of the log, and the progress bar. since: the time at a step, to tell the speed."""
    check(run, s, data)
    loss, (then, step) = np.mean(run.losses), since
    frames = (run.step - step) * s.accumulate * s.batch * s.clip_frames
    speed = frames / (time.monotonic() - then)
    held = validate(run, s, data) if run.step % 500 == 0 else []
    bands = ",".join(f"{x:.5f}" for x in held) or ",,"
    log.write(f"{run.step},{loss:.5f},{lr:.3g},{bands},{speed:.1f},{run.elapsed:.1f}\n")
    log.flush()
    bar.set_postfix_str(f"step {run.step}, loss {loss:.4f}, {speed:.0f} frames/s", refresh=False)
    bar.update(min(progress(run, s), 1) - bar.n)
    run.losses = []


def train(s, run, data, resume):
    """The loop: until the end -> True, or until Ctrl-C (SIGINT, SIGTERM) -> False."""
    out, stop, stopped, pool = Path(s.out), [], 0, ThreadPoolExecutor(1)
    signals = (signal.SIGINT, signal.SIGTERM)  # finish the step; a second one ends at once, but
    handlers = [signal.signal(n, lambda n, _: stop.append(n) or WORLD > 1  # for torchrun's own
                              or signal.signal(n, signal.SIG_DFL)) for n in signals]
    log = open(os.devnull, "w") if RANK else open_log(out.with_suffix(".csv"), s, run.step)
    start, saved = time.monotonic() - run.elapsed, run.elapsed
    since = time.monotonic(), run.step
    upcoming = pool.submit(draw_step, data, s, run.step)
    with tqdm(total=1.0, initial=progress(run, s), disable=RANK > 0, bar_format="{percentage:3.0f}%"
              "|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while not stopped and progress(run, s) < 1:
            batches = upcoming.result()
            upcoming = pool.submit(draw_step, data, s, run.step + 1)  # during this step
            lr = learning_rate(run.step, progress(run, s), s)
            run.losses.append(train_step(run, s, batches, lr))
            run.elapsed, stopped = agree(time.monotonic() - start, len(stop))
            if run.step % 20 == 0:
                report(run, s, data, log, bar, since, lr)
                since = time.monotonic(), run.step
                if run.elapsed - saved > 60 * s.save_minutes:
                    saved = run.elapsed
                    save(run, s, data, resume)
                    preview("preview", run.ema, data, 2 * s.clip_frames, s)
                    since = time.monotonic(), run.step
    pool.shutdown()
    save(run, s, data, resume)
    agree(0)  # nobody leaves before all is saved
    if WORLD > 1:
        dist.destroy_process_group()  # threads that outlive Python abort the process
    for number, handler in zip(signals, handlers):
        signal.signal(number, handler)
    return not stopped


def join():
    """Under torchrun, makes this process one of a group; the first speaks for all."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    day = datetime.timedelta(days=1)  # decoding may take that long
    dist.init_process_group(backend, timeout=day)
    if RANK:
        sys.stdout = open(os.devnull, "w")


def main():
    args, began = parse_args(), time.time()
    if WORLD > 1:
        join()
    s, resume, saved = settle(args)
    try:
        if RANK:
            agree(0)  # the first process decodes, the others wait and find all done
        data = (Clips(s.data, s.clip_frames, s.size, s.stride, Path(s.cache), s.val) if s.data else
                Balls(s.clip_frames, s.size))
        if not RANK:
            agree(0)
        run = build(s, data, saved)
        finished = train(s, run, data, resume)
        if finished:
            video = preview("rollout", run.ema, data, 256, s)
    except (OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        ours = resume.exists() and (args.resume or resume.stat().st_mtime > began)
        kept = f". {resume} is whole, and --resume goes on with it" if ours else ""
        fail(explain(error) + kept)
    if not finished:
        words = shlex.join(w for w in sys.argv if w not in ("--overwrite", "--resume"))
        start = "python" if WORLD == 1 else "torchrun, as before, with"
        sys.exit(RANK and 1 or f"stopped and saved at step {run.step}; to go on: {start} {words} "
                 "--resume")
    frames = run.step * s.accumulate * s.batch * s.clip_frames
    full = s.forcing == "full_sequence"
    print(f"{s.out}: {run.step} steps in {run.elapsed / 60:.1f} minutes, "
          f"{frames / run.elapsed:.0f} frames/s, {peak_memory(s.device)}; a rollout is in {video}\n"
          f"more of them: python sample.py --ckpt {s.out} --frames "
          + (f"{s.clip_frames} --schedule full_sequence" if full else "256"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; what was saved before is whole")
