# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]>=2.30"]
# ///
"""Trains Diffusion Forcing on a folder of clips, or on two bouncing balls drawn on the fly.

    python train.py                 the balls: eight minutes on two CPU cores, nothing to download
    python train.py --data clips/   videos, .npy, folders of images; actions in NAME.actions.npy
    python train.py --resume        goes on where a run stopped
    torchrun --nproc_per_node=8 train.py --data clips/    eight GPUs, which share each batch

Besides model.pt it writes model.resume.pt (for --resume), model.csv (the log), and two videos with
real clips above rollouts from their first frames: model.preview.mp4; at the end, model.rollout.mp4.
"""

import contextlib
import copy
import datetime
import math
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from torch import distributed as dist, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from data.balls import Balls
from data.clips import Clips, to_bytes, to_frames, video_writer
from diffusion_forcing import (FORCINGS, MIXERS, Config, Denoiser, diffusion_forcing_loss,
                               edm_scalings, load_checkpoint, need, save_checkpoint, zero)
from sample import (fitting_length, generate, is_small, mistakes, one_thread, positive,
                    positive_float, working_device)

PRESETS = {  # small: runs anywhere. base: some tens of millions of parameters, for a GPU.
    "small": dict(size=[32], batch=2, lr=3e-3, warmup=100, ema=0.995, minutes=8.0, dim=32,
                  dim_mults=(1, 2), temporal="gru", save_minutes=2),
    "base": dict(size=[64], batch=32, lr=3e-4, warmup=1000, ema=0.9995, minutes=240.0, dim=128,
                 dim_mults=(1, 2, 3, 4), temporal="attention", save_minutes=10),
}
NOISE = {"diffusion": (-0.6, 2.4), "bidirectional": (0.6, 2.0), "teacher": (-0.6, 1.6),
         "full_sequence": (0.4, 1.6)}  # P_mean and P_std of Config, chosen by rollouts
MAY_CHANGE = ("data", "cache", "steps", "minutes", "lr")  # settings, when a run is resumed
NOT_SAVED = ("out", "device", "fast", "resume", "overwrite")  # of no use to --resume
MEASURE, PREVIEW, VALIDATE = 2**60, 2**61, 2**62  # for `draw`: no step has such a number
# loss: that of `Objective`, which may be negative. *_noise: plain losses of held-out clips.
LOG = "step,loss,learning_rate,low_noise,middle_noise,high_noise,frames_per_second,seconds\n"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # of the processes on this machine
THREADS = torch.get_num_threads()  # of all cores, or as OMP_NUM_THREADS says


class ExpectedLoss(nn.Module):
    """-> log_expected (B, T): the log of each frame's expected loss, from its own sigma (B, T) and
    from sigma_seen (B, T) of the four frames before it (bidirectional: and after it). It trains
    with the model, on the same loss. Frames with little noise, or after nearly clean ones, often
    have a far smaller loss: in a plain mean they hardly count, but rollouts need them. Divided by
    what is expected, every mixture of noise counts the same (but for `gain`), and the best denoiser
    stays the same. (arXiv 1705.07115, 2312.02696. In the paper: fused SNR weights.)"""

    def __init__(self, config, past=4, width=64):
        super().__init__()
        self.config, self.past, self.ahead = config, past, 0 if config.causal else past
        self.layers = nn.Sequential(nn.Linear(past + 1 + self.ahead, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), zero(nn.Linear(width, 1)))

    def forward(self, sigma, sigma_seen):
        unknown = self.config.in_frame_units(self.config.sigma_max)  # beyond the clip: pure noise
        padded = nn.functional.pad(sigma_seen, (self.past, self.ahead), value=unknown)
        sigmas = padded.unfold(1, self.past + 1 + self.ahead, 1).clone()  # (B,T,past+1+ahead)
        sigmas[..., self.past] = sigma  # at this place: the frame's own
        *_, c_noise = edm_scalings(sigmas, self.config.sigma_data)
        with torch.autocast(sigma.device.type, enabled=False):
            return self.layers(2 * c_noise)[..., 0]  # times 2: about unit variance


class Objective(nn.Module):
    """The loss of a batch, as one module: DistributedDataParallel has to see all of its weights."""

    def __init__(self, model):
        super().__init__()
        self.model, self.expected_loss = model, ExpectedLoss(model.config)

    def forward(self, x, actions, generator):
        return diffusion_forcing_loss(self.model, x, self.model.config, actions=actions,
                                      generator=generator, expected_loss=self.expected_loss)


def load_data(s):
    """-> the clips of --data, or the balls. Raises ValueError."""
    if not s.data:
        need(s.size[0] == s.size[1] and s.stride == 1, "balls need a square --size, no --stride")
        return Balls(s.size[0], push=not s.no_push)
    args = (s.data, *s.size, s.clip_frames, s.stride, s.cache)
    clips = Clips(*args) if LOCAL_RANK == 0 else None  # one process of a machine decodes for all
    if WORLD > 1:
        dist.barrier()
    return clips or Clips(*args, quiet=True)


def draw(data, s, n, num_frames, step, held=False, rank=0):
    """The only way from the data to a batch -> clips (n, T, H, W, 3) uint8, actions (n, T, A), and
    a seed for the noise. All that is random depends on (seed, step, rank) alone, so that a run can
    be repeated. It uses numpy only: in a second thread, torch would slow down the training step."""
    rng = np.random.default_rng((s.seed, step, rank))
    clips, actions = data.batch(rng, n, num_frames, held)
    if step < MEASURE:  # in training, the actions of one clip in ten are withheld
        actions[rng.random(n) < 0.1] = np.nan
    return clips, actions, int(rng.integers(2**62))


def to_device(batch, s):
    """What was drawn -> x (n, T, C, H, W) in [-1, 1], actions (n, T, A), and a generator."""
    clips, actions, seed = batch
    generator = torch.Generator(s.device).manual_seed(seed)
    return to_frames(clips, s.device), torch.from_numpy(actions).to(s.device), generator


def new_model(s, data):
    """-> a Denoiser for these settings. 64 random clips give mean, deviation, scale of actions."""
    clips, actions, _ = draw(data, s, 64, s.clip_frames, MEASURE)
    x = to_frames(clips)  # (64,T,C,H,W)
    mean = x.mean((0, 1, 3, 4))  # (C,)
    deviation = (x - mean[:, None, None]).std().item()
    need(deviation > 1e-4, f"--data {s.data}: all is of one colour, so there is nothing to learn")
    known = actions[np.isfinite(actions).all(-1)].astype(float)  # (N,A): float32 could overflow
    scale = np.sqrt((known**2).sum(0) / max(1, len(known)))  # (A,)
    P_mean, P_std = NOISE["bidirectional" if s.bidirectional else s.forcing]
    looks_ahead = s.bidirectional or (s.forcing == "full_sequence" and s.temporal != "gru")
    torch.manual_seed(s.seed)
    return Denoiser(Config(
        height=s.size[0], width=s.size[1], clip_frames=s.clip_frames, stride=s.stride, dim=s.dim,
        dim_mults=s.dim_mults, temporal=s.temporal, window=s.window, causal=not looks_ahead,
        forcing=s.forcing, P_mean=P_mean, P_std=P_std, context_noise=s.context_noise,
        action_dim=data.action_dim, action_scale=[a or 1.0 for a in scale], data_mean=mean,
        sigma_data=deviation))


def preview(path, model, data, s, num_frames):
    """Writes a video: four real clips above, rollouts from their first frames below."""
    config = model.config
    num_frames = fitting_length(config, num_frames)
    known = 0 if config.forcing == "full_sequence" else min(4, num_frames - 1)  # 0: from nothing
    x, actions, generator = to_device(draw(data, s, 4, num_frames, PREVIEW, data.held_out), s)
    try:
        with one_thread(model), video_writer(path, 2 * config.height, 4 * config.width) as write:
            frames = generate(model, num_frames, x[:, :known] if known else None, actions=actions,
                              batch_size=4, generator=generator)
            for real, rolled in zip(x.unbind(1), tqdm(frames, str(path), num_frames, leave=False)):
                write(to_bytes(make_grid([*real, *rolled], nrow=4, padding=0)))
    except OSError as error:  # no reason to end a training
        tqdm.write(f"{path}: {error}")


def choose_threads(objective, data, s):
    """For a small model on a CPU: takes all threads or one, whichever is faster. Threads wait where
    other programs keep a core busy. --steps: all, as rounding depends on their number."""
    few = s.batch * s.clip_frames * math.prod(s.size) < 3e5  # pixels: eight steps take seconds
    if THREADS == 1 or WORLD > 1 or s.steps < math.inf or not (few and is_small(objective)):
        return
    batch, took = to_device(draw(data, s, s.batch, s.clip_frames, MEASURE), s), {}
    for threads in (THREADS, 1) * 4:
        torch.set_num_threads(threads)
        took.setdefault(threads, []).append(timeit(lambda: objective(*batch).backward(), number=1))
    objective.zero_grad()
    torch.set_num_threads(min(took, key=lambda threads: sum(took[threads][1:])))  # [0] warms up


@torch.no_grad()
def validate(model, data, s):
    """-> the losses of held-out clips at ln sigma = P_mean - P_std, P_mean, P_mean + P_std."""
    losses, config = [], model.config
    batch = draw(data, s, 16, s.clip_frames, VALIDATE, held=True)
    for deviations in (-1, 0, 1):
        x, actions, generator = to_device(batch, s)  # each time with the same noise
        sigma = config.in_frame_units(math.exp(config.P_mean + deviations * config.P_std))
        losses.append(diffusion_forcing_loss(
            model, x, config, sigma=x.new_full(x.shape[:2], sigma), actions=actions,
            generator=generator).item())
    return losses


def start_processes():
    """Joins the processes of torchrun. They share each batch. The first one prints and saves."""
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(LOCAL_RANK % gpus)
    nccl = dist.is_nccl_available() and int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo",
                            timeout=datetime.timedelta(days=1))  # decoding may take that long
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def average(numbers):
    """The mean of each number over all processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64) / WORLD
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def parse_args():
    """-> settings; the averaged model, or None; what else --resume found. Raises ValueError."""
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", help="folder of clips, any depth (default: the bouncing balls)")
    add("--out", type=Path, default="model.pt", help="checkpoint (%(default)s)")
    add("--preset", choices=PRESETS, help="default: base with --data and a GPU for it, else small")
    add("--size", type=positive, nargs="+", help="pixels: 64, or 64 112, height first (32; 64)")
    add("--clip-frames", type=positive, default=16, help="frames of a training clip (%(default)s)")
    add("--stride", type=positive, default=1, help="take every n-th frame of a clip (%(default)s)")
    add("--batch", type=positive, help="clips of a step, of all processes together (2; 32)")
    add("--steps", type=positive, help="length of the run; needed to repeat it exactly")
    add("--minutes", type=positive_float, help="length of the run (8; 240)")
    add("--lr", type=positive_float, help="learning rate (0.003; 0.0003)")
    add("--no-push", action="store_true", help="balls that nobody pushes, and no actions")
    add("--window", type=positive, help="attention: how many frames it sees (--clip-frames)")
    add("--temporal", choices=MIXERS, help="(gru; base, or to look ahead: attention)")
    add("--forcing", choices=FORCINGS, default="diffusion", help="paradigm (%(default)s)")
    add("--bidirectional", action="store_true", help="frames also see later ones: for keyframes")
    add("--context-noise", type=positive_float, default=0.05, help="of the history (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (%(default)s)")
    add("--device", type=working_device, default="auto", help="cuda, cpu or mps (cuda or cpu)")
    add("--cache", help="folder for decoded clips (~/.cache/diffusion_forcing)")
    add("--resume", action="store_true", help=f"go on; may change: {', '.join(MAY_CHANGE)}, device")
    add("--overwrite", action="store_true", help="replace --out if it exists")

    given, model, saved = p.parse_args(), None, dict(settings={})
    need(given.out.suffix == ".pt" and not given.out.is_dir(), "--out is not a name like model.pt")
    need(given.out.parent.is_dir(), f"--out: there is no folder {given.out.parent}")
    out, resume = given.out, given.out.with_suffix(".resume.pt")
    capable = "cuda" in given.device and torch.cuda.get_device_capability(given.device) >= (8, 0)
    if given.resume:
        model, extra = load_checkpoint(resume)
        need("training" in extra, f"{resume} is of another train.py: --overwrite starts anew")
        saved = extra["training"]
        p.set_defaults(**saved["settings"])
    else:
        for path in (out, resume):
            need(given.overwrite or not path.exists(), f"{path} exists: --resume or --overwrite it")
        preset = given.preset or ("base" if given.data and capable else "small")
        p.set_defaults(window=given.clip_frames, preset=preset, steps=math.inf, **PRESETS[preset])
        if given.bidirectional or given.forcing == "full_sequence" or "mps" in given.device:
            p.set_defaults(temporal="attention")  # a GRU cannot look ahead; mps: `working_device`
    if given.steps or given.minutes:  # the length that is asked for, and no other
        p.set_defaults(steps=math.inf, minutes=math.inf)
    s = p.parse_args()
    need(len(s.size) < 3, "--size: one number, or height and width")
    s.size, s.fast = [s.size[0], s.size[-1]], capable and s.preset == "base"
    for name, was in saved["settings"].items():
        option, same = f"--{name.replace('_', '-')}", getattr(s, name) == was
        need(same or name in MAY_CHANGE, f"{option} cannot change: {resume} has {was}")
    need(0 <= s.seed < 2**63, f"--seed {s.seed}: 0 or more, and below 2**63, is needed")
    need(s.batch % WORLD == 0, f"--batch {s.batch}: a multiple of the {WORLD} processes is needed")
    need(not s.bidirectional or (s.forcing, s.temporal) == ("diffusion", "attention"),
         "--bidirectional is for --forcing diffusion and --temporal attention")
    Config(height=s.size[0], width=s.size[1], dim=s.dim, dim_mults=s.dim_mults)  # is --size right?
    tempfile.NamedTemporaryFile(prefix=f"{out.name}.", dir=out.parent).close()  # can be written?
    return s, model, saved


def main():
    # Setup. Whatever a user can fix is found here.
    if WORLD > 1:
        start_processes()
    sys.stdout.reconfigure(errors="backslashreplace")  # files may have names of any kind
    with mistakes(ValueError):
        s, model, saved = parse_args()
        data = load_data(s)
        model = model or new_model(s, data)
        need(data.action_dim == model.config.action_dim, "--data: other actions than before")

    # The model, its moving average, the optimizer: new, or as saved.
    model.to(s.device).train()
    ema = copy.deepcopy(model).to(s.device).eval().requires_grad_(False)  # .to packs GRUs
    objective = Objective(model).to(s.device)
    weights = list(objective.parameters())
    optimizer = torch.optim.AdamW(weights, s.lr, betas=(0.9, 0.99))
    step, elapsed, log = 0, 0.0, LOG
    if s.resume:  # up to here, `model` was the average
        objective.load_state_dict(saved["objective"])
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed, log = saved["step"], saved["elapsed"], saved["log"]

    if s.fast:  # TF32, bfloat16 and a compiled network, where the GPU is made for it
        torch.set_float32_matmul_precision("high")
        model.compile(disable=s.temporal == "gru" or sys.platform == "win32")  # neither can
    loss_of = nn.parallel.DistributedDataParallel(objective) if WORLD > 1 else objective
    print(f"{sum(w.numel() for w in weights) / 1e6:.2f} M weights, preset {s.preset}, {s.device}")

    # Ctrl-C and similar signals: finish the step, and save. A second Ctrl-C ends at once.
    signals, saving, all_saved = [], False, False

    def ask_to_stop(number, frame):
        signals.append(number)
        impatient = number == signal.SIGINT and len(signals) > 1 and WORLD == 1  # torchrun sends 2
        if (impatient or all_saved) and not saving:
            raise KeyboardInterrupt

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            signal.signal(number, ask_to_stop)
    progress = lambda: min(1, max(step / s.steps, elapsed / 60 / s.minutes))
    bar = tqdm(total=1, initial=progress(), disable=RANK > 0,
               bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    choose_threads(objective, data, s)
    start, save_time, stopped = time.monotonic() - elapsed, elapsed, False
    total, count, row_time = 0.0, 0, time.monotonic()  # of the losses since the last row of the log
    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(draw, data, s, s.batch // WORLD, s.clip_frames, step, rank=RANK)
    while True:
        done = progress()
        end = stopped or done == 1

        # Log: a row every 20 steps, and at the end.
        if count and (end or step % 20 == 0):
            [loss] = average([total / count])  # waits for a GPU
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} near step {step}: try a lower --lr")
            speed = count * s.batch * s.clip_frames / (time.monotonic() - row_time)
            losses = validate(ema, data, s) if data.held_out and step % 500 == 0 else [math.nan] * 3
            log += ",".join(f"{v:.6g}" for v in (step, loss, lr, *losses, speed, elapsed)) + "\n"
            with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` of `| tee log`
                bar.set_postfix_str(f"step {step}, loss {loss:.4f}, {speed:.0f} frames/s")
                bar.update(done - bar.n)
            total, count, row_time = 0.0, 0, time.monotonic()

        # Save: every few minutes, with a preview, and at the end.
        due = step % 20 == 0 and elapsed - save_time > 60 * s.save_minutes
        if RANK == 0 and (end or due):
            saving = True
            settings = {k: v for k, v in vars(s).items() if k not in NOT_SAVED}
            training = dict(objective=objective.state_dict(), optimizer=optimizer.state_dict(),
                            step=step, elapsed=elapsed, log=log, settings=settings)
            resume = s.out.with_suffix(".resume.pt")
            save_checkpoint(resume, ema.config, ema.state_dict(), training=training)
            save_checkpoint(s.out, ema.config, ema.state_dict())
            with contextlib.suppress(OSError):  # a spreadsheet may hold it open
                s.out.with_suffix(".csv").write_text(log)
            saving = False
            if not end:
                preview(s.out.with_suffix(".preview.mp4"), ema, data, s, 2 * s.clip_frames)
                choose_threads(objective, data, s)
            save_time, row_time = elapsed, time.monotonic()  # it does not count in frames/s
        if end:
            break

        # Step: the loss of the clips of this process, AdamW, the moving average.
        x, actions, generator = to_device(upcoming.result(), s)
        upcoming = pool.submit(draw, data, s, s.batch // WORLD, s.clip_frames, step + 1, rank=RANK)
        if step % 4 == 0 and model.config.causal:  # single frames: in clips, few have no past
            x, actions = (v[:, ::4].flatten(0, 1)[:, None] for v in (x, actions))  # few are enough
        with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.fast):
            loss = loss_of(x, actions, generator)
        loss.backward()
        lr = s.lr * min(1, (step + 1) / s.warmup) * min(1, 2 * (1 - done))  # up, constant, down
        optimizer.param_groups[0]["lr"] = lr
        norm = nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(s.ema, (step + 1) / (step + 10))  # a short memory at first
        torch._foreach_lerp_([*ema.parameters()], [w.data for w in model.parameters()], 1 - decay)
        step, count, total = step + 1, count + 1, total + loss.detach() + 0 * norm  # NaN if it is
        elapsed, stopped = average([time.monotonic() - start, len(signals)])

    # The end: of the run, or until it is resumed.
    bar.close()
    if WORLD > 1:
        dist.barrier()  # nobody leaves before all is saved
        dist.destroy_process_group()  # threads that outlive Python abort the process
    if stopped:
        sys.exit(f"stopped and saved at step {step}; the same command with --resume goes on")
    all_saved = True
    print(f"{step} steps in {elapsed / 60:.1f} minutes; next: python sample.py --ckpt {s.out}")
    if RANK == 0:  # the model is saved: Ctrl-C during the video loses nothing
        preview(s.out.with_suffix(".rollout.mp4"), ema, data, s, 256)


if __name__ == "__main__":
    with mistakes(FloatingPointError):
        main()
