"""Diffusion Forcing for video: the whole method in one file, in the order of the paper.

The idea (Chen et al., NeurIPS 2024, https://arxiv.org/abs/2407.01392):
  1. Noise is a mask. A frame without noise is known; a frame of pure noise is unknown.
  2. In training, every frame of a clip gets its own amount of noise, independent of all others.
     One network, causal in time, learns to denoise every mixture of known and unknown frames.
  3. In sampling, you choose the mixture. A matrix says how noisy each frame is at each step. Frame
     by frame, all frames together, and everything between: only the matrix differs.
  4. Given and finished frames are the history. The network sees them with a little noise, and is
     told how much. The noise hides errors, which would otherwise add up. (Paper: stabilization.)
  5. A finished frame enters the state of the network once, and is not computed again. The state
     (keys and values, or a hidden state) does not grow: a rollout need not end.

Three of the scheduling matrices. Column t is frame t. Row m has the level of each frame before step
m: from S (here 4), pure noise, to 0, finished. A frame starts u rows after the one before it.

    autoregressive, u = S    pyramid, u = 2    full sequence, u = 0
          4 4 4 4               4 4 4 4              4 4 4 4
          3 4 4 4               3 4 4 4              3 3 3 3
          2 4 4 4               2 4 4 4              2 2 2 2
          1 4 4 4               1 3 4 4              1 1 1 1
          0 4 4 4               0 2 4 4              0 0 0 0
          0 3 4 4 ...           0 1 3 4 ...

  B, T, C, H, W   batch, frames, channels, height, width, always in this order; t is a frame's index
  x               frames, pixels in [-1, 1]; a noisy frame is x + sigma * standard normal noise
  sigma (B, T)    how much noise each frame has, in frame units: those of x (Config has others)
  D               the denoiser's output: the mean of all clean frames that fit the noisy ones
  K (M+1, T)      scheduling matrix: K[m, t], frame t's level before step m (paper: m counts down)

Who sees whom: in each temporal mixer, a frame sees itself and the window - 1 frames before it (in a
GRU, all of them). In a bidirectional model (causal=False; attention only) it also sees later ones,
so its features are never final: every call takes all frames; there is no state, no `rollout` and no
teacher forcing. `sample` makes one clip, of at most `window` frames. In return, any of them may be
given, as keyframes. Latents in place of pixels only need another Config: their channels, height,
width, mean and deviation (bring all channels to one scale), and patch = 1.
Departures from the paper, by section: EDM in place of DDPM (3); a step may use the D of the one
before (6, `solver_step`); half of the clips `alternate` (2); gates (8); attention or a GRU at each
pixel, not a convolutional GRU (9). In train.py: `ExpectedLoss`, single frames, withheld actions.
"""

import io
import itertools
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # not EDM's F, which is called "the network" here
from torch import nn

# ==== 1. Config: what training, sampling and the network agree on. ===============================

FORCINGS = ("diffusion", "full_sequence", "teacher")
SCHEDULES = ("autoregressive", "pyramid", "full_sequence", "trapezoid")
SOLVERS = ("euler", "multistep")
VERSION = 3  # of the checkpoints


@dataclass
class Config:
    """Sizes, network and noise. It travels in the checkpoint. data_mean and sigma_data are measured
    on the clips, in frame units: those of x. Every other sigma here, and P_mean, has Config units:
    for data of standard deviation 0.5, as in EDM. `in_frame_units` converts."""
    height: int = 32
    width: int = 32
    channels: int = 3                # or those of latents in place of pixels
    action_dim: int = 0              # numbers in the action that leads to a frame; 0: no actions
    clip_frames: int = 16            # T in training; a rollout goes far beyond it
    stride: int = 1                  # a clip has every stride-th frame of its video
    data_mean: tuple = ()            # mean of each channel; (): zeros
    sigma_data: float = 0.5          # standard deviation around data_mean
    action_scale: tuple = ()         # root mean square of each number in an action; (): ones

    temporal: str = "attention"      # where frames meet: one of MIXERS
    causal: bool = True              # False: a bidirectional model; frames also see later ones
    window: int = 16                 # attention: a frame sees itself and window - 1 frames back
    patch: int = 2                   # the U-Net works at 1/patch of the resolution
    dim: int = 32                    # channels at the highest resolution of the U-Net ...
    dim_mults: tuple = (1, 2)        # ... and their multiples, one for each resolution
    head_dim: int = 16               # channels of one attention head
    gates: bool = True               # section 8; False: the head outputs EDM's F

    forcing: str = "diffusion"       # how to train: see diffusion_forcing_loss
    P_mean: float = -0.6             # in training, ln sigma is normal with this mean ...
    P_std: float = 2.4               # ... and this standard deviation, twice as wide as in EDM
    alternating: float = 0.5         # share of the training clips that `alternate`, section 2
    sigma_min: float = 0.02          # in sampling, sigma comes down from sigma_max to sigma_min,
    sigma_max: float = 80.0          # and then to 0
    rho: float = 7.0                 # EDM: the larger, the more of the steps are near sigma_min
    context_noise: float = 0.05      # sigma of all history, given or generated

    def in_frame_units(self, sigma):
        """A sigma in Config units -> the same in frame units."""
        return sigma * self.sigma_data / 0.5

    def __post_init__(self):
        self.dim_mults = tuple(self.dim_mults)
        self.data_mean = tuple(float(m) for m in self.data_mean) or (0.0,) * self.channels
        self.action_scale = tuple(float(a) for a in self.action_scale) or (1.0,) * self.action_dim
        for name in ("height", "width", "channels", "clip_frames", "stride", "sigma_data", "window",
                     "patch", "dim", "head_dim", "sigma_min", "rho", "context_noise"):
            need(0 < vars(self)[name] < math.inf, f"{name} is {vars(self)[name]}, not above 0")
        need(self.sigma_min < self.sigma_max < math.inf,
             f"sigma_max is {self.sigma_max}; more than sigma_min, {self.sigma_min}, is needed")
        need(self.P_std >= 0 and 0 <= self.alternating <= 1, "P_std >= 0, alternating in 0 to 1")
        need(len(self.data_mean) == self.channels, f"data_mean: {self.channels} numbers are needed")
        need(len(self.action_scale) == self.action_dim and min(self.action_scale, default=1) > 0,
             f"action_scale {self.action_scale}: {self.action_dim} numbers above 0 are needed")
        multiple = self.patch * 2 ** (len(self.dim_mults) - 1)
        need(self.height % multiple == 0 and self.width % multiple == 0,
             f"frames of {self.height}x{self.width}: multiples of {multiple} are needed")
        dims = [self.dim * m for m in self.dim_mults]
        fits = all(d > 0 and d % 8 == 0 and d % self.head_dim == 0 for d in dims)
        need(dims and fits and self.head_dim % 2 == 0,
             f"channels {dims}: multiples of 8 and of head_dim ({self.head_dim}, even) are needed")
        need(self.forcing in FORCINGS, f"forcing is {self.forcing!r}; it is one of {FORCINGS}")
        need(self.temporal in MIXERS, f"temporal is {self.temporal!r}; it is one of {(*MIXERS,)}")
        need(self.causal or (self.forcing != "teacher" and not MIXERS[self.temporal].causal_only),
             "teacher forcing, and a mixer that is causal_only, need a causal model")


def need(ok, message):
    """Raises ValueError with this message unless ok."""
    if not ok:
        raise ValueError(message)


# ==== 2. Noise: every frame has its own sigma. This makes it Diffusion Forcing. ==================

def sample_noise_levels(batch_size, num_frames, config, generator=None):
    """-> sigma (B, T) in frame units; in Config units, ln sigma ~ Normal(P_mean, P_std^2). Every
    frame has its own, independent of all others (paper, Algorithm 1); but for "diffusion", some
    clips `alternate`, and for "full_sequence", a clip has one. The device is the generator's."""
    device = generator.device if generator else None
    normal = torch.randn(batch_size, num_frames, generator=generator, device=device)  # (B,T)
    if config.forcing == "full_sequence":
        normal = normal[:, :1].expand(batch_size, num_frames)
    if config.forcing == "diffusion":
        normal = alternate(normal, config, generator)
    return config.in_frame_units((config.P_mean + config.P_std * normal).exp())


def alternate(normal, config, generator):
    """normal (B, T) -> the same, but each clip, with probability config.alternating, mixes low and
    high noise (below and above the median). Each frame alone stays standard normal. Causal: they
    take turns, and either comes first. Bidirectional: a random share of the frames (uniform in 0 to
    1), anywhere, is high, to be filled in; these have one sigma, newly drawn. Why turns: what an
    action does is learned where a frame too noisy to show it follows a nearly clean one (Config
    units: sigma < .1, then > 2): in 11 % of neighbouring pairs; without turns, in 7 %."""
    (B, T), device = normal.shape, normal.device
    rand = lambda *size: torch.rand(size, generator=generator, device=device)
    alternates = rand(B, 1) < config.alternating  # (B,1): which clips
    if config.causal:
        even = torch.arange(T, device=device) % 2 == 0  # (T,)
        noisy = even == (rand(B, 1) < 0.5)  # (B,T): the even frames, or else the odd ones
        high = normal.abs()
    else:
        noisy = rand(B, T) < rand(B, 1)  # (B,T): any share of the frames, ...
        high = torch.randn(B, 1, generator=generator, device=device).abs()  # ... all with one sigma
    return torch.where(alternates, torch.where(noisy, high, -normal.abs()), normal)


def randn(shape, like, generator=None):
    """Standard normal noise with the device and type of `like`, wherever the generator is."""
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def per_frame(v):
    """(..., T) -> (..., T, 1, 1, 1): one number for each frame, ready to multiply frames with."""
    return v[..., None, None, None]


# ==== 3. EDM preconditioning and weighting (arXiv 2206.00364, Table 1). ==========================
#    D(x; sigma) = mu + c_skip (x - mu) + c_out network(c_in (x - mu); c_noise)
#    In Denoiser.forward. Here, mu is the mean of the data. The network's input and target have unit
#    variance: the target is about minus the noise at low sigma, and the frame at high sigma.

def edm_scalings(sigma, sigma_data):
    """-> c_skip, c_out, c_in, and c_noise of sigma / sigma_data, each with the shape of sigma."""
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = (sigma / sigma_data).log() / 4  # in EDM, of sigma alone
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma, sigma_data):
    """lambda = 1 / c_out^2: an output of 0 has a mean loss of 1 at every sigma."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def gain(sigma, sigma_data):
    """-> the factor of the gates in section 8, with the shape of sigma. (It is not in EDM.)"""
    return (sigma_data / sigma).clamp(1, 25)  # 25 at the default sigma_min


# ==== 4. The training loss (paper, Algorithm 1). =================================================

def diffusion_forcing_loss(model, x, config, *, sigma=None, actions=None, generator=None,
                           expected_loss=None):
    """The weighted denoising loss of clips x (B, T, C, H, W) -> scalar, for config.forcing:
      "diffusion"      every frame has its own sigma, and is predicted from all that it sees;
      "full_sequence"  ordinary video diffusion: one sigma for a whole clip;
      "teacher"        next-frame prediction: each has its own sigma (none alternates), but its past
                       is a second copy of the clip, the `history` of section 8, with context_noise.
    The model is called once, without a state (commit is 0). sigma (B, T) takes the place of the
    random one. actions (B, T, A): row t leads to frame t; None: they are unknown.
    expected_loss(sigma, sigma with which later frames see this one) -> u (B, T): a second network,
    trained along with the first one, predicts the logarithm of each frame's mean loss. The frame
    counts as loss / exp(u) + u (divided by its `gain` if the model has gates)."""
    if sigma is None:
        sigma = sample_noise_levels(*x.shape[:2], config, generator).to(x)  # (B,T)
    noisy = x + per_frame(sigma) * randn(x.shape, x, generator)
    history, sigma_seen = None, sigma  # sigma_seen: the sigma with which later frames see a frame
    if config.forcing == "teacher":
        sigma_seen = torch.full_like(sigma, config.in_frame_units(config.context_noise))
        history = (x + per_frame(sigma_seen) * randn(x.shape, x, generator), sigma_seen)

    D, _ = model(noisy, sigma, actions=actions, commit=0, history=history)
    loss = per_frame(loss_weight(sigma, config.sigma_data)) * (D - x) ** 2  # (B,T,C,H,W)
    loss = loss.mean((2, 3, 4))  # (B,T)
    if expected_loss is not None:
        u = expected_loss(sigma, sigma_seen)  # (B,T)
        loss = loss / u.exp() + u  # least where exp(u) is the mean loss
        if config.gates:  # gradients have `gain` as a factor: little noise would count too much
            loss = loss / gain(sigma, config.sigma_data)
    return loss.mean()


# ==== 5. Scheduling matrices (paper, section 3.3): the level of each frame at each step. =========

def karras_sigmas(num_steps, config):
    """-> (S+1,) the sigma of each level, in frame units: [0] = 0, [1] = sigma_min, [S] = sigma_max
    (EDM, eq. 5, in increasing order). A single step starts at sigma_max."""
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    sigmas = torch.linspace(high, low, num_steps).flip(0) ** config.rho
    return config.in_frame_units(torch.cat([torch.zeros(1), sigmas]))


def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0):
    """-> int64 (M+1, T), K[m, t] = clip(S + floor(u t) - m, 0, S), up to the first row of all 0. A
    frame comes down S levels, one in each row, and starts u rows after the frame before it:
      "full_sequence"   u = 0: all frames come down together
      "autoregressive"  u = S: a frame starts when the one before it is finished
      "pyramid"         u = `uncertainty`: near frames are nearly finished while far ones are noisy
      "trapezoid"       from both ends to the middle, u min(t, T - 1 - t): for bidirectional models
    One call of the network serves all frames in flight, about S / u in a pyramid. So T frames take
    at most S + floor(u (T - 1)) calls. With one frame, all kinds are the same. Raises ValueError
    for any other kind, no frame, no step, `uncertainty` below 0, infinite or NaN."""
    need(kind in SCHEDULES, f"schedule is {kind!r}; it is one of {', '.join(SCHEDULES)}")
    need(min(num_frames, num_steps) >= 1, f"{num_frames} frames in {num_steps} steps: at least 1")
    need(0 <= uncertainty < math.inf, f"uncertainty is {uncertainty}; at least 0 is needed")
    u = {"full_sequence": 0, "autoregressive": num_steps}.get(kind, uncertainty)
    turn = [min(t, num_frames - 1 - t) if kind == "trapezoid" else t for t in range(num_frames)]
    start = torch.tensor([math.floor(u * n) for n in turn])  # (T,): the row in which each starts
    m = torch.arange(num_steps + int(start.max()) + 1)[:, None]  # (M+1,1)
    return (num_steps + start - m).clamp(0, num_steps)


# ==== 6. Sampling: the paper's Algorithm 2 (for its guidance, see experiments/maze.py). ==========

@torch.no_grad()
def sample(model, matrix, context=None, *, keyframes=None, actions=None, batch_size=1,
           solver="multistep", generator=None, config=None):
    """Algorithm 2 of the paper: all T frames are in every call -> (B, T, C, H, W), context first.
    model      anything that is called like Denoiser.forward; config defaults to model.config
    matrix     (M+1, T - T_context) integers, from a row of S to a row of 0
    context    (B, T_context, C, H, W), frames to go on from; None: batch_size clips without any
    keyframes  {t: (B, C, H, W)}: frame t, context counted, is given: its column counts as zeros
    actions    (B, T or more, A): row t leads to frame t; None: they are unknown
    Raises ValueError where `check_call` does. A row that changes nothing makes no call. In every
    call, commit is 0, and x, sigma and actions have the type and device of context. Each frame in
    turn draws the noise it starts from (unless it is given), then the noise it has as history.
    `rollout` draws in the same order, so that equal seeds give equal frames."""
    config = config or model.config
    context = no_frames(model, batch_size, config) if context is None else context
    given = dict(enumerate(context.unbind(1))) | (keyframes or {})  # {t: (B,C,H,W)}
    T = context.shape[1] + matrix.shape[-1]
    check_call(matrix, T, context, actions, solver, config, keyframes=keyframes or {})

    K = F.pad(matrix.cpu(), (context.shape[1], 0))  # (M+1,T)
    K[:, list(given)] = 0  # given frames are columns of zeros
    K = K.unique_consecutive(dim=0)  # without rows in which nothing moves
    sigmas = karras_sigmas(int(matrix.max()), config).to(context)[K]  # (rows,T)

    noise = lambda: randn((len(context), *context.shape[2:]), context, generator)  # (B,C,H,W)
    pairs = [(given[t] if t in given else sigmas[0, t] * noise(), noise()) for t in range(T)]
    x, eps = (torch.stack(frames, 1) for frames in zip(*pairs))  # (B,T,C,H,W); eps: for history
    actions = None if actions is None else actions[:, :T].to(x)  # (B,T,A)
    D_last, s_last = x, torch.full_like(sigmas[0], math.inf)  # inf: there is no D_last yet
    for s, s_next in zip(sigmas, sigmas[1:]):  # (T,) each: before and after this step
        # Given and finished frames (s = 0) get context_noise, and the network is told so. It hides
        # errors. It is really added: clean frames that are called noisy never occur in training.
        told = torch.where(s > 0, s, config.in_frame_units(config.context_noise))  # (T,)
        seen = x + per_frame(told - s) * eps  # (B,T,C,H,W)
        D, _ = model(seen, told.expand(len(x), T), actions=actions, commit=0)
        x = solver_step(x, D, D_last, s_last, s, s_next, solver)
        D_last = torch.where(per_frame(s_next < s), D, D_last)  # if held: that of its last step
        s_last = torch.where(s_next < s, s, s_last)
    return x


def solver_step(x, D, D_last, s_last, s, s_next, solver):
    """Takes each frame of x (B, T, C, H, W) from its sigma s (T,) to s_next (T,). Euler's step for
    dx/dsigma = (x - D) / sigma (EDM, eqs. 1 and 3) is x + (s_next - s) (x - D) / s, but written so
    that at 0 it lands on D exactly. The multistep solver (DPM-Solver++(2M), arXiv 2211.01095, Alg.
    2) replaces D by a guess of D in the middle of the step. It draws a line, over ln sigma, through
    D_last (found at s_last (T,), in the frame's previous step) and D (found at s), and follows it
    to there, half a step further. But a first step has no D_last (s_last is infinite), and a step
    to 0 has no middle: there, D stays. A held frame (s_next = s) keeps every bit, also at 0."""
    target = D
    if solver == "multistep":
        ahead = torch.where(s_next > 0, (s / s_next).log() / 2 / (s_last / s).log(), 0)  # (T,)
        target = D + per_frame(ahead) * (D - D_last)
    stepped = target + per_frame(s_next / s) * (x - target)
    return torch.where(per_frame(s_next < s), stepped, x)  # of a finished frame, stepped is 0 / 0


# ==== 7. Rollout: the same with a state, for causal models, for as long as you like. =============

def rollout(model, matrix, num_frames, context=None, *, period=None, actions=None, batch_size=1,
            solver="multistep", generator=None, config=None):
    """Algorithm 2 with a state -> iterator over num_frames frames (B, C, H, W), context first, each
    as soon as it is finished. Neither memory nor the time for a frame grows. Copies of the matrix
    follow each other, each `period` rows after the one before: by default M, so that no two
    overlap. If the matrix has one column (S, S - 1 ... 0), each frame has a copy, and `period` is
    the u of an endless pyramid, which takes u calls a frame (at most S):
    rollout(model, scheduling_matrix("pyramid", 1, S), num_frames=None, period=u).
    No frame may be cleaner than one before it. num_frames counts the context; None: without an end,
    or until the actions end. Actions may also be an iterator over (B, A), asked for one whenever a
    frame starts. All else is as in `sample`, without keyframes."""
    config = config or model.config
    context = no_frames(model, batch_size, config) if context is None else context
    period = len(matrix) - 1 if period is None else period
    check_call(matrix, num_frames, context, actions, solver, config, period)
    if actions is None:
        actions = itertools.repeat(context.new_full((len(context), config.action_dim), math.nan))
    actions = iter(actions.unbind(1) if torch.is_tensor(actions) else actions)
    return roll(model, matrix.tolist(), num_frames, context, period, actions, solver, generator,
                config)


def endless_level(matrix, period, row, n):
    """The level of frame n, where 0 is the first one after the context, in a row of the endless
    matrix. Copy j of `matrix` (a list of rows) starts floor(j * period) rows after copy 0."""
    copy, column = divmod(n, len(matrix[0]))
    start = math.floor(copy * period)  # Python's floats: float32 would be wrong in long rollouts
    row = min(max(row - start, 0), len(matrix) - 1)  # S before its start, 0 after its end
    return matrix[row][column] if n >= 0 else 0


@torch.no_grad()
def roll(model, matrix, num_frames, context, period, actions, solver, generator, config):
    """The loop of `rollout`, split off so that bad arguments raise errors before the first frame:
    matrix is a list of rows, and actions an iterator. The tensors are those of `sample`, but only
    of n frames: those that have started but are not in the state yet. A frame starts, and its
    action is asked for, in the last row in which its level is S (context: in row 0). Before that,
    no frame sees it, and it costs nothing. Once finished, it enters the state in the next call."""
    num_context, S = context.shape[1], matrix[0][0]
    sigmas = karras_sigmas(S, config).to(context)  # (S+1,)
    noise = lambda: randn((len(context), 1, *context.shape[2:]), context, generator)  # (B,1,C,H,W)
    level = lambda row, t: endless_level(matrix, period, row, t - num_context)
    x = eps = D_last = context[:, :0]  # (B,n,C,H,W) each; at first, n = 0
    s_last, acts = sigmas[:0], context.new_empty(len(x), 0, config.action_dim)  # (n,), (B,n,A)
    joined, state = 0, None  # joined: how many frames have started

    for row in itertools.count():
        while joined != num_frames and level(row + 1, joined) < S:  # the next frame starts
            action = next(actions, None)
            if action is None:  # the video ends where its actions end
                num_frames = joined
                break
            if joined < num_context:
                new = context[:, joined : joined + 1]  # (B,1,C,H,W)
                yield new[:, 0].clone()
            else:
                new = sigmas[S] * noise()
            x, D_last = torch.cat([x, new], 1), torch.cat([D_last, new], 1)
            eps, acts = torch.cat([eps, noise()], 1), torch.cat([acts, action[:, None].to(x)], 1)
            s_last = F.pad(s_last, (0, 1), value=math.inf)  # no step was taken yet
            joined += 1

        frames = range(joined - x.shape[1], joined)  # those in the tensors
        now, after = ([level(r, t) for t in frames] for r in (row, row + 1))
        if joined == num_frames and not any(now):  # all are finished
            return
        if now == after:  # nothing changes: no call
            continue

        s, s_next = sigmas[torch.tensor([now, after])]  # (n,) each
        finished = now.count(0)  # these come first, and enter the state in this call
        told = torch.where(s > 0, s, config.in_frame_units(config.context_noise))  # (n,)
        seen = x + per_frame(told - s) * eps  # (B,n,C,H,W)
        D, state = model(seen, told.expand(len(x), -1), state, actions=acts, commit=finished)
        x = solver_step(x, D, D_last, s_last, s, s_next, solver)
        D_last = torch.where(per_frame(s_next < s), D, D_last)
        s_last = torch.where(s_next < s, s, s_last)
        for i in range(finished, after.count(0)):  # finished by this step
            yield x[:, i].clone()
        x, eps, D_last, acts = (each[:, finished:] for each in (x, eps, D_last, acts))
        s_last = s_last[finished:]  # without those that are in the state now


def no_frames(model, batch_size, config):
    """-> a context without frames (B, 0, C, H, W), with the device and type of the weights."""
    weights = next(model.parameters() if isinstance(model, nn.Module) else iter(()), torch.empty(0))
    return weights.new_empty(max(0, batch_size), 0, config.channels, config.height, config.width)


def check_call(matrix, num_frames, context, actions, solver, config, period=None, keyframes={}):
    """Raises ValueError for what `sample` (period is None) or `rollout` cannot do."""
    B, num_context, *size = context.shape
    need(size == [config.channels, config.height, config.width] and context.is_floating_point()
         and B > 0, f"context is {context.dtype} {tuple(context.shape)}, not floats as in Config")
    need(num_frames is None or num_frames >= max(num_context, 1), f"num_frames is {num_frames}; "
         f"it counts the {num_context} frames of context, and is at least 1")
    if torch.is_tensor(actions):
        need(actions.shape[::2] == (B, config.action_dim) and actions.shape[1] >= (num_frames or 1),
             f"actions {tuple(actions.shape)}: ({B}, {num_frames}, {config.action_dim}) is needed")
    need(solver in SOLVERS, f"solver is {solver!r}; it is one of {SOLVERS}")
    whole = matrix.ndim == 2 and matrix.numel() > 0 and not matrix.is_floating_point()
    need(whole and matrix[0].min() == matrix.max() > 0 and matrix[-1].max() == 0
         and (matrix.diff(dim=0) <= 0).all(), "a matrix has integers, rows of S to 0, never rising")
    if period is None:
        need(config.causal or num_frames <= config.window,
             f"{num_frames} frames; a bidirectional model has at most {config.window}, its window")
        need(not config.causal or not keyframes, "keyframes need a bidirectional model")
        for t, x in keyframes.items():
            fits = x.dtype == context.dtype and [*x.shape] == [B, *size]
            need(fits and num_context <= t < num_frames,
                 f"keyframe {t}, {x.dtype} {[*x.shape]}: in or unlike the context, or past the end")
    else:
        need(config.causal, "a bidirectional model keeps no state: take sample, not rollout")
        need(0 < period < math.inf, f"period is {period}; a number above 0 is needed")
        next_copy = matrix[(torch.arange(len(matrix)) - math.floor(period)).clamp(min=0), 0]
        need((matrix.diff(dim=1) >= 0).all() and (next_copy >= matrix[:, -1]).all(),
             "in no row may a frame be cleaner than one before it: take another matrix or, if "
             f"copies clash, a longer period than {period}")


# ==== 8. The denoiser: a small 2-D U-Net. Frames meet only in the mixers that end its blocks. =====
#    Gates: for each value of a frame, the head outputs a guess a and a gate b. Section 3's network
#    is gain (a + b z); z = c_in (x - mu) is its input, gain = sigma_data / sigma, clamped to 1..25.
#    At low sigma, down to sigma_min, D is about mu + (1 + b) (x - mu) + sigma_data a. If a = b = 0,
#    the noisy value is kept; if b = -1, the guess takes its place. Without gates, the noise of each
#    value has to pass through every layer to the output, and this is learned late.

class Denoiser(nn.Module):
    """D(x; sigma): noisy frames and their sigma -> denoised frames, and the next state."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim * m for m in config.dim_mults]
        pairs = list(zip(dims, dims[1:]))
        channels_in = config.channels * config.patch**2
        E = 4 * config.dim  # width of the embedding that tells every block about its frame
        mean = torch.tensor(config.data_mean)[:, None, None]  # (C,1,1)
        self.register_buffer("data_mean", mean, persistent=False)
        self.register_buffer("action_scale", torch.tensor(config.action_scale), persistent=False)
        self.register_buffer("frequency", torch.logspace(-0.5, 1.5, E // 4), persistent=False)
        self.embed_noise = nn.Sequential(nn.Linear(E // 2, E), nn.SiLU(), nn.Linear(E, E))
        self.embed_action = nn.Linear(config.action_dim, E) if config.action_dim else None

        self.stem = nn.Conv2d(channels_in, dims[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(d, d, E, config) for d in dims)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.middle = Block(dims[-1], dims[-1], E, config, attend=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.decoder = nn.ModuleList(Block(2 * d, d, E, config) for d in dims)
        self.head = nn.Sequential(nn.GroupNorm(8, dims[0]), nn.SiLU(), zero(
            nn.Conv2d(dims[0], channels_in * (2 if config.gates else 1), 3, padding=1)))
        self.to(memory_format=torch.channels_last)  # about twice as fast for convolutions

    def forward(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        """x (B, T, C, H, W), sigma (B, T), all above 0 -> D (B, T, C, H, W), state.
        state    what the last call returned, about the frames before x[:, 0]; None: there are none
        commit   how many frames of this call, from its first on, enter the state; None: all
        actions  (B, T, A), [:, t] leads to frame t; NaN: unknown, unlike an action of zeros
        history  for teacher forcing: (x, sigma) of the same frames, with little noise; section 9"""
        self.check(x, sigma, state, actions, commit, history)
        T = x.shape[1]
        commit = T if commit is None else commit
        if history is not None:
            x, sigma = torch.cat([history[0], x], 1), torch.cat([history[1], sigma], 1)  # 2T frames
            actions = None if actions is None else torch.cat([actions, actions], 1)

        *scalings, c_noise = edm_scalings(sigma, self.config.sigma_data)
        c_skip, c_out, c_in = map(per_frame, scalings)
        centred = x - self.data_mean
        z = c_in * centred  # the input of the network; with history, of 2T frames
        out, new_state = self.network(z, c_noise, state, actions, commit, history is not None)
        if self.config.gates:
            a, b = out.chunk(2, 2)  # (B,T,C,H,W) each
            out = per_frame(gain(sigma, self.config.sigma_data)) * (a + b * z)
        D = self.data_mean + c_skip * centred + c_out * out
        return D[:, -T:], (state if commit == 0 else new_state)  # None stays None

    def network(self, x, c_noise, state, actions, commit, two_streams):
        """-> EDM's F, or a and b; the new state. One batch of B*T: only the mixers know of time."""
        B, T = x.shape[:2]
        angle = c_noise[..., None] * self.frequency  # (B,T,E/4)
        emb = self.embed_noise(torch.cat([angle.cos(), angle.sin()], -1))  # (B,T,E)
        if self.embed_action is not None and actions is not None:
            known = actions.isfinite().all(-1, keepdim=True)  # (B,T,1)
            actions = torch.where(known, actions, 0)
            emb = emb + known * self.embed_action(actions / self.action_scale)  # (B,T,E)
        emb = F.silu(emb).flatten(0, 1)  # (BT,E)

        depth = len(self.encoder)
        old = [None] * (2 * depth + 1) if state is None else state  # one for each block
        skips, new = [], list(old)
        pattern = self.middle.mixer.pattern(T, old[depth], two_streams, x.device)
        h = F.pixel_unshuffle(x.flatten(0, 1), self.config.patch)  # (BT, C*p*p, H/p, W/p)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        for i in range(depth):
            h = self.down[i - 1](h) if i > 0 else h
            h, new[i] = self.encoder[i](h, emb, B, old[i], commit, pattern)
            skips.append(h)
        h, new[depth] = self.middle(h, emb, B, old[depth], commit, pattern)
        for i in reversed(range(depth)):  # decoder i mirrors encoder i
            h = torch.cat([h, skips[i]], 1)
            h, new[-1 - i] = self.decoder[i](h, emb, B, old[-1 - i], commit, pattern)
            h = self.up[i - 1](h) if i > 0 else h
        with torch.autocast(x.device.type, enabled=False):  # gain multiplies rounding errors
            h = F.pixel_shuffle(self.head(h.to(x.dtype)), self.config.patch)  # (BT, C or 2C, H, W)
        return h.unflatten(0, (B, T)), tuple(new)

    def check(self, x, sigma, state, actions, commit, history):
        """Raises ValueError for what does not fit."""
        (B, T), c = x.shape[:2], self.config
        need(x.shape[2:] == (c.channels, c.height, c.width) and sigma.shape == (B, T)
             and (actions is None or actions.shape == (B, T, c.action_dim)),
             f"x {tuple(x.shape)}, sigma or actions do not fit Config, or each other")
        need(commit is None or 0 <= commit <= T, f"commit is {commit}; 0 to {T} is needed")
        need(history is None or (c.causal and state is None), "history: a causal model, no state")
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would wait
            need((sigma > 0).all(), "sigma must be above 0: the network is told its logarithm")


class Block(nn.Module):
    """A residual block in space, attention in space (middle block only), a mixer in time."""

    def __init__(self, dim_in, dim_out, E, config, attend=False):
        super().__init__()
        self.spatial = ResBlock(dim_in, dim_out, E)
        self.attend = SpatialAttention(dim_out, config.head_dim) if attend else nn.Identity()
        self.norm = nn.LayerNorm(dim_out)
        self.mixer = MIXERS[config.temporal](dim_out, config)

    def forward(self, x, emb, B, state, commit, pattern):
        h = self.attend(self.spatial(x, emb))  # (BT,C,h,w)
        BT, C, height, width = h.shape
        z = h.permute(0, 2, 3, 1).reshape(B, BT // B, height * width, C)  # (B,T,hw,C)
        z = self.norm(z).transpose(1, 2).flatten(0, 1)  # (B*hw,T,C): one sequence for each pixel
        z, state = self.mixer(z, state, commit, pattern)
        z = z.unflatten(0, (B, height * width)).transpose(1, 2)  # (B,T,hw,C)
        return h + z.reshape(BT, height, width, C).permute(0, 3, 1, 2), state


# ==== 9. Temporal mixers: in them, and only in them, frames meet. ================================
#    Mixer(dim, config) works on N sequences: one for each pixel of each clip. forward(x (N, T, C),
#    state, commit, pattern) -> (N, T, C), and the state after `commit` frames (0: the old one).
#    pattern(T, state, two_streams, device) -> what forward needs to know of time, made once for all
#    blocks. Streaming: 16 frames in one call, or 5, then 1, then 10, give equal results. With
#    two_streams (teacher forcing, no state), x is [history | the same frames, noisy]: a frame of
#    either half sees itself, and the history before it. A CUDA kernel gets at most MOST
#    sequences. A third mixer also needs causal_only, an `out` that starts at zero, a state of
#    bounded size (cloned: a view would keep all frames alive) and its name in MIXERS.

class TemporalAttention(nn.Module):
    """Banded attention: a frame sees the last `window` frames, itself included (bidirectional: as
    many ahead, too). Through n mixers in a row, it can know of n (window - 1) of them.
    State: keys (before rotation) and values of the last frames, (N, heads, < window, d) each."""
    causal_only = False

    def __init__(self, dim, config):
        super().__init__()
        self.head_dim, self.window, self.causal = config.head_dim, config.window, config.causal
        # The bias of qkv is a constant part of q and k. Once rotated, the product of these parts
        # depends on the distance in time alone: a head can look "n frames back", whatever is there.
        self.qkv = nn.Linear(dim, 3 * dim)  # q, then k, then v, each of them head by head
        self.out = zero(nn.Linear(dim, dim))

    def pattern(self, T, state, two_streams, device):
        """-> sees (T, keys), which query sees which key; cos and sin (keys, d), float32, of the
        angles by which keys turn (RoPE, arXiv 2104.09864), as `rotary` takes them. From frame to
        frame, pair i of channels turns by pi/2 1000^(-i / (d/2)). The queries are the last keys."""
        keys = T if state is None else T + state[0].shape[2]
        times = T // 2 if two_streams else keys  # two streams: the same times twice
        position = torch.arange(keys, device=device) % times  # from the oldest key: it never grows
        ago = position[-T:, None] - position  # (T,keys): how many frames back a key is
        sees = (ago < self.window) & (ago >= 0 if self.causal else ago > -self.window)
        if two_streams:
            key_is_history = torch.arange(keys, device=device) < times  # (keys,)
            itself = torch.eye(T, dtype=torch.bool, device=device)
            sees = (sees & key_is_history & (ago > 0)) | itself
        pair = torch.arange(self.head_dim // 2, device=device) / (self.head_dim // 2)  # 0 to < 1
        angle = position[:, None] * (math.pi / 2 * 1000.0**-pair)  # (keys,d/2)
        return sees, angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], -1)

    def forward(self, x, state, commit, pattern):
        N, T, C = x.shape
        qkv = self.qkv(x).view(N, T, 3, C // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N,heads,T,d) each
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)  # (N,heads,keys,d) each
        if commit > 0:
            end = k.shape[2] - T + commit
            keep = slice(max(0, end - self.window + 1), end)  # all that the next frame may see
            state = k[:, :, keep].clone(), v[:, :, keep].clone()

        sees, cos, sin = pattern
        q, k = rotary(q, cos[-T:], sin[-T:]), rotary(k, cos, sin)
        parts = zip(q.split(MOST), k.split(MOST), v.split(MOST))
        y = torch.cat([F.scaled_dot_product_attention(*part, attn_mask=sees) for part in parts])
        return self.out(y.transpose(1, 2).reshape(N, T, C)), state


def rotary(x, cos, sin):
    """Turns pairs of channels of x (N, heads, T, d), a of its first half and b of its second, to
    (a cos - b sin, b cos + a sin), of the type of x. The first half of `sin` has its minus."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class TemporalGRU(nn.Module):
    """A GRU at every pixel, like the paper's recurrent model. State: the hidden state, (N, C)."""
    causal_only = True

    def __init__(self, dim, config):
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.out = zero(nn.Linear(dim, dim))

    def pattern(self, T, state, two_streams, device):
        return two_streams

    # Autocast runs cuDNN's GRU in float16, even where bfloat16 is asked for, and that underflows.
    @torch.autocast("cuda", enabled=False)
    def forward(self, x, state, commit, two_streams):
        N, _, C = x.shape
        first = x.new_zeros(N, C) if state is None else state
        clean, noisy = x.chunk(2, 1) if two_streams else (x, None)  # (N,T,C) each
        hidden = self.run(clean, first)  # (N,T,C)
        if commit > 0:
            state = hidden[:, commit - 1].clone()
        if two_streams:  # one step for each noisy frame, from the clean ones before it
            before = torch.cat([first[:, None], hidden[:, :-1]], 1)  # (N,T,C)
            step = self.run(noisy.reshape(-1, 1, C), before.reshape(-1, C))  # (NT,1,C)
            hidden = torch.cat([hidden, step.view_as(hidden)], 1)  # (N,2T,C)
        return self.out(hidden), state

    def run(self, x, hidden):
        """x (N, T, C), the hidden state before it (N, C) -> the one after each frame (N, T, C)."""
        if len(x) > MOST:
            return torch.cat([self.run(*part) for part in zip(x.split(MOST), hidden.split(MOST))])
        return self.gru(x, hidden[None])[0]


MIXERS = {"attention": TemporalAttention, "gru": TemporalGRU}
MOST = 65_535  # sequences that CUDA's kernels take in one call


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
    """Every pixel of a frame sees every other."""

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


# ==== 11. Checkpoints: what is at `path` is always whole. ========================================

@contextmanager
def atomic_write(path):
    """-> a path of this process alone. It takes the place of `path` at the end, or is removed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, config, weights, **extra):
    """Writes config, weights (a state dict) and extras. If it fails, what was there stays."""
    data = io.BytesIO()
    torch.save({"version": VERSION, "config": asdict(config), "weights": weights, **extra}, data)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.getbuffer())


def load_checkpoint(path, device="cpu"):
    """-> the Denoiser in eval mode, and a dict of all else in the file. Executes nothing from the
    file. Raises OSError, or ValueError for a file that is not such a checkpoint."""
    try:
        extra = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = extra.pop("config"), extra.pop("weights")
        version = extra.pop("version", 1)  # the first one had no number
        if version == VERSION:
            model = Denoiser(Config(**config))
            model.load_state_dict(weights)
    except OSError:
        raise
    except Exception as error:  # whatever a foreign or damaged file provokes
        raise ValueError(f"{path} is damaged or of another program") from error
    need(version == VERSION, f"{path} has version {version}; {VERSION} is needed: train it anew")
    return model.to(device).eval(), extra
