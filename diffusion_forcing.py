"""Diffusion Forcing for video: the whole method in one file.

The idea (Chen et al., NeurIPS 2024, https://arxiv.org/abs/2407.01392):
  1. Noise is a mask. A frame without noise is known; a frame of pure noise is unknown.
  2. In training, every frame of a clip gets its own amount of noise, independent of all others.
     One network, causal in time, learns to denoise every mixture of known and unknown frames.
  3. In sampling you choose the mixture. A matrix of levels says how noisy each frame is at each
     step: one row for each step, one column for each frame.
  4. "Frame after frame", "all frames together" and everything between: only the matrix differs.
  5. Finished frames enter the state of the network. It does not grow: a rollout may never end.

Training: sigma of each frame in three clips (in two, it alternates). Sampling: matrices, S = 4.

    sigma of frame 0, 1, 2 ...      autoregressive    pyramid, u = 2    full sequence
    .31  2.4  .08  .90  .02  17.       4 4 4 4           4 4 4 4           4 4 4 4     steps
    .75  .11  5.0  .04  1.2  .46       3 4 4 4           3 4 4 4           3 3 3 3       |
    .05  .62  .19  31.  .33  .07       2 4 4 4           2 4 4 4           2 2 2 2       |
                                       1 4 4 4           1 3 4 4           1 1 1 1       |
                                       0 4 4 4           0 2 4 4           0 0 0 0       v
                                       0 3 4 4           0 1 3 4
                                         ...               ...
Why history carries noise: generated frames are slightly wrong, and the errors would grow. A little
noise hides them, and a label tells the network how much. Even given frames get it: in training too,
each frame has the noise that its label tells. The price: details are lost. (Paper: stabilization.)

Glossary
  B, T, C, H, W   batch, frames, channels, height, width; always in this order
  t               the number of a frame; never a diffusion time
  x               frames, pixels in [-1, 1]; a noisy frame is x + sigma * standard normal noise
  sigma (B, T)    how much noise each frame has: its standard deviation, in the units of x
  D               what the denoiser says: the mean of all clean frames that fit the noisy ones
  S, k            sampling steps of one frame; a level k in 0..S, where 0 is clean, S pure noise
  K (M+1, T)      scheduling matrix: K[m, t] is the level of frame t before step m; K[M] is all 0
  context         given frames at the start of a video; keyframes: later ones (two-way models only)
  history         all given and finished frames, as the network sees them: with a little noise
  state           what the network keeps of the history: keys and values, or a hidden state
  in flight       started and not yet finished: the frames that a sampling step works on

Departures from the paper: sigma, preconditioning, weighting and steps without randomness are those
of EDM (arXiv 2206.00364), not those of DDPM; loss weights are learned; a step may use the D of the
one before; a GRU, or attention with a cache, works at every place of a U-Net (paper: convolutional
GRU); rows of the matrix are in the order of sampling; in half of the clips, noise alternates.

Does not include: autoencoders, text conditioning, discrete levels of noise. For latents in place
of pixels, set channels, height and width of Config to theirs and patch = 1, and measure data_mean
and sigma_data on them (scale all channels to about the same deviation first).
"""

import itertools
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ==== 1. Config: what training, sampling and network agree on. It travels in the checkpoint. =====

FORCINGS = ("diffusion", "full_sequence", "teacher")
SCHEDULES = ("autoregressive", "pyramid", "full_sequence", "trapezoid")
SOLVERS, MIXERS = ("euler", "multistep"), ("attention", "gru")


def need(ok, message):
    """Raises ValueError with this message unless ok."""
    if not ok:
        raise ValueError(message)


@dataclass
class Config:
    """Sizes, network and noise. All amounts of noise in it are stated for data of standard
    deviation 0.5, as in EDM; `in_frame_units` is the one place that converts them to the data at
    hand. Raises ValueError, with the numbers, for what cannot work."""
    height: int = 32
    width: int = 32
    channels: int = 3
    action_dim: int = 0              # numbers in the action that leads to a frame; 0: no actions
    clip_frames: int = 16            # T in training; a rollout goes far beyond it

    temporal: str = "attention"      # where frames meet: "attention" or "gru"
    causal: bool = True              # False: a two-way model, in which frames also see later ones
    window: int = 16                 # attention: a frame sees itself and window - 1 frames back
    patch: int = 2                   # the U-Net works at 1/patch of the resolution
    dim: int = 32                    # channels at the highest resolution of the U-Net ...
    dim_mults: tuple = (1, 2)        # ... and their multiples, one for each resolution
    head_dim: int = 16               # channels of one attention head

    sigma_data: float = 0.5          # of the training clips: standard deviation around data_mean
    data_mean: tuple = ()            # mean of each channel; (): zeros
    action_scale: tuple = ()         # root mean square of each action; (): ones

    P_mean: float = -0.6             # in training, ln sigma is normal with this mean ...
    P_std: float = 2.4               # ... and this standard deviation, twice as wide as in EDM
    alternating: float = 0.5         # share of clips with a pattern of noise: sample_noise_levels
    sigma_min: float = 0.02          # in sampling, sigma comes down from sigma_max to sigma_min,
    sigma_max: float = 80.0          # and then to 0
    rho: float = 7.0                 # EDM: the larger, the more of the steps are near sigma_min
    context_noise: float = 0.05      # sigma of all history, given or generated: see the top

    def __post_init__(self):
        self.dim_mults = tuple(self.dim_mults)
        self.data_mean = tuple(float(m) for m in self.data_mean) or (0.0,) * self.channels
        self.action_scale = tuple(float(a) for a in self.action_scale) or (1.0,) * self.action_dim
        for name in ("height", "width", "channels", "clip_frames", "window", "patch", "dim"):
            need(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1 is needed")
        multiple = self.patch * 2 ** (len(self.dim_mults) - 1)
        need(self.height % multiple == self.width % multiple == 0,
             f"frames of {self.height}x{self.width}: multiples of {multiple} are needed")
        need(self.temporal in MIXERS, f"temporal is {self.temporal!r}; one of {MIXERS} is needed")
        need(self.causal or self.temporal == "attention", "a GRU is always causal")
        need(self.head_dim > 0 and self.head_dim % 2 == 0, f"head_dim {self.head_dim} is not even")
        dims = [self.dim * m for m in self.dim_mults]
        need(dims and all(d > 0 and d % 8 == 0 and d % self.head_dim == 0 for d in dims),
             f"channels {dims}: multiples of 8 and of head_dim {self.head_dim} are needed")
        need(len(self.data_mean) == self.channels,
             f"data_mean has {len(self.data_mean)} numbers for {self.channels} channels")
        need(len(self.action_scale) == self.action_dim and all(a > 0 for a in self.action_scale),
             f"action_scale {self.action_scale}: {self.action_dim} positive numbers are needed")
        for name in ("sigma_data", "context_noise", "sigma_min", "rho"):
            need(0 < getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; a number "
                 "above 0 is needed" + " (frames of one colour?)" * (name == "sigma_data"))
        need(self.P_std >= 0, f"P_std is {self.P_std}; a standard deviation is never below 0")
        need(0 <= self.alternating <= 1, f"alternating is {self.alternating}; a share is 0 to 1")
        need(self.sigma_min < self.sigma_max < math.inf,
             f"sigma_min {self.sigma_min} must lie below sigma_max {self.sigma_max}")

    def in_frame_units(self, sigma):
        """An amount of noise as it stands in Config -> the same in the units of the frames."""
        return sigma * self.sigma_data / 0.5


# ==== 2. Noise: every frame has its own sigma. These lines make it Diffusion Forcing. ============

def sample_noise_levels(batch_size, num_frames, config, forcing="diffusion", generator=None):
    """-> sigma (B, T) for training, in frame units: ln sigma ~ Normal(P_mean, P_std^2).

    Every frame has its own sigma, independent of all others (paper, Algorithm 1). With forcing
    "full_sequence", all frames of a clip share one. The device is that of the generator.
    But in config.alternating of the clips of "diffusion", sigmas below and above the median take
    turns: much noise after little is rare by chance, and from it, actions are learned. In two-way
    models, chance says which frames are above, and those share one sigma: a gap that is to be
    filled. Each sigma by itself stays log-normal. Raises ValueError for another forcing.
    """
    need(forcing in FORCINGS, f"forcing is {forcing!r}; one of {', '.join(FORCINGS)} is needed")
    shape = (batch_size, 1 if forcing == "full_sequence" else num_frames)
    device = generator.device if generator else None
    normal = torch.randn(shape, generator=generator, device=device)
    if forcing == "diffusion":
        rand = lambda *size: torch.rand(size, generator=generator, device=device)
        draw, much, little = rand(batch_size, 1), normal.abs(), -normal.abs()  # (B,1), (B,T), (B,T)
        noisy = (torch.arange(num_frames, device=device) + (draw < config.alternating / 2)) % 2 == 0
        if not config.causal:
            noisy, much = rand(*shape) < rand(batch_size, 1), much[:, :1]
        normal = torch.where(draw < config.alternating, torch.where(noisy, much, little), normal)
    sigma = config.in_frame_units((config.P_mean + config.P_std * normal).exp())
    return sigma.expand(batch_size, num_frames)


def randn(shape, like, generator=None):
    """Standard normal noise with the device and type of `like`, wherever the generator is."""
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def per_frame(v):
    """(..., T) -> (..., T, 1, 1, 1): one number for each frame, ready to multiply frames with."""
    return v[..., None, None, None]


# ==== 3. EDM preconditioning and weighting (arXiv 2206.00364, Table 1). F is the network: ========
#    D(x; sigma) = mu + c_skip (x - mu) + c_out F(c_in (x - mu); c_noise)
#
#    The input and the target of F have unit variance at every sigma. The target is about minus the
#    noise at low sigma, and the frame at high sigma. mu is the mean of the data (in EDM: 0).

def edm_scalings(sigma, sigma_data):
    """-> c_skip, c_out, c_in, c_noise, each with the shape of sigma (EDM, Table 1)."""
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = (sigma / sigma_data).log() / 4  # in EDM, of sigma alone
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma, sigma_data):
    """lambda = 1 / c_out^2 (EDM, Table 1): a network that says 0 has loss 1 at every sigma."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


# ==== 4. The training loss (paper, Algorithm 1). =================================================

def diffusion_forcing_loss(model, x, config, *, sigma=None, forcing="diffusion", actions=None,
                           generator=None, expected_loss=None):
    """Weighted denoising loss of clips x (B, T, C, H, W) -> scalar. Algorithm 1 of the paper.

    `forcing` selects the training paradigm, and nothing else changes:
      "diffusion"      every frame has its own sigma, and is predicted from itself and its past;
      "full_sequence"  ordinary video diffusion: one sigma for a whole clip;
      "teacher"        next-frame prediction: the frames before each have context_noise, as history.
    sigma (B, T) takes the place of the random one. actions (B, T, A): row t leads to frame t. With
    ExpectedLoss, each frame counts as loss / exp(u) + u. Raises ValueError for what does not fit.
    """
    B, T = x.shape[:2]
    drawn = sample_noise_levels(B, T, config, forcing, generator).to(x)
    sigma = drawn if sigma is None else sigma  # the noise below is the same with a given sigma
    need(sigma is drawn or sigma.shape == (B, T) and (sigma > 0).all(),
         f"sigma is {tuple(sigma.shape)}; ({B}, {T}) numbers above 0 are needed")
    noisy = x + per_frame(sigma) * randn(x.shape, x, generator)
    history, sigma_past = None, sigma  # sigma_past: the sigma with which others see a frame
    if forcing == "teacher":
        sigma_past = torch.full_like(sigma, config.in_frame_units(config.context_noise))
        history = (x + per_frame(sigma_past) * randn(x.shape, x, generator), sigma_past)
    # commit=0: nothing follows a training clip, so no state is kept
    denoised, _ = model(noisy, sigma, actions=actions, commit=0, history=history)
    loss = per_frame(loss_weight(sigma, config.sigma_data)) * (denoised - x) ** 2
    loss = loss.mean((2, 3, 4))  # (B,T)
    if expected_loss is not None:  # least where exp(u) is the mean loss, whatever the denoiser
        u = expected_loss(sigma, sigma_past)
        loss = loss / u.exp() + u
    return loss.mean()


class ExpectedLoss(nn.Module):
    """-> u (B, T): exp(u) is the loss to be expected of a frame, from its own sigma (B, T) and from
    sigma_past (B, T) of the four frames before it (two-way: and of the four after). For training.

    A frame with little noise, or after nearly clean ones, often has a far smaller loss than others.
    In a plain mean such frames hardly count, but a rollout needs them. Divided by what is expected,
    every mixture counts the same. The optimal denoiser stays what it was, as exp(u) does not depend
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


# ==== 5. Scheduling matrices (paper, section 3.3): the level of each frame at each step. =========

def karras_sigmas(num_steps, config):
    """-> (S+1,) the sigma of each level, in frame units: [0] = 0, [1] = sigma_min, [S] = sigma_max
    (EDM, eq. 5, in increasing order). A single step starts at sigma_max."""
    need(num_steps >= 1, f"num_steps is {num_steps}; at least 1 is needed")
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    sigmas = torch.linspace(high, low, num_steps).flip(0) ** config.rho
    return config.in_frame_units(torch.cat([torch.zeros(1), sigmas]))


def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0):
    """-> int64 (M+1, T), K[m, t] = clip(S + floor(u t) - m, 0, S). A frame comes down S levels, one
    in each row, and starts u rows after the frame before it.

      "full_sequence"   u = 0: all frames come down together
      "autoregressive"  u = S: a frame starts when the one before it is finished
      "pyramid"         u = `uncertainty`: near frames are nearly finished while far ones are noisy
      "trapezoid"       from both ends to the middle, u min(t, T - 1 - t): for two-way models only

    One call of the network serves all frames in flight, in a pyramid about S / u. So T frames take
    S + floor(u (T - 1)) calls: it has to fill and to drain. An endless one takes u calls for each:
    rollout(model, scheduling_matrix("pyramid", 1, S), None, period=u).
    """
    need(kind in SCHEDULES, f"schedule is {kind!r}; one of {', '.join(SCHEDULES)} is needed")
    need(min(num_frames, num_steps) >= 1, f"{num_frames} frames in {num_steps} steps: at least 1")
    need(0 <= uncertainty < math.inf, f"uncertainty is {uncertainty}; at least 0 is needed")
    u = {"full_sequence": 0, "autoregressive": num_steps}.get(kind, uncertainty)
    last = num_frames - 1 if kind == "trapezoid" else math.inf  # infinite: min is t
    start = torch.tensor([math.floor(u * min(t, last - t)) for t in range(num_frames)])  # (T,)
    m = torch.arange(num_steps + int(start.max()) + 1)  # (M+1,)
    return (num_steps + start - m[:, None]).clamp(0, num_steps)


def endless_level(matrix, period, row, t):
    """The level of frame t, counted from the end of the context, in one row of the endless matrix:
    copies of `matrix` (a list of rows) side by side, T frames each. Copy j starts floor(j * period)
    rows after copy 0. Before that its frames are at S, and after its end at 0."""
    copy, column = divmod(t, len(matrix[0]))
    row -= math.floor(copy * period)  # Python's floats: a float32 would round much sooner
    return 0 if t < 0 else matrix[min(max(row, 0), len(matrix) - 1)][column]


# ==== 6. Sampling and rollout (paper, Algorithm 2). ==============================================

def sample(model, matrix, context=None, **options):
    """rollout of one copy of the matrix -> (B, T_context + matrix.shape[1], C, H, W)."""
    num_frames = matrix.shape[1] + (0 if context is None else context.shape[1])
    return torch.stack(list(rollout(model, matrix, num_frames, context, **options)), 1)


def rollout(model, matrix, num_frames, context=None, *, period=None, keyframes=None, actions=None,
            batch_size=1, solver="multistep", generator=None, config=None):
    """Algorithm 2 of the paper -> iterator over num_frames frames (B, C, H, W), context first: each
    as soon as it and all before it are finished. Memory and the time for a frame do not grow.
    model       anything that is called like Denoiser.forward; config defaults to model.config
    matrix      (M+1, T) integers, from a row of S to a row of 0; see endless_level for period
    period      rows from the start of a copy to that of the next; default M: no two overlap
    num_frames  counts the context; None: go on for ever, or until the actions end
    context     (B, T_context, C, H, W), frames to go on from; None: batch_size clips without any
    keyframes   {t: (B, C, H, W)}: frame t of the video, context counted, is given, not sampled
    actions     (B, num_frames or more, action_dim), or an iterator over (B, action_dim), whose end
                ends the rollout. Row t leads to frame t, from frame 0 on. It is asked for when
                frame t joins: after frame t - 1 was yielded (in a pyramid, frame t - S / u)
    A two-way model (causal=False) keeps no state: all frames are in each call, those of one copy.
    Raises ValueError for what cannot work, before anything is computed.
    """
    config = config or model.config
    size = (config.channels, config.height, config.width)
    if context is None:
        need(batch_size >= 1, f"batch_size is {batch_size}; at least 1 is needed")
        weights = model.parameters() if isinstance(model, nn.Module) else iter(())
        context = next(weights, torch.empty(0)).new_empty(batch_size, 0, *size)
    need(context.ndim == 5 and context.shape[2:] == size and context.is_floating_point(),
         f"context is {context.dtype} {tuple(context.shape)}; floats (B, T, *{size}) are needed")
    B, num_context = context.shape[:2]
    if torch.is_tensor(actions):
        need(actions.ndim == 3 and actions.shape[::2] == (B, config.action_dim)
             and actions.shape[1] >= (num_frames or 1), f"actions are {tuple(actions.shape)}; "
             f"({B}, {num_frames or 'one row for each frame'}, {config.action_dim}) is needed")
        actions = actions.unbind(1)
    need(num_frames is None or num_frames >= max(num_context, 1), f"num_frames is {num_frames}; "
         f"it counts the {num_context} frames of context, and is at least 1")
    need(solver in SOLVERS, f"solver is {solver!r}; one of {', '.join(SOLVERS)} is needed")
    period = check_matrix(matrix := matrix.cpu(), period, config.causal)
    longest = math.inf if config.causal else min(num_context + matrix.shape[1], config.window)
    need((num_frames or math.inf) <= longest, f"num_frames is {num_frames}; a two-way model rolls "
         f"out one copy of the matrix, within its window: here {longest}")
    need(not keyframes or not config.causal, "keyframes need a two-way model (causal=False)")
    for t, x in (keyframes := keyframes or {}).items():
        need(t in range(num_context, num_frames), f"keyframe {t} is in the context or past the end")
        need((x.dtype, x.shape) == (context.dtype, (B, *size)), f"keyframe {t} is {x.dtype} "
             f"{tuple(x.shape)}; {context.dtype} {(B, *size)} is needed")
    return roll(model, matrix.tolist(), num_frames, context, keyframes, period, actions, solver,
                generator, config)


def check_matrix(matrix, period, causal):
    """-> the period, or M. The state takes frames in order: none may be cleaner than one before."""
    need(matrix.ndim == 2 and matrix.numel() and not matrix.is_floating_point(),
         "a scheduling matrix holds integers: one row for each step, one column for each frame")
    need(matrix.max() > 0 and (matrix[0] == matrix.max()).all() and (matrix[-1] == 0).all()
         and (matrix.diff(dim=0) <= 0).all(),
         "a scheduling matrix starts with a row of S, ends with a row of 0, and never rises")
    period = len(matrix) - 1 if period is None else period
    need(0 < period < math.inf, f"period is {period}; a number above 0 is needed")
    next_copy = matrix[(torch.arange(len(matrix)) - math.floor(period)).clamp(min=0), 0]
    in_order = (matrix.diff(dim=1) >= 0).all() and (next_copy >= matrix[:, -1]).all()
    need(in_order or not causal, "for a causal model, in no row may a frame be cleaner than one "
         f"before it: take another matrix or, if copies clash, a longer period than {period}")
    return period


@dataclass
class Frame:
    """What `roll` keeps of each frame that is not in the state yet. x, eps, D: (B, C, H, W)."""
    t: int                     # its number in the video, context included
    action: torch.Tensor       # (B, A), the one that leads to it; None: there are no actions
    x: torch.Tensor
    eps: torch.Tensor          # its one draw of noise as history
    D: torch.Tensor            # what it was denoised to in its last step; before the first step: x
    s_last: float = math.inf   # its sigma before that step; infinite: there was none


def all_frames(given, num_frames, actions, sigma_max, noise):
    """-> iterator over every Frame: x is that of `given`, {t: x}, or pure noise. The action of each
    is asked for with it. It ends after num_frames, or where the actions end."""
    numbers = itertools.count() if num_frames is None else range(num_frames)
    for t, action in zip(numbers, itertools.repeat(None) if actions is None else actions):
        x = given[t] if t in given else sigma_max * noise()
        yield Frame(t, action, x, noise(), x)


@torch.no_grad()
def roll(model, matrix, num_frames, context, keyframes, period, actions, solver, generator, config):
    """The loop of `rollout`: one network call for each row in which a level changes."""
    (B, num_context, *size), S = context.shape, matrix[0][0]
    given = dict(enumerate(context.unbind(1))) | {t: x.to(context) for t, x in keyframes.items()}
    sigmas = karras_sigmas(S, config).to(context.dtype)  # (S+1,), on the CPU
    noise = lambda: randn((B, *size), context, generator)
    level = lambda row, t: 0 if t in given else endless_level(matrix, period, row, t - num_context)

    upcoming = all_frames(given, num_frames, actions, float(sigmas[S]), noise)
    frames, ended, state = list(itertools.islice(upcoming, num_context)), False, None
    joined, yielded = len(frames), 0
    for row in itertools.count():
        # Yield, in the order of time, what is finished. Cloned, since the caller may change it.
        while yielded < joined and level(row, yielded) == 0:
            yield frames[yielded - joined].x.clone()  # counted from the last frame
            yielded += 1
        # Join: a frame joins in the row in which it starts. Before that it costs nothing: it does
        # not move, and nobody sees it, as no later frame has started. (Two-way: all see all.)
        while not ended and (level(row + 1, joined) < S or not config.causal):
            new = list(itertools.islice(upcoming, 1))  # nothing, if the video ends here
            frames, joined, ended = frames + new, joined + len(new), not new
        if ended and yielded == joined:
            return
        now, after = ([level(r, frame.t) for frame in frames] for r in (row, row + 1))
        if now == after:  # nothing moves: no call
            continue
        # Mark the history: finished frames get context_noise, and the label says so. In this call,
        # the first after they finished, they enter the state. (Two-way: they are in every call.)
        s, s_next = sigmas[torch.tensor([now, after])]  # (n,) each, for n frames in this call
        added = config.in_frame_units(config.context_noise) * (s == 0).to(s)
        finished = now.count(0) if config.causal else 0
        # The multistep solver (DPM-Solver++(2M), arXiv 2211.01095) looks ahead: D_half is D halfway
        # through the step, on the line through D_last and this D, in ln sigma. A first step
        # has no D_last, and the step to 0 has no halfway: there ahead = 0, which is Euler's step.
        s_last = torch.tensor([frame.s_last for frame in frames]).to(s)
        ahead = torch.where(s_next > 0, (s / s_next).log() / 2 / (s_last / s).log(), 0)
        ahead = ahead * (solver == "multistep")
        # Denoise. All small numbers go to the device at once: each transfer makes a GPU wait.
        label, *factors = torch.stack([s + added, added, ahead, s_next / s]).to(context)
        added, ahead, shrink = map(per_frame, factors)
        x, eps, D_last = (torch.stack([getattr(frame, name) for frame in frames], 1)
                          for name in ("x", "eps", "D"))  # (B,n,C,H,W) each
        acts = None if actions is None else torch.stack([f.action for f in frames], 1).to(x)
        D, state = model(x + added * eps, label.expand(B, -1), state, actions=acts, commit=finished)
        # Step: Euler's is x + (s_next - s) (x - D) / s. So written, a step to 0 lands on D exactly.
        D_half = D + ahead * (D - D_last)
        x = D_half + shrink * (x - D_half)
        for i, frame in enumerate(frames):
            if now[i] != after[i]:  # a held frame keeps every bit (a finished one: x is 0 / 0 here)
                frame.x, frame.D, frame.s_last = x[:, i], D[:, i], float(s[i])
        frames = frames[finished:]  # the others are in the state now


# ==== 7. Guidance is a wrapper around the denoiser: no loop needs to know of it. =================

class Guided(nn.Module):
    """A causal denoiser whose history counts for more: D_less + weight (D - D_less). D_less sees
    the history through noise of at least `noise`, in the unit of Config: sigma_max hides all of it,
    less hides its details. Weight 1, or a noise up to context_noise, leaves D as it is. Called like
    Denoiser; the state is that of 2B clips. (History guidance, Song et al., arXiv 2502.06764.)
    Hiding all of it may go too far: x[t] = .9 x[t-1] + Gaussian chance, of variance 1 in all,
    becomes 1.08 x[t-1] with weight 1.5, and a long rollout explodes."""

    def __init__(self, model, weight, noise, generator=None):
        super().__init__()
        need(model.config.causal, "history guidance: a two-way model keeps no history in a state")
        self.model, self.config, self.generator = model, model.config, generator
        self.weight, self.noise = weight, self.config.in_frame_units(noise)

    def forward(self, x, sigma, state=None, *, actions=None, commit=None):
        """As Denoiser.forward. History gets its noise once, in the call in which it enters."""
        less, sigma_less = x.clone(), sigma.clone()
        history, s = less[:, :commit], sigma[:, :commit]  # (B,n,C,H,W), a view of less; (B,n)
        sigma_less[:, :commit] = s.clamp(min=self.noise)
        more = (sigma_less[:, :commit] ** 2 - s**2).sqrt()  # variances add up
        history += per_frame(more) * randn(history.shape, x, self.generator)
        acts = None if actions is None else torch.cat([actions, actions])
        D, state = self.model(torch.cat([x, less]), torch.cat([sigma, sigma_less]), state,
                              actions=acts, commit=commit)
        D, D_less = D.chunk(2)
        return torch.lerp(D_less, D, self.weight), state


# ==== 8. The denoiser: a small 2-D U-Net. Frames meet only in the mixers that end its blocks. =====

class Denoiser(nn.Module):
    """D(x; sigma): noisy frames and their sigma -> denoised frames, and the next state."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim * m for m in config.dim_mults]
        pixels = config.channels * config.patch**2
        E = 4 * config.dim  # width of the embedding that tells every block about its frame
        mean = torch.tensor(config.data_mean)[:, None, None]
        self.register_buffer("data_mean", mean, persistent=False)
        self.register_buffer("action_scale", torch.tensor(config.action_scale), persistent=False)
        self.register_buffer("frequency", torch.logspace(-0.5, 1.5, E // 4), persistent=False)
        self.embed_noise = nn.Sequential(nn.Linear(E // 2, E), nn.SiLU(), nn.Linear(E, E))
        self.embed_action = nn.Linear(config.action_dim, E) if config.action_dim else None
        self.stem = nn.Conv2d(pixels, dims[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(d, d, E, config) for d in dims)
        pairs = list(zip(dims, dims[1:]))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.middle = Block(dims[-1], dims[-1], E, config, spatial_attention=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.decoder = nn.ModuleList(Block(2 * d, d, E, config) for d in dims)
        self.head = nn.Sequential(nn.GroupNorm(8, dims[0]), nn.SiLU(),
                                  zero(nn.Conv2d(dims[0], pixels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)  # about twice as fast for convolutions

    def forward(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        """x (B, T, C, H, W), sigma (B, T), all above 0 -> denoised (B, T, C, H, W), state.

        state    what the last call returned, about the frames before x[:, 0]; None: there are none
        commit   how many frames of this call, from its first on, enter the state; None: all
        actions  (B, T, action_dim); None: zeros
        history  for teacher forcing, (x_clean (B, T, C, H, W), sigma_clean (B, T)): each frame sees
                 the clean frames before it, and itself, in one pass of 2T frames, [clean | noisy]
        Raises ValueError for shapes that do not fit, and on a CPU for a sigma of 0.
        """
        (B, T), c = x.shape[:2], self.config
        need(x.shape[2:] == (c.channels, c.height, c.width) and sigma.shape == (B, T),
             f"x {tuple(x.shape)}, sigma {tuple(sigma.shape)} do not fit Config, or each other")
        need(actions is None or actions.shape == (B, T, c.action_dim),
             f"actions must be ({B}, {T}, {c.action_dim})")
        need(commit is None or 0 <= commit <= T, f"commit is {commit}; 0 to {T} is needed")
        need(sigma.device.type != "cpu" or (sigma > 0).all(),  # a GPU would have to wait for this
             "sigma must be above 0, for its label is a logarithm: give even clean frames a little")
        if history is not None:
            need(state is None and c.causal, "history needs a causal denoiser, without a state")
            x, sigma = torch.cat([history[0], x], 1), torch.cat([history[1], sigma], 1)  # 2T frames
            commit = T if commit is None else commit  # the clean frames come first
            actions = None if actions is None else torch.cat([actions, actions], 1)
        *scalings, c_noise = edm_scalings(sigma, c.sigma_data)
        c_skip, c_out, c_in = map(per_frame, scalings)
        centred = x - self.data_mean
        out, new_state = self.network(c_in * centred, c_noise, state, actions, commit,
                                      two_streams=history is not None)
        denoised = self.data_mean + c_skip * centred + c_out * out
        return denoised[:, -T:], state if commit == 0 else new_state

    def network(self, x, c_noise, state, actions, commit, two_streams):
        """F of EDM. All frames go through it as a batch of B*T; only the mixers know of time."""
        B, T = x.shape[:2]
        angle = c_noise[..., None] * self.frequency  # (B,T,E/4)
        emb = self.embed_noise(torch.cat([angle.cos(), angle.sin()], -1))  # (B,T,E)
        if self.embed_action is not None:
            zeros = emb.new_zeros(B, T, self.config.action_dim)
            emb = emb + self.embed_action(zeros if actions is None else actions / self.action_scale)
        emb = F.silu(emb).flatten(0, 1)  # (BT,E)
        new = []

        def run(block, h):  # blocks run in a fixed order, which is also the order of their states
            old = None if state is None else state[len(new)]
            h, block_state = block(h, emb, B, old, commit, two_streams)
            new.append(block_state)
            return h

        h = F.pixel_unshuffle(x.flatten(0, 1), self.config.patch)  # (BT, C*p*p, H/p, W/p)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, block in enumerate(self.encoder):
            h = run(block, self.down[i - 1](h) if i else h)
            skips.append(h)
        h = run(self.middle, h)
        for i in reversed(range(len(skips))):
            h = run(self.decoder[i], torch.cat([h, skips[i]], 1))
            h = self.up[i - 1](h) if i else h
        h = F.pixel_shuffle(self.head(h), self.config.patch)  # (BT,C,H,W)
        return h.unflatten(0, (B, T)), tuple(new)


class Block(nn.Module):
    """A residual block in space, attention in space (middle block only), a mixer in time."""

    def __init__(self, dim_in, dim_out, E, config, spatial_attention=False):
        super().__init__()
        self.spatial = ResBlock(dim_in, dim_out, E)
        self.attend = (SpatialAttention(dim_out, config.head_dim) if spatial_attention else
                       nn.Identity())
        self.norm = nn.LayerNorm(dim_out)
        self.mixer = (TemporalGRU(dim_out) if config.temporal == "gru" else
                      TemporalAttention(dim_out, config.head_dim, config.window, config.causal))

    def forward(self, x, emb, B, state, commit, two_streams):
        h = self.attend(self.spatial(x, emb))  # (BT,C,h,w)
        BT, C, height, width = h.shape
        z = h.permute(0, 2, 3, 1).reshape(B, BT // B, height * width, C)
        z = self.norm(z).transpose(1, 2).flatten(0, 1)  # (B*hw,T,C): one sequence for each place
        z, state = self.mixer(z, state, commit, two_streams)
        z = z.unflatten(0, (B, height * width)).transpose(1, 2)  # (B,T,hw,C)
        return h + z.reshape(BT, height, width, C).permute(0, 3, 1, 2), state


# ==== 9. Temporal mixers: x (N, T, C) -> (N, T, C), and the state after `commit` frames. ==========
#    Streaming is exact: 16 frames in one call, or 5, then 1, then 10 with the state handed on, give
#    the same numbers (but for rounding), also past the window: the state keeps all that the next
#    frame may see. two_streams (teacher forcing): x is [clean frames | the same frames, noisy]. A
#    frame of both sees the clean frames before it, and itself.

class TemporalAttention(nn.Module):
    """Banded causal attention: a frame sees the last `window` frames, itself included (two-way: as
    many ahead), and through n mixers, one after the other, it learns of n (window - 1) frames back.
    State: keys (before rotation) and values of the last frames, (N, heads, < window, d) each."""

    def __init__(self, dim, head_dim, window, causal=True):
        super().__init__()
        self.head_dim, self.window, self.causal = head_dim, window, causal
        # The bias is a constant in q and in k. Once both are rotated, their product depends on the
        # distance in time alone, so a head can look "n frames back", whatever the frames show.
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        qkv = self.qkv(x).view(N, T, 3, C // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N,heads,T,d) each
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        end = k.shape[2] - T + (T if commit is None else commit)
        keep = slice(max(0, end - self.window + 1), end)  # cloned, so that the rest is freed
        new_state = state if commit == 0 else (k[:, :, keep].clone(), v[:, :, keep].clone())
        position = torch.arange(k.shape[2], device=x.device)  # from the oldest key: never grows
        if two_streams:
            position = position % (T // 2)
        ago = position[-T:, None] - position  # (queries,keys)
        sees = (ago < self.window) & (ago >= 0 if self.causal else ago > -self.window)
        if two_streams:
            noisy, itself = torch.arange(T, device=x.device) >= T // 2, torch.eye(T).to(sees)
            twin = noisy[:, None] & (ago == 0)  # of a noisy frame, its clean twin
            sees = sees & ~noisy & ~twin | itself  # clean keys, but for the twin; and itself
        cos, sin = rotation(position, self.head_dim)
        q, k = rotary(q, cos[-T:], sin[-T:]), rotary(k, cos, sin)
        # CUDA's attention kernels take at most 65,535 sequences in one call.
        parts = zip(q.split(65535), k.split(65535), v.split(65535))
        y = torch.cat([F.scaled_dot_product_attention(*part, attn_mask=sees) for part in parts])
        return self.out(y.transpose(1, 2).reshape(N, T, C)), new_state


class TemporalGRU(nn.Module):
    """A GRU at every place, after the paper's recurrent model. State: the hidden state, (N, C)."""

    def __init__(self, dim):
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.out = zero(nn.Linear(dim, dim))

    @torch.autocast("cuda", enabled=False)  # autocast would run a GRU in float16: it underflows
    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        first = x.new_zeros(N, C) if state is None else state
        if two_streams:
            clean, noisy = x.chunk(2, 1)  # (N,T/2,C) each
            after, _ = self.gru(clean, first[None])  # (N,T/2,C), after each clean frame
            before = torch.cat([first[:, None], after[:, :-1]], 1)  # what each noisy frame finds
            one_step, _ = self.gru(noisy.reshape(-1, 1, C), before.reshape(1, -1, C))
            hidden = torch.cat([after, one_step.view(N, T // 2, C)], 1)
        else:
            hidden, _ = self.gru(x, first[None])  # (N,T,C)
        new_state = state if commit == 0 else hidden[:, (commit or T) - 1].clone()
        return self.out(hidden), new_state


def rotation(position, dim):
    """cos and sin (T, d) of the angles by which frames at `position` (T,) turn (RoPE, arXiv
    2104.09864): the first pair of channels by a quarter for each frame, the last up to 1000 times
    slower. A pair is a channel of the first half and the same one of the second."""
    half = torch.arange(dim // 2, device=position.device) / (dim // 2)
    angle = position[:, None] * (math.pi / 2 * 1000.0**-half)  # (T,d/2)
    angle = torch.cat([-angle, angle], -1)  # turns (a, b) to (a cos - b sin, b cos + a sin)
    return angle.cos(), angle.sin()


def rotary(x, cos, sin):
    """Turns the pairs of channels of x (N, heads, T, d), in few passes over the memory."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


# ==== 10. Spatial blocks: every frame by itself, x (BT, C, h, w). =================================

class ResBlock(nn.Module):
    """Two convolutions. The scale and shift between them carry sigma and action."""

    def __init__(self, dim_in, dim_out, E):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, dim_in), nn.GroupNorm(8, dim_out)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(dim_out, dim_out, 3, padding=1))
        self.scale_shift = nn.Linear(E, 2 * dim_out)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[..., None, None].chunk(2, 1)  # (BT,C,1,1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class SpatialAttention(nn.Module):
    """Every place of a frame sees every other."""

    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(8, dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.out = zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        BT, C, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(BT, 3, C // self.head_dim, self.head_dim, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (BT,heads,hw,d) each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(BT, C, h, w))


def zero(layer):
    """Starts a layer at zero, so that its branch begins as 'no change'."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ==== 11. Checkpoints are written aside and then renamed: what is at `path` is always whole. ======

@contextmanager
def aside(path, own=""):
    """-> a path to write to, which takes the place of `path` at the end, or goes if anything fails.
    own: a mark of this process, for files that several may write at once."""
    temporary = Path(f"{path}{own}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, config, weights, **extra):
    """Writes config, weights (a state dict) and any extra tensors, numbers, strings and dicts.
    Raises OSError, and leaves what was there before."""
    try:
        with aside(path) as temporary:
            torch.save({"config": asdict(config), "weights": weights, **extra}, temporary)
    except RuntimeError as error:  # what torch makes of a full disk or a lost folder
        raise OSError(f"{path} cannot be written (is the disk full?)") from error


def load_checkpoint(path, device="cpu"):
    """-> the Denoiser in eval mode, and a dict of all else in the file. Executes nothing from the
    file. Raises OSError, or ValueError for a file that is not such a checkpoint."""
    try:
        extra = torch.load(path, map_location="cpu", weights_only=True)
        model = Denoiser(Config(**extra.pop("config")))
        model.load_state_dict(extra.pop("weights"))
    except OSError:
        raise
    except Exception as error:  # whatever a foreign or damaged file provokes
        kind = type(error).__name__
        raise ValueError(f"{path} is damaged or not from diffusion_forcing.py ({kind})") from error
    return model.to(device).eval(), extra
