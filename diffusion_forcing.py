"""Diffusion Forcing for video: the whole method in one file.

The idea (Chen et al., NeurIPS 2024, https://arxiv.org/abs/2407.01392) in five lines:
  1. Give every frame of a clip its own, independent noise level, and train a network that is causal in time to
     denoise all of them at once. Noise is masking: no noise = a frame you know, pure noise = one you know nothing of.
  2. The network has then seen every mixture of known, half-known and unknown frames,
  3. so when sampling you may choose the mixture: a matrix of noise levels, one row a step, one column a frame.
  4. "Next frame after next frame", "all frames together" and everything between are just different matrices.
  5. Finished frames enter the network's memory with a little noise on them, so a rollout can go on for ever.

One clip while it trains (each frame at a level of its own) and while it is sampled (rows of the matrix, S = 4):

    sigma of frames 0..5                 autoregressive        pyramid, u = 2        full sequence
    clip 1   .31 2.4 .08 .90 .02 17.     4 4 4 4  start        4 4 4 4  start        4 4 4 4  start
    clip 2   .75 .11 5.0 .04 1.2 .46     3 4 4 4               3 4 4 4               3 3 3 3
    clip 3   .05 .62 .19 31. .33 .07     2 4 4 4               2 4 4 4               2 2 2 2
                                         1 4 4 4               1 3 4 4               1 1 1 1
                                         0 4 4 4  frame 0      0 2 4 4  frame 0      0 0 0 0  all done
                                         0 3 4 4  is done      0 1 3 4  is done

Glossary
  B, T, C, H, W   batch, frames, channels, height, width; always in this order
  t               a frame of the clip, never a diffusion time
  x               frames, float in [-1, 1]; noisy frames are x + sigma * standard normal noise
  sigma  (B, T)   noise level of each frame, in the units of the frames
  D               the denoiser, D(x; sigma) = E[clean frame | noisy frames up to and including it]
  S, k            number of sampling steps; a level k in 0..S, 0 = clean, S = sigma_max
  K  (M+1, T)     scheduling matrix: K[m, t] is the level of frame t before step m
  state           what the network remembers of finished frames: keys and values, or a GRU's hidden state

Departures from the paper: EDM's noise levels, preconditioning and weighting (Karras et al., arXiv 2206.00364) in place
of a discrete DDPM schedule; attention with a cache beside the paper's GRU; the GRU runs at every location of a U-Net.
Read on from top to bottom: the method comes first, the network after it.
"""

import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# 1. Config: everything that training, sampling and the network have to agree on. It travels in the checkpoint.

FORCINGS = ("diffusion", "full_sequence", "teacher")
SCHEDULES = ("autoregressive", "pyramid", "full_sequence")
SOLVERS = ("euler", "heun")


@dataclass
class Config:
    """Sizes, network and noise. Raises ValueError, with the numbers, for what cannot work together."""

    height: int = 32
    width: int = 32
    channels: int = 3
    action_dim: int = 0              # numbers a frame that say what was done to get to it; 0 = no actions
    clip_frames: int = 16            # T while training; rollouts go far beyond

    temporal: str = "attention"      # where frames meet: "attention" or "gru"
    causal: bool = True              # False: frames also see later ones (clips of full sequences only)
    window: int = 16                 # attention: a frame sees this many frames, itself included
    patch: int = 2                   # pixel-unshuffle of the stem: the U-Net works at 1/patch of the resolution
    dim: int = 32                    # channels at the highest resolution ...
    dim_mults: tuple = (1, 2)        # ... and how many times that at each level; a level halves the resolution
    head_dim: int = 32               # channels of one attention head

    sigma_data: float = 0.5          # standard deviation of the training frames, measured
    data_mean: tuple = ()            # their mean, one number a channel, measured; () = zeros
    P_mean: float = -0.6             # training noise: ln sigma ~ Normal(P_mean, P_std^2)
    P_std: float = 1.6
    sigma_min: float = 0.02          # sampling noise: from sigma_max down to sigma_min, then 0
    sigma_max: float = 80.0
    rho: float = 7.0                 # EDM: how much denser the steps are near sigma_min
    context_noise: float = 0.05      # noise on every frame that enters the network's memory

    def __post_init__(self):
        self.dim_mults = tuple(self.dim_mults)
        self.data_mean = tuple(float(m) for m in self.data_mean) or (0.0,) * self.channels
        multiple = self.patch * 2 ** (len(self.dim_mults) - 1)
        dims = [self.dim * m for m in self.dim_mults]

        def check(ok, message):
            if not ok:
                raise ValueError(message)

        for name in ("height", "width", "channels", "clip_frames", "window", "patch", "dim"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(self.height % multiple == 0 and self.width % multiple == 0,
              f"frames of {self.height}x{self.width}: both must be multiples of {multiple} "
              f"(patch {self.patch}, {len(dims)} levels)")
        check(self.temporal in ("attention", "gru"), f"temporal {self.temporal!r} is not 'attention' or 'gru'")
        check(self.causal or self.temporal == "attention", "a GRU runs forward in time: causal must be True")
        check(all(d % self.head_dim == 0 for d in dims), f"channels {dims}: not multiples of head_dim {self.head_dim}")
        check(len(self.data_mean) == self.channels,
              f"data_mean has {len(self.data_mean)} numbers for {self.channels} channels")
        check(self.sigma_data > 0, f"sigma_data is {self.sigma_data}; it must be positive")
        check(self.context_noise > 0, f"context_noise is {self.context_noise}; the label ln(0) does not exist")
        check(0 < self.sigma_min < self.sigma_max,
              f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}: 0 < sigma_min < sigma_max is needed")

    def in_frame_units(self, sigma):
        """The noise levels above are stated for data of standard deviation 0.5, as in EDM. Here, and nowhere else,
        they are scaled to the data at hand."""
        return sigma * self.sigma_data / 0.5


# ---------------------------------------------------------------------------------------------------------------------
# 2. Noise: one independent level for every frame. This is the line that makes it Diffusion Forcing.


def sample_noise_levels(batch_size, num_frames, config, forcing="diffusion", generator=None):
    """Training noise levels, ln sigma ~ Normal(P_mean, P_std^2): (batch_size, num_frames), in frame units.

    forcing "diffusion" and "teacher" draw one level a frame, independent of all others (paper, Algorithm 1, line 3);
    "full_sequence" draws one a clip. Drawn on the generator's device. Raises ValueError for another forcing.
    """
    if forcing not in FORCINGS:
        raise ValueError(f"forcing {forcing!r} is not one of {', '.join(FORCINGS)}")
    levels = 1 if forcing == "full_sequence" else num_frames
    normal = torch.randn(batch_size, levels, generator=generator, device=generator.device if generator else None)
    sigma = config.in_frame_units((config.P_mean + config.P_std * normal).exp())
    return sigma.expand(batch_size, num_frames)


def randn(shape, like, generator=None):
    """Standard normal noise on the device and in the type of `like`, whatever device the generator lives on."""
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def per_frame(v):
    """(B, T) or (T,) -> (B, T, 1, 1, 1) or (T, 1, 1, 1): one number a frame, ready to multiply frames with."""
    return v[..., None, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# 3. EDM preconditioning and weighting (arXiv 2206.00364, Table 1).
#
#    D(x; sigma) = mu + c_skip (x - mu) + c_out F(c_in (x - mu); c_noise)        F is the network, mu the data's mean
#
#    keeps what goes into F and what F is asked for at unit variance at every sigma. At low noise F predicts the noise,
#    at high noise the clean frame, and between them a mixture that makes its errors matter least.


def edm_scalings(sigma, sigma_data):
    """-> c_skip, c_out, c_in, c_noise, each of sigma's shape (EDM, Table 1; c_noise in units of sigma_data)."""
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = (sigma / sigma_data).log() / 4
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma, sigma_data):
    """lambda(sigma) = 1 / c_out^2: a network that says 0 has loss 1 at every noise level (EDM, eq. 19 to 21)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# 4. The training loss (paper, Algorithm 1).


def diffusion_forcing_loss(model, x, config, *, sigma=None, forcing="diffusion", actions=None, generator=None,
                           history_noise=None):
    """Weighted denoising loss of a batch of clips x (B, T, C, H, W) in [-1, 1] -> scalar. Algorithm 1 of the paper.

    `forcing` selects the paradigm and nothing else changes:
      "diffusion"      every frame has its own noise, and is predicted from itself and its equally noisy past;
      "full_sequence"  ordinary video diffusion: one noise level for the whole clip;
      "teacher"        every noisy frame is predicted from its past without that noise, as in next-frame prediction.
                       The past has only `history_noise` (a sigma, default config.context_noise), really added.
    sigma (B, T) replaces the random levels. actions (B, T, A): row t drives the change into frame t.
    """
    B, T = x.shape[:2]
    if sigma is None:
        sigma = sample_noise_levels(B, T, config, forcing, generator).to(x)
    noisy = x + per_frame(sigma) * randn(x.shape, x, generator)
    history = None
    if forcing == "teacher":
        level = config.context_noise if history_noise is None else history_noise
        past_sigma = torch.full_like(sigma, config.in_frame_units(level))
        history = (x + per_frame(past_sigma) * randn(x.shape, x, generator), past_sigma)
    denoised, _ = model(noisy, sigma, actions=actions, history=history)
    return (per_frame(loss_weight(sigma, config.sigma_data)) * (denoised - x) ** 2).mean()


# ---------------------------------------------------------------------------------------------------------------------
# 5. Scheduling matrices (paper, section 3.3 and Appendix): how much noise each frame has left at each step.


def karras_sigmas(num_steps, config):
    """-> (S+1,) sigma of level k in frame units: [0] = 0, [1] = sigma_min, ..., [S] = sigma_max (EDM, eq. 5)."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    fraction = torch.arange(1, num_steps + 1) - 1 if num_steps > 1 else torch.ones(1)
    sigmas = (low + fraction / max(num_steps - 1, 1) * (high - low)) ** config.rho
    return config.in_frame_units(torch.cat([torch.zeros(1), sigmas]))


def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0):
    """-> int64 (M+1, T), K[m, t] = clip(S + floor(u t) - m, 0, S): every frame comes down S levels, one a row, and
    starts u rows after the frame before it.

      "full_sequence"   u = 0: all frames come down together
      "autoregressive"  u = S: a frame starts when the one before it is done
      "pyramid"         u = `uncertainty`, levels a frame: near frames settle while far ones are still uncertain
    Raises ValueError for another kind, an uncertainty below 0, or fewer than one frame or step.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is not one of {', '.join(SCHEDULES)}")
    if num_frames < 1 or num_steps < 1 or not 0 <= uncertainty < math.inf:
        raise ValueError(f"{num_frames} frames, {num_steps} steps, uncertainty {uncertainty}: "
                         "at least 1 frame, 1 step and an uncertainty of 0 or more are needed")
    u = {"full_sequence": 0, "autoregressive": num_steps, "pyramid": uncertainty}[kind]
    start = torch.tensor([math.floor(u * t) for t in range(num_frames)])  # (T,) row in which frame t starts
    step = torch.arange(num_steps + int(start[-1]) + 1)  # (M+1,)
    return (num_steps + start - step[:, None]).clamp(0, num_steps)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Sampling and rollout (paper, Algorithm 2).


def sample(model, matrix, context=None, **options):
    """One pass of the matrix: -> (B, T_context + matrix.shape[1], C, H, W), context first. Options as in rollout."""
    num_frames = matrix.shape[1] + (0 if context is None else context.shape[1])
    return torch.stack(list(rollout(model, matrix, num_frames, context, **options)), 1)


def rollout(model, matrix, num_frames, context=None, *, config=None, batch_size=1, actions=None, solver="euler",
            generator=None, device=None, dtype=None):
    """Algorithm 2: -> iterator over num_frames frames (B, C, H, W), those of the context first, each as soon as it is
    finished. The matrix is laid along time as often as needed; memory and cost per frame do not grow.

    model    anything called like Denoiser.forward; config defaults to model.config.
    matrix   (M+1, T) int levels, row by row from S to 0, as scheduling_matrix makes them; S is its maximum.
    context  (B, T_context, C, H, W) frames to go on from, or None to start from nothing with batch_size clips.
    actions  (B, num_frames or more, A), row t drives the change into frame t.
    Raises ValueError for a matrix that does not lead from S to 0, or, if the model is causal, has a frame cleaner than
    one before it; for a context of another size; for actions too short; for an unknown solver.
    """
    config = config or model.config
    check_rollout(matrix, num_frames, context, config, actions, solver)
    if context is None:
        like = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        like = torch.empty(0) if like is None else like
        shape = (batch_size, 0, config.channels, config.height, config.width)
        context = torch.empty(shape, device=device or like.device, dtype=dtype or like.dtype)
    return roll(model, matrix.cpu(), num_frames, context.to(device=device, dtype=dtype), config, actions, solver,
                generator)


@torch.no_grad()
def roll(model, matrix, num_frames, context, config, actions, solver, generator):
    """The loop of rollout. x holds the frames that are not yet in the state: finished ones first, then the tile."""
    S = int(matrix.max())
    sigmas = karras_sigmas(S, config).to(context)

    def noise(n):  # frame by frame and in order, so that neither tiles nor num_frames change what a frame begins with
        shape = (len(context), *context.shape[2:])
        return torch.stack([randn(shape, context, generator) for _ in range(n)], 1) if n else context[:, :0]

    x, eps, state, first = context, noise(context.shape[1]), None, 0  # eps: each frame's noise as history
    yield from context.unbind(1)
    while first + x.shape[1] < num_frames:
        n = min(matrix.shape[1], num_frames - first - x.shape[1])  # the last tile is cut to length
        begin, end = noise(2 * n).unflatten(1, (n, 2)).unbind(2)  # (B,n,C,H,W) twice: each frame's two draws
        K = torch.cat([torch.zeros(len(matrix), x.shape[1], dtype=matrix.dtype), matrix[:, :n]], 1)
        x, eps = torch.cat([x, sigmas[S] * begin], 1), torch.cat([eps, end], 1)
        entered, shown = 0, K.shape[1] - n  # how many of x are in the state; have been given out
        for now, then in zip(K[:-1], K[1:]):
            if torch.equal(now, then):
                continue
            finished = int((now == 0).cumprod(0).sum())
            started = int((then < S).nonzero().max()) + 1  # what comes later is pure noise: nothing is lost unseen
            live = slice(entered, started)
            a = None if actions is None else actions[:, first + entered : first + started].to(x)
            x[:, live], state = step(model, x[:, live], eps[:, live], now[live], then[live], sigmas, config, state,
                                     finished - entered, a, solver)
            entered = finished
            while shown < len(then) and then[shown] == 0:
                yield x[:, shown].clone()
                shown += 1
        x, eps, first = x[:, entered:], eps[:, entered:], first + entered


def step(model, x, eps, now, then, sigmas, config, state, commit, actions, solver):
    """Takes frames x (B, n, C, H, W) from levels `now` to levels `then`, both (n,): -> x, state.

    The first `commit` frames are finished and enter the state in the same call. A frame at level 0 is shown to the
    network with its one draw of context noise, and the label says so: what the network is told is what it is given.
    """
    context_noise = config.in_frame_units(config.context_noise)
    s, s_next, moves = sigmas[now], sigmas[then], (now != then).to(x.device)

    def look(x, k, state, commit, actions):
        k = k.to(x.device)
        seen = x + per_frame(k == 0) * context_noise * eps[:, -x.shape[1]:]
        label = torch.where(k == 0, context_noise, sigmas[k]).expand(len(x), -1)
        return model(seen, label, state, actions=actions, commit=commit)

    denoised, state = look(x, now, state, commit, actions)
    euler = denoised + per_frame(s_next / s) * (x - denoised)  # x + (s_next - s) dx/dsigma; lands on D at s_next = 0
    x_next = torch.where(per_frame(moves), euler, x)  # a frame that keeps its level keeps its every bit
    if solver == "heun" and (then[now != then] > 0).any():
        new = slice(commit, None)  # the others are in the state by now
        a = None if actions is None else actions[:, new]
        again, _ = look(x_next[:, new], then[new], state, 0, a)
        again = torch.cat([denoised[:, :commit], again], 1)
        slope = ((x - denoised) / per_frame(s) + (x_next - again) / per_frame(s_next)) / 2
        corrected = per_frame(moves & (s_next > 0))
        x_next = torch.where(corrected, x + per_frame(s_next - s) * slope, x_next)
    return x_next, state


def check_rollout(matrix, num_frames, context, config, actions, solver):
    """Raises ValueError, in one line, for what rollout cannot do."""
    problem = None
    if solver not in SOLVERS:
        problem = f"solver {solver!r} is not one of {', '.join(SOLVERS)}"
    elif (matrix[0] != matrix.max()).any() or (matrix[-1] != 0).any() or (matrix.diff(dim=0) > 0).any():
        problem = "the first row of a scheduling matrix is S, the last 0, and no level rises on the way"
    elif config.causal and (matrix.diff(dim=1) < 0).any():
        problem = "a causal model cannot use a frame that is cleaner than the frames before it: levels in a row may " \
                  "not decrease"
    elif context is not None and tuple(context.shape[2:]) != (config.channels, config.height, config.width):
        problem = f"context of shape {tuple(context.shape)}; (B, T, {config.channels}, {config.height}, " \
                  f"{config.width}) is needed"
    elif num_frames < (1 if context is None else context.shape[1]):
        problem = f"num_frames is {num_frames}; it counts the context and is at least 1"
    elif actions is not None and actions.shape[1] < num_frames:
        problem = f"{actions.shape[1]} actions for {num_frames} frames"
    if problem:
        raise ValueError(problem)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The denoiser: a small 2-D U-Net over frames, with a temporal mixer in every block, the only place where frames meet.


class Denoiser(nn.Module):
    """D(x; sigma): x (B, T, C, H, W) noisy frames, sigma (B, T) -> their denoised versions, and the next state."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim * m for m in config.dim_mults]
        pixels = config.channels * config.patch**2
        width = 4 * config.dim  # of the embedding that tells every block about its frame
        self.register_buffer("data_mean", torch.tensor(config.data_mean)[:, None, None], persistent=False)
        self.embed_noise = NoiseEmbedding(width)
        self.embed_action = nn.Linear(config.action_dim, width) if config.action_dim else None
        self.stem = nn.Conv2d(pixels, dims[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(d, d, width, config) for d in dims)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(dims, dims[1:]))
        self.middle = Block(dims[-1], dims[-1], width, config, spatial=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(dims, dims[1:]))
        self.decoder = nn.ModuleList(Block(2 * d, d, width, config) for d in dims)
        self.head = nn.Sequential(nn.GroupNorm(8, dims[0]), nn.SiLU(), zero(nn.Conv2d(dims[0], pixels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)  # convolutions are about twice as fast

    def forward(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        """-> denoised (B, T, C, H, W), state.

        state    what the last call returned: the frames before x[:, 0]. None = there are none.
        commit   the state moves on by the first `commit` frames of this call. None = by all; 0 = it comes back as is.
        actions  (B, T, A), or None: all zeros.
        history  (x_clean (B, T, C, H, W), sigma_clean (B, T)): teacher forcing. Frame t then sees, apart from itself,
                 only the clean frames before t; all T predictions in one pass. Without state, causal only.
        """
        T = x.shape[1]
        if history is not None:
            if state is not None or not self.config.causal:
                raise ValueError("history is for a causal denoiser that starts without a state")
            x, sigma = torch.cat([history[0], x], 1), torch.cat([history[1], sigma], 1)  # (B, 2T, ...): two streams
            actions = None if actions is None else torch.cat([actions, actions], 1)
        c_skip, c_out, c_in, c_noise = edm_scalings(sigma, self.config.sigma_data)
        centred = x - self.data_mean
        out, new_state = self.network(per_frame(c_in) * centred, c_noise, state, actions, commit, history is not None)
        denoised = self.data_mean + per_frame(c_skip) * centred + per_frame(c_out) * out
        return denoised[:, -T:], state if commit == 0 else new_state

    def network(self, x, c_noise, state, actions, commit, two_streams):
        """F of EDM: the U-Net. Frames go through it one by one, as a batch of B*T, but for the mixers."""
        B, T = x.shape[:2]
        emb = self.embed_noise(c_noise)  # (B,T,E)
        if self.embed_action is not None:
            emb = emb + self.embed_action(torch.zeros_like(emb[..., :1]).expand(B, T, self.config.action_dim)
                                          if actions is None else actions)
        emb = F.silu(emb).flatten(0, 1)  # (BT,E)
        old, new = list(state or []), []

        def run(block, h):
            h, block_state = block(h, emb, B, old[len(new)] if old else None, commit, two_streams)
            new.append(block_state)
            return h

        h = F.pixel_unshuffle(x.flatten(0, 1), self.config.patch)  # (BT, C*p*p, H/p, W/p)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, block in enumerate(self.encoder):
            h = run(block, self.down[level - 1](h) if level else h)
            skips.append(h)
        h = run(self.middle, h)
        for level, block in reversed(list(enumerate(self.decoder))):
            h = run(block, torch.cat([h, skips[level]], 1))
            h = self.up[level - 1](h) if level else h
        h = F.pixel_shuffle(self.head(h), self.config.patch)  # (BT,C,H,W)
        return h.unflatten(0, (B, T)).to(x.dtype), tuple(new)


class Block(nn.Module):
    """Residual block in space, then (at the lowest level) attention in space, then the mixer in time."""

    def __init__(self, dim_in, dim_out, width, config, spatial=False):
        super().__init__()
        self.spatial = ResBlock(dim_in, dim_out, width)
        self.attend = SpatialAttention(dim_out, config.head_dim) if spatial else None
        self.norm = nn.LayerNorm(dim_out)
        self.temporal = (TemporalAttention(dim_out, config.head_dim, config.window, config.causal)
                         if config.temporal == "attention" else TemporalGRU(dim_out))

    def forward(self, x, emb, B, state, commit, two_streams):
        h = self.spatial(x, emb)  # (BT,C,h,w)
        h = self.attend(h) if self.attend else h
        BT, C, height, width = h.shape
        z = h.permute(0, 2, 3, 1).reshape(B, BT // B, height * width, C)
        z = self.norm(z).transpose(1, 2).flatten(0, 1)  # (B*hw, T, C): every location is a sequence in time
        z, state = self.temporal(z, state, commit, two_streams)
        z = z.unflatten(0, (B, height * width)).transpose(1, 2)  # (B,T,hw,C)
        return h + z.reshape(BT, height, width, C).permute(0, 3, 1, 2), state


# ---------------------------------------------------------------------------------------------------------------------
# 8. Temporal mixers: x (N, T, C) -> (N, T, C) and the state after the first `commit` frames. Feeding 16 frames at once,
#    or 5, then 1, then 10 with the state handed on, gives the same numbers.
#
#    two_streams (teacher forcing): the first half of the frames is clean, the second the same frames, noisy. Clean
#    frames see clean frames up to themselves; a noisy frame sees the clean frames before it, and itself.


class TemporalAttention(nn.Module):
    """Banded causal attention along time: a frame sees the last `window` frames, itself included.
    State: keys (before rotation) and values of the last window - 1 frames, each (N, heads, <= window - 1, head_dim)."""

    def __init__(self, dim, head_dim, window, causal=True):
        super().__init__()
        self.head_dim, self.window, self.causal = head_dim, window, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, C // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)  # (N,heads,T,d)
        new_state = self.next_state(state, k, v, T if commit is None else commit)
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        position = torch.arange(k.shape[2], device=x.device)  # counted from the oldest cached key: never grows
        if two_streams:
            position = position % (T // 2)
        mask = self.mask(position[-T:], position, two_streams)
        q, k = rotary(q, position[-T:]), rotary(k, position)
        # CUDA's attention kernels put the batch on a grid axis that ends at 65,535.
        parts = [F.scaled_dot_product_attention(*qkv, attn_mask=mask) for qkv in
                 zip(q.split(65535), k.split(65535), v.split(65535))]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.out(y.transpose(1, 2).reshape(N, T, C)), new_state

    def next_state(self, state, k, v, commit):
        if commit == 0 or self.window == 1:
            return state
        k, v = k[:, :, :commit], v[:, :, :commit]
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        return tuple(z[:, :, 1 - self.window :].clone() for z in (k, v))  # cloned: a view would keep all of it alive

    def mask(self, query, key, two_streams):
        """-> bool (queries, keys), True = sees."""
        ago = query[:, None] - key[None, :]
        band = (ago < self.window) & (ago >= 0 if self.causal else ago > -self.window)
        if two_streams:
            T = len(query) // 2
            sees, same = band[:T, :T], ago[:T, :T] == 0
            band = torch.cat([torch.cat([sees, torch.zeros_like(sees)], 1), torch.cat([sees & ~same, same], 1)])
        return band


class TemporalGRU(nn.Module):
    """The paper's recurrent model, at every location. State: the hidden state (N, C) after the last frame."""

    def __init__(self, dim):
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, state=None, commit=None, two_streams=False):
        N, T, C = x.shape
        start = x.new_zeros(N, C) if state is None else state
        if two_streams:
            clean, noisy = x.chunk(2, 1)  # (N,T/2,C) each
            scanned, _ = self.gru(clean, start[None])
            before = torch.cat([start[:, None], scanned[:, :-1]], 1)  # the state that each frame finds
            stepped, _ = self.gru(noisy.reshape(-1, 1, C), before.reshape(1, -1, C))
            hidden = torch.cat([scanned, stepped.view(N, T // 2, C)], 1)
        else:
            hidden, _ = self.gru(x, start[None])  # (N,T,C)
        commit = T if commit is None else commit
        return self.out(hidden), state if commit == 0 else hidden[:, commit - 1].clone()


def rotary(x, position):
    """Rotary position embedding (arXiv 2104.09864): x (N, heads, T, d), position (T,) -> rotated x."""
    half = x.shape[-1] // 2
    frequency = 1000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = position[:, None] * frequency  # (T,d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# ---------------------------------------------------------------------------------------------------------------------
# 9. Spatial blocks: each frame by itself, x (BT, C, h, w).


class ResBlock(nn.Module):
    """Two convolutions; scale and shift between them tell the frame's noise level and action."""

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
        q, k, v = self.qkv(self.norm(x)).view(BT, 3, C // self.head_dim, self.head_dim, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)  # (BT,heads,hw,d)
        return x + self.out(y.transpose(2, 3).reshape(BT, C, h, w))


class NoiseEmbedding(nn.Module):
    """c_noise (B, T) -> (B, T, width): sines and cosines, then a small network."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequency", torch.logspace(-0.5, 1.5, width // 4), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width // 2, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise):
        angle = c_noise[..., None] * self.frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


def zero(layer):
    """Starts a layer at zero, so that its branch begins as 'no change'."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# 10. Checkpoints. Written aside and renamed: whatever happens, the file at `path` is a whole one.


def save_checkpoint(path, config, weights, **extra):
    """Writes config, weights (a state dict) and anything else torch.load(weights_only=True) can read back."""
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        torch.save({"config": asdict(config), "weights": weights, **extra}, aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def load_checkpoint(path, device="cpu"):
    """-> Denoiser in eval mode on `device`, and the dict of everything else in the file. Executes nothing from the
    file. Raises FileNotFoundError, or ValueError if the file is not a checkpoint of this program."""
    try:
        extra = torch.load(path, map_location=device, weights_only=True)
        config = extra.pop("config")
        model = Denoiser(Config(**{f.name: config[f.name] for f in fields(Config)}))
        model.load_state_dict(extra.pop("weights"))
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint of diffusion_forcing.py ({type(error).__name__}: {reason})") from error
    return model.to(device).eval(), extra
