"""Diffusion Forcing for video: the whole method in one file.

The idea (Chen et al., NeurIPS 2024, https://arxiv.org/abs/2407.01392) in five lines:
  1. Noise is masking: a frame without noise is known, a frame of pure noise is not.
  2. Give every frame of a clip its own, independent noise level, and train a network that is
     causal in time to denoise them all. It then knows every mixture of known and unknown frames,
  3. so when sampling you choose the mixture: a matrix of levels, a row a step, a column a frame.
  4. "Frame after frame", "all frames together" and all between them are just different matrices.
  5. Finished frames enter the network's memory with a little noise: a rollout can go on for ever.

Noise levels of three training clips, and three matrices to sample with (S = 4 steps a frame):

    sigma of frame 0, 1, 2 ...      autoregressive    pyramid, u = 2    full sequence
    .31  2.4  .08  .90  .02  17.       4 4 4 4           4 4 4 4           4 4 4 4      time
    .75  .11  5.0  .04  1.2  .46       3 4 4 4           3 4 4 4           3 3 3 3       |
    .05  .62  .19  31.  .33  .07       2 4 4 4           2 4 4 4           2 2 2 2       |
                                       1 4 4 4           1 3 4 4           1 1 1 1       |
                                       0 4 4 4           0 2 4 4           0 0 0 0       v
                                       0 3 4 4           0 1 3 4
                                         ...               ...

Glossary
  B, T, C, H, W   batch, frames, channels, height, width; always in this order
  t               a frame of the clip, never a diffusion time
  x               frames, float in [-1, 1]; noisy frames are x + sigma * standard normal noise
  sigma  (B, T)   noise level of each frame, in the units of the frames
  D               the denoiser, D(x; sigma) = E[clean frame | noisy frames up to and including it]
  S, k            number of sampling steps; a level k in 0..S, 0 = clean, S = sigma_max
  K  (M+1, T)     scheduling matrix: K[m, t] is the level of frame t before step m
  state           what the network keeps of finished frames: keys and values, or a hidden state

Departures from the paper: EDM's noise levels, preconditioning, weighting and deterministic steps
(Karras et al., arXiv 2206.00364) in place of discrete DDPM ones; on top of that, learned weights
(ExpectedLoss), and steps of second order that know the step before (DPM-Solver++); attention with
a cache as a second choice beside a GRU, which here runs at every location of the U-Net (the paper:
a convolutional GRU); rows of the matrix in the order of sampling; the noise on finished frames is
really added.

Does not include: latent autoencoders, text conditioning, guidance, discrete noise schedules.

Read on from top to bottom: the method comes first, the network after it.
"""

import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# -------------------------------------------------------------------------------------------------
# 1. Config: all that training, sampling and network must agree on. It travels in the checkpoint.

FORCINGS = ("diffusion", "full_sequence", "teacher")
SCHEDULES = ("autoregressive", "pyramid", "full_sequence")
SOLVERS = ("euler", "multistep")


@dataclass
class Config:
    """Sizes, network and noise. Raises ValueError, with the numbers, for what cannot work."""

    height: int = 32
    width: int = 32
    channels: int = 3
    action_dim: int = 0              # numbers a frame that say what led to it; 0 = no actions
    clip_frames: int = 16            # T in training; rollouts go far beyond

    temporal: str = "attention"      # where frames meet: "attention" or "gru"
    causal: bool = True              # False: frames also see later ones; streaming is not exact
    window: int = 16                 # attention: a frame sees this many frames, itself included
    patch: int = 2                   # pixel-unshuffle: the U-Net works at 1/patch resolution
    dim: int = 32                    # channels at the highest resolution ...
    dim_mults: tuple = (1, 2)        # ... and their multiples at each level, half as large each
    head_dim: int = 16               # channels of one attention head

    sigma_data: float = 0.5          # standard deviation of the training frames, measured
    data_mean: tuple = ()            # their mean, a number a channel, measured; () = zeros
    action_scale: tuple = ()         # root mean square of each action, measured; () = ones
    P_mean: float = -0.6             # training noise: ln sigma ~ Normal(P_mean, P_std^2), so wide
    P_std: float = 2.4               # that several nearly clean frames in a row are not rare
    sigma_min: float = 0.02          # sampling noise: from sigma_max to sigma_min, then 0
    sigma_max: float = 80.0
    rho: float = 7.0                 # EDM: how much denser the levels are near sigma_min
    context_noise: float = 0.05      # on every frame that enters the network's memory

    def __post_init__(self):
        self.dim_mults = tuple(self.dim_mults)
        self.data_mean = tuple(float(m) for m in self.data_mean) or (0.0,) * self.channels
        self.action_scale = tuple(float(a) for a in self.action_scale) or (1.0,) * self.action_dim
        for name in ("height", "width", "channels", "clip_frames", "window", "patch", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.dim_mults or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"dim_mults {self.dim_mults}, head_dim {self.head_dim}: at least one "
                             "level and an even head_dim are needed")
        multiple = self.patch * 2 ** (len(self.dim_mults) - 1)
        dims = [self.dim * m for m in self.dim_mults]
        for ok, message in (
            (self.height % multiple == 0 and self.width % multiple == 0,
             f"frames of {self.height}x{self.width}: multiples of {multiple} are needed "
             f"(patch {self.patch}, {len(dims)} levels)"),
            (self.temporal in ("attention", "gru"),
             f"temporal is {self.temporal!r}; 'attention' or 'gru' is needed"),
            (self.causal or self.temporal == "attention", "a GRU is always causal"),
            (all(d % 8 == 0 and d % self.head_dim == 0 for d in dims),
             f"channels {dims}: multiples of 8 and of head_dim {self.head_dim} are needed"),
            (len(self.data_mean) == self.channels,
             f"data_mean has {len(self.data_mean)} numbers for {self.channels} channels"),
            (len(self.action_scale) == self.action_dim and all(a > 0 for a in self.action_scale),
             f"action_scale {self.action_scale}: {self.action_dim} positive numbers are needed"),
            (self.sigma_data > 0, f"sigma_data is {self.sigma_data}; it must be positive"),
            (self.context_noise > 0,
             f"context_noise is {self.context_noise}; it must be positive: labels are logarithms"),
            (0 < self.sigma_min < self.sigma_max,
             f"sigma_min {self.sigma_min} must lie between 0 and sigma_max {self.sigma_max}"),
        ):
            if not ok:
                raise ValueError(message)

    def in_frame_units(self, sigma):
        """The levels above are stated for data of standard deviation 0.5, as in EDM. Here, and
        nowhere else, they are scaled to the data at hand."""
        return sigma * self.sigma_data / 0.5


# -------------------------------------------------------------------------------------------------
# 2. Noise: one independent level for every frame. These lines make it Diffusion Forcing.


def sample_noise_levels(batch_size, num_frames, config, forcing="diffusion", generator=None):
    """Noise levels for training, ln sigma ~ Normal(P_mean, P_std^2) -> (B, T) in frame units.

    forcing "diffusion" and "teacher": one level a frame, independent of all others (paper,
    Algorithm 1); "full_sequence": one a clip. Drawn on the generator's device. Raises ValueError
    for any other forcing.
    """
    if forcing not in FORCINGS:
        raise ValueError(f"forcing is {forcing!r}; one of {', '.join(FORCINGS)} is needed")
    shape = (batch_size, 1 if forcing == "full_sequence" else num_frames)
    device = generator.device if generator else None
    normal = torch.randn(shape, generator=generator, device=device)
    sigma = config.in_frame_units((config.P_mean + config.P_std * normal).exp())
    return sigma.expand(batch_size, num_frames)


def randn(shape, like, generator=None):
    """Standard normal noise on the device and of the type of `like`, wherever the generator is."""
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def per_frame(v):
    """(..., T) -> (..., T, 1, 1, 1): one number a frame, ready to multiply frames with."""
    return v[..., None, None, None]


# -------------------------------------------------------------------------------------------------
# 3. EDM preconditioning and weighting (arXiv 2206.00364, Table 1), F being the network:
#
#    D(x; sigma) = mu + c_skip (x - mu) + c_out F(c_in (x - mu); c_noise)
#
#    What F gets and what it is asked for have unit variance at every sigma: at low noise it
#    predicts minus the noise, at high noise the frame. mu is the mean of the data (in EDM: 0).


def edm_scalings(sigma, sigma_data):
    """-> c_skip, c_out, c_in, c_noise, each of sigma's shape (EDM, Table 1; the label c_noise is
    relative to sigma_data)."""
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = (sigma / sigma_data).log() / 4
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma, sigma_data):
    """lambda(sigma) = 1 / c_out^2: a network that says 0 has loss 1 at every noise level (EDM,
    Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


# -------------------------------------------------------------------------------------------------
# 4. The training loss (paper, Algorithm 1).


def diffusion_forcing_loss(model, x, config, *, sigma=None, forcing="diffusion", actions=None,
                           generator=None, history_noise=None, expected_loss=None):
    """Weighted denoising loss of clips x (B, T, C, H, W) -> scalar. Algorithm 1 of the paper.

    `forcing` selects the paradigm, and nothing else changes:
      "diffusion"      every frame has noise of its own, and is predicted from itself and its past;
      "full_sequence"  ordinary video diffusion: one noise level for the whole clip;
      "teacher"        next-frame prediction: the past that a frame sees is clean but for
                       `history_noise` (default config.context_noise), which is really added.
    sigma (B, T) replaces the random levels. actions (B, T, A): row t drives the change into t.
    With an ExpectedLoss, a frame's loss counts as loss / exp(u) + u, exp(u) being what its levels
    and those of its past let expect.
    """
    B, T = x.shape[:2]
    drawn = sample_noise_levels(B, T, config, forcing, generator).to(x)
    sigma = drawn if sigma is None else sigma
    noisy = x + per_frame(sigma) * randn(x.shape, x, generator)
    history, past_sigma = None, sigma  # past_sigma: how noisy a frame sees those before it
    if forcing == "teacher":
        level = config.context_noise if history_noise is None else history_noise
        past_sigma = torch.full_like(sigma, config.in_frame_units(level))
        history = (x + per_frame(past_sigma) * randn(x.shape, x, generator), past_sigma)
    # commit=0: nothing follows a training clip, so that no state is kept
    denoised, _ = model(noisy, sigma, actions=actions, commit=0, history=history)
    loss = per_frame(loss_weight(sigma, config.sigma_data)) * (denoised - x) ** 2
    loss = loss.mean((2, 3, 4))  # (B,T)
    if expected_loss is not None:  # least where exp(u) is the mean loss, whatever the denoiser
        u = expected_loss(sigma, past_sigma)
        loss = loss / u.exp() + u
    return loss.mean()


class ExpectedLoss(nn.Module):
    """u: the logarithm of the loss to expect of each frame, (B, T), from its level sigma (B, T) and
    past_sigma (B, T), those at which it sees the frames before it. Learned beside the denoiser, and
    needed in training only.

    Low noise, or a past that is nearly clean, makes a frame a hundred times easier than a noisy one
    after noisy ones. The sum of such losses would be all about the hopeless cases, and rollouts are
    made of the others. Divided by what is expected of it, every mixture of levels counts the same,
    and the optimal denoiser remains what it was (EDM2, arXiv 2312.02696, where u knows the frame's
    own level alone; Kendall et al., arXiv 1705.07115).
    """

    def __init__(self, config, past=4, width=64):
        super().__init__()
        self.config, self.past = config, past
        self.layers = nn.Sequential(nn.Linear(past + 1, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(),
                                    zero(nn.Linear(width, 1)))  # begins as no change: u = 0

    def forward(self, sigma, past_sigma):
        nothing = self.config.in_frame_units(self.config.sigma_max)  # before frame 0: pure noise
        past = F.pad(past_sigma, (self.past, 0), value=nothing)[:, :-1].unfold(1, self.past, 1)
        levels = torch.cat([past, sigma[..., None]], -1)  # (B,T,past+1), the frame's own at the end
        *_, c_noise = edm_scalings(levels, self.config.sigma_data)
        with torch.autocast(sigma.device.type, enabled=False):
            return self.layers(2 * c_noise)[..., 0]  # times 2: about unit variance


# -------------------------------------------------------------------------------------------------
# 5. Scheduling matrices (paper, section 3.3): how noisy each frame is at each step of sampling.


def karras_sigmas(num_steps, config):
    """-> (S+1,) sigma of level k, in frame units: [0] = 0, [1] = sigma_min, [S] = sigma_max (EDM,
    eq. 5, in increasing order). A single step starts at sigma_max."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    sigmas = torch.linspace(high, low, num_steps).flip(0) ** config.rho
    return config.in_frame_units(torch.cat([torch.zeros(1), sigmas]))


def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0):
    """-> int64 (M+1, T), K[m, t] = clip(S + floor(u t) - m, 0, S): a frame comes down S levels,
    one a row, and starts u rows after the frame before it.

      "full_sequence"   u = 0: all frames come down together
      "autoregressive"  u = S: a frame starts when the one before it is done
      "pyramid"         u = `uncertainty`: near frames settle while far ones are still uncertain
    Raises ValueError for another kind, less than a frame or a step, or an uncertainty below 0.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule is {kind!r}; one of {', '.join(SCHEDULES)} is needed")
    if num_frames < 1 or num_steps < 1 or not 0 <= uncertainty < math.inf:
        raise ValueError(f"{num_frames} frames, {num_steps} steps, uncertainty {uncertainty}: "
                         "at least 1 frame and 1 step are needed, and no uncertainty below 0")
    u = {"full_sequence": 0, "autoregressive": num_steps, "pyramid": uncertainty}[kind]
    start = torch.tensor([math.floor(u * t) for t in range(num_frames)])  # (T,) when t starts
    m = torch.arange(num_steps + int(start[-1]) + 1)  # (M+1,)
    return (num_steps + start - m[:, None]).clamp(0, num_steps)


# -------------------------------------------------------------------------------------------------
# 6. Sampling and rollout (paper, Algorithm 2).


def sample(model, matrix, context=None, **options):
    """The matrix once, from `context` on -> (B, T_context + matrix.shape[1], C, H, W). Takes the
    options of rollout."""
    num_frames = matrix.shape[1] + (0 if context is None else context.shape[1])
    return torch.stack(list(rollout(model, matrix, num_frames, context, **options)), 1)


def rollout(model, matrix, num_frames, context=None, *, config=None, batch_size=1, actions=None,
            solver="euler", generator=None, device=None, dtype=None):
    """After Algorithm 2 of the paper -> iterator over num_frames frames (B, C, H, W), those of the
    context first, each as soon as it is finished. The matrix is laid along time again and again,
    the last time cut to length; memory and the cost of a frame do not grow.

    model    anything that is called like Denoiser.forward; config defaults to model.config
    matrix   (M+1, T) int levels from S (first row) to 0 (last row); S is its maximum
    context  (B, T_context, C, H, W) frames to go on from, or None: batch_size clips from nothing
    actions  (B, num_frames or more, A): row t drives the change into frame t
    solver   "euler", or "multistep", which is of second order and as cheap
    Raises ValueError for a matrix that does not come down from S to 0 or, with a causal model, has
    a frame cleaner than one before it; for a context of another size; for too few actions.
    """
    config = config or model.config
    check_rollout(matrix, num_frames, context, config, actions, solver)
    if context is None:
        weights = model.parameters() if isinstance(model, nn.Module) else iter(())
        like = next(weights, torch.empty(0))
        context = like.new_empty(batch_size, 0, config.channels, config.height, config.width)
    context = context.to(device=device, dtype=dtype)
    return roll(model, matrix.cpu(), num_frames, context, config, actions, solver, generator)


@torch.no_grad()
def roll(model, matrix, num_frames, context, config, actions, solver, generator):
    """The loop of rollout. x holds the frames not yet in the state: finished ones, then a tile."""
    S = int(matrix.max())
    sigmas = karras_sigmas(S, config).to(context)  # (S+1,), and at level S + 1, for "no level":
    sigmas = torch.cat([sigmas, sigmas.new_tensor([math.inf])])

    def noise(n):  # drawn frame by frame, so that neither tile nor num_frames change a frame's
        shape = (len(context), *context.shape[2:])
        frames = [randn(shape, context, generator) for _ in range(n)]
        return torch.stack(frames, 1) if n else context[:, :0]

    x, state, first = context, None, 0  # x[:, 0] is frame `first`
    eps = noise(x.shape[1])  # what each frame will carry as history, times context_noise
    yield from context.clone().unbind(1)  # copies, here and below: the caller may paint on them
    while first + x.shape[1] < num_frames:
        old, n = x.shape[1], min(matrix.shape[1], num_frames - first - x.shape[1])
        # two draws a frame, one after the other: what it starts from, what it carries as history
        start, history = noise(2 * n).unflatten(1, (n, 2)).unbind(2)  # (B,n,C,H,W) each
        x, eps = torch.cat([x, sigmas[S] * start], 1), torch.cat([eps, history], 1)
        K = torch.cat([matrix.new_zeros(len(matrix), old), matrix[:, :n]], 1)
        entered, shown = 0, old  # how many of x are in the state; have been given out
        D = torch.zeros_like(x)  # what each frame was denoised to in its last step
        for now, then in zip(K[:-1], K[1:]):
            if torch.equal(now, then):
                continue
            finished = int((now == 0).cumprod(0).sum())  # zeros in front: these enter the state
            started = int((then < S).nonzero().max()) + 1  # later ones are pure noise: no use
            live = slice(entered, started)
            # the level each frame came from: as levels never rise, the lowest above `now` in its
            # column; S + 1 if it has not moved yet, or if nobody will ask: Euler takes no look back
            before = torch.where((K > now) & (solver == "multistep"), K, S + 1).amin(0)
            a = None if actions is None else actions[:, first + entered : first + started].to(x)
            x[:, live], D[:, live], state = step(
                model, x[:, live], D[:, live], eps[:, live], before[live], now[live], then[live],
                sigmas, config, state, finished - entered, a)
            entered = finished
            while shown < len(then) and then[shown] == 0:
                yield x[:, shown].clone()
                shown += 1
        x, eps, first = x[:, entered:], eps[:, entered:], first + entered


def step(model, x, D_last, eps, before, now, then, sigmas, config, state, commit, actions):
    """Takes frames x (B, n, C, H, W) from levels `now` (n,) to levels `then` -> x, D, state.

    The first `commit` frames are finished and enter the state in the same call. Finished frames
    are shown with their one draw of context noise, and the label says so: what the network is told
    is what it is given. D_last, before: what frames were denoised to in their last step, from which
    level; S + 1 says that there was none: its sigma is infinite, so that `ahead` is 0, as in Euler.
    """
    before, now, then = torch.stack([before, now, then]).to(x.device)  # one copy, not three
    s_last, s, s_next = sigmas[before], sigmas[now], sigmas[then]  # (n,) each
    history_sigma = config.in_frame_units(config.context_noise)
    seen = torch.where(per_frame(now == 0), x + history_sigma * eps, x)
    label = torch.where(now == 0, history_sigma, s).expand(len(x), -1)
    D, state = model(seen, label, state, actions=actions, commit=commit)
    # Euler: x + (s_next - s) dx/dsigma, where dx/dsigma = (x - D) / s, written so that it ends on D
    # at 0. Multistep (DPM-Solver++(2M), arXiv 2211.01095): with D as it will be halfway through the
    # step, on the line, in log sigma, from the last D to this one. A step to 0 has no halfway.
    ahead = torch.where(s_next > 0, (s / s_next).log() / 2 / (s_last / s).log(), 0)
    halfway = D + per_frame(ahead) * (D - D_last)
    x_next = halfway + per_frame(s_next / s) * (x - halfway)
    moves = per_frame(now != then)  # a level that is held holds every bit
    return torch.where(moves, x_next, x), torch.where(moves, D, D_last), state


def check_rollout(matrix, num_frames, context, config, actions, solver):
    """Raises ValueError, in one line, for what rollout cannot do."""
    size = (config.channels, config.height, config.width)
    given = 0 if context is None else context.shape[1]
    for wrong, message in (
        (solver not in SOLVERS, f"solver is {solver!r}; one of {', '.join(SOLVERS)} is needed"),
        (matrix.max() < 1 or (matrix[0] != matrix.max()).any() or (matrix[-1] != 0).any()
         or (matrix.diff(dim=0) > 0).any(),
         "a scheduling matrix starts with a row of S, ends with a row of 0, and never rises"),
        (config.causal and (matrix.diff(dim=1) < 0).any(),
         "levels may not decrease along a row: a causal model never uses a frame that is cleaner "
         "than those before it"),
        (context is not None and tuple(context.shape[2:]) != size,
         f"context frames of another size than {size}"),
        (num_frames < max(given, 1), f"num_frames is {num_frames}; it counts the {given} frames "
         "of context and is at least 1"),
        (actions is not None and (actions.shape[1] < num_frames
                                  or actions.shape[2:] != (config.action_dim,)),
         f"{num_frames} frames need as many rows of {config.action_dim} actions"),
    ):
        if wrong:
            raise ValueError(message)


# -------------------------------------------------------------------------------------------------
# 7. The denoiser: a small 2-D U-Net over frames. Every block ends with a temporal mixer, the only
#    place where frames meet.


class Denoiser(nn.Module):
    """D(x; sigma): noisy frames and their levels -> denoised frames, and the next state."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim * m for m in config.dim_mults]
        pixels = config.channels * config.patch**2
        width = 4 * config.dim  # of the embedding that tells every block about its frame
        mean = torch.tensor(config.data_mean)[:, None, None]
        self.register_buffer("data_mean", mean, persistent=False)
        scale = torch.tensor(config.action_scale)
        self.register_buffer("action_scale", scale, persistent=False)
        self.embed_noise = NoiseEmbedding(width)
        self.embed_action = nn.Linear(config.action_dim, width) if config.action_dim else None
        self.stem = nn.Conv2d(pixels, dims[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(d, d, width, config) for d in dims)
        pairs = list(zip(dims, dims[1:]))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.middle = Block(dims[-1], dims[-1], width, config, spatial_attention=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.decoder = nn.ModuleList(Block(2 * d, d, width, config) for d in dims)
        self.head = nn.Sequential(nn.GroupNorm(8, dims[0]), nn.SiLU(),
                                  zero(nn.Conv2d(dims[0], pixels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)  # about twice as fast for convolutions

    def forward(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        """x (B, T, C, H, W), sigma (B, T) -> denoised (B, T, C, H, W), state.

        state    what the last call returned, for the frames before x[:, 0]; None: there are none
        commit   the state moves on by the first `commit` frames of this call; None: by all of
                 them; 0: it comes back as it was
        actions  (B, T, A); None: zeros
        history  (x_clean (B, T, C, H, W), sigma_clean (B, T)), for teacher forcing: frame t sees
                 itself and the clean frames before t. All T predictions in one pass.
        """
        T = x.shape[1]
        if history is not None:
            if state is not None or not self.config.causal:
                raise ValueError("history needs a causal denoiser that starts without a state")
            x, sigma = torch.cat([history[0], x], 1), torch.cat([history[1], sigma], 1)  # 2T frames
            commit = T if commit is None else commit  # clean ones: they come first
            actions = None if actions is None else torch.cat([actions, actions], 1)
        *scalings, c_noise = edm_scalings(sigma, self.config.sigma_data)
        c_skip, c_out, c_in = map(per_frame, scalings)
        centred = x - self.data_mean
        out, new_state = self.network(c_in * centred, c_noise, state, actions, commit,
                                      two_streams=history is not None)
        denoised = self.data_mean + c_skip * centred + c_out * out
        return denoised[:, -T:], state if commit == 0 else new_state

    def network(self, x, c_noise, state, actions, commit, two_streams):
        """F of EDM. All frames go through it as a batch of B*T; only the mixers know of time."""
        B, T = x.shape[:2]
        emb = self.embed_noise(c_noise)  # (B,T,E)
        if self.embed_action is not None:
            none = emb.new_zeros(B, T, self.config.action_dim)
            emb = emb + self.embed_action(none if actions is None else actions / self.action_scale)
        emb = F.silu(emb).flatten(0, 1)  # (BT,E)
        new = []

        def run(block, h):  # blocks run in a fixed order: that is the order of their states
            old = None if state is None else state[len(new)]
            h, block_state = block(h, emb, B, old, commit, two_streams)
            new.append(block_state)
            return h

        h = F.pixel_unshuffle(x.flatten(0, 1), self.config.patch)  # (BT, C*p*p, H/p, W/p)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, block in enumerate(self.encoder):
            h = run(block, self.down[level - 1](h) if level else h)
            skips.append(h)
        h = run(self.middle, h)
        for level in reversed(range(len(skips))):
            h = run(self.decoder[level], torch.cat([h, skips[level]], 1))
            h = self.up[level - 1](h) if level else h
        h = F.pixel_shuffle(self.head(h), self.config.patch)  # (BT,C,H,W)
        return h.unflatten(0, (B, T)), tuple(new)


class Block(nn.Module):
    """Residual block in space, attention in space (lowest level only), then a mixer in time."""

    def __init__(self, dim_in, dim_out, width, config, spatial_attention=False):
        super().__init__()
        self.spatial = ResBlock(dim_in, dim_out, width)
        self.attend = SpatialAttention(dim_out, config.head_dim) if spatial_attention else None
        self.norm = nn.LayerNorm(dim_out)
        if config.temporal == "attention":
            self.mixer = TemporalAttention(dim_out, config.head_dim, config.window, config.causal)
        else:
            self.mixer = TemporalGRU(dim_out)

    def forward(self, x, emb, B, state, commit, two_streams):
        h = self.spatial(x, emb)  # (BT,C,h,w)
        if self.attend is not None:
            h = self.attend(h)
        BT, C, height, width = h.shape
        z = h.permute(0, 2, 3, 1).reshape(B, BT // B, height * width, C)
        z = self.norm(z).transpose(1, 2).flatten(0, 1)  # (B*hw, T, C): a sequence per location
        z, state = self.mixer(z, state, commit, two_streams)
        z = z.unflatten(0, (B, height * width)).transpose(1, 2)  # (B,T,hw,C)
        return h + z.reshape(BT, height, width, C).permute(0, 3, 1, 2), state


# -------------------------------------------------------------------------------------------------
# 8. Temporal mixers: x (N, T, C) -> (N, T, C), and the state after the first `commit` frames.
#    Feeding 16 frames at once, or 5, then 1, then 10 with the state handed on: the same numbers.
#
#    two_streams (teacher forcing): x is [clean frames | the same frames, noisy]. A clean frame
#    sees the clean frames up to itself; a noisy one sees the clean frames before it, and itself.


class TemporalAttention(nn.Module):
    """Banded causal attention: a frame sees the last `window` frames, itself included. State: keys
    (before rotation) and values of the last window - 1 frames, (N, heads, window - 1, d) each."""

    def __init__(self, dim, head_dim, window, causal=True):
        super().__init__()
        self.head_dim, self.window, self.causal = head_dim, window, causal
        # The bias is a constant in q and k. Once rotated, it depends on their distance in time
        # alone, so that a head can look "n frames back", whatever the frames show.
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        qkv = self.qkv(x).view(N, T, 3, C // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N,heads,T,d) each
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        new_state = state
        if commit != 0 and self.window > 1:
            end = k.shape[2] - T + (T if commit is None else commit)
            keep = slice(max(0, end - self.window + 1), end)
            new_state = k[:, :, keep].clone(), v[:, :, keep].clone()  # a view would keep it all
        position = torch.arange(k.shape[2], device=x.device)  # from the oldest key: never grows
        if two_streams:
            position = position % (T // 2)
        mask = self.mask(position[-T:], position, two_streams)
        cos, sin = rotation(position, self.head_dim)
        q, k = rotary(q, cos[-T:], sin[-T:]), rotary(k, cos, sin)
        # CUDA's attention kernels put the batch on a grid axis that ends at 65,535.
        parts = zip(q.split(65535), k.split(65535), v.split(65535))
        y = [F.scaled_dot_product_attention(*part, attn_mask=mask) for part in parts]
        y = y[0] if len(y) == 1 else torch.cat(y)
        return self.out(y.transpose(1, 2).reshape(N, T, C)), new_state

    def mask(self, query, key, two_streams):
        """Positions of queries and keys -> bool (queries, keys), True = sees."""
        ago = query[:, None] - key
        band = (ago < self.window) & (ago >= 0 if self.causal else ago > -self.window)
        if two_streams:
            T = len(query) // 2
            sees, same = band[:T, :T], ago[:T, :T] == 0
            clean = torch.cat([sees, torch.zeros_like(sees)], 1)
            noisy = torch.cat([sees & ~same, same], 1)
            band = torch.cat([clean, noisy])
        return band


class TemporalGRU(nn.Module):
    """A GRU at every location, after the paper's recurrent model. State: hidden state, (N, C)."""

    def __init__(self, dim):
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.out = zero(nn.Linear(dim, dim))

    @torch.autocast("cuda", enabled=False)  # which would run a GRU in float16: it underflows
    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        start = x.new_zeros(N, C) if state is None else state
        if two_streams:
            clean, noisy = x.chunk(2, 1)  # (N,T/2,C) each
            scanned, _ = self.gru(clean, start[None])
            before = torch.cat([start[:, None], scanned[:, :-1]], 1)  # what each frame finds
            stepped, _ = self.gru(noisy.reshape(-1, 1, C), before.reshape(1, -1, C))
            hidden = torch.cat([scanned, stepped.view(N, T // 2, C)], 1)
        else:
            hidden, _ = self.gru(x, start[None])  # (N,T,C)
        new_state = state if commit == 0 else hidden[:, (commit or T) - 1].clone()
        return self.out(hidden), new_state


def rotation(position, dim):
    """cos and sin (T, d) of the angles by which frames at `position` (T,) turn (RoPE, arXiv
    2104.09864): the first pair of channels by a quarter a frame, the last hundreds of times
    slower. A pair is a channel of the first half and its like of the second."""
    half = torch.arange(dim // 2, device=position.device) / (dim // 2)
    angle = position[:, None] * (math.pi / 2 * 1000.0**-half)  # (T,d/2)
    angle = torch.cat([-angle, angle], -1)  # turns (a, b) to (a cos - b sin, b cos + a sin)
    return angle.cos(), angle.sin()


def rotary(x, cos, sin):
    """Turns the pairs of channels of x (N, heads, T, d). In few passes: in a rollout, all keys in
    memory are turned in every step."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


# -------------------------------------------------------------------------------------------------
# 9. Spatial blocks: every frame by itself, x (BT, C, h, w).


class ResBlock(nn.Module):
    """Two convolutions; the scale and shift between them tell of noise level and action."""

    def __init__(self, dim_in, dim_out, width):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, dim_in), nn.GroupNorm(8, dim_out)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(dim_out, dim_out, 3, padding=1))
        self.scale_shift = nn.Linear(width, 2 * dim_out)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[..., None, None].chunk(2, 1)  # (BT,C,1,1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class SpatialAttention(nn.Module):
    """Every location of a frame sees every other."""

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


class NoiseEmbedding(nn.Module):
    """c_noise (B, T) -> (B, T, width): sines and cosines of it, then two layers."""

    def __init__(self, width):
        super().__init__()
        frequency = torch.logspace(-0.5, 1.5, width // 4)
        self.register_buffer("frequency", frequency, persistent=False)
        first, second = nn.Linear(width // 2, width), nn.Linear(width, width)
        self.layers = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, c_noise):
        angle = c_noise[..., None] * self.frequency
        return self.layers(torch.cat([angle.cos(), angle.sin()], -1))


def zero(layer):
    """Starts a layer at zero, so that its branch begins as 'no change'."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# -------------------------------------------------------------------------------------------------
# 10. Checkpoints: written aside, then renamed. Whoever dies meanwhile, the file at `path` is whole.


@contextmanager
def aside(path):
    """-> a path to write to. It takes the place of `path` at the end, or goes if anything fails."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
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
