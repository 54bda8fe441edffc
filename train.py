# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Trains Diffusion Forcing on a folder of clips, or on two bouncing balls drawn on the fly.

    python train.py                          the balls: ten minutes on two CPU cores, nothing to download
    python train.py --data clips/            a folder of clips (mp4, mov, avi, mkv, webm, gif, npy, image folders)
    python train.py --resume                 goes on where an interrupted run stopped

Beside --out model.pt it writes model.resume.pt (all that --resume needs), model.csv (the log), model.preview.mp4 (real
clips above, rollouts of twice their length below, both from the same first frames) and at the end model.rollout.mp4.
"""

import argparse
import copy
import csv
import hashlib
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sample
from diffusion_forcing import (FORCINGS, Config, Denoiser, diffusion_forcing_loss, load_checkpoint, rollout,
                               save_checkpoint, scheduling_matrix)

PRESETS = {  # base: for a GPU; small: for anything, and for the balls
    "small": dict(size=32, clip_frames=16, stride=1, batch=8, lr=2e-3, warmup=100, ema=0.995, save_minutes=2,
                  dim=32, dim_mults=(1, 2), fast=False, minutes=8.0),
    "base": dict(size=64, clip_frames=16, stride=1, batch=32, lr=3e-4, warmup=1000, ema=0.9995, save_minutes=10,
                 dim=128, dim_mults=(1, 2, 3, 4), fast=True, steps=200_000),
}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
CONTEXT = 4  # real frames that previews go on from


# ---- data: anything with batch(rng, n) -> uint8 clips (n, T, H, W, 3) and their actions (n, T, A) or None ------------


def bouncing_balls(num_clips, num_frames, rng, size=32, radius=3.5, substeps=8):
    """Two balls of equal mass in a box without friction -> uint8 (N, T, size, size, 3)."""
    background, colours = np.array([12, 14, 20]), np.array([[230, 70, 0], [0, 110, 225]])  # the colours are added on it
    angle, speed = rng.uniform(0, 2 * np.pi, (num_clips, 2)), rng.uniform(0.6, 1.5, (num_clips, 2))  # pixels a frame
    v = speed[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)  # (N, ball, xy)
    p = rng.uniform(radius, size - radius, (num_clips, 2, 2))
    while (overlap := np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) < 2 * radius).any():
        p[overlap] = rng.uniform(radius, size - radius, (overlap.sum(), 2, 2))
    pixel, clips = np.arange(size) + 0.5, np.empty((num_clips, num_frames, size, size, 3), np.uint8)
    for t in range(num_frames):
        dx, dy = pixel - p[..., 0, None], pixel - p[..., 1, None]  # (N, ball, size) each
        distance = np.sqrt(dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2)
        cover = np.clip(radius + 0.5 - distance, 0, 1)  # an edge of one pixel
        clips[:, t] = np.minimum(background + np.einsum("nkhw,kc->nhwc", cover, colours), 255).round()
        for _ in range(substeps):
            p = p + v / substeps
            low, high = p < radius, p > size - radius
            p = np.where(low, 2 * radius - p, np.where(high, 2 * (size - radius) - p, p))  # walls mirror
            v = np.where(low, abs(v), np.where(high, -abs(v), v))
            apart = p[:, 1] - p[:, 0]
            distance = np.linalg.norm(apart, axis=-1, keepdims=True)
            normal = apart / distance
            closing = ((v[:, 0] - v[:, 1]) * normal).sum(-1, keepdims=True)
            swap = np.where((distance < 2 * radius) & (closing > 0), closing, 0) * normal
            v = v + np.stack([-swap, swap], 1)  # equal masses swap their speeds along the line of centres
    return clips


class Balls:
    action_dim = 0

    def __init__(self, num_frames, size):
        self.num_frames, self.size = num_frames, size

    def batch(self, rng, n, num_frames=None):
        return bouncing_balls(n, num_frames or self.num_frames, rng, self.size), None


class Clips:
    """A folder of clips, each decoded once into a memory-mapped .npy, so that training never waits for a decoder."""

    def __init__(self, folder, num_frames, size, stride, cache):
        self.num_frames, self.stride, self.clips, self.actions = num_frames, stride, [], []
        self.need = (num_frames - 1) * stride + 1
        files, skipped = find_clips(folder), []
        cache.mkdir(parents=True, exist_ok=True)
        print(f"decoding {len(files)} clips of {folder} to {size}x{size} into {cache}, once")
        for file in tqdm(files, unit="clip", desc="clips"):
            try:
                clip = cached_clip(file, size, cache)
                if len(clip) < self.need:
                    raise ValueError(f"{file}: {len(clip)} frames; {self.need} are needed (--clip-frames, --stride)")
                side = file.with_suffix(".actions.npy")
                actions = sample.read_actions(side, stride) if side.exists() else None
                if actions is not None and len(actions) < len(clip):
                    raise ValueError(f"{side}: {len(actions)} rows for {len(clip)} frames")
                self.clips.append(clip)
                self.actions.append(actions)
            except ValueError as error:
                skipped.append(str(error))
        for line in skipped:
            print(f"skipped {line}")
        widths = {a.shape[1] for a in self.actions if a is not None}
        if not self.clips or len(widths) > 1:
            sample.fail(f"{folder}: no clip that can be used" if not self.clips else
                        f"{folder}: actions of different widths {sorted(widths)}")
        self.action_dim = max(widths, default=0)
        windows = np.array([len(c) - self.need + 1 for c in self.clips])
        self.share = windows / windows.sum()
        frames = sum(map(len, self.clips))
        print(f"{len(self.clips)} clips, {frames} frames, {self.action_dim} actions a frame; {len(skipped)} skipped")

    def batch(self, rng, n, num_frames=None):
        clips, actions = [], []
        for i in rng.choice(len(self.clips), n, p=self.share):
            start = rng.integers(len(self.clips[i]) - self.need + 1)
            at = start + np.arange(num_frames or self.num_frames) * self.stride
            at = np.minimum(at, len(self.clips[i]) - 1)  # a clip too short for a preview stands still at its end
            clips.append(self.clips[i][at])
            actions.append(np.zeros((len(at), self.action_dim), np.float32) if self.actions[i] is None
                           else self.actions[i][at])
        return np.stack(clips), np.stack(actions) if self.action_dim else None


def find_clips(folder):
    """Videos, .npy files and folders of images below a folder, in an order that does not depend on the file system."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            images = [p for p in path.iterdir() if p.suffix.lower() in sample.IMAGES and not p.name.startswith(".")]
            found += [path] * (len(images) > 1)
        elif path.suffix.lower() in (*VIDEOS, ".npy") and not path.name.endswith(".actions.npy"):
            found.append(path)
    return found


def cached_clip(file, size, cache):
    """-> memory-mapped uint8 (T, size, size, 3). The name says all that the content depends on."""
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {size}"
    path = cache / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npy")
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        with open(aside, "wb") as f:
            np.save(f, sample.read_clip(file, size, size))
        os.replace(aside, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


# ---- the command ----------------------------------------------------------------------------------------------------


def parse_args():
    def default(name):
        return "default: " + ", ".join(f"{p} {PRESETS[p].get(name, 'none')}" for p in PRESETS)

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of clips, any depth (default: the bouncing balls)")
    p.add_argument("--out", type=Path, default=Path("model.pt"), help="checkpoint to write (default: %(default)s)")
    p.add_argument("--preset", choices=PRESETS, help="default: base with --data and a CUDA device, else small")
    p.add_argument("--size", type=int, help=f"height and width in pixels ({default('size')})")
    p.add_argument("--clip-frames", type=int, help=f"frames of a training clip ({default('clip_frames')})")
    p.add_argument("--stride", type=int, help=f"take every n-th frame of a clip ({default('stride')})")
    p.add_argument("--batch", type=int, help=f"clips a step ({default('batch')})")
    p.add_argument("--steps", type=int, help=f"length of the run in steps ({default('steps')})")
    p.add_argument("--minutes", type=float, help=f"length of the run in minutes ({default('minutes')})")
    p.add_argument("--lr", type=float, help=f"learning rate ({default('lr')})")
    p.add_argument("--window", type=int, help="frames that attention sees, itself included (default: --clip-frames)")
    p.add_argument("--temporal", choices=("attention", "gru"), help="temporal mixer (default: attention)")
    p.add_argument("--forcing", choices=FORCINGS, help="training paradigm (default: diffusion)")
    p.add_argument("--seed", type=int, help="batches and noise depend on it and the step alone (default: 0)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first of them that there is)")
    p.add_argument("--cache", type=Path, help="decoded clips (default: ~/.cache/diffusion_forcing)")
    p.add_argument("--no-compile", action="store_true", help="do not compile the network (default: base on CUDA does)")
    p.add_argument("--resume", action="store_true", help="go on from --out's .resume.pt, with its settings")
    p.add_argument("--overwrite", action="store_true", help="start anew even where --out exists")
    return p.parse_args()


def settle(args):
    """-> settings of the run (plain values, they travel in the checkpoints), and the file to resume from or None."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if v is not None}
    out, resume = args.out, args.out.with_suffix(".resume.pt")
    if not out.parent.is_dir():
        sample.fail(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and not (args.resume or args.overwrite):
        sample.fail(f"{out} exists: --resume goes on with it, --overwrite starts anew, --out writes elsewhere")
    if args.resume:
        try:
            stored = load_checkpoint(resume)[1]["settings"]
        except (OSError, ValueError) as error:
            sample.fail(error)
        free = ("steps", "minutes", "device", "no_compile", "cache", "out", "resume", "overwrite")
        differ = [k for k in given if k not in free and given[k] != stored.get(k)]
        if differ:
            sample.fail(f"{resume} was made with other settings: " + ", ".join(
                f"--{k.replace('_', '-')} {stored.get(k)}" for k in differ))
    else:
        device = args.device or sample.default_device()
        preset = args.preset or ("base" if args.data and device.startswith("cuda") else "small")
        stored = dict(preset=preset, data=None, temporal="attention", forcing="diffusion", seed=0, device=device,
                      cache=str(Path.home() / ".cache" / "diffusion_forcing"), steps=None, minutes=None)
        stored |= PRESETS[preset]
    if "steps" in given or "minutes" in given:  # a length that is asked for replaces the one there was
        stored |= dict(steps=None, minutes=None)
    settings = stored | given
    settings["window"] = settings.get("window", settings["clip_frames"])
    for name in ("size", "clip_frames", "stride", "batch", "steps", "minutes", "lr", "window"):
        if settings[name] is not None and not settings[name] > 0:
            sample.fail(f"--{name.replace('_', '-')} is {settings[name]}; it must be positive")
    return argparse.Namespace(**settings), resume


def draw(data, seed, step, batch, rank=0):
    """Everything random about a step, from (seed, step, rank) alone: seed of its noise, clips, actions."""
    rng = np.random.default_rng((seed, step, rank))
    return int(rng.integers(2**62)), *data.batch(rng, batch)


def measure(data, seed):
    """-> mean of each channel, standard deviation around it, in frame units, over 256 clips."""
    x = sample.to_frames(data.batch(np.random.default_rng((seed, 2**32)), 256)[0])  # (N,T,C,H,W)
    mean = x.mean((0, 1, 3, 4))
    return tuple(mean.tolist()), (x - mean[:, None, None]).std().item()


def learning_rate(step, progress, settings):
    """Linear warm-up, then constant, then linear to zero over the second half. progress: 0 to 1, of the whole run."""
    return settings.lr * min(1, (step + 1) / settings.warmup) * min(1, 2 * (1 - progress))


def preview(path, model, data, num_frames, device, columns=4):
    """Writes real clips (above) and rollouts from their first frames (below) as one video."""
    real, actions = data.batch(np.random.default_rng(0), columns, num_frames)
    context = sample.to_frames(real[:, :CONTEXT]).to(device)
    frames = rollout(model, scheduling_matrix("autoregressive", 1, 10), num_frames, context,
                     actions=None if actions is None else torch.from_numpy(actions))
    height, width = 2 * model.config.height, columns * model.config.width
    video = sample.VideoWriter(path, num_frames, height, width, scale=-(-256 // height))
    for above, below in zip(real.swapaxes(0, 1), tqdm(frames, str(path), num_frames, leave=False, unit="frame")):
        video.write(np.concatenate([np.concatenate(above, 1), np.concatenate(sample.to_bytes(below), 1)]))
    video.close()


def build(s, data, resume):
    """-> the run: config, model, its moving average, optimizer, step, elapsed seconds; new, or as it was saved."""
    run = argparse.Namespace(step=0, elapsed=0.0)
    torch.manual_seed(s.seed)
    if s.resume:
        run.model, saved = load_checkpoint(resume, s.device)
        run.step, run.elapsed = saved["step"], saved["elapsed"]
    else:
        mean, std = measure(data, s.seed)
        try:
            run.model = Denoiser(Config(
                height=s.size, width=s.size, action_dim=data.action_dim, clip_frames=s.clip_frames, window=s.window,
                temporal=s.temporal, dim=s.dim, dim_mults=s.dim_mults, sigma_data=std, data_mean=mean)).to(s.device)
        except ValueError as error:
            sample.fail(error)
    run.config = run.model.train().config
    run.ema = copy.deepcopy(run.model).eval()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), s.lr, betas=(0.9, 0.99))
    if s.resume:
        run.ema.load_state_dict(saved["ema"])
        run.optimizer.load_state_dict(saved["optimizer"])
    on_cuda = s.device.startswith("cuda")
    run.bfloat16 = s.fast and on_cuda and torch.cuda.is_bf16_supported()
    if s.fast and not run.bfloat16:
        print(f"bfloat16 is not to be had on {s.device}: training in float32")
    run.network = torch.compile(run.model) if s.fast and on_cuda and not s.no_compile else run.model
    print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters, preset {s.preset}, {s.device}")
    return run


def train_step(run, s, noise_seed, clips, actions, lr):
    """One step of AdamW, one of the moving average -> the loss, still on the device."""
    x = sample.to_frames(clips).to(s.device)  # (B,T,C,H,W)
    actions = None if actions is None else torch.from_numpy(actions).to(s.device)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=run.bfloat16):
        loss = diffusion_forcing_loss(run.network, x, run.config, forcing=s.forcing, actions=actions,
                                      generator=torch.Generator(s.device).manual_seed(noise_seed))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    decay = min(s.ema, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.model.parameters()), 1 - decay)
    run.step += 1
    return loss.detach()


def save(run, s, resume):
    save_checkpoint(resume, run.config, run.model.state_dict(), ema=run.ema.state_dict(), step=run.step,
                    optimizer=run.optimizer.state_dict(), elapsed=run.elapsed, settings=vars(s))
    save_checkpoint(s.out, run.config, run.ema.state_dict(), step=run.step, stride=s.stride)


class Log:
    """The CSV file and the progress bar, every 20 steps."""

    def __init__(self, path, run, s):
        self.run, self.s, self.losses, self.frames, self.since = run, s, 0, 0, time.monotonic()
        self.file = open(path, "a" if s.resume else "w", newline="")
        self.csv = csv.writer(self.file)
        if not s.resume:
            self.csv.writerow(["step", "loss", "lr", "frames_per_second", "seconds"])
        self.bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def add(self, loss, lr, progress):
        self.losses, self.frames = self.losses + loss, self.frames + self.s.batch * self.s.clip_frames
        if self.run.step % 20 == 0:
            now = time.monotonic()
            loss, speed = float(self.losses) / 20, self.frames / (now - self.since)
            self.losses, self.frames, self.since = 0, 0, now
            self.csv.writerow([self.run.step, f"{loss:.5f}", f"{lr:.3g}", f"{speed:.1f}", f"{self.run.elapsed:.1f}"])
            self.file.flush()
            self.bar.set_postfix_str(f"step {self.run.step}, loss {loss:.4f}, {speed:.0f} frames/s", refresh=False)
            self.bar.update(min(progress, 1) - self.bar.n)


def main():
    s, resume = settle(parse_args())
    data = Clips(s.data, s.clip_frames, s.size, s.stride, Path(s.cache)) if s.data else Balls(s.clip_frames, s.size)
    run = build(s, data, resume)
    log = Log(Path(s.out).with_suffix(".csv"), run, s)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step first; a second signal ends the program at once
        signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(draw, data, s.seed, run.step, s.batch)
    start, saved = time.monotonic() - run.elapsed, run.elapsed

    def progress():
        return max(run.step / s.steps if s.steps else 0, run.elapsed / (60 * s.minutes) if s.minutes else 0)

    while not stop and progress() < 1:
        batch = upcoming.result()
        upcoming = pool.submit(draw, data, s.seed, run.step + 1, s.batch)  # while this step is computed
        lr = learning_rate(run.step, progress(), s)
        loss = train_step(run, s, *batch, lr)
        run.elapsed = time.monotonic() - start
        log.add(loss, lr, progress())
        if run.elapsed - saved > 60 * s.save_minutes:
            saved = run.elapsed
            save(run, s, resume)
            preview(Path(s.out).with_suffix(".preview.mp4"), run.ema, data, 2 * s.clip_frames, s.device)
    log.bar.close()
    pool.shutdown()
    save(run, s, resume)
    if stop:
        words = [w for w in sys.argv if w not in ("--overwrite", "--resume")]
        sys.exit(f"stopped and saved at step {run.step}; to go on: python {shlex.join(words)} --resume")
    preview(Path(s.out).with_suffix(".rollout.mp4"), run.ema, data, 256, s.device)
    print(f"{s.out} is done after {run.step} steps, {run.elapsed / 60:.1f} minutes; a rollout is in "
          f"{Path(s.out).with_suffix('.rollout.mp4')}; for more: python sample.py --ckpt {s.out} --frames 256")


if __name__ == "__main__":
    main()
