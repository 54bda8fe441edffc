"""The specification of diffusion_forcing.py, in the order of its sections. `pytest -m schedule` grades one of them.

Every test compares with something independent: a closed form, a slow loop, or a spy that records what it was given.
"""

import contextlib
import gc
import io
import itertools
import math
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from argparse import Namespace
from operator import attrgetter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusion_forcing as df
import sample
import train
from diffusion_forcing import Config, Denoiser, TemporalAttention, TemporalGRU

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
KINDS = [("autoregressive", 0), ("pyramid", 1), ("pyramid", 2.5), ("pyramid", 0.4), ("full_sequence", 0)]
TRAPEZOIDS = [("trapezoid", 1), ("trapezoid", 2.5), ("trapezoid", 0.4)]  # for bidirectional models only
MIXERS = ["attention", "gru"]


def tiny(**options):
    """A Config small enough to test with. sigma_data is not 0.5, so that forgotten units show."""
    defaults = dict(height=8, width=8, channels=3, dim=8, dim_mults=(1, 2), head_dim=8, window=3, clip_frames=4,
                    sigma_data=0.3, data_mean=(-0.8, 0.1, 0.4))
    return Config(**(defaults | options))


def random_denoiser(**options):
    """A Denoiser without zero layers: those would hide everything behind them."""
    torch.manual_seed(0)
    model = Denoiser(tiny(**options))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


class Spy:
    """Looks like a denoiser: returns answer(x, sigma), records every call. Its state is how many frames entered."""

    def __init__(self, answer=lambda x, sigma: torch.zeros_like(x), **options):
        self.config, self.answer, self.calls = tiny(**options), answer, []

    def __call__(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        assert len(self.calls) < 5000, "the rollout never ends: do frames leave before they are given out?"
        self.calls.append(dict(x=x.clone(), sigma=sigma.clone(), state=state, commit=commit, actions=actions,
                               history=history))
        committed = x.shape[1] if commit is None else commit
        return self.answer(x, sigma), state if committed == 0 else (state or 0) + committed


def seed(number=0):
    return torch.Generator().manual_seed(number)


def refused(what, call, *args, **options):
    """Fails, naming `what`, unless the call raises ValueError with a message of one line."""
    try:
        call(*args, **options)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, f"{what}: one clear sentence, not {error}"
        return
    pytest.fail(f"{what}: a ValueError should say so, before anything is computed")


def units(config):
    """What one unit of EDM's noise levels is in frame units."""
    return config.sigma_data / 0.5


def flat(state):
    return [t for s in state for t in (s if isinstance(s, tuple) else (s,))]


# ---- 1. Config ------------------------------------------------------------------------------------------------------


@pytest.mark.config
@pytest.mark.parametrize("wrong", [
    dict(height=30), dict(width=30), dict(height=0), dict(width=0), dict(channels=0, data_mean=()), dict(clip_frames=0),
    dict(stride=0), dict(window=0), dict(patch=0), dict(dim=0), dict(dim=12, head_dim=8), dict(dim=24, head_dim=3),
    dict(head_dim=6), dict(head_dim=0), dict(dim_mults=()), dict(dim_mults=(0,)), dict(dim_mults=(1, 1, 1, 1)),
    dict(sigma_data=0.0), dict(sigma_data=math.nan), dict(sigma_min=0), dict(sigma_min=90), dict(sigma_max=math.inf),
    dict(rho=0.0), dict(P_std=-1.0), dict(context_noise=0.0), dict(temporal="lstm"), dict(forcing="nonsense"),
    dict(causal=False, temporal="gru"), dict(causal=False, forcing="teacher")])
def test_configs_that_cannot_work_are_refused(wrong):
    refused(f"a Config with {wrong}", tiny, **wrong)


@pytest.mark.config
def test_amounts_of_noise_are_stated_for_data_of_standard_deviation_one_half():
    assert Config(sigma_data=0.5).in_frame_units(3.0) == 3, "for a standard deviation of 0.5 the two units are the same"
    assert Config(sigma_data=0.1).in_frame_units(3.0) == pytest.approx(0.6), "with a fifth of it, so is the noise"
    c = Config()
    told = (c.sigma_min, c.sigma_max, c.rho, c.context_noise, c.P_mean, c.P_std, c.alternating, c.window, c.forcing)
    assert told == (0.02, 80, 7, 0.05, -0.6, 2.4, 0.5, 16, "diffusion"), "all results were made with these defaults"


# ---- 2. noise -------------------------------------------------------------------------------------------------------


def log_sigmas(batch_size, num_frames, number=0, **options):
    """ln sigma (B, T), in units of standard deviations around the median."""
    config = tiny(**(dict(P_mean=2.5, P_std=0.7) | options))
    sigma = df.sample_noise_levels(batch_size, num_frames, config, seed(number))
    assert sigma.shape == (batch_size, num_frames) and sigma.dtype == torch.float32, "float32 of (B, T)"
    return ((sigma / units(config)).log() - 2.5) / 0.7


@pytest.mark.noise
@pytest.mark.parametrize("forcing,options", [("diffusion", dict(alternating=0.0)), ("teacher", {})])
def test_every_frame_has_a_level_of_its_own(forcing, options):
    z = log_sigmas(4000, 5, forcing=forcing, **options)
    assert not torch.equal(z[0], z[1]), "clips of a batch share their levels"
    correlation = torch.corrcoef(z.T) - torch.eye(5)
    assert correlation.abs().max() < 0.1, "frames of a clip share their noise: draw (B, T) levels, not (B, 1)"


@pytest.mark.noise
@pytest.mark.parametrize("options", [dict(alternating=0.0), dict(alternating=1.0), dict(alternating=1.0, causal=False)])
def test_levels_of_each_frame_are_log_normal_in_frame_units(options):
    z = log_sigmas(20000, 4, **options)
    assert z.mean(0).abs().max() < 0.04, "E[ln sigma] = P_mean + ln(sigma_data / 0.5): units forgotten?"
    assert (z.std(0) - 1).abs().max() < 0.03, "the standard deviation of ln sigma is P_std"
    assert ((z.abs() > 2).float().mean(0) - 0.0455).abs().max() < 0.01, "normal: 4.55 % lie beyond two P_std"


@pytest.mark.noise
def test_in_a_share_of_the_clips_little_and_much_noise_take_turns():
    z = log_sigmas(8000, 6, alternating=1.0)
    assert ((z[:, 1:] > 0) != (z[:, :-1] > 0)).all(), "with a share of 1, noise takes turns in all clips"
    assert abs((z[:, 0] > 0).float().mean() - 0.5) < 0.03, "half of the clips begin with much noise, half with little"
    size = torch.corrcoef(z.abs().T) - torch.eye(6)
    assert size.abs().max() < 0.06, "how far a frame is from the median depends on no other frame"
    for share in (0.5, 0.2):
        turns = ((log_sigmas(8000, 6, alternating=share) > 0).diff(dim=1) != 0).all(1).float().mean()
        assert abs(turns - share - (1 - share) / 32) < 0.03, "the share of such clips (by chance, 1 in 32)"


@pytest.mark.noise
def test_chance_says_which_clips_take_turns():
    turns = [((log_sigmas(2, 12, n, alternating=0.5) > 0).diff(dim=1) != 0).all(1) for n in range(400)]
    turns = torch.stack(turns)  # (400,2)
    both = turns.float().mean(0).tolist() + [turns.all(1).float().mean().item() * 2]
    assert both == pytest.approx([0.5] * 3, abs=0.11), "each clip with this chance, not the first ones"


@pytest.mark.noise
def test_a_bidirectional_model_learns_gaps_of_any_length_between_frames_with_little_noise():
    z = log_sigmas(8000, 6, alternating=1.0, causal=False)
    noisy = z > 0
    for clip, much in zip(z[:200], noisy):
        assert not much.any() or clip[much].max() - clip[much].min() < 1e-4, "noisy frames share one sigma"
        assert len(clip[~much].unique()) == (~much).sum(), "each of the others has a sigma of its own"
    count = noisy.sum(1).bincount(minlength=7) / 8000
    assert (abs(count - 1 / 7) < 0.015).all(), "0, 1 ... 6 noisy frames are as likely: the share is uniform"
    two = noisy[noisy.sum(1) == 2].float().mean(0)
    assert (abs(two - 1 / 3) < 0.06).all(), "any frames may be the noisy ones, not only neighbours or every second"
    shared = lambda z: (z[:, :, None] == z[:, None]).sum((1, 2)) > 6
    share = shared(log_sigmas(8000, 6, alternating=0.3, causal=False)).float().mean()
    assert abs(share - 0.3 * 5 / 7) < 0.03, "the share of such clips; 5 in 7 have two noisy frames"


@pytest.mark.noise
@pytest.mark.parametrize("frame", [0, 3])
def test_the_sigma_of_a_gap_is_a_draw_of_its_own(frame):
    z = log_sigmas(20000, 4, alternating=1.0, causal=False)
    known = (z[:, frame] < 0) & (z > 0).any(1)  # clips in which this frame is known, and others are not
    pair = torch.stack([z[known].amax(1), z[known][:, frame]])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.05, f"the sigma of the noisy frames mirrors that of frame {frame}"
    everything = torch.corrcoef(z.T)[0, 1:]
    assert everything.tolist() == pytest.approx([1 / 3] * 3, abs=0.04), "one third: both noisy; the rest cancels"


@pytest.mark.noise
def test_full_sequence_has_one_level_a_clip():
    z = log_sigmas(500, 4, forcing="full_sequence")
    assert (z == z[:, :1]).all(), "full_sequence: one sigma for all frames"
    assert z[:, 0].unique().numel() == 500, "full_sequence: but one for every clip"


@pytest.mark.noise
@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(forcing="full_sequence"), dict(forcing="teacher")])
def test_all_chance_comes_from_the_generator(options):
    first = log_sigmas(8, 6, 3, **options)
    torch.rand(1)
    assert torch.equal(first, log_sigmas(8, 6, 3, **options)), "one draw was made without the generator"


# ---- 3. EDM ---------------------------------------------------------------------------------------------------------


@pytest.mark.edm
def test_scalings_are_those_of_edm():
    c_skip, c_out, c_in, c_noise = (c.tolist() for c in df.edm_scalings(torch.tensor([[0.4, 0.3]]), 0.3))
    assert c_skip == [pytest.approx([0.09 / 0.25, 0.5])], "c_skip = sd^2 / (sigma^2 + sd^2)"
    assert c_out == [pytest.approx([0.12 / 0.5, 0.3 / 2**0.5])], "c_out = sigma sd / sqrt(sigma^2 + sd^2)"
    assert c_in == [pytest.approx([1 / 0.5, 1 / 0.18**0.5])], "c_in = 1 / sqrt(sigma^2 + sd^2)"
    assert c_noise == [pytest.approx([math.log(0.4 / 0.3) / 4, 0])], "c_noise = ln(sigma / sd) / 4"


@pytest.mark.edm
def test_weight_is_one_over_c_out_squared():
    sigma = [[0.0005, 0.02, 0.4], [0.3, 3.0, 80.0]]
    expected = [[(s**2 + 0.3**2) / (s * 0.3) ** 2 for s in row] for row in sigma]
    weight = df.loss_weight(torch.tensor(sigma), 0.3)
    assert weight.shape == (2, 3), "one weight for each frame"
    assert weight.tolist() == [pytest.approx(row, rel=1e-5) for row in expected], "lambda = 1 / c_out^2, at every sigma"


@pytest.mark.edm
def test_preconditioning_is_that_of_edm_around_the_mean_of_the_data(monkeypatch):
    model, seen, sigma = Denoiser(tiny()), {}, torch.tensor([[0.4, 0.3]])
    mean = torch.tensor(model.config.data_mean)[:, None, None]
    x = mean + 0.3 * torch.randn(1, 2, 3, 8, 8)
    expected = torch.stack([mean + 0.36 * (x[:, 0] - mean), mean + 0.5 * (x[:, 1] - mean)], 1)
    assert torch.allclose(model(x, sigma)[0], expected, atol=1e-6), "a new network says 0: D = mu + c_skip (x - mu)"

    def network(x, c_noise, *args, **options):
        seen.update(x=x, c_noise=c_noise)
        return torch.ones_like(x), None

    monkeypatch.setattr(model, "network", network)
    D, _ = model(x, sigma)
    assert torch.allclose(D[:, 0], expected[:, 0] + 0.24, atol=1e-6), "D = mu + c_skip (x - mu) + c_out network"
    assert torch.allclose(seen["x"][:, 0], (x[:, 0] - mean) / 0.5), "the input of the network is c_in (x - mu)"
    assert torch.allclose(seen["c_noise"], torch.tensor([[0.4 / 0.3, 1.0]]).log() / 4), "what it is told is c_noise"


# ---- 4. the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.loss
@pytest.mark.parametrize("sigma", [0.003, 0.1, 1.0, 30.0])
def test_a_network_that_says_zero_has_loss_one_at_every_level(sigma):
    config = tiny()
    x = torch.tensor(config.data_mean)[:, None, None] + 0.3 * torch.randn(64, 4, 3, 8, 8, generator=seed())
    loss = df.diffusion_forcing_loss(Denoiser(config), x, config, sigma=torch.full((64, 4), sigma))
    assert loss.item() == pytest.approx(1, abs=0.05), "weight missing or twice, or noise that is not sigma?"


@pytest.mark.loss
@pytest.mark.parametrize("forcing", ["diffusion", "full_sequence", "teacher"])
def test_the_loss_is_that_of_algorithm_1(forcing):
    spy, x = Spy(lambda x, sigma: x * 0.5, forcing=forcing), torch.randn(3, 4, 3, 8, 8, generator=seed(2))
    actions = torch.randn(3, 4, 1)
    loss = df.diffusion_forcing_loss(spy, x, spy.config, actions=actions, generator=seed(1))
    (call,), total = spy.calls, 0.0
    for b, t in itertools.product(range(3), range(4)):
        sd, s = 0.3, float(call["sigma"][b, t])
        total += (s**2 + sd**2) / (s * sd) ** 2 * float(((0.5 * call["x"][b, t] - x[b, t]) ** 2).mean())
    assert float(loss) == pytest.approx(total / 12, rel=1e-4), "the loss is the mean of lambda(sigma) |D - x0|^2"
    z = (call["x"] - x) / df.per_frame(call["sigma"])
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.05, "frame t gets sigma[b, t] times a standard normal"
    levels = 3 if forcing == "full_sequence" else 12
    assert call["sigma"].unique().numel() == levels, f"{levels} levels in 3 clips of 4 frames: that is config.forcing"
    assert call["actions"] is actions and call["commit"] == 0, "the model is told the actions, and keeps no state"
    assert (call["history"] is not None) == (forcing == "teacher"), "only teacher forcing has a history"


@pytest.mark.loss
def test_the_history_of_teacher_forcing_has_the_noise_that_the_network_is_told():
    for level in (0.1, 0.4):
        spy, x = Spy(forcing="teacher", context_noise=level), torch.full((16, 4, 3, 8, 8), 0.5)
        df.diffusion_forcing_loss(spy, x, spy.config, generator=seed())
        frames, told = spy.calls[0]["history"]
        expected = torch.full((16, 4), level * units(spy.config))
        assert torch.allclose(told, expected), "the network is told context_noise, in frame units"
        assert float((frames - x).std() / told[0, 0]) == pytest.approx(1, abs=0.05), "its noise is not what it is told"


@pytest.mark.loss
def test_noise_is_shared_by_no_clips_frames_channels_or_streams():
    spy, x = Spy(forcing="teacher"), torch.zeros(2, 3, 3, 16, 16)
    df.diffusion_forcing_loss(spy, x, spy.config, generator=seed())
    noisy, (frames, told) = spy.calls[0]["x"] / df.per_frame(spy.calls[0]["sigma"]), spy.calls[0]["history"]
    z = torch.stack([noisy, frames / df.per_frame(told)]).flatten(4).flatten(0, 3)  # a row for each channel
    assert torch.corrcoef(z).triu(1).abs().max() < 0.3, "noise is shared: the shape of randn?"


@pytest.mark.loss
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_the_same_generator_gives_the_same_loss(forcing):
    spy, x = Spy(lambda x, sigma: 0.5 * x, forcing=forcing), torch.randn(2, 4, 3, 8, 8)
    losses = [df.diffusion_forcing_loss(spy, x, spy.config, generator=seed(s)) for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2], "levels and noise come from the generator, and from nothing else"
    if forcing == "teacher":
        assert torch.equal(spy.calls[0]["history"][0], spy.calls[1]["history"][0]), "so does the noise of the history"


@pytest.mark.loss
def test_the_loss_has_a_gradient():
    model = Denoiser(tiny())
    df.diffusion_forcing_loss(model, torch.randn(2, 4, 3, 8, 8), model.config).backward()
    assert model.head[-1].weight.grad.any(), "no gradient reaches the network: detached?"


@pytest.mark.loss
def test_each_loss_is_divided_by_the_one_that_was_to_be_expected():
    x, u, sigma, told = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4), torch.rand(2, 4) + 0.1, []
    each = df.loss_weight(sigma, 0.3) * x.square().mean((2, 3, 4))  # the spy says 0
    for forcing in ("diffusion", "teacher"):
        spy = Spy(forcing=forcing)
        loss = lambda **options: float(df.diffusion_forcing_loss(spy, x, spy.config, sigma=sigma, **options))
        weighed = loss(expected_loss=lambda *levels: told.append(levels) or u)
        assert loss() == pytest.approx(float(each.mean())), "without expected_loss nothing changes"
        assert weighed == pytest.approx(float((each / u.exp() + u).mean())), "loss / E + ln E, frame by frame, u = ln E"
    (own, seen), (own_teacher, seen_teacher) = told
    assert torch.equal(own, sigma) and torch.equal(own_teacher, sigma), "it is told the sigma that each frame has,"
    assert torch.equal(seen, sigma), "and the one with which other frames see it: the same,"
    assert (seen_teacher - 0.05 * units(spy.config)).abs().max() < 1e-6, "but for teacher forcing, context_noise"


# ---- 5. schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.schedule
def test_levels_are_those_of_edm():
    config = tiny(sigma_min=0.02, sigma_max=80.0, rho=7.0)
    sigma = df.karras_sigmas(4, config)
    assert sigma[0] == 0 and len(sigma) == 5 and sigma.dtype == torch.float32, "S + 1 levels; 0 is no noise"
    steps = [((0.02 ** (1 / 7) * (3 - i) + 80 ** (1 / 7) * i) / 3) ** 7 for i in range(4)]
    assert (sigma[1:] / units(config)).tolist() == pytest.approx(steps, rel=1e-4), "EDM, eq. 5: even in sigma^(1/rho)"
    assert df.karras_sigmas(1, config)[1] == pytest.approx(80 * units(config)), "a single step starts at sigma_max"
    bent = df.karras_sigmas(3, tiny(sigma_min=0.02, sigma_max=80.0, rho=2.0))[2] / units(config)
    assert bent == pytest.approx(((0.02**0.5 + 80**0.5) / 2) ** 2, rel=1e-4), "rho is that of the Config"


@pytest.mark.schedule
@pytest.mark.parametrize("kind,u", KINDS + TRAPEZOIDS)
@pytest.mark.parametrize("T,S", [(1, 1), (1, 4), (5, 1), (4, 3), (7, 10)])
def test_matrix_against_a_slow_loop(kind, u, T, S):
    K = df.scheduling_matrix(kind, T, S, u)
    apart = {"autoregressive": S, "full_sequence": 0}.get(kind, u)
    order = [min(t, T - 1 - t) if kind == "trapezoid" else t for t in range(T)]  # how far from an end
    rows, m = [], 0
    while not rows or any(rows[-1]):
        rows.append([min(S, max(0, S + math.floor(apart * n) - m)) for n in order])
        m += 1
    assert K.tolist() == rows, f"{kind}: K[m, t] = clip(S + floor(u t) - m, 0, S), from all S to all 0"
    assert K.dtype == torch.int64, "levels are integers, and index the sigmas: int64"


@pytest.mark.schedule
@pytest.mark.parametrize("arguments", [("none", 4, 4), ("pyramid", 0, 4), ("pyramid", 4, 0), ("pyramid", 4, 4, -1.0),
                                       ("pyramid", 4, 4, math.inf), ("pyramid", 4, 4, math.nan)])
def test_impossible_matrices_are_refused(arguments):
    refused(f"a matrix of {arguments}", df.scheduling_matrix, *arguments)


# ---- 6. sampling: Algorithm 2 ---------------------------------------------------------------------------------------


def matrix(kind, T, S, u=1.0):
    """A matrix by the formula, so that these tests do not need the one of section 5."""
    apart = {"autoregressive": S, "full_sequence": 0}.get(kind, u)
    start = torch.tensor([math.floor(apart * (min(t, T - 1 - t) if kind == "trapezoid" else t)) for t in range(T)])
    return (S + start - torch.arange(S + int(start.max()) + 1)[:, None]).clamp(0, S)


def euler_by_hand(x, sigmas, D):
    """dx / dsigma = (x - D) / sigma (EDM, eqs. 1 and 3), in straight steps."""
    for s, s_next in zip(sigmas, sigmas[1:]):
        x = x + (s_next - s) * (x - D(x, s)) / s
    return x


def multistep_by_hand(x, sigmas, D):
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2: alpha = 1, so lambda = -ln sigma; last step of order 1."""
    lam, seen = [-math.log(s) if s else math.inf for s in sigmas], []
    for i in range(1, len(sigmas)):
        seen.append(D(x, sigmas[i - 1]))
        h = lam[i] - lam[i - 1]
        target = seen[-1]
        if i > 1 and sigmas[i]:
            r = (lam[i - 1] - lam[i - 2]) / h
            target = (1 + 1 / (2 * r)) * seen[-1] - 1 / (2 * r) * seen[-2]
        x = sigmas[i] / sigmas[i - 1] * x - math.expm1(-h) * target
    return x


@pytest.mark.sampler
@pytest.mark.parametrize("options,by_hand", [(dict(solver="euler"), euler_by_hand), ({}, multistep_by_hand)])
@pytest.mark.parametrize("K", [matrix("pyramid", 4, 5, 1.5), matrix("autoregressive", 3, 5),
                               torch.tensor([[5, 5], [4, 5], [2, 5], [2, 3], [1, 2], [1, 1], [0, 1], [0, 0]])])
def test_each_frame_takes_the_steps_of_its_column(K, options, by_hand):
    """A denoiser that looks at each frame by itself: with levels held or skipped, each goes as it would alone."""
    spy = Spy(lambda x, sigma: torch.tanh(x) / (1 + df.per_frame(sigma)))
    nothing = torch.empty(1, 0, 3, 8, 8, dtype=torch.float64)
    out = df.sample(spy, K, nothing, generator=seed(), **options)  # multistep is the default
    s, start = df.karras_sigmas(5, spy.config).double(), spy.calls[0]["x"]
    assert abs((start / s[5]).std() - 1) < 0.1, "it begins as sigma_max times a standard normal"
    for t in range(K.shape[1]):
        levels = [int(k) for k in torch.unique_consecutive(K[:, t])]
        alone = by_hand(start[:, t], [float(s[k]) for k in levels], lambda x, sigma: torch.tanh(x) / (1 + sigma))
        assert torch.allclose(out[:, t], alone, rtol=1e-5, atol=1e-9), f"frame {t}: its own last D, its own last sigma"


@pytest.mark.sampler
@pytest.mark.parametrize("kind,u", KINDS + TRAPEZOIDS)
@pytest.mark.parametrize("solver", df.SOLVERS)
def test_a_constant_denoiser_is_landed_on_exactly(kind, u, solver):
    x0 = torch.randn(3, 8, 8)
    out = df.sample(Spy(lambda x, sigma: x0.expand_as(x)), matrix(kind, 4, 3, u), solver=solver)
    assert torch.equal(out, x0.expand_as(out)), "a step to sigma 0 lands on D exactly"


@pytest.mark.sampler
@pytest.mark.parametrize("solver", df.SOLVERS)
def test_a_frame_whose_level_is_held_keeps_every_bit(solver):
    K = torch.tensor([[3, 3], [2, 3], [1, 3], [1, 2], [1, 1], [0, 1], [0, 0]])
    for run in (df.sample, lambda *args, **options: list(df.rollout(*args, num_frames=2, **options))):
        spy = Spy(lambda x, sigma: torch.sin(3 * x))
        run(spy, K, solver=solver)
        level_1 = df.karras_sigmas(3, spy.config)[1]
        held = [c["x"][:, 0] for c in spy.calls if c["sigma"].shape[1] == 2 and c["sigma"][0, 0] == level_1]
        assert len(held) >= 3, "a held frame is still shown to the frames after it"
        assert all(torch.equal(h, held[0]) for h in held), "a held frame is copied, not stepped"


@pytest.mark.sampler
@pytest.mark.parametrize("causal", [True, False])
def test_sample_shows_all_frames_in_every_call_with_the_sigma_that_they_have(causal):
    spy, context = Spy(lambda x, sigma: 0.9 * x, causal=causal, window=6, action_dim=1), torch.randn(2, 2, 3, 8, 8)
    K, actions = torch.tensor([[3, 3, 3], [2, 3, 3], [0, 3, 3], [0, 2, 2], [0, 0, 1], [0, 0, 0]]), torch.randn(2, 9, 1)
    before, sigmas, known = K.clone(), df.karras_sigmas(3, spy.config), 0.05 * units(spy.config)
    out = df.sample(spy, K, context, actions=actions)
    assert len(spy.calls) == 5, "one call for each step"
    for row, call in zip(K, spy.calls):
        told = [known] * 2 + [float(sigmas[k]) if k else known for k in row]
        assert call["sigma"].tolist() == [pytest.approx(told)] * 2, f"row {row.tolist()}: sigmas[K], or context_noise"
        assert call["commit"] == 0 and call["state"] is None, "all frames are in every call, so there is no state"
        assert torch.equal(call["actions"], actions[:, :5]), "row t of the actions belongs to frame t, context included"
    assert out.shape == (2, 5, 3, 8, 8) and torch.equal(out[:, :2], context), "the context comes first, as it went in"
    assert torch.equal(K, before), "the matrix of the caller stays as it was"


@pytest.mark.sampler
def test_history_carries_the_noise_that_the_network_is_told_drawn_once():
    told, x0 = 0.3 * units(tiny()), torch.full((4, 2, 3, 16, 16), 0.5)
    both = Spy(lambda x, sigma: torch.full_like(x, 0.7), causal=False, window=6, height=16, width=16, context_noise=0.3)
    out = df.sample(both, matrix("autoregressive", 3, 2), x0, keyframes={4: x0[:, 0]})
    noise = torch.stack([call["x"] - out for call in both.calls])  # (calls,B,T,C,H,W): of known frames, their noise
    assert len(both.calls) == 2 * 2, "two frames are sampled, in two steps each: a keyframe takes none"
    for t, known in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [2, 3]), (4, [0, 1, 2, 3])):
        assert (noise[known, :, t] == noise[known[0], :, t]).all(), "one draw for each frame, not one for each call"
        assert float(noise[known[0], :, t].std()) == pytest.approx(told, rel=0.06), "it is really added, and as told"
    rows = noise[2][:, [0, 1, 2, 4]].flatten(3).flatten(0, 2)
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.35, "no clip, frame or channel shares it"
    first = torch.stack([both.calls[0]["x"][:, 2].flatten(), noise[2, :, 2].flatten()])
    assert torch.corrcoef(first)[0, 1].abs() < 0.1, "it is not the noise that the frame began with"
    given = dict(enumerate(x0.unbind(1)))
    assert torch.equal(df.sample(both, matrix("pyramid", 2, 2), keyframes=given, batch_size=4), x0), "all is given"
    assert len(both.calls) == 4, "so there is nothing to call the network for"


class JointGaussian:
    """E[x | all noisy frames] for frames of one pixel with covariance C; its state: committed frames and sigmas."""

    def __init__(self, C, **options):
        self.C, self.config = C, tiny(height=1, width=1, channels=1, patch=1, dim_mults=(1,), data_mean=(),
                                      sigma_data=0.5, context_noise=1e-4, sigma_min=0.002, window=len(C), **options)

    def __call__(self, x, sigma, state=None, *, actions=None, commit=None, history=None):
        y, s = x.flatten(2).squeeze(-1).double(), sigma[0].double()
        if state is not None:
            y, s = torch.cat([state[0], y], 1), torch.cat([state[1], s])
        n, done = y.shape[1], 0 if state is None else state[0].shape[1]
        if self.config.causal:
            D = torch.stack([self.mean(y[:, : i + 1], s[: i + 1])[:, i] for i in range(done, n)], 1)
        else:
            D = self.mean(y, s)[:, done:]
        commit = x.shape[1] if commit is None else commit
        return D.to(x).view_as(x), state if commit == 0 else (y[:, : done + commit], s[: done + commit])

    def mean(self, y, s):
        C = self.C[: len(s), : len(s)]
        return y @ torch.linalg.solve(C + torch.diag(s**2), C)


def ar1(T, phi=0.9):
    i = torch.arange(T).double()
    return 0.25 * phi ** (i[:, None] - i[None]).abs()


@pytest.mark.sampler
@pytest.mark.parametrize("causal,kind,u", [(False, *ku) for ku in KINDS + TRAPEZOIDS] + [(True, "autoregressive", 0)])
def test_exact_denoisers_give_the_true_covariance(causal, kind, u):
    model = JointGaussian(ar1(4), causal=causal)
    x = df.sample(model, matrix(kind, 4, 64, u), batch_size=8000, generator=seed()).flatten(1)
    error = (torch.cov(x.T).double() - model.C).abs().max() / 0.25
    assert error < 0.06, f"samples of {kind} have the wrong covariance (off by {error:.0%}): wrong slope or level"


@pytest.mark.sampler
def test_with_a_causal_denoiser_only_autoregressive_is_exact():
    """Past frames cannot listen to later ones: no bug, but a limit of every causal model."""
    model = JointGaussian(ar1(4), causal=True)
    x = df.sample(model, matrix("full_sequence", 4, 64), batch_size=8000, generator=seed()).flatten(1)
    error = (torch.cov(x.T).double() - model.C).abs().max() / 0.25
    assert 0.2 < error < 0.7, f"full_sequence with a causal denoiser is off by {error:.0%}, not by the known 45 %"


@pytest.mark.sampler
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("kind,u", KINDS + TRAPEZOIDS)
def test_frames_between_keyframes_have_the_true_mean_and_covariance(kind, u, context):
    """The first frame (a keyframe, or context) and the last one are given: in closed form, what lies between."""
    model, ends = JointGaussian(ar1(4), causal=False), torch.tensor([0.8, -0.3])
    given = ends[:, None, None, None, None].expand(2, 4000, 1, 1, 1)
    keyframes = {3: given[1]} if context else {0: given[0], 3: given[1]}
    x = df.sample(model, matrix(kind, 4 - context, 64, u), given[0][:, None] if context else None, keyframes=keyframes,
                  batch_size=4000, generator=seed()).flatten(1)
    assert torch.equal(x[:, [0, 3]], ends.expand(4000, 2)), "given frames come out bit for bit"
    C, between, known = model.C, [1, 2], [0, 3]
    gain = C[between][:, known] @ torch.linalg.inv(C[known][:, known])
    mean, cov = gain @ ends.double(), C[between][:, between] - gain @ C[known][:, between]
    assert (x[:, 1:3].double().mean(0) - mean).abs().max() < 0.02, f"{kind}: wrong mean: both ends pull"
    assert (torch.cov(x[:, 1:3].T).double() - cov).abs().max() < 0.05 * cov[0, 0], f"{kind}: wrong covariance"


@pytest.mark.sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_type_and_device_are_those_of_the_context_or_of_the_weights(dtype):
    actions, nothing = torch.ones(1, 2, 1), torch.empty(1, 0, 3, 8, 8, dtype=dtype)
    for run in (df.sample, lambda *args, **options: torch.stack(list(df.rollout(*args[:2], 2, args[2], **options)), 1)):
        spy = Spy(lambda x, sigma: 0.9 * x, action_dim=1)
        out = run(spy, matrix("pyramid", 2, 2), nothing, actions=actions)
        types = {out.dtype} | {c[k].dtype for c in spy.calls for k in ("x", "sigma", "actions")}
        assert types == {dtype}, "something was promoted, or actions are of another type than the frames"
    model, K = random_denoiser().to(dtype if dtype == torch.float64 else torch.float32), matrix("pyramid", 2, 2)
    out = df.sample(model, K)
    assert out.dtype == next(model.parameters()).dtype, "without a context: as the weights"
    assert not out.requires_grad and not next(df.rollout(model, K, 2)).requires_grad, "it keeps no graph"


# ---- 7. rollout -----------------------------------------------------------------------------------------------------


LAYOUTS = [("autoregressive", 0, 5, None), ("pyramid", 1, 5, None), ("pyramid", 2.5, 5, None),
           ("pyramid", 0.4, 5, None), ("full_sequence", 0, 5, None), ("autoregressive", 0, 1, None),
           ("full_sequence", 0, 3, None), ("pyramid", 1, 3, 3.5), *[("pyramid", 0, 1, u) for u in (0.3, 1, 2.5, 7)]]


def laid_out(K, period, num_frames):
    """Copies of K side by side, by a slow loop: copy j begins floor(j period) rows after copy 0."""
    T, S, copies = K.shape[1], int(K[0, 0]), math.ceil(num_frames / K.shape[1])
    period = len(K) - 1 if period is None else period
    height = math.floor((copies - 1) * period) + len(K)
    sheet = torch.full((height, copies * T), S)
    for j in range(copies):
        top = math.floor(j * period)
        for row in range(top, height):
            sheet[row, j * T : (j + 1) * T] = K[row - top] if row - top < len(K) else 0
    return sheet[:, :num_frames]


@pytest.mark.rollout
@pytest.mark.parametrize("temporal", MIXERS)
@pytest.mark.parametrize("kind,u,T,period", LAYOUTS)
def test_rollout_is_sample_with_a_state(temporal, kind, u, T, period):
    """The heart of the sampler: frames that leave, a state that takes them, copies of the matrix change no number."""
    model, K = random_denoiser(temporal=temporal, action_dim=2, window=4).double(), matrix(kind, T, 3, u)
    for num_context, acting, options in ((0, True, {}), (2, False, dict(solver="euler")), (2, True, {})):
        N = num_context + (5 if T == 5 else 7)
        context = torch.randn(2, num_context, 3, 8, 8, dtype=torch.float64, generator=seed(1))
        options = options | dict(actions=torch.randn(2, N, 2, generator=seed(2)) if acting else None)
        frames = torch.stack(list(df.rollout(model, K, N, context, period=period, generator=seed(3), **options)), 1)
        clip = df.sample(model, laid_out(K, period, N - num_context), context, generator=seed(3), **options)
        assert frames.shape == clip.shape == (2, N, 3, 8, 8), "no frame is dropped or added"
        assert torch.equal(frames[:, :num_context], context), "the context comes first, as it went in"
        worst = float((frames - clip).abs().max())
        assert worst < 1e-5, f"off by {worst:.1e}: context {num_context}, actions {acting}, {options.keys()}"


@pytest.mark.rollout
@pytest.mark.parametrize("kind,u,T,period", LAYOUTS)
def test_a_frame_is_in_the_calls_from_its_start_until_it_enters_the_state(kind, u, T, period):
    spy, K = Spy(lambda x, sigma: 0.9 * x), matrix(kind, T, 3, u)
    list(df.rollout(spy, K, 12, torch.randn(2, 2, 3, 8, 8), period=period))
    calls, entered = iter(spy.calls), 0
    for now, then in itertools.pairwise(F.pad(laid_out(K, period, 10), (2, 0)).tolist()):
        if now == then:
            continue
        call, finished = next(calls), now.count(0)
        flying = sum(k > 0 and after < 3 for k, after in zip(now, then))
        assert call["commit"] == finished - entered, f"row {now}: exactly the newly finished frames enter the state"
        assert (call["state"] or 0) == entered, f"row {now}: the state of the last call, with every finished frame once"
        assert call["x"].shape[1] == finished - entered + flying, f"row {now}: and those in flight"
        entered = finished
    assert next(calls, None) is None, "a row in which nothing moves makes no call"


@pytest.mark.rollout
@pytest.mark.parametrize("temporal", MIXERS)
def test_a_late_frame_costs_what_an_early_one_does(temporal):
    model, widths, kept = random_denoiser(temporal=temporal), [], {}
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for t, _ in enumerate(df.rollout(model, matrix("pyramid", 1, 3), 221, period=1.5)):
        if t in (40, 41, 219, 220):  # bytes of all tensors that are alive
            gc.collect()
            storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
            kept[t] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert max(widths[250:]) == max(widths[30:60]) <= 4, "x grows: finished frames must leave it"
    frame = 3 * 8 * 8 * 4
    assert max(kept[219], kept[220]) < max(kept[40], kept[41]) + 20 * frame, "180 frames later, memory has grown"


@pytest.mark.rollout
def test_a_rollout_without_an_end_goes_on_and_a_longer_one_begins_with_the_shorter():
    spy, K = Spy(lambda x, sigma: 0.9 * x), matrix("pyramid", 4, 3, 1.5)
    endless = df.rollout(spy, K, None, generator=seed(5))
    first = torch.stack([next(endless) for _ in range(30)], 1)
    for N in (1, 7, 30):
        whole = torch.stack(list(df.rollout(spy, K, N, generator=seed(5))), 1)
        assert torch.equal(first[:, :N], whole), "noise is drawn frame by frame: num_frames must not change it"
    acting = df.rollout(Spy(action_dim=1), matrix("autoregressive", 1, 2), None, actions=torch.ones(1, 7, 1))
    assert len(list(acting)) == 7, "it ends where its actions end"


@pytest.mark.rollout
def test_a_frame_is_given_out_as_soon_as_it_is_finished():
    spy = Spy()
    calls = [len(spy.calls) for _ in df.rollout(spy, matrix("autoregressive", 4, 3), 5, torch.zeros(1, 1, 3, 8, 8))]
    assert calls == [0, 3, 6, 9, 12], "frames are held back: yield in the loop over rows"


@pytest.mark.rollout
@pytest.mark.parametrize("context", [0, 2])
def test_whoever_paints_on_a_frame_does_not_change_the_memory(context):
    model, K = random_denoiser(), matrix("autoregressive", 2, 2)

    def run(keep):
        clip, frames = torch.ones(1, context, 3, 8, 8) if context else None, []
        for frame in df.rollout(model, K, 5, clip, generator=seed(5)):
            frames.append(frame.clone())
            frame *= keep
        return torch.stack(frames)

    assert torch.equal(run(1.0), run(0.0)), "frames are given out as views of the memory: clone them"


@pytest.mark.rollout
@pytest.mark.parametrize("kind,S,u", [("autoregressive", 3, 3), ("pyramid", 4, 2), ("pyramid", 6, 1)])
def test_an_action_is_asked_for_when_its_frame_joins(kind, S, u):
    """After frame t - 1 was given out (in a pyramid, frame t - S / u), and not before: a player sees it first."""
    seen = []  # in order: the number of an action that was asked for, or of a frame that was given out

    def keys():
        for t in itertools.count():
            seen.append(f"action {t}")
            yield torch.full((1, 1), float(t))

    spy, context = Spy(action_dim=1), torch.zeros(1, 2, 3, 8, 8)
    for t, _ in enumerate(df.rollout(spy, matrix(kind, 1, S), 12, context, period=u, actions=keys())):
        seen.append(f"frame {t}")
    ahead = S // u
    for t in range(2 + ahead, 12):
        before = seen[: seen.index(f"action {t}")]
        assert f"frame {t - ahead}" in before, f"action {t} is asked for before frame {t - ahead} is given out"
        assert f"frame {t - ahead + 1}" not in before, f"action {t} is asked for late: frame {t} is no longer noise"
    assert {"action 0", "action 1"} < set(seen[:4]), "the frames of context have actions, too"
    assert "action 12" not in seen, "no action is asked for that no frame of num_frames needs"
    for call in spy.calls:
        told = call["actions"][0, :, 0].tolist()
        first = call["state"] or 0
        assert told == list(range(first, first + call["x"].shape[1])), "each frame has its own action"


@pytest.mark.rollout
@pytest.mark.parametrize("kind,u", KINDS)
def test_actions_may_come_from_an_iterator(kind, u):
    model, actions = random_denoiser(action_dim=2, window=4), torch.randn(2, 9, 2)
    run = lambda actions, N: list(df.rollout(model, matrix(kind, 3, 4, u), N, torch.zeros(2, 2, 3, 8, 8),
                                             actions=actions, generator=seed()))
    tensor, one_by_one = run(actions, 9), run(iter(actions.unbind(1)), None)
    assert len(one_by_one) == 9, "its end ends the rollout, after all frames that have an action"
    assert all(map(torch.equal, tensor, one_by_one)), "an iterator gives the same frames as a tensor, bit for bit"
    assert len(run(iter(actions.unbind(1)), 7)) == 7, "num_frames ends it before the actions do"
    assert len(run(iter(actions[:, :1].unbind(1)), None)) == 1, "also within the context"


@pytest.mark.rollout
def test_what_cannot_work_is_refused_before_anything_is_computed():
    spy, both, K = Spy(action_dim=2), Spy(action_dim=2, causal=False, window=4), matrix("autoregressive", 2, 2)
    clip, long = torch.zeros(1, 2, 3, 8, 8), matrix("full_sequence", 5, 2)
    rolls = lambda K=K, model=spy, num_frames=4, **options: (df.rollout, model, K, num_frames, options)
    whole = lambda K=K, model=both, **options: (df.sample, model, K, options)
    either = [
        ("a matrix upside down", dict(K=K.flip(0))), ("a level that rises", dict(K=torch.tensor([[2], [1], [2], [0]]))),
        ("a matrix of zeros", dict(K=K[-1:])), ("a matrix that does not end at 0", dict(K=K[:-1])),
        ("a matrix that does not begin at S", dict(K=K[1:])), ("an empty matrix", dict(K=K[:0])),
        ("a matrix without a frame", dict(K=K[:, :0])), ("a matrix of floats", dict(K=K.float())),
        ("a matrix of one axis", dict(K=K[0])), ("levels below 0", dict(K=K - 1)), ("a solver", dict(solver="rk")),
        ("1 number a frame where 2 are needed", dict(actions=torch.zeros(1, 4, 1))), ("no clip", dict(batch_size=0)),
        ("actions of two clips", dict(actions=torch.zeros(2, 4, 2))), ("of one axis", dict(actions=torch.zeros(4))),
        ("too few actions", dict(actions=torch.zeros(1, 1, 2))), ("context of bytes", dict(context=clip.byte())),
        ("context of another size", dict(context=clip[..., :4])), ("of one channel", dict(context=clip[:, :, :1]))]
    calls = [(what, call(**options)) for call in (rolls, whole) for what, options in either] + [
        ("a frame cleaner than one before it", rolls(K.flip(1))), ("a trapezoid", rolls(matrix("trapezoid", 5, 2))),
        ("a rollout of no frame", rolls(num_frames=0)), ("a period of 0", rolls(period=0)),
        ("an endless period", rolls(period=math.inf)), ("copies that clash", rolls(period=1.9)),
        ("2 frames after 2 of context, 1 in all", rolls(context=clip, num_frames=1)),
        ("a bidirectional model, which has no state", rolls(model=both)), ("frames beyond the window", whole(long)),
        ("context and frames beyond the window", whole(matrix("full_sequence", 3, 2), context=clip)),
        ("keyframes for a causal model", whole(model=spy, keyframes={1: clip[:, 1]})),
        ("a keyframe in the context", whole(context=clip, keyframes={0: clip[:, 0]})),
        ("one beyond the end", whole(keyframes={2: clip[:, 0]})), ("before 0", whole(keyframes={-1: clip[:, 0]})),
        ("one of bytes", whole(keyframes={1: clip[:, 0].byte()})), ("a size", whole(keyframes={1: clip[:, 0, :, :4]})),
        ("keyframes of two clips for one", whole(keyframes={1: clip[0]}))]
    for what, (function, *args, options) in calls:
        refused(f"{function.__name__}: {what}", function, *args, **options)
    refused("actions for a model without", df.rollout, Spy(), K, 4, actions=torch.zeros(1, 4, 2))
    df.rollout(spy, K, 4, period=2)  # the last column starts in row 2: the next copy may start there, too
    df.rollout(spy, K, 4, actions=torch.zeros(1, 9, 2))  # more actions than frames are welcome
    assert not spy.calls and not both.calls, "nothing is computed before the first frame is asked for"


# ---- 8. the denoiser ------------------------------------------------------------------------------------------------


@pytest.mark.causality
@pytest.mark.parametrize("temporal", MIXERS)
@pytest.mark.parametrize("through", ["x", "sigma"])
def test_no_output_depends_on_a_later_frame(temporal, through):
    model = random_denoiser(temporal=temporal)
    x = torch.randn(2, 5, 3, 8, 8, requires_grad=True)
    sigma = (torch.rand(2, 5) + 0.1).requires_grad_()
    out, _ = model(x, sigma)
    for i in range(5):
        grad = torch.autograd.grad(out[:, i].square().sum(), {"x": x, "sigma": sigma}[through], retain_graph=True)[0]
        grad = grad.flatten(2).abs().amax((0, 2)) if through == "x" else grad.abs().amax(0)
        assert grad[i] > 0, f"frame {i} does not even depend on itself through {through}"
        assert (grad[i + 1 :] == 0).all(), f"output {i} sees the future through {through}: a norm over time?"
        if i > 0:
            assert grad[i - 1] > 0, f"output {i} does not depend on the frame before it: nothing mixes along time"


@pytest.mark.causality
def test_clips_of_a_batch_do_not_meet():
    model, x, sigma = random_denoiser(), torch.randn(3, 4, 3, 8, 8), torch.rand(3, 4) + 0.1
    together, _ = model(x, sigma)
    for b in range(3):
        alone, _ = model(x[b : b + 1], sigma[b : b + 1])
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5), \
            "a clip depends on its neighbours in the batch: axes of a reshape mixed up?"


@pytest.mark.actions
def test_an_action_changes_its_own_clip_from_its_frame_on():
    model, x, sigma = random_denoiser(action_dim=2), torch.randn(2, 3, 3, 8, 8), torch.ones(2, 3)
    none, one = torch.zeros(2, 2, 3, 2)
    one[1, 1] = 1
    still, moved = model(x, sigma, actions=none)[0], model(x, sigma, actions=one)[0]
    changed = ((moved - still).abs().amax((2, 3, 4)) > 1e-5).tolist()
    assert changed == [[False, False, False], [False, True, True]], "actions ignored, or given to another clip or frame"


@pytest.mark.actions
def test_a_row_of_nan_is_unknown_and_so_is_no_action_at_all():
    model, x, sigma = random_denoiser(action_dim=2), torch.randn(2, 3, 3, 8, 8), torch.ones(2, 3)
    actions, nan = torch.randn(2, 3, 2), float("nan")
    unknown, _ = model(x, sigma)
    assert torch.equal(model(x, sigma, actions=torch.full((2, 3, 2), nan))[0], unknown), "None: all rows are unknown"
    assert not torch.allclose(model(x, sigma, actions=torch.zeros(2, 3, 2))[0], unknown), "zeros are not unknown"
    partly = actions.clone()
    partly[0, 1, 0] = nan
    out, known = model(x, sigma, actions=partly)[0], model(x, sigma, actions=actions)[0]
    changed = ((out - known).abs().amax((2, 3, 4)) > 1e-5).tolist()
    assert changed == [[False, True, True], [False] * 3], "one row is unknown, and the others are known"
    partly[0, 1, 1] = 7
    assert torch.equal(model(x, sigma, actions=partly)[0], out), "a row with one NaN is unknown as a whole"
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), "NaN in a gradient"


@pytest.mark.actions
def test_actions_are_measured_in_units_of_their_size():
    plain, scaled = random_denoiser(action_dim=2), random_denoiser(action_dim=2, action_scale=(20.0, 0.5))
    x, sigma, actions = torch.randn(1, 2, 3, 8, 8), torch.ones(1, 2), torch.randn(1, 2, 2)
    same = scaled(x, sigma, actions=actions * torch.tensor([20.0, 0.5]))[0]
    assert torch.allclose(plain(x, sigma, actions=actions)[0], same, atol=1e-5), "actions / action_scale"


@pytest.mark.streaming
@pytest.mark.parametrize("temporal", MIXERS)
@pytest.mark.parametrize("chunks", [(5, 1, 10), (1,) * 16, (2, 14)])
def test_streaming_equals_parallel_past_the_window(temporal, chunks):
    model = random_denoiser(temporal=temporal, action_dim=2)
    x, sigma, actions = torch.randn(2, 16, 3, 8, 8), torch.rand(2, 16) + 0.1, torch.randn(2, 16, 2)
    parallel, end = model(x, sigma, actions=actions)
    outputs, state, t = [], None, 0
    for n in chunks:
        out, state = model(x[:, t : t + n], sigma[:, t : t + n], state, actions=actions[:, t : t + n])
        outputs, t = outputs + [out], t + n
    assert torch.allclose(torch.cat(outputs, 1), parallel, atol=1e-5), f"chunks of {chunks} differ from one call"
    for a, b in zip(flat(state), flat(end)):
        assert torch.allclose(a, b, atol=1e-5), "the state after the chunks differs from that after one call"


@pytest.mark.streaming
@pytest.mark.parametrize("temporal", MIXERS)
@pytest.mark.parametrize("before", [0, 2, 7])
def test_state_after_commit_is_that_of_a_clean_pass(temporal, before):
    model = random_denoiser(temporal=temporal)
    x, sigma = torch.randn(2, before + 5, 3, 8, 8), torch.rand(2, before + 5) + 0.1
    state = model(x[:, :before], sigma[:, :before])[1] if before else None
    assert model(x[:, before:], sigma[:, before:], state, commit=0)[1] is state, "commit=0: the same state"
    for n in range(1, 4):
        _, committed = model(x[:, before:], sigma[:, before:], state, commit=n)
        _, clean = model(x[:, : before + n], sigma[:, : before + n])
        for a, b in zip(flat(committed), flat(clean)):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5), \
                f"commit={n}: a frame in flight is in the state, or a finished one is not"


@pytest.mark.streaming
@pytest.mark.parametrize("temporal", MIXERS)
def test_the_state_stops_growing(temporal):
    model, state = random_denoiser(temporal=temporal, window=4), None
    with torch.no_grad():
        for t in range(12):
            _, state = model(torch.randn(1, 1, 3, 8, 8), torch.ones(1, 1), state)
    _, long = model(torch.randn(1, 50, 3, 8, 8), torch.ones(1, 50))
    assert [s.shape for s in flat(state)] == [s.shape for s in flat(long)], "the state has grown"
    assert all(s.untyped_storage().nbytes() == s.numel() * 4 for s in flat(long)), "a view keeps all frames alive"
    if temporal == "attention":
        assert {s.shape[2] for s in flat(long)} == {3}, "window 4: the frame itself and three before it"


@pytest.mark.teacher
@pytest.mark.parametrize("temporal", MIXERS)
def test_teacher_forcing_is_T_calls_with_the_clean_past_committed(temporal):
    model = random_denoiser(temporal=temporal, action_dim=2)
    past, noisy = torch.randn(2, 2, 6, 3, 8, 8)
    past_sigma, sigma, actions = torch.full((2, 6), 0.01), torch.rand(2, 6) + 0.1, torch.randn(2, 6, 2)
    together, end = model(noisy, sigma, actions=actions, history=(past, past_sigma))
    state = None
    for t in range(6):
        now = slice(t, t + 1)
        alone, _ = model(noisy[:, now], sigma[:, now], state, actions=actions[:, now], commit=0)
        assert torch.allclose(together[:, t], alone[:, 0], atol=1e-5), \
            f"noisy frame {t} differs from a call of its own: mask, position, action, or a layer that mixes frames?"
        _, state = model(past[:, now], past_sigma[:, now], state, actions=actions[:, now])
    for a, b in zip(flat(end), flat(state)):
        assert torch.allclose(a, b, atol=1e-5), "the state never holds a noisy frame"


@pytest.mark.causality
def test_what_does_not_fit_is_refused():
    model, x, sigma = random_denoiser(action_dim=2), torch.randn(1, 2, 3, 8, 8), torch.ones(1, 2)
    for what, args, options in (
            ("one channel, not three", (x[:, :, :1], sigma), {}), ("another size", (x[..., :4], sigma), {}),
            ("one sigma for two frames", (x, sigma[:, :1]), {}), ("a sigma of 0", (x, torch.tensor([[1.0, 0.0]])), {}),
            ("a sigma below 0", (x, -sigma), {}), ("3 numbers, not 2", (x, sigma), dict(actions=torch.ones(1, 2, 3))),
            ("1 row for 2 frames", (x, sigma), dict(actions=torch.ones(1, 1, 2))),
            ("3 of 2 frames enter the state", (x, sigma), dict(commit=3)), ("-1 of them", (x, sigma), dict(commit=-1))):
        refused(what, model, *args, **options)
        if not options:
            refused(f"loss: {what}", df.diffusion_forcing_loss, model, args[0], model.config, sigma=args[1])
    refused("actions for a model without", random_denoiser(), x, sigma, actions=torch.ones(1, 2, 2))
    model(x, sigma, commit=2)  # both may


@pytest.mark.network
def test_a_sigma_is_sines_and_cosines_of_its_logarithm():
    model, seen, c_noise = random_denoiser(), [], torch.tensor([[0.0, 0.70, 0.71]])
    model.embed_noise.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    near, _ = model(torch.zeros(1, 3, 3, 8, 8), model.config.sigma_data * (4 * c_noise).exp())
    none, a, b = seen[0].unflatten(-1, (2, -1))
    assert torch.allclose(none, torch.tensor([[1.0], [0.0]]).expand(2, 8), atol=1e-5), "cosines, then sines"
    assert torch.allclose(a.square().sum(0), torch.ones(8)), "each frequency has its cosine and its sine"
    assert (a - b).abs().max() < 0.5, "near levels look unrelated: frequencies too high"
    ends = [float(model.frequency[i]) for i in (0, -1)]
    assert ends == pytest.approx([10**-0.5, 10**1.5], rel=1e-3), "every checkpoint was trained with these frequencies"
    x = torch.randn(1, 1, 3, 8, 8)
    out = [model.network(x, torch.full((1, 1), label), None, None, 0, False)[0] for label in (-1.0, -0.9, 1.0)]
    assert not torch.allclose(out[0], out[2], atol=1e-3), "the network ignores sigma: does it reach the blocks?"
    assert not torch.allclose(out[0], out[1], atol=1e-4), "it cannot tell near levels apart: frequencies too low"


@pytest.mark.network
def test_frames_meet_at_the_same_place_only():
    model, x = random_denoiser(), torch.randn(2, 8, 3, 5, requires_grad=True)
    block = model.encoder[0]
    block.spatial.forward = lambda x, emb: x
    out, _ = block(x, None, 1, None, 0, block.mixer.pattern(2, None, False, x.device))
    seen = torch.autograd.grad(out[1, :, 1, 3].sum(), x)[0][0].abs().sum(0) > 0
    assert seen.nonzero().tolist() == [[1, 3]], "frame 1 sees frame 0 elsewhere: the axes of permute and reshape?"


@pytest.mark.network
def test_the_mixer_gets_normalised_features_and_begins_as_no_change():
    block, seen, x = df.Block(8, 8, 8, tiny()), [], 5 + 3 * torch.randn(2, 8, 3, 5)
    block.spatial.forward = lambda x, emb: x
    block.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out, _ = block(x, None, 1, None, 0, block.mixer.pattern(2, None, False, x.device))
    assert torch.equal(out, x), "a new mixer changes nothing: residual lost, or no zero layer?"
    assert seen[0].mean(-1).abs().max() < 1e-3, "the mixer gets LayerNorm(h): attention saturates as h grows"


@pytest.mark.network
def test_all_blocks_share_one_pattern_of_time(monkeypatch):
    calls, real = [], TemporalAttention.pattern
    monkeypatch.setattr(TemporalAttention, "pattern", lambda *args: calls.append(args[2:]) or real(*args))
    model, x, sigma = random_denoiser(), torch.randn(1, 2, 3, 8, 8), torch.ones(1, 2)
    _, state = model(x, sigma)
    model(x, sigma, state)
    assert len(calls) == 2, "mask and rotation are made once for each call, not in every block"


@pytest.mark.network
def test_skips_reach_the_decoder():
    model, seen = random_denoiser(), []
    model.encoder[0].register_forward_hook(lambda module, x, out: seen.append(out[0]))
    model.decoder[0].register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    model(torch.randn(1, 1, 3, 8, 8), torch.ones(1, 1))
    assert torch.equal(seen[1][:, 8:], seen[0]), "the decoder gets what came up from below, and its level's skip"


@pytest.mark.network
def test_a_network_may_have_four_resolutions():
    model, x = random_denoiser(height=16, width=16, dim_mults=(1, 2, 3, 4)), torch.randn(1, 2, 3, 16, 16)
    assert model(x, torch.ones(1, 2))[0].shape == x.shape, "each layer of up belongs to its own level"


# ---- 9. temporal mixers ---------------------------------------------------------------------------------------------


def mixer(kind, **options):
    torch.manual_seed(0)
    m = df.MIXERS[kind](16, tiny(dim=16, temporal=kind, **({"window": 4} | options)))
    torch.nn.init.normal_(m.out.weight, std=0.3)
    return m


def mix(m, x, state=None, commit=None, two_streams=False):
    """One call of a mixer by itself, as the network makes it."""
    commit = x.shape[1] if commit is None else commit
    return m(x, state, commit, m.pattern(x.shape[1], state, two_streams, x.device))


@pytest.mark.attention
@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_a_frame_sees_the_last_window_frames(window, causal):
    m, x = mixer("attention", window=window, causal=causal), torch.randn(1, 9, 16, requires_grad=True)
    out, _ = mix(m, x)
    for i in range(9):
        seen = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().amax(-1) > 0
        expected = [i - j < window and (j <= i or not causal and j - i < window) for j in range(9)]
        assert seen.tolist() == expected, f"frame {i} must see the last {window} frames, itself included"


@pytest.mark.attention
def test_each_stream_sees_the_history_that_it_may():
    m, T, window = mixer("attention", window=3), 6, 3
    x = torch.randn(1, 2 * T, 16, requires_grad=True)
    out, _ = mix(m, x, commit=0, two_streams=True)
    for i in range(2 * T):
        seen = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().amax(-1) > 0
        history = [(j <= i if i < T else j < i - T) and (i % T) - j < window for j in range(T)]
        noisy = [j + T == i for j in range(T)]
        assert seen.tolist() == history + noisy, f"position {i}: history sees history, noisy i history < i and itself"


@pytest.mark.attention
def test_attention_by_its_formula():
    """Pair i of channels (i, i + d/2) turns by pi/2 1000^(-i / (d/2)) a frame; then softmax(q k / sqrt(d)) v."""
    m, x = mixer("attention"), torch.randn(1, 4, 16)
    q, k, v = m.qkv(x).view(1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (1,heads,T,d) each
    score = torch.full((1, 2, 4, 4), -math.inf)
    for i, j in itertools.product(range(4), repeat=2):
        if j <= i:
            angle = (i - j) * math.pi / 2 * 1000 ** (-torch.arange(4) / 4)
            a, b, c, d = *q[:, :, i].chunk(2, -1), *k[:, :, j].chunk(2, -1)
            score[:, :, i, j] = ((a * c + b * d) * angle.cos() + (a * d - b * c) * angle.sin()).sum(-1) / 8**0.5
    y = score.softmax(-1) @ v
    expected = m.out(y.transpose(1, 2).reshape(1, 4, 16))
    assert torch.allclose(mix(m, x)[0], expected, atol=1e-5), "softmax(q k / sqrt(d)) v, with q and k turned"


@pytest.mark.attention
def test_rotation_is_in_float32_and_keeps_the_type():
    m, x = mixer("attention"), torch.ones(1, 1, 32, 8)
    sees, cos, sin = m.pattern(32, None, False, x.device)
    assert cos.dtype == sin.dtype == torch.float32, "in bfloat16 an angle of 48.7 is 48.75"
    half = df.rotary(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16, "attention gets back the type that it gave"
    assert torch.allclose(df.rotary(x, cos, sin), half.float(), atol=0.02), "and the same turn"


@pytest.mark.attention
def test_a_head_can_look_back_whatever_the_frames_show():
    m, x = mixer("attention"), torch.randn(1, 4, 16, requires_grad=True)
    m.qkv.weight.data[:32] = 0  # now q and k are their bias alone
    grad = torch.autograd.grad(mix(m, x)[0][0, 3].sum(), x)[0][0]
    assert (grad[0] - grad[3]).abs().max() > 1e-4, "q and k have a bias, which tells frames apart once it is turned"


@pytest.mark.attention
def test_two_thousand_frames_on_nothing_has_shifted():
    m, x = mixer("attention"), torch.randn(1, 2004, 16)
    with torch.no_grad():
        state, at_once = None, mix(m, x[:, -4:])[0][:, -1]
        for t in range(0, 2004, 4):
            out, state = mix(m, x[:, t : t + 4], state)
    assert torch.allclose(out[:, -1], at_once, atol=1e-6), "positions grow with the rollout: count from the oldest key"


@pytest.mark.attention
def test_attention_splits_more_than_65535_sequences(monkeypatch):
    sizes, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **o: sizes.append(len(q)) or real(q, *a, **o))
    m, x = mixer("attention"), torch.randn(66_000, 1, 16)
    out, _ = mix(m, x)
    assert max(sizes) <= 65_535, "CUDA's kernels take at most 65,535 sequences a call"
    assert torch.allclose(out[-1:], mix(m, x[-1:])[0], atol=1e-6), "the parts are put together in order"


@pytest.mark.gru
def test_gru_against_its_equations():
    m, x = mixer("gru"), torch.randn(2, 5, 16)
    h = torch.zeros(2, 16)
    for t in range(5):
        gi, gh = x[:, t] @ m.gru.weight_ih_l0.T + m.gru.bias_ih_l0, h @ m.gru.weight_hh_l0.T + m.gru.bias_hh_l0
        r, z = (gi[:, :32] + gh[:, :32]).sigmoid().chunk(2, 1)
        h = (1 - z) * (gi[:, 32:] + r * gh[:, 32:]).tanh() + z * h
        assert torch.allclose(mix(m, x)[0][:, t], m.out(h), atol=1e-5), f"frame {t} comes from the state after it"
    assert torch.allclose(flat([mix(m, x)[1]])[0], h, atol=1e-5), "the state is the last hidden state"


@pytest.mark.gru
@pytest.mark.parametrize("two_streams", [False, True])
def test_a_gru_splits_more_than_65535_sequences(two_streams):
    m, sizes = mixer("gru"), []
    m.gru.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x, state = torch.randn(33_000 if two_streams else 66_000, 4 if two_streams else 1, 16), torch.randn(66_000, 16)
    run = lambda rows: mix(m, x[rows], None if two_streams else state[rows], 0, two_streams)[0]
    out = run(slice(None))
    assert max(sizes) <= 65_535, "CUDA's kernels take at most 65,535 sequences a call; each noisy frame is one"
    assert torch.allclose(out[-1:], run(slice(-1, None)), atol=1e-5), "the parts are put together in order"


# ---- 10. spatial blocks ---------------------------------------------------------------------------------------------


@pytest.mark.network
def test_res_block_by_its_formula():
    m, x, emb = df.ResBlock(8, 16, 4), torch.randn(2, 8, 3, 3), torch.randn(2, 4)
    same = df.ResBlock(8, 8, 4)
    assert torch.equal(same(x, emb), x), "a new ResBlock changes nothing: skip lost, or no zero layer?"
    torch.nn.init.normal_(m.conv2.weight)
    scale, shift = m.scale_shift(emb)[..., None, None].chunk(2, 1)
    h = m.norm2(m.conv1(F.silu(m.norm1(x)))) * (1 + scale) + shift
    assert torch.allclose(m(x, emb), m.skip(x) + m.conv2(F.silu(h)), atol=1e-4), \
        "skip + conv(silu((1 + scale) norm(conv(silu(norm x))) + shift))"


@pytest.mark.network
def test_spatial_attention_by_its_formula():
    m, x = df.SpatialAttention(16, 8), torch.randn(2, 16, 2, 3)
    torch.nn.init.normal_(m.out.weight)
    q, k, v = m.qkv(m.norm(x)).flatten(2).view(2, 3, 2, 8, 6).unbind(1)  # (N,heads,d,hw) each
    share = (torch.einsum("nhdi,nhdj->nhij", q, k) / 8**0.5).softmax(-1)
    y = torch.einsum("nhij,nhdj->nhdi", share, v).reshape(2, 16, 2, 3)
    assert torch.allclose(m(x), x + m.out(y), atol=1e-5), "x + softmax(q k / sqrt(d)) v, over places, head by head"
    assert isinstance(random_denoiser().middle.attend, df.SpatialAttention), "it stands at the lowest resolution"


# ---- 11. checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.checkpoint
@pytest.mark.parametrize("temporal", MIXERS)
def test_a_checkpoint_gives_back_the_same_model(tmp_path, temporal):
    model, x = random_denoiser(temporal=temporal, stride=2, forcing="teacher"), torch.randn(1, 3, 3, 8, 8)
    sigma = torch.ones(1, 3)
    df.save_checkpoint(tmp_path / "m.pt", model.config, model.state_dict(), step=7)
    loaded, extra = df.load_checkpoint(tmp_path / "m.pt")
    assert loaded.config == model.config and extra == {"step": 7}, "config or extras come back changed"
    assert torch.equal(loaded(x, sigma)[0], model(x, sigma)[0]), "weights or config got lost"
    assert not loaded.training, "a loaded model is in eval mode"
    assert os.listdir(tmp_path) == ["m.pt"], "the file that was written aside is renamed, not left"
    assert not {"data_mean", "action_scale"} & set(model.state_dict()), "Config has them, and nothing else"


@pytest.mark.checkpoint
def test_what_is_no_such_checkpoint_is_refused_in_one_line_and_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    model, path = random_denoiser(), tmp_path / "m.pt"
    df.save_checkpoint(path, model.config, model.state_dict())
    whole, data = torch.load(path, weights_only=True), path.read_bytes()
    lacking = dict(whole["weights"])
    lacking.pop("stem.weight")
    contents = {"without a weight": whole | {"weights": lacking}, "of a new setting": whole | {"config": {"depth": 3}},
                "of another program": {"state_dict": {}}, "a list": [1, 2], "evil": {"config": Evil(), "weights": {}}}
    for what, content in contents.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match="m.pt") as told:
            df.load_checkpoint(path)
        assert len(str(told.value).splitlines()) == 1, f"a file {what}: one line that names it"
    assert not (tmp_path / "executed").exists(), "load with weights_only=True"
    for what, content in {"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}.items():
        path.write_bytes(content)
        refused(f"a file that is {what}", df.load_checkpoint, path)
    with pytest.raises(FileNotFoundError):
        df.load_checkpoint(tmp_path / "none.pt")


@pytest.mark.checkpoint
@pytest.mark.parametrize("version", [None, 1, 3])
def test_a_checkpoint_of_another_version_says_so(tmp_path, version):
    model, path = random_denoiser(), tmp_path / "m.pt"
    df.save_checkpoint(path, model.config, model.state_dict())
    saved = torch.load(path, weights_only=True)
    saved.pop("version")
    saved["config"].pop("forcing")  # of the first version, which had no number
    torch.save(saved | ({} if version is None else {"version": version}), path)
    with pytest.raises(ValueError, match=f"m.pt.*version {version or 1}.*{df.VERSION}"):
        df.load_checkpoint(path)


@pytest.mark.checkpoint
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path, real = random_denoiser(), tmp_path / "m.pt", os.replace
    df.save_checkpoint(path, model.config, model.state_dict(), step=1)
    renamed = []

    def full(a, b):
        renamed.append((Path(a), Path(b)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        df.save_checkpoint(path, model.config, model.state_dict(), step=2)
    assert df.load_checkpoint(path)[1] == {"step": 1}, "a save that failed must leave the old file whole: write aside"
    assert renamed[0][0].parent == tmp_path and renamed[0][1] == path, "only a rename on one disk is one stroke"
    assert os.listdir(tmp_path) == ["m.pt"], "what was written aside is removed"


# ---- train.py and sample.py -----------------------------------------------------------------------------------------


def here(script, *words, cwd, code=0):
    """The command `script words` in this process (starting one takes seconds) -> what it wrote to both outputs."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    status, argv = 0, sys.argv
    try:
        os.chdir(cwd)
        sys.argv = [script.__name__ + ".py", *map(str, words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), sample.mistakes():
            script.main()
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status == code, f"{script.__name__}.py {words}: exit status {status}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue() + err.getvalue()


def train_here(monkeypatch, folder, *words, interrupt_at=None, die_at=None, nan_at=None, code=0):
    """train.py in this process, with small frames and short previews, saving every 20 steps; optionally with Ctrl-C in a
    step, sudden death instead of saving, or a loss that is no number in a step (counted from the start of this process)."""
    real_loss, real_save, real_preview, steps = train.diffusion_forcing_loss, train.save_checkpoint, train.preview, []

    def loss(model, x, config, **options):
        value = real_loss(model, x, config, **options)
        if options.get("expected_loss") is not None:  # of training, not of validation
            steps.append(0)
            if len(steps) == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            value = value * (math.nan if len(steps) == nan_at else 1)
        return value

    def save(path, config, weights, **extra):
        if extra["step"] == die_at:
            raise SystemExit("dead")
        real_save(path, config, weights, **extra)

    with monkeypatch.context() as m:
        m.setattr(train, "diffusion_forcing_loss", loss)
        m.setattr(train, "save_checkpoint", save)
        m.setattr(train, "preview", lambda path, model, data, s, frames: real_preview(path, model, data, s, 5))
        m.setitem(train.PRESETS, "small", train.PRESETS["small"] | dict(save_minutes=0))
        small = "--size 16 --clip-frames 4 --batch 2 --device cpu".split()
        return here(train, *small, *words, cwd=folder, code=code)


def balls(n=1, frames=8, size=16, seed=0, **options):
    return train.bouncing_balls(n, frames, np.random.default_rng(seed), size, **options)


def settings(**options):
    return Namespace(**(dict(seed=0, device="cpu", clip_frames=4, size=(16, 16), stride=1, batch=2, forcing="diffusion",
                            no_push=False) | options))


def clips_of(folder, **options):
    return train.Clips(settings(data=folder, cache=folder.parent / "cache", **options))


@pytest.mark.cli
def test_bytes_survive_the_round_trip():
    clip = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert (sample.to_bytes(sample.to_frames(clip)) == clip).all(), "uint8 -> [-1, 1] -> uint8 must be exact: round"
    assert sample.to_bytes(torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1)).flatten().tolist() == [0, 255], "clamp, do not wrap"


@pytest.mark.cli
def test_balls_keep_their_energy_and_stay_inside():
    clips = balls(8, 77, 32).astype(float) - np.array([12, 14, 20])
    cover = clips @ np.linalg.pinv(np.array([[230, 70, 0], [0, 110, 225]]))  # (N,T,H,W,ball)
    area = cover.sum((2, 3)) / (np.pi * 3.5**2)
    assert abs(area - 1).max() < 0.05, "both balls are whole in every frame"
    centre = np.stack([(cover * axis[..., None]).sum((2, 3)) for axis in np.meshgrid(*[np.arange(32) + 0.5] * 2)], -1)
    centre = centre / cover.sum((2, 3))[..., None]  # (N,T,ball,xy)
    apart = np.linalg.norm(centre[:, :, 0] - centre[:, :, 1], axis=-1)
    assert 6.7 < apart.min() < 7.1, "balls of radius 3.5 meet, and do not pass through each other"
    speed = np.linalg.norm(np.diff(centre, axis=1), axis=-1)
    assert speed.max() < 1.5 * 2**0.5 + 0.1 and np.median(speed) > 0.5, "0.6 to 1.5 pixels a frame, shared in collisions"
    energy = np.median((speed**2).sum(-1).reshape(8, 4, 19), -1)  # in each quarter of each clip
    assert np.allclose(energy, energy[:, :1], rtol=0.03), "collisions hand energy on and lose none"


@pytest.mark.cli
@pytest.mark.parametrize("dx,dy", [d for d in itertools.product((-1, 0, 1), repeat=2) if any(d)])
def test_a_push_turns_the_red_ball_before_it_moves(monkeypatch, dx, dy):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    from compare import find

    push = np.zeros((12, 7, 2))
    push[:, 0], push[:, 4] = (-dy, dx), (dx, dy)
    plain, pushed = balls(12, 7, 48, seed=2), balls(12, 7, 48, seed=2, push=push)
    assert (plain[:, :4] == pushed[:, :4]).all(), "a push of frame 4 changes no frame before it, and that of frame 0 nothing"
    p, still = (np.stack([find(clip)[0] for clip in clips]) for clips in (pushed, plain))  # (N,T,ball,xy)
    gap = np.minimum(p, 48 - p)[:, 3:].min((1, 2, 3)) - 3.5
    free = (gap > 1.6) & (np.linalg.norm(p[:, 3:, 0] - p[:, 3:, 1], axis=-1).min(1) > 7.2)
    assert free.sum() > 2
    steps = np.diff(p, axis=1)[free, 3:, 0]
    assert np.allclose(steps, np.array([dx, dy]) / np.hypot(dx, dy), atol=0.05), "it goes on at 1 pixel a frame, from frame 4 on"
    assert np.allclose(p[free][:, :, 1], still[free][:, :, 1], atol=0.05), "the blue ball is not pushed"


@pytest.mark.cli
def test_training_draws_pushes_and_one_argument_leaves_them_out(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    from compare import push_errors

    s = settings(size=(32, 32), no_push=False)
    clips, push = train.Balls(s).batch(np.random.default_rng(0), 200, 16)
    assert train.Balls(s).action_dim == 2 and push.shape == (200, 16, 2), "an action is (dx, dy)"
    pushed = push[push.any((1, 2))]
    assert 80 < len(pushed) < 120, "half of the clips have no push"
    counts = np.unique(pushed.reshape(-1, 2), axis=0, return_counts=True)[1] / (len(pushed) * 16)
    expected = np.full(9, 1 / 36) + [0, 0, 0, 0, 3 / 4, 0, 0, 0, 0]
    assert np.allclose(counts, expected, atol=0.015), "in the others in one frame of four, uniform over the nine directions"
    off = np.concatenate([push_errors(clip, p) for clip, p in zip(clips, push)])
    assert len(off) > 20 and off.max() < 3, "row t of the actions is the push that leads to frame t"
    plain = train.Balls(settings(size=(32, 32), no_push=True))
    clips, push = plain.batch(np.random.default_rng(0), 3, 8)
    assert plain.action_dim == 0 and push.shape == (3, 8, 0), "--no-push: no actions"
    assert (clips == balls(3, 8, 32)).all(), "--no-push: and the clips are those without pushes"


@pytest.mark.cli
def test_the_angle_of_a_push_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    def drawn(*centres):
        pixel = np.arange(32) + 0.5
        cover = [np.clip(4 - np.hypot(pixel - x, pixel[:, None] - y), 0, 1) for x, y in centres]
        return np.minimum(train.BACKGROUND + np.einsum("khw,kc->hwc", cover, train.COLOURS), 255).round().astype(np.uint8)

    red = np.array([(8, 16 + 0.1 * t) for t in range(9)])
    red[6:] += (1, 0.9)  # the step into frame 6 is (1, 1): 45 degrees to the right and downwards
    clip, push = np.stack([drawn(xy, (26, 16)) for xy in red]), np.zeros((9, 2))
    for direction, degrees in (((1, 1), 0), ((1, 0), 45), ((0, 1), 45), ((1, -1), 90), ((-1, -1), 180)):
        push[6] = direction
        assert compare.push_errors(clip, push) == pytest.approx([degrees], abs=1), f"a push of {direction}"
    near = np.stack([drawn(xy, (17, 16)) for xy in red])
    wall = np.stack([drawn(xy - (3, 0), (26, 16)) for xy in red])
    assert not len(compare.push_errors(near, push)) and not len(compare.push_errors(wall, push)), "only in free flight"
    assert not len(compare.push_errors(clip[3:], push[3:])), "a push at the end of the context is not measured"


@pytest.mark.cli
def test_the_arrow_of_a_push_points_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    push = np.zeros((8, 2))
    push[5] = 1, 0
    clip = balls(1, 8, 48, seed=2, push=push[None])[0]
    compare.draw_pushes(clip, push, tmp_path / "a.gif", scale=2, frames=2)
    video = sample.read_clip(tmp_path / "a.gif", 96, 96)
    drawn = [np.argwhere((frame == 255).all(-1)) for frame in video]
    assert [len(d) > 0 for d in drawn] == [t in (5, 6) for t in range(8)], "in the frame that the push leads to, and the next"
    x, y = 2 * compare.find(clip)[0][5, 0]
    assert abs(drawn[5][:, 1].min() - x) < 2 and abs(drawn[5][:, 1].max() - x - 14) < 2, "7 pixels to the right of the ball's middle"
    assert abs(np.median(drawn[5][:, 0]) - y) < 2, "and not up or down"


@pytest.mark.cli
def test_physics_tells_what_is_wrong_with_balls(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    from compare import physics, true_speed

    clip = balls(1, 140, 32)[0]
    good, shape, vel, speed, prefix = physics(clip)
    assert good == 1 and shape < 0.01 and vel < 0.02 and speed < 0.02 and prefix == 140, "real balls do nothing wrong"
    lost, shaky = clip.copy(), clip.copy()
    lost[30] = (12, 14, 20)
    assert physics(lost)[0] == pytest.approx(139 / 140) and physics(lost)[4] == 30, "one frame without balls: frame 30"
    blurred = (clip.astype(int) + np.roll(clip, 1, 2) + np.roll(clip, -1, 2)) // 3
    assert physics(blurred)[1] > 0.1, "a blurred disc is no disc"
    shaky[1::2] = np.roll(clip, (1, 1), (1, 2))[1::2]
    assert physics(shaky)[2] == pytest.approx(2, abs=0.1), "a pixel there in every other frame: 1 - (-1), on both axes"
    faster, still = np.concatenate([clip[:20], clip[20::2]]), np.concatenate([clip[:4], clip[3:4].repeat(136, 0)])
    assert physics(faster)[3] > 0.5 and 20 <= physics(faster)[4] < 30, "twice the speed from frame 20 on"
    true = true_speed(clip)
    assert physics(still, true)[3] == pytest.approx(1, abs=0.01) and physics(still, true)[4] < 10, "standing still is wrong"
    half = balls(1, 140, 32, speed=(0.3, 0.75))[0]
    assert physics(half, true)[3] == pytest.approx(0.5, abs=0.02), "half the speed of the clip that was to be gone on from"


@pytest.mark.cli
def test_a_ball_that_jumps_along_a_wall_is_a_mistake(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    from compare import physics

    def drawn(x, y):  # two balls at rest, the red one beside the left wall, where nothing counts as free flight
        pixel = np.arange(32) + 0.5
        cover = [np.clip(4 - np.hypot(pixel - a, pixel[:, None] - b), 0, 1) for a, b in ((x, y), (25, 16))]
        return np.minimum(train.BACKGROUND + np.einsum("khw,kc->hwc", cover, train.COLOURS), 255).round().astype(np.uint8)

    slides = np.stack([drawn(3.6, 8 + t) for t in range(12)])
    assert physics(slides)[4] == 12, "a pixel in each step along the wall is possible"
    jumps = np.stack([drawn(3.6, 8 + t + 3 * (t >= 6)) for t in range(12)])
    assert physics(jumps)[4] == 6, "no step is longer than 2.3 pixels, not even beside a wall"


@pytest.mark.cli
def test_the_speed_of_a_clip_is_that_of_its_first_free_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    clip = balls(1, 100, 32, seed=5, speed=(0.2, 0.3))[0]
    free, _ = compare.free_flight(compare.find(clip)[0], 32)
    assert not free[:8].any() and free.any(), "this clip begins near a wall, or with two balls that touch"
    assert compare.physics(clip)[3] < 0.1, "its first 8 free steps tell its speed, not its first 8 steps"


@pytest.mark.cli
def test_given_frames_do_not_count_in_the_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    clip = balls(1, 16, 32)[0]
    lost = clip.copy()
    lost[:4] = train.BACKGROUND  # no ball in the first four frames
    compare.print_table({("", "--steps 3"): [lost[None]], ("", "--batch 8"): [lost[None]]}, [clip], {})
    good = [row.split(" | ")[3] for row in capsys.readouterr().out.splitlines()[2:]]
    assert good == ["1.000", "0.750"], "the first four frames were given, so they do not count; with --batch none was given"


@pytest.mark.cli
def test_clips_between_keyframes_are_measured_by_their_longest_step(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(HERE / "assets")
    import compare
    ways = []

    def roll_out(ckpt, way, args, name, num_clips):
        ways.append(way)
        clips = np.stack([np.load(tmp_path / f"{name}_{i}.npy") for i in range(num_clips)])
        clips[:, 8:] = clips[:, :7:-1]  # the second half backwards: a jump in its middle
        return clips

    monkeypatch.setattr(compare, "roll_out", roll_out)
    compare.between([Path("model.pt")], Namespace(out=tmp_path))
    lines = capsys.readouterr().out.replace(" of ", "|").splitlines()[2:]
    real, jump, *_ = ([float(n) for n in line.split("|")[3:-1]] for line in lines)
    assert [way.partition("--keyframes 0,15 --frames 16")[::2] for way in ways[:2]] == [("", ""), ("", " --steps 20")], "the default"
    others = [kind for kind in df.SCHEDULES if kind != sample.schedule_for("diffusion", tiny(causal=False))]
    assert [way.split()[-1] for way in ways[2:]] == others, "a two-way model may use any matrix: all but the default are named"
    assert real[0] == jump[0] == 1 and real[3] < 2.3 < jump[3], "the longest step of any ball in any clip"
    assert real[4:] == [64, 64] and jump[4] < 32, "in so many of the clips, no step is longer than 2.3 pixels"
    assert iio.imread(tmp_path / "keyframes.png").shape == (2 * 33 * 2, 2 * 33 * 16, 3), "a real clip, and the same filled in"


@pytest.mark.cli
def test_nothing_is_measured_that_was_made_in_another_way(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    done = []
    monkeypatch.setattr(compare.subprocess, "run", lambda words, **_: done.append(words) or Namespace(returncode=0))
    for minutes in (0.1, 0.1, 4):
        ckpt = compare.train("--temporal gru", 0, Namespace(out=tmp_path, minutes=minutes))
    assert [words[words.index("--minutes") + 1] for words in done] == ["0.1", "4"], "the same once, another anew"
    assert all("--no-push" in words for words in done), "the paper's claim is measured on balls that nobody pushes"
    ckpt.write_bytes(b"")
    np.save(compare.folder(Namespace(out=tmp_path), ckpt.parent.name, "sample --steps 3") / "r_0.npy", np.zeros((1, 2, 2, 3), np.uint8))
    for when in (1, 1, 2):
        os.utime(ckpt, (when, when))
        compare.roll_out(ckpt, "--steps 3", Namespace(out=tmp_path))
    assert len(done) == 4, "a model is rolled out once, and again when it was trained again"


@pytest.mark.cli
def test_the_picture_of_the_matrices_shows_noise_black_and_clean_frames_white(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    compare.draw_matrices(tmp_path / "m.png", num_steps=2, num_frames=3, rows=6, cell=4)
    grey = iio.imread(tmp_path / "m.png")
    panels = [grey[2:-1:4, at + 2 : at + 20 : 4] for at in (0, 33, 66)]  # the middle of each cell; 12 white columns between panels
    black, white = 0, 255
    assert (panels[0][:, :2] == white).all(), "two frames of context"
    assert panels[0][:, 2].tolist() == panels[1][:, 2].tolist() == panels[2][:, 2].tolist() == [black, 128, *[white] * 4], \
        "the first frame comes down in two steps"
    assert [p[:, 3].tolist().count(black) for p in panels] == [3, 3, 1], "u is 2, with 2 steps the same as frame after frame; or 0"


# ---- train.py: from the data to a batch


@pytest.mark.cli
def test_a_batch_and_its_noise_depend_on_seed_and_number_alone():
    s, other = settings(seed=2**40), settings(seed=2**40 + 1)
    data = train.Balls(s)
    draw = lambda s, at: train.to_device(train.draw(data, s, 2, 4, at), s)
    a, b = draw(s, 5), draw(s, 5)
    levels = lambda drawn: df.sample_noise_levels(2000, 2, tiny(), generator=drawn[2]).log().flatten()
    first = levels(a)
    assert torch.equal(a[0], b[0]) and torch.equal(first, levels(b)), "the same (seed, at) gives the same batch and noise"
    for c in (draw(other, 5), draw(s, 6), draw(s, train.MEASURE)):
        assert (a[0] != c[0]).any(), "another seed, or another number, gives another batch"
        assert abs(torch.corrcoef(torch.stack([first, levels(c)]))[0, 1]) < 0.1, "and other noise"


@pytest.mark.cli
def test_seed_and_number_are_not_added():
    a, b = (train.draw(train.Balls(settings()), settings(seed=seed), 1, 2, at=at)[0] for seed, at in ((0, 1), (1, 0)))
    assert (a != b).any(), "step 1 of seed 0 is step 0 of seed 1"


@pytest.mark.cli
def test_every_pass_of_every_step_has_a_number_of_its_own(tmp_path, monkeypatch):
    drawn, real = [], train.draw
    monkeypatch.setattr(train, "draw", lambda data, s, n, T, at, held=False: drawn.append((at, held)) or real(data, s, n, T, at, held))
    train_here(monkeypatch, tmp_path, *"--steps 3 --accumulate 2".split())
    steps = [divmod(at, train.PARTS) for at, _ in drawn if at < train.MEASURE]
    assert steps == [(step, part) for step in range(4) for part in range(2)], "both parts of each step; one step is drawn ahead"
    assert len({at for at, _ in drawn}) == len(drawn), "measuring, previews and training take different clips"


@pytest.mark.cli
def test_the_data_is_measured_around_the_mean_of_each_channel():
    drawn = []

    class Data:
        action_dim = 2

        def batch(self, rng, n, num_frames, held):
            clips = (rng.random((n, 3, 4, 4, 3)) * [20, 80, 200]).astype(np.uint8)
            drawn.append((clips / 127.5 - 1, (rng.standard_normal((n, 3, 2)) * [25, 0]).astype(np.float32)))
            return clips, drawn[-1][1]

    measured = train.measure(Data(), settings())
    x, actions = (np.concatenate(parts) for parts in zip(*drawn))
    mean = x.mean((0, 1, 2, 3))
    assert len(x) == 256 and max(len(part) for part, _ in drawn) == 16, "256 clips, 16 at a time"
    assert measured["data_mean"] == pytest.approx(mean, rel=1e-4), "one mean for each channel"
    assert measured["sigma_data"] == pytest.approx((x - mean).std(), rel=1e-4), "the deviation around these means"
    rms = np.sqrt((actions[..., 0] ** 2).mean())
    assert measured["action_scale"] == pytest.approx([rms, 1]), "root mean square; 0 becomes 1"


@pytest.mark.cli
def test_validation_is_of_held_out_clips_with_three_amounts_of_noise(monkeypatch):
    seen, model = [], Namespace(config=tiny())
    data = Namespace(held_out=True, batch=lambda rng, n, T, held=False:
                     (np.full((n, T, 8, 8, 3), 255 * held, np.uint8), np.zeros((n, T, 0), np.float32)))
    monkeypatch.setattr(train, "diffusion_forcing_loss", lambda model, x, config, sigma, generator, **options: seen.append(
        (float(x.mean()), math.log(float(sigma[0, 0]) / units(config)), generator.initial_seed(), options)) or torch.zeros(()))
    assert train.validate(model, data, settings(forcing="teacher")) == [0, 0, 0], "one loss for each amount of noise"
    clips, logs, seeds, options = zip(*seen)
    told = {(o.get("forcing"), o["actions"].shape) for o in options}
    assert told == {("teacher", (16, 4, 0))}, "the loss is told of --forcing, and of the actions"
    assert clips == (1, 1, 1), "held-out clips"
    assert logs == pytest.approx([-0.6 - 2.4, -0.6, -0.6 + 2.4], rel=1e-4), "ln sigma: P_mean - P_std, P_mean, P_mean + P_std"
    assert len(set(seeds)) == 1, "always the same noise"
    data.held_out = False
    assert all(math.isnan(loss) for loss in train.validate(model, data, settings())), "training clips are not called held out"


@pytest.mark.cli
def test_validation_is_of_the_average(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "validate", lambda model, data, s: seen.append(model.training) or [1.0, 2.0, 3.0])
    train_here(monkeypatch, tmp_path, "--steps", "1")
    saved = torch.load(tmp_path / "model.resume.pt", weights_only=True)
    torch.save(saved | dict(step=499), tmp_path / "model.resume.pt")
    train_here(monkeypatch, tmp_path, *"--resume --steps 500".split())
    assert seen == [False], "every 500 steps, of the average, which is in eval mode"
    assert (tmp_path / "model.csv").read_text().splitlines()[-1].split(",")[3:6] == ["1", "2", "3"], "and in the log"


@pytest.mark.cli
def test_a_preview_is_of_the_average_with_the_actions_of_held_out_clips(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(train, "HELD_OUT", 2)
    monkeypatch.setattr(train, "rollout", lambda model, K, n, context, **options:
                        told.append((model.training, context, options)) or iter([-torch.ones(4, 3, 16, 16)] * n))
    counting_clip(tmp_path / "clips", 9)  # a: for training; b: held out, white, with actions of 7
    np.save(tmp_path / "clips" / "b.npy", np.full((9, 8, 8, 3), 255, np.uint8))
    np.save(tmp_path / "clips" / "b.actions.npy", np.full((9, 1), 7.0))
    train_here(monkeypatch, tmp_path, *"--data clips --cache cache --steps 20".split())
    assert told, "no preview at all"
    for training, context, options in told:
        assert not training, "previews are of the moving average, which is in eval mode"
        assert (context == 1).all(), "they go on from held-out clips"
        assert (options["actions"] == 7).all(), "with the actions of these clips"
    above, below = np.split(iio.imread(tmp_path / "model.rollout.mp4"), 2, 1)
    assert above.min() > 200 and below.max() < 50, "real clips, here white, are above; rollouts, here black, are below"


# ---- train.py: a folder of clips


@pytest.mark.cli
def test_links_are_followed_and_every_clip_counts_once(tmp_path):
    real, clips = tmp_path / "real", tmp_path / "clips"
    real.mkdir()
    (clips / "sub").mkdir(parents=True)
    np.save(real / "a.npy", balls(1, 4)[0])
    (clips / "link").symlink_to(real)
    (clips / "copy.npy").symlink_to(real / "a.npy")
    for name in ("loop", "sub/loop"):
        (clips / name).symlink_to(clips)  # glob would follow these for ever
    found = train.find_clips(clips, tmp_path / "cache")
    assert len(found) == 1, f"one clip, however many links lead to it: {found}"


@pytest.mark.cli
def test_clips_of_one_name_size_and_time_are_kept_apart(tmp_path):
    for name, value in (("a", 10), ("b", 20)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        np.save(tmp_path / "clips" / name / "x.npy", np.full((4, 16, 16, 3), value, np.uint8))
        os.utime(tmp_path / "clips" / name / "x.npy", (1, 1))
    values = {int(np.load(path)[0, 0, 0, 0]) for path, *_ in clips_of(tmp_path / "clips").clips}
    assert values == {10, 20}, "the cache takes one clip for the other: it must know the whole path"


@pytest.mark.cli
def test_long_clips_are_drawn_more_often(tmp_path):
    (tmp_path / "clips").mkdir()
    for name, frames in (("a", 4), ("b", 10)):
        np.save(tmp_path / "clips" / f"{name}.npy", balls(1, frames)[0])
    share = clips_of(tmp_path / "clips").share[False].tolist()
    assert share == [1 / 8, 7 / 8], "10 frames have 7 places to start, 4 frames one: each place is as likely as any other"


@pytest.mark.cli
def test_decoded_clips_are_no_clips(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    np.save(clips / "a.npy", balls(1, 4)[0])
    for _ in range(2):
        data = train.Clips(settings(data=clips, cache=clips / "cache"))
        assert len(data.clips) == 1, "what lies in --cache, inside --data, was taken for clips"


@pytest.mark.cli
def test_the_cache_knows_what_a_clip_was_made_from(tmp_path):
    clip, rng = tmp_path / "clips" / "a.npy", np.random.default_rng(0)
    clip.parent.mkdir()
    read = lambda *size: clips_of(clip.parent, size=size).batch(rng, 1, 4)[0]
    np.save(clip, np.full((4, 16, 16, 3), 10, np.uint8))
    assert read(16, 16).shape == (1, 4, 16, 16, 3) and read(8, 12).shape == (1, 4, 8, 12, 3), "one size taken for the other"
    np.save(clip, np.full((4, 16, 16, 3), 20, np.uint8))
    os.utime(clip, (1, 1))
    assert (read(16, 16) == 20).all(), "a clip of the same length, written later, was taken for the one before it"
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:200])  # after a power failure
    assert (read(16, 16) == 20).all(), "a damaged file in the cache is decoded anew"


@pytest.mark.cli
def test_a_cache_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch, capsys):
    def full(file, clip):
        assert f".{os.getpid()}." in file.name, "each process needs a file of its own: two may decode the same clip"
        file.write(b"half of it")
        raise OSError("15360 requested and 9872 written")

    np.save(tmp_path / "a.npy", balls(1, 4)[0])
    monkeypatch.setattr(train.np, "save", full)
    with pytest.raises(SystemExit):
        train.Clips(settings(data=tmp_path, cache=tmp_path / "cache"))
    assert f"--cache {tmp_path / 'cache'}" in capsys.readouterr().err, "it is not the clip that is to blame"
    assert not os.listdir(tmp_path / "cache"), "half a file is left behind"
    with pytest.raises(SystemExit):
        train.Clips(settings(data=tmp_path, cache=tmp_path / "a.npy"))
    assert f"--cache {tmp_path / 'a.npy'}" in capsys.readouterr().err, "a file is no folder"


@pytest.mark.cli
def test_what_killed_runs_left_in_the_cache_goes_after_a_day(tmp_path):
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    clips.mkdir()
    cache.mkdir()
    np.save(clips / "a.npy", balls(1, 4)[0])
    old, new, foreign = f"{'0' * 24}.npy.1.tmp", f"{'1' * 24}.npy.2.tmp", "mine.tmp"
    for name in (old, new, foreign):
        (cache / name).write_bytes(b"half")
    for name in (old, foreign):
        os.utime(cache / name, (1, 1))
    clips_of(clips)
    left = {p.name for p in cache.iterdir() if p.suffix == ".tmp"}
    assert left == {new, foreign}, "the old one goes; the new one may be in use, and the third is not ours"


@pytest.mark.cli
def test_what_is_no_clip_is_skipped_with_its_reason(tmp_path, capsys, monkeypatch):
    clips, clip = tmp_path / "clips", balls(1, 8)[0]
    clips.mkdir()
    np.save(clips / "good.npy", clip)
    np.save(clips / "floats.npy", clip / np.float32(255))
    np.save(clips / "nan.npy", np.full((8, 16, 16, 3), np.nan))
    np.save(clips / "objects.npy", np.array([{}] * 8), allow_pickle=True)
    np.save(clips / "nothing.npy", clip[:0])
    np.save(clips / "short.npy", clip[:3])
    (clips / "empty.npy").write_bytes(b"")
    np.save(clips / "acted.npy", clip)
    np.save(clips / "acted.actions.npy", np.full((8, 1), np.nan))
    np.save(clips / "late.npy", clip)
    np.save(clips / "late.actions.npy", np.ones((7, 1)))
    (clips / "text.mp4").write_text("no video")
    (clips / "cut.gif").write_bytes(b"GIF89a")
    (clips / "script.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")  # would have ffmpeg open another file
    (clips / "dead.mp4").symlink_to("nowhere")
    os.mkfifo(clips / "pipe.mp4")  # whoever opens it waits for ever
    for name in (".hidden.mp4", "hidden.preview.mp4", "hidden.rollout.mp4"):  # the last two are train.py's
        (clips / name).write_text("ignored")
    monkeypatch.setattr(train, "HELD_OUT", 2)
    data = clips_of(clips)
    said = capsys.readouterr().out
    for name, reason in [("nan", "NaN"), ("objects", "not a .npy of numbers"), ("short", "3 frames; 4 are needed"), ("text", "moov"),
                         ("acted", "finite"), ("late", "7 rows for 8 frames"), ("nothing", "(0, 16, 16, 3)"), ("empty", "damaged"),
                         ("script", "whitelist"), ("dead", "No such file"), ("pipe", "no such file"), ("cut", "cannot be read")]:
        line = [line for line in said.splitlines() if f"{name}." in line]
        assert len(line) == 1 and line[0].startswith("skipped") and reason in line[0], f"{name}: one line with the reason:\n{said}"
    assert "hidden" not in said and "2 clips (1 held out, 0 with actions), 16 frames; 12 skipped" in said, said
    assert all((np.load(path) == clip).all() for path, *_ in data.clips), "floats in 0..1 are bytes / 255"
    assert [list(data.share[held]) for held in (False, True)] == [[1, 0], [0, 1]], "clips are held out whole"


@pytest.mark.cli
@pytest.mark.parametrize("what,actions", [
    ("infinite as float32", np.full((4, 1), 1e300)), ("complex", np.ones((4, 1), complex)), ("text", np.full((4, 1), "1")),
    ("one axis", np.ones(4)), ("no number in a row", np.ones((4, 0))), ("an archive", None), ("a pipe", "pipe"), ("a dead link", "dead")])
def test_actions_that_are_no_numbers_are_refused(tmp_path, what, actions):
    path = tmp_path / "a.actions.npy"
    if actions is None:
        np.savez(tmp_path / "a.npz", np.ones((4, 1)))
        (tmp_path / "a.npz").rename(path)
    elif what == "a pipe":
        os.mkfifo(path)  # whoever opens it waits for ever
    elif what == "a dead link":
        path.symlink_to("nowhere")
    else:
        np.save(path, actions)
    refused(f"actions: {what}", sample.read_actions, path)
    np.save(tmp_path / "a.npy", balls(1, 4)[0])
    refused(f"a clip with actions: {what}", train.Clips, settings(data=tmp_path, cache=tmp_path / "cache"))


@pytest.mark.cli
def test_a_bad_image_is_told_by_name(tmp_path):
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    for i in range(3):
        iio.imwrite(tmp_path / f"{i}.png", frames[0])
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1.png"):
        sample.read_clip(tmp_path, 8, 8)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="1.png"):
        sample.read_clip(tmp_path, 8, 8)
    iio.imwrite(tmp_path / "1.png", np.stack(frames), plugin="pillow", is_batch=True)  # an animated one
    assert sample.read_clip(tmp_path, 8, 8).shape == (3, 8, 8, 3), "one frame for each image"


@pytest.mark.cli
def test_actions_of_different_widths_are_refused(tmp_path):
    for name, width in (("a", 1), ("b", 2)):
        np.save(tmp_path / f"{name}.npy", balls(1, 4)[0])
        np.save(tmp_path / f"{name}.actions.npy", np.ones((4, width)))
    refused("files of 1 and of 2 actions", train.Clips, settings(data=tmp_path, cache=tmp_path / "cache"))


def counting_clip(folder, frames=7):
    """A clip whose frame t is all 10 t, and whose action t is t."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", np.full((8, 8, 3, frames), 10 * np.arange(frames), np.uint8).transpose(3, 0, 1, 2))
    np.save(folder / "a.actions.npy", np.arange(float(frames))[:, None])


@pytest.mark.cli
def test_a_training_clip_keeps_its_stride_and_its_actions(tmp_path):
    counting_clip(tmp_path / "clips")
    data = clips_of(tmp_path / "clips", clip_frames=3, size=(8, 8), stride=2)
    clips, actions = data.batch(np.random.default_rng(0), 50, 3)
    at = clips[..., 0, 0, 0].astype(int) // 10
    assert (np.diff(at) == 2).all(), "--stride 2 takes every second frame"
    assert set(at[:, 0]) == {0, 1, 2}, "the first and the last place to start are both drawn"
    assert np.allclose(actions[..., 0], np.maximum(at - 0.5, 0)), "row t: the mean of the actions that led to frame t"
    assert (data.batch(np.random.default_rng(0), 1, 9)[0][0, -4:] == 60).all(), "too short for a preview: it stands still"


# ---- train.py: the run


class Recorder(torch.optim.AdamW):
    """AdamW that keeps, for each step, its learning rate, its gradient, and a weight after it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = []
        Recorder.last = self

    def step(self):
        params = self.param_groups[0]["params"]
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        super().step()
        self.steps.append((self.param_groups[0]["lr"], gradient.clone(), params[0].detach().clone()))


@pytest.mark.cli
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_step_averages_its_passes_clips_and_follows_the_schedule(tmp_path, monkeypatch, scale):
    passes, losses, real = [], [], train.diffusion_forcing_loss

    def loss(model, x, config, **options):
        value = real(model, x, config, **options) * scale
        told.append((options["forcing"], options["actions"].shape, options["expected_loss"] is not None))
        params = Recorder.last.param_groups[0]["params"]
        parts = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        passes.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(parts, params)]))
        losses.append(value.item())
        return value

    told = []
    monkeypatch.setattr(train, "diffusion_forcing_loss", loss)
    monkeypatch.setattr(train.torch.optim, "AdamW", Recorder)
    monkeypatch.setitem(train.PRESETS, "small", train.PRESETS["small"] | dict(warmup=4, ema=0.5))
    counting_clip(tmp_path / "clips", 8)
    train_here(monkeypatch, tmp_path, *"--data clips --cache cache --steps 20 --accumulate 2 --lr 1e-3 --forcing teacher".split())
    steps = Recorder.last.steps
    assert set(told) == {("teacher", (2, 4, 1), True)}, "the loss is told of forcing, of actions, and what loss to expect"
    for i, (_, gradient, _) in enumerate(steps):
        mean = (passes[2 * i] + passes[2 * i + 1]) / 2
        mean = mean * min(1, 10 / float(mean.norm()))
        assert torch.allclose(gradient, mean, rtol=1e-3, atol=1e-6), \
            f"step {i}: the mean gradient of its passes, clipped to a norm of 10, and nothing left of the step before"
    rates = [1e-3 * min(1, (i + 1) / 4) * min(1, 2 * (1 - i / 20)) for i in range(20)]
    assert [lr for lr, _, _ in steps] == pytest.approx(rates), "up over `warmup` steps, constant, down to 0 over the second half"
    average = torch.load(tmp_path / "model.resume.pt", weights_only=True)["ema"]
    first = next(iter(average.values()))
    expected = steps[0][2] * 0 + train_weight_before(tmp_path)
    for i, (_, _, weight) in enumerate(steps):
        decay = min(0.5, (i + 1) / (i + 10))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(first, expected, atol=1e-6), "average = decay average + (1 - decay) weights, with a short memory at first"
    row = (tmp_path / "model.csv").read_text().splitlines()[1].split(",")
    assert float(row[1]) == pytest.approx(np.mean(losses), rel=1e-3), "the log has the mean loss of the 20 steps"
    assert float(row[2]) == pytest.approx(rates[-1]), "and the learning rate of the last of them, as the schedule has it"


def train_weight_before(folder):
    """The first weight of the model before its first step: it follows from the seed alone."""
    config = df.load_checkpoint(folder / "model.pt")[0].config
    torch.manual_seed(0)
    return next(iter(Denoiser(config).parameters())).detach()


@pytest.mark.cli
def test_two_processes_train_the_model_that_one_trains(tmp_path, monkeypatch):
    words = "--size 16 --clip-frames 4 --batch 1 --device cpu".split()
    program = ("import train\ntrain.preview = lambda *_: None\ntrain.main()\n"
               "assert not train.dist.is_initialized(), 'a group that outlives Python may abort the process'\n")
    (tmp_path / "run.py").write_text(program)

    def torchrun(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
        done = subprocess.run([*command, *words, *more], cwd=tmp_path, capture_output=True, text=True,
                              timeout=300, env=os.environ | dict(PYTHONPATH=str(HERE), OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters") == 1, "one process speaks for all"

    torchrun("--steps", "20", "--accumulate", "4", "--out", "two.pt")
    train_here(monkeypatch, tmp_path, *words, "--steps", "20", "--accumulate", "4", "--out", "one.pt")
    train_here(monkeypatch, tmp_path, *words, "--steps", "12", "--accumulate", "2", "--out", "mixed.pt")
    torchrun("--steps", "20", "--out", "mixed.pt", "--resume")  # only a check of --resume: its schedule differs
    saved = {name: torch.load(tmp_path / f"{name}.resume.pt", weights_only=True) for name in ("one", "two", "mixed")}
    for key in ("weights", "ema", "expected_loss"):
        for name, weight in saved["one"][key].items():
            same = torch.allclose(weight, saved["two"][key][name], atol=1e-5)
            assert same, f"{key} {name} depends on how many processes"
    assert saved["mixed"]["step"] == 20, "a run may go on with another number of processes"
    one, two = ([float(v) for v in saved[name]["log"].splitlines()[1].split(",")[:2]] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4), "the log has the mean loss over the processes, once"


def log_without_times(path):
    return [line.split(",")[:6] for line in path.read_text().splitlines()]


@pytest.mark.cli
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    train_here(monkeypatch, tmp_path / "whole", "--steps", "62")
    said = "stopped and saved at step 9; the same command with --resume goes on"
    train_here(monkeypatch, tmp_path / "broken", "--steps", "62", interrupt_at=9, code=said)
    train_here(monkeypatch, tmp_path / "broken", "--resume", die_at=40, code="dead")  # what came after step 20 is lost
    train_here(monkeypatch, tmp_path / "broken", "--resume")
    for file in ("model.pt", "model.resume.pt"):
        a, b = (torch.load(tmp_path / name / file, weights_only=True) for name in ("whole", "broken"))
        for key in ("weights", "ema", "expected_loss"):
            for weight in a.get(key, {}):
                assert torch.equal(a[key][weight], b[key][weight]), f"{file}: {weight} differs after Ctrl-C and --resume"
        assert a["step"] == b["step"] == 62, f"{file}: --steps counts the steps before the interruption too"
    logs = [log_without_times(tmp_path / name / "model.csv") for name in ("whole", "broken")]
    assert logs[0] == logs[1] and len(logs[0]) == 4, "the log is that of an unbroken run: it travels in the checkpoint"
    saved = torch.load(tmp_path / "whole" / "model.resume.pt", weights_only=True)
    shipped = df.load_checkpoint(tmp_path / "whole" / "model.pt")[0].state_dict()
    assert all(torch.equal(shipped[k], saved["ema"][k]) for k in shipped), "model.pt holds the moving average"
    assert any(not torch.equal(shipped[k], saved["weights"][k]) for k in shipped), "and not the raw weights"
    assert all(weight.any() for weight in saved["expected_loss"].values()), "the expected loss, zero at first, is trained too"
    left = [name for name in os.listdir(tmp_path / "broken") if name.endswith(".tmp")]
    assert not left, f"files written aside were left: {left}"


@pytest.mark.cli
def test_a_run_that_is_told_to_end_is_saved_first(tmp_path, monkeypatch):
    real = train.diffusion_forcing_loss
    monkeypatch.setattr(train, "diffusion_forcing_loss", lambda *a, **o: signal.raise_signal(signal.SIGTERM) or real(*a, **o))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM (a machine shuts down) ends the run at once"))
    try:
        said = "stopped and saved at step 1; the same command with --resume goes on"
        train_here(monkeypatch, tmp_path, "--steps", "9", code=said)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.cli
@pytest.mark.parametrize("minutes,told", [(0, [("preview", 8), ("rollout", 256)]), (0.2, [("rollout", 256)])])
def test_previews_have_two_clips_and_come_every_few_minutes(tmp_path, monkeypatch, minutes, told):
    made = []
    monkeypatch.setattr(train, "preview", lambda path, model, data, s, frames: made.append((path.stem.split(".")[1], frames)))
    monkeypatch.setitem(train.PRESETS, "small", train.PRESETS["small"] | dict(save_minutes=minutes))
    here(train, *"--size 16 --clip-frames 4 --device cpu --steps 21".split(), cwd=tmp_path)
    assert made == told, "after save_minutes (not seconds): a preview of two clips; at the end: a rollout of 256 frames"


@pytest.mark.cli
def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / "m.pt.tmp").write_bytes(b"half")
    df.save_checkpoint(tmp_path / "m.pt", tiny(), {})
    assert os.listdir(tmp_path) == ["m.pt"], "every kill would leave a file for ever: write aside to one name"


@pytest.mark.cli
def test_a_finished_run_can_be_stopped_in_its_last_rollout(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "rollout", lambda *args, **options: signal.raise_signal(signal.SIGINT) or iter(()))
    said = train_here(monkeypatch, tmp_path, "--steps", "1", code=2)
    assert "stopped" in said and df.load_checkpoint(tmp_path / "model.pt")[1]["step"] == 1, "Ctrl-C was swallowed"


@pytest.mark.cli
def test_the_clock_goes_on_after_resume(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "--steps", "1")
    saved = torch.load(tmp_path / "model.resume.pt", weights_only=True)
    torch.save(saved | dict(elapsed=1000.0), tmp_path / "model.resume.pt")
    train_here(monkeypatch, tmp_path, "--resume", "--steps", "2")
    elapsed = torch.load(tmp_path / "model.resume.pt", weights_only=True)["elapsed"]
    assert elapsed > 1000, "--minutes counts from the first start"


@pytest.mark.cli
def test_minutes_are_minutes(tmp_path, monkeypatch):
    clock, real = [0.0], train.diffusion_forcing_loss

    def loss(*args, **options):
        clock[0] += 6
        return real(*args, **options)

    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "diffusion_forcing_loss", loss)
    train_here(monkeypatch, tmp_path, "--minutes", "1")
    assert df.load_checkpoint(tmp_path / "model.pt")[1]["step"] == 10, "--minutes 1 is ten steps of six seconds"


@pytest.mark.cli
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_saved(tmp_path, monkeypatch):
    said = train_here(monkeypatch, tmp_path, "--steps", "40", nan_at=25, code=2).strip().splitlines()[-1]
    assert "steps 20 to 40 is nan" in said and "--lr" in said, f"the steps, and the remedy, not: {said}"
    model, extra = df.load_checkpoint(tmp_path / "model.resume.pt")
    assert extra["step"] == 20 and all(p.isfinite().all() for p in model.parameters()), "the last good state stays"
    assert "--resume goes on with it" in said, f"say how to go on: {said}"
    said = train_here(monkeypatch, tmp_path, "--overwrite", "--steps", "40", nan_at=5, code=2).strip().splitlines()[-1]
    assert "--resume" not in said, f"nothing of this run was saved: do not offer to go on with the one before it: {said}"


@pytest.mark.cli
def test_speed_counts_the_steps_since_it_was_last_told(tmp_path, monkeypatch):
    clock, real = [100.0], train.diffusion_forcing_loss

    def loss(*args, **options):  # every pass takes a quarter of a second
        clock[0] += 0.25
        return real(*args, **options)

    def preview(*_):
        clock[0] += 100

    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "diffusion_forcing_loss", loss)
    monkeypatch.setattr(train, "preview", preview)
    stopped = "stopped and saved at step 13; the same command with --resume goes on"
    train_here(monkeypatch, tmp_path, *"--steps 40 --accumulate 2".split(), interrupt_at=25, code=stopped)
    train_here(monkeypatch, tmp_path, "--resume")
    rows = [row.split(",") for row in (tmp_path / "model.csv").read_text().splitlines()[1:]]
    assert [float(row[6]) for row in rows] == pytest.approx([2 * 2 * 4 / 0.5] * 2), "frames/s: 2 passes of 2 clips of 4 frames in .5 s"
    assert float(rows[-1][7]) == pytest.approx(120), "40 steps of half a second and a preview, however often it was stopped"


@pytest.mark.cli
def test_resuming_with_other_settings_says_which_differ(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "--steps", "1")
    for words, said in (("--window 3", "--window cannot change: model.resume.pt has 4"), ("--temporal gru", "has attention"),
                        ("--size 32", "has (16, 16)"), ("--clip-frames 5", "has 4"), ("--stride 2", "has 1"),
                        ("--batch 3", "has 2"), ("--forcing teacher", "has diffusion"), ("--context-noise 0.2", "has 0.05"),
                        ("--seed 1", "has 0"), ("--two-way", "has False")):
        assert said in train_here(monkeypatch, tmp_path, "--resume", *words.split(), code=2), "say what differs"
    assert "step" in train_here(monkeypatch, tmp_path, *"--resume --steps 2 --lr 1e-5".split()), "the length may change"


@pytest.mark.cli
def test_passes_that_processes_cannot_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(sys, "argv", ["train.py", *"--accumulate 3 --device cpu --out".split(), str(tmp_path / "m.pt")])
    refused("3 passes for 2 processes", train.parse_args)


@pytest.mark.cli
def test_a_run_goes_on_when_its_clips_have_moved(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", balls(1, 4)[0])
    train_here(monkeypatch, tmp_path, *"--data clips --cache cache --steps 1".split())
    (tmp_path / "clips").rename(tmp_path / "moved")
    train_here(monkeypatch, tmp_path, *"--data moved --cache cache --steps 2 --resume".split())
    assert df.load_checkpoint(tmp_path / "model.pt")[1]["step"] == 2, "the folder's name is no part of the run"


@pytest.mark.cli
def test_a_run_on_a_folder_is_resumed_on_that_folder(tmp_path, monkeypatch):
    counting_clip(tmp_path / "clips", 8)
    (tmp_path / "clips" / "a.actions.npy").rename(tmp_path / "b")
    train_here(monkeypatch, tmp_path, *"--data clips --cache cache --steps 1 --stride 2".split())
    assert df.load_checkpoint(tmp_path / "model.pt")[1]["stride"] == 2, "sample.py is told the --stride of training"
    assert "1 clips" in train_here(monkeypatch, tmp_path, *"--steps 2 --resume".split()), "--resume goes on with the same --data"
    (tmp_path / "b").rename(tmp_path / "clips" / "a.actions.npy")
    said = train_here(monkeypatch, tmp_path, *"--steps 3 --resume".split(), code=2)
    assert "actions of 1 numbers, but the run began with 0" in said, "new actions do not fit the old model: one line says so"


@pytest.mark.cli
def test_fine_tuning_starts_from_the_weights_and_settings_of_a_model(tmp_path, monkeypatch):
    model = random_denoiser(height=16, width=16, dim=16, temporal="gru", context_noise=0.2, P_mean=0.4, P_std=1.6)
    df.save_checkpoint(tmp_path / "old.pt", model.config, model.state_dict())
    counting_clip(tmp_path / "clips", 8)
    words = "--init old.pt --data clips --cache cache --steps 1 --lr 1e-9 --size 16x24".split()
    train_here(monkeypatch, tmp_path, *words)
    tuned, _ = df.load_checkpoint(tmp_path / "model.pt")
    c = tuned.config
    assert (c.dim, c.head_dim, c.temporal, c.context_noise) == (16, 8, "gru", 0.2), "the network, and its settings, are the old model's"
    assert (c.height, c.width, c.action_dim, c.clip_frames) == (16, 24, 1, 4), "its data, and what was asked for, are new"
    assert c.sigma_data != model.config.sigma_data, "the new clips are measured"
    for name, weight in model.state_dict().items():
        assert torch.allclose(tuned.state_dict()[name], weight, atol=1e-5), f"{name} does not come from --init"
    assert (c.P_mean, c.P_std, c.causal) == (Config.P_mean, Config.P_std, True), "the paradigm is that of --forcing"
    refuses = train_here(monkeypatch, tmp_path, *words, *"--temporal attention --overwrite".split(), code=2)
    assert "--temporal" in refuses, "attention cannot start from the weights of a GRU"


@pytest.mark.cli
def test_fine_tuning_keeps_size_window_and_network_unless_told(tmp_path, monkeypatch):
    model = random_denoiser(height=16, width=24)
    df.save_checkpoint(tmp_path / "old.pt", model.config, model.state_dict())
    counting_clip(tmp_path / "clips", 8)
    monkeypatch.setattr(train, "preview", lambda *_: None)
    here(train, *"--init old.pt --data clips --cache cache --steps 1 --batch 1 --device cpu".split(), cwd=tmp_path)
    c = df.load_checkpoint(tmp_path / "model.pt")[0].config
    assert (c.height, c.width) == (16, 24), "the size of the old model, height first"
    assert (c.window, c.clip_frames) == (3, 4), "its window, and the length of its clips"
    assert (c.dim, c.head_dim) == (8, 8), "its network, even where the head_dim of a new Config would not fit"


@pytest.mark.cli
def test_frames_need_not_be_square(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", np.zeros((4, 20, 60, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None])
    train_here(monkeypatch, tmp_path, *"--data clips --cache cache --steps 1 --size 8x24".split())
    config = df.load_checkpoint(tmp_path / "model.pt")[0].config
    assert (config.height, config.width) == (8, 24), "--size HEIGHTxWIDTH"
    here(sample, *"--frames 2 --steps 1 --out o.npy --device cpu".split(), cwd=tmp_path)
    assert np.load(tmp_path / "o.npy").shape == (2, 8, 24, 3), "and rollouts have that size"
    assert sample.read_clip(tmp_path / "model.rollout.mp4", 256, 1536).shape == (5, 256, 1536, 3), "two rows of four clips"


@pytest.mark.cli
def test_options_of_train_reach_the_model(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, *"--steps 1 --window 3 --context-noise 0.2 --temporal gru".split())
    c = df.load_checkpoint(tmp_path / "model.pt")[0].config
    told = dict(height=c.height, clip_frames=c.clip_frames, window=c.window, context_noise=c.context_noise, temporal=c.temporal)
    assert told == dict(height=16, clip_frames=4, window=3, context_noise=0.2, temporal="gru"), "each option has its place in Config"


@pytest.mark.cli
@pytest.mark.parametrize("words,causal,mean,std,tile,period", [
    ("--forcing diffusion", True, -0.6, 2.4, 1, 2), ("--forcing teacher", True, -0.6, 1.6, 1, None),
    ("--forcing full_sequence", False, 0.4, 1.6, 4, None), ("--forcing full_sequence --temporal gru", True, 0.4, 1.6, 4, None)])
def test_each_paradigm_gets_what_suits_it(tmp_path, monkeypatch, words, causal, mean, std, tile, period):
    def spy(model, K, num_frames, context=None, **options):
        told.append((tuple(K.shape), options.get("period"), num_frames, 0 if context is None else context.shape[1]))
        return real(model, K, num_frames, context, **options)

    told, real = [], df.rollout
    monkeypatch.setattr(train, "rollout", spy)
    monkeypatch.setattr(sample, "rollout", spy)
    train_here(monkeypatch, tmp_path, "--steps", "1", *words.split())
    config = df.load_checkpoint(tmp_path / "model.pt")[0].config
    assert config.causal == causal, "frames of one sigma tell of each other, both ways; a GRU never looks ahead"
    assert (config.P_mean, config.P_std) == (mean, std), "mixtures of levels need more of noise and of clean"
    shown = len(sample.read_clip(tmp_path / "model.rollout.mp4", 32, 64))
    assert shown == (4 if "full_sequence" in words else 5), "a model of full_sequence knows whole clips of 4 frames only"
    here(sample, "--device", "cpu", "--out", "o.npy", *["--frames", "5"] * (tile == 1), cwd=tmp_path)
    assert {call[:2] for call in told if call[2] > 1} == {((9, tile), period)}, "8 steps in the schedule of its paradigm; previews and sample.py alike"
    assert told[-1][2] == (4 if tile == 4 else 5), "sample.py with no option: full_sequence has one clip"
    assert told[0][3] == (0 if tile == 4 else 4), "a preview goes on from 4 frames, one of full_sequence from none"


@pytest.mark.cli
def test_a_two_way_model_fills_in_what_lies_between_keyframes(tmp_path, monkeypatch):
    told, real = [], df.rollout

    def spy(model, K, num_frames, context, **options):
        told.append((K.tolist(), num_frames, 0 if context is None else context.shape[1], options["period"]))
        return real(model, K, num_frames, context, **options)

    monkeypatch.setattr(train, "rollout", spy)
    monkeypatch.setattr(sample, "rollout", spy)
    train_here(monkeypatch, tmp_path, *"--two-way --steps 1".split())
    config = df.load_checkpoint(tmp_path / "model.pt")[0].config
    assert (config.causal, config.P_mean, config.P_std, config.alternating) == (False, 0.6, 2.0, 0.5), "two-way: a gap begins at much noise"
    assert told[-1][1:] == (4, 3, None), "its preview is one clip, from real frames"
    assert len(told[-1][0][0]) == 1, "its matrix is for the frames after those"
    write(tmp_path / "a.npy", clip := balls(1, 6)[0])
    words, told[:] = "--context a.npy --out o.npy --steps 2 --device cpu".split(), []
    for more, given in (("--keyframes 0,3", [0, 3]), ("--keyframes 3 --context-frames 1", [0, 3]), ("--keyframes 1", [1])):
        here(sample, *words, *more.split(), cwd=tmp_path)
        out = np.load(tmp_path / "o.npy")
        assert (out[given] == clip[given]).all() and len(out) == 4, f"{more}: these are given, in a clip as long as in training"
        assert (out[2] != clip[2]).any(), f"{more}: this one is not given"
    assert [call[2] for call in told] == [0, 1, 0], "with keyframes, there is a context only if it is asked for"
    assert told[0][0] == df.scheduling_matrix("full_sequence", 4, 2).tolist(), "one copy of the matrix"
    told.clear()
    here(sample, *words, *"--schedule trapezoid --uncertainty 2 --keyframes 4 --frames 3 --context-frames 1".split(), cwd=tmp_path, code=2)
    here(sample, *words, *"--schedule trapezoid --uncertainty 3 --keyframes 3 --context-frames 1".split(), cwd=tmp_path)
    assert told[-1][0] == df.scheduling_matrix("trapezoid", 3, 2, 3).tolist(), "the matrix is for what comes after the context"
    random = random_denoiser(height=16, width=16)
    df.save_checkpoint(tmp_path / "causal.pt", random.config, random.state_dict())
    for what, more, said in [("frames of no clip", "--ckpt causal.pt --keyframes 1 --out o.npy", "--context"),
                             ("a causal model", "--ckpt causal.pt --keyframes 3 --context a.npy --out o.npy", "two-way"),
                             ("a clip of 6 frames", "--keyframes 9 --context a.npy --out o.npy", "too short"),
                             ("no number", "--keyframes 3;4 --context a.npy", "3;4")]:
        assert said in here(sample, *more.split(), cwd=tmp_path, code=2), f"{what}: the error names what is wrong"
    for more in ("--temporal gru", "--forcing teacher", "--forcing full_sequence"):
        assert "--two-way" in here(train, *f"--two-way --out new.pt {more}".split(), cwd=tmp_path, code=2), more


@pytest.mark.cli
def test_guidance_of_the_command_is_that_of_the_wrapper(tmp_path):
    model, clip = random_denoiser(height=16, width=16), balls(1, 2)
    df.save_checkpoint(tmp_path / "model.pt", model.config, model.state_dict())
    np.save(tmp_path / "a.npy", clip[0])
    words = "--context a.npy --context-frames 2 --frames 5 --device cpu --out".split()
    here(sample, *words, "plain.npy", cwd=tmp_path)
    here(sample, *words, "one.npy", "--guidance", 1, "--guidance-noise", 9, cwd=tmp_path)
    here(sample, *words, "two.npy", "--guidance", 2, "--guidance-noise", 9, cwd=tmp_path)
    plain, one, two = (np.load(tmp_path / f"{name}.npy").astype(int) for name in ("plain", "one", "two"))
    assert abs(one - plain).max() <= 1, "weight 1 changes nothing"
    guided = df.Guided(model, 2, 9, torch.Generator().manual_seed(1))
    frames = df.rollout(guided, df.scheduling_matrix("pyramid", 1, 8), 5, sample.to_frames(clip), period=2,
                        generator=torch.Generator().manual_seed(0))
    expected = sample.to_bytes(torch.stack(list(frames), 1))[0]
    assert abs(two - expected).max() <= 1 and (two != plain).any(), "weight and noise of the command, in their places"
    model = random_denoiser(causal=False)
    df.save_checkpoint(tmp_path / "two-way.pt", model.config, model.state_dict())
    assert "no history" in here(sample, *"--ckpt two-way.pt --guidance 2".split(), cwd=tmp_path, code=2)


# ---- sample.py: clips in, clips out


def write(path, clip, **options):
    with sample.video_writer(path, *clip.shape[1:3], **options) as put:
        for frame in clip:
            put(frame)


@pytest.mark.cli
def test_images_are_ordered_by_number_and_may_be_of_any_kind(tmp_path):
    (tmp_path / "._frame0.png").write_bytes(b"hidden")  # macOS leaves such files on other disks
    for i in range(12):
        kind = (".png", ".jpg", ".bmp")[i % 3]
        iio.imwrite(tmp_path / f"frame{i}{kind}", np.full((4, 6 + i, 3), 20 * i, np.uint8))
    read = sample.read_clip(tmp_path, 4, 4)[:, 0, 0, 0].astype(int)
    assert abs(read - 20 * np.arange(12)).max() <= 2, "frame2 before frame10; PNG, JPG and BMP of any size in one folder"
    assert len(sample.read_clip(tmp_path, 4, 4, 5)) == 5, "the first images alone"
    deep = tmp_path / "deep"
    deep.mkdir()
    for i, value in enumerate((0, 25_828, 65_535)):
        iio.imwrite(deep / f"{i}.png", np.full((4, 4), value, np.uint16))
    assert sample.read_clip(deep, 4, 4)[:, 0, 0].tolist() == [[0] * 3, [100] * 3, [255] * 3], "16 bits / 257, grey to RGB"


@pytest.mark.cli
@pytest.mark.parametrize("what,shape", [("grey", (8, 8)), ("with transparency", (8, 8, 4))])
def test_images_of_any_kind_become_rgb(tmp_path, what, shape):
    clip = np.stack([np.full(shape, value, np.uint8) for value in (50, 100, 200)])
    if shape[-1] == 4:
        clip[..., 3] = 255 * (np.arange(8) < 6)  # two columns of eight show what is behind
    iio.imwrite(tmp_path / "a.gif", clip, plugin="pillow", is_batch=True)
    for i, image in enumerate(clip):
        iio.imwrite(tmp_path / f"{i}.png", image)
    for path in (tmp_path / "a.gif", tmp_path):
        read = sample.read_clip(path, 8, 8)
        assert read[:, 0, 0].tolist() == [[50] * 3, [100] * 3, [200] * 3], f"{path.suffix or 'folder'}, {what}: three channels"


@pytest.mark.cli
def test_photos_are_turned_upright(tmp_path):
    from PIL import Image  # comes with imageio; only this test needs to write EXIF
    image, exif = Image.fromarray(np.arange(0, 240, 30, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(3, 2)), Image.Exif()
    exif[0x0112] = 3  # held upside down
    image.save(tmp_path / "0.png", exif=exif)
    assert sample.read_clip(tmp_path, 8, 8)[0, :, 0, 0].tolist() == list(range(210, -1, -30)), "EXIF orientation"


@pytest.mark.cli
@pytest.mark.parametrize("size", [8, 4])
def test_a_long_npy_is_read_whole(tmp_path, size):
    clip = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    np.save(tmp_path / "long.npy", clip)
    read = sample.read_clip(tmp_path / "long.npy", size, size)
    assert read.shape == (300, size, size, 3)
    if size == 8:
        assert (read == clip).all(), "frames of the right size are not touched"
    else:
        means = clip.reshape(300, size, 2, size, 2, 3).mean((2, 4))
        assert abs(read - means).mean() < 30, "smaller frames are averages, not single pixels"


@pytest.mark.cli
@pytest.mark.parametrize("height,width,kept", [(4, 4, (3, 7)), (4, 8, (1, 9)), (4, 10, (0, 10)), (8, 10, (2.5, 7.5))])
def test_frames_are_scaled_to_cover_and_cropped_to_the_centre(tmp_path, height, width, kept):
    ramp = np.broadcast_to(np.arange(0, 240, 24, dtype=np.uint8)[:, None], (2, 4, 10, 3))  # column i is 24 i
    np.save(tmp_path / "a.npy", ramp)
    write(tmp_path / "a.mkv.mp4", ramp.repeat(8, 1).repeat(8, 2), scale=1)
    for name in ("a.npy", "a.mkv.mp4"):
        row = sample.read_clip(tmp_path / name, height, width)[0, height // 2, :, 0].astype(float)
        left, right = (24 * (edge - 0.5) for edge in kept)  # values at the edges, half a column out
        step = (right - left) / width
        expected = np.clip(left + step * (np.arange(width) + 0.5), 0, 216)
        assert abs(row - expected).max() < 13, f"{name}: columns {kept} of 10 should fill {height}x{width}, not {row}"


@pytest.mark.cli
def test_every_coded_frame_of_a_video_comes_through(tmp_path):
    clip = balls(1, 40, 32)[0]
    for name, codec in (("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")):
        iio.imwrite(tmp_path / name, clip, plugin="FFMPEG", fps=15, codec=codec, quality=None, macro_block_size=1, output_params=[
            "-vf", "select='lt(n,10)+not(mod(n,6))'", "-fps_mode", "vfr"])  # 10 frames, then every sixth of 30
        assert len(sample.read_clip(tmp_path / name, 32, 32)) == 15, f"{name}: frames of a variable rate repeated or dropped"
        assert len(sample.read_clip(tmp_path / name, 32, 32, 3)) == 3, f"{name}: the first frames alone"


@pytest.mark.cli
def test_a_video_that_is_cut_off_or_damaged_is_refused(tmp_path, monkeypatch):
    clip = balls(1, 100, 64)[0]
    for name, codec, options in (("a.mkv", "libx264", []), ("a.webm", "libvpx-vp9", []), ("a.mp4", "libx264", ["-movflags", "faststart"])):
        path = tmp_path / name
        iio.imwrite(path, clip, plugin="FFMPEG", fps=15, codec=codec, quality=None, macro_block_size=1, output_params=options)
        assert len(sample.read_clip(path, 32, 32)) == 100
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at])
        refused(f"half of {name}", sample.read_clip, path, 32, 32)
        path.write_bytes(whole[: len(whole) * 17 // 20])
        refused(f"{name} without its end", sample.read_clip, path, 32, 32)
        if "libx264" in codec:
            path.write_bytes(whole[:at] + bytes(255 - b for b in whole[at : at + 200]) + whole[at + 200 :])
            refused(f"{name} with a scratch", sample.read_clip, path, 32, 32)
        path.write_bytes(whole)
    real, calls = sample.imageio.v2.get_reader, []

    class Killed:
        def __init__(self, reader):
            self.reader = reader

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.reader.close()

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def __iter__(self):
            return itertools.islice(iter(self.reader), 50)

    def first_is_killed(*args, **options):
        calls.append(args)
        return Killed(real(*args, **options)) if len(calls) == 1 else real(*args, **options)

    monkeypatch.setattr(sample.imageio.v2, "get_reader", first_is_killed)
    refused("a clip whose decoder was killed", sample.read_clip, tmp_path / "a.mkv", 32, 32)


@pytest.mark.cli
@pytest.mark.parametrize("suffix", [".npy", ".mp4", ".webm", ".gif"])
def test_what_is_written_can_be_read_again(tmp_path, suffix):
    clip = balls(1, 20, 32)[0]
    write(tmp_path / f"a{suffix}", clip, scale=1)
    read = sample.read_clip(tmp_path / f"a{suffix}", 32, 32).astype(int)
    assert read.shape == clip.shape, f"{suffix}: frames got lost, or their size changed"
    assert abs(read - clip).mean() < 4, f"{suffix}: other frames than were written"
    if suffix == ".npy":
        assert (read == clip).all() and (np.load(tmp_path / "a.npy") == clip).all(), ".npy keeps every bit"
    else:
        write(tmp_path / f"b{suffix}", clip)
        assert sample.read_clip(tmp_path / f"b{suffix}", 256, 256).shape[1:3] == (256, 256), "enlarged to be watched"


@pytest.mark.cli
def test_pixels_are_enlarged_and_stay_sharp(tmp_path):
    clip = np.random.default_rng(0).integers(0, 2, (2, 8, 8, 1), np.uint8).repeat(3, 3) * 255  # black and white
    write(tmp_path / "a.mp4", clip, scale=32)
    read = iio.imread(tmp_path / "a.mp4")
    assert ((read > 64) & (read < 192)).mean() < 0.03, "black and white, no grey: ffmpeg must repeat pixels, not blend"
    write(tmp_path / "b.mp4", clip[:, :5, :7], scale=3)
    assert iio.immeta(tmp_path / "b.mp4", plugin="FFMPEG")["size"] == (22, 16), "H.264 needs even numbers, not 21x15"
    write(tmp_path / "c.gif", np.zeros((1, 100, 8, 3), np.uint8))
    assert iio.imread(tmp_path / "c.gif").shape[1:3] == (300, 24), "a height of 100 becomes 256 or more"


@pytest.mark.cli
def test_frames_of_any_size_are_counted_in_npy(tmp_path):
    write(tmp_path / "a.npy", np.zeros((3, 2, 2, 3), np.uint8))
    assert np.load(tmp_path / "a.npy").shape == (3, 2, 2, 3), "the header is no part of the frames"


@pytest.mark.cli
def test_fps_and_scale_reach_the_file(tmp_path):
    df.save_checkpoint(tmp_path / "model.pt", tiny(), random_denoiser().state_dict())
    here(sample, *"--frames 4 --steps 1 --fps 5 --scale 2 --out o.mp4 --device cpu".split(), cwd=tmp_path)
    meta = iio.immeta(tmp_path / "o.mp4", plugin="FFMPEG")
    assert meta["fps"] == 5 and meta["size"] == (16, 16), "--fps, --scale"
    here(sample, *"--frames 4 --steps 1 --fps 5 --out o.gif --device cpu".split(), cwd=tmp_path)
    assert iio.immeta(tmp_path / "o.gif", plugin="pillow").get("duration") == 200, "--fps 5: each frame is shown for 200 ms"


@pytest.mark.cli
def test_frames_go_to_the_file_as_they_come(tmp_path):
    frame = np.zeros((64, 64, 3), np.uint8)
    with sample.video_writer(tmp_path / "a.npy", 64, 64) as put:
        for _ in range(100):
            put(frame)
        assert (tmp_path / "a.npy").stat().st_size > 95 * frame.nbytes, "frames pile up in memory"
    with pytest.raises(KeyboardInterrupt), sample.video_writer(tmp_path / "b.npy", 64, 64) as put:
        put(frame)
        raise KeyboardInterrupt
    assert np.load(tmp_path / "b.npy").shape == (1, 64, 64, 3), "what was written before Ctrl-C is a whole file"


@pytest.mark.cli
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("suffix", [".npy", ".mp4", ".webm", ".gif"])
def test_a_full_disk_is_an_error(tmp_path, suffix):
    (tmp_path / f"a{suffix}").symlink_to("/dev/full")
    with pytest.raises(OSError):
        write(tmp_path / f"a{suffix}", np.zeros((3, 64, 64, 3), np.uint8))


@pytest.mark.cli
def test_actions_have_the_name_of_their_clip(tmp_path):
    (tmp_path / "take.1").mkdir()
    for name in ("take.1", "take.1.mp4"):
        side = sample.side_file(tmp_path / name).name
        assert side == "take.1.actions.npy", f"{name}: the name of a video without its ending, the whole name of a folder"


@pytest.mark.cli
def test_actions_of_skipped_frames_are_averaged(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0)[:, None])
    assert sample.read_actions(tmp_path / "a.npy", stride=2)[::2, 0].tolist() == [0, 1.5, 3.5], "rows (1,2), (3,4)"


# ---- sample.py: the command


def asked(**options):
    return Namespace(**(dict(context=[], context_frames=2, keyframes=[], batch=1, frames=3, device="cpu", actions=None)
                        | options))


@pytest.mark.cli
def test_a_model_of_stride_two_goes_on_from_every_second_frame(tmp_path):
    counting_clip(tmp_path)
    args = asked(context=[tmp_path / "a.npy"], keyframes=[2])
    context, keyframes, actions = sample.load_inputs(args, tiny(action_dim=1), 2)
    assert sample.to_bytes(context)[0, :, 0, 0, 0].tolist() == [0, 20], "frames 0 and 2: the stride first, then the cut"
    assert sample.to_bytes(keyframes[2])[0, 0, 0].tolist() == [40] * 3, "keyframe 2 is frame 4 of the clip"
    assert [row.tolist() for row in actions] == [[[0]], [[1.5]], [[3.5]]], "and the actions that led to them"


@pytest.mark.cli
def test_every_clip_has_actions_of_its_own(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.save(tmp_path / "b.actions.npy", np.arange(6.0).reshape(3, 2))
    args = asked(context=[tmp_path / "a.npy", tmp_path / "b.npy"], batch=3, frames=5)
    context, _, actions = sample.load_inputs(args, tiny(action_dim=2), 1)
    assert context.shape == (3, 2, 3, 8, 8), "contexts are taken in turn"
    assert not any(row[[0, 2]].any() for row in actions), "a clip without a side file has no actions: zeros"
    assert [row[1, 0].item() for row in actions] == [0, 2, 4, 0, 2], "actions that end are repeated"
    refused("2 numbers a frame where 3 are needed", sample.load_inputs, args, tiny(action_dim=3), 1)


@pytest.mark.cli
def test_the_checkpoint_tells_whether_actions_are_one_of_several(tmp_path, monkeypatch):
    def one_hot(*rows, stride=1):
        for name, row in zip("ab", rows):
            np.save(tmp_path / "clips" / f"{name}.npy", balls(1, 8)[0])
            np.save(tmp_path / "clips" / f"{name}.actions.npy", np.array(row)[np.arange(8) % len(row)])
        return clips_of(tmp_path / "clips", stride=stride, clip_frames=2).one_hot

    (tmp_path / "clips").mkdir()
    eye = np.eye(3)
    assert one_hot(eye) and one_hot(eye, eye[1:]), "every row has a single 1"
    assert one_hot(eye, stride=2), "of the rows as they are in the file, not of their means"
    for what, row in (("two ones", [[1, 1, 0]]), ("no one", eye * [1, 1, 0]), ("a half", eye / 2), ("-1, 1, 1", [[-1, 1, 1]])):
        assert not one_hot(eye, row), f"{what} in one of the clips"
    assert not train.Balls(settings(no_push=False)).one_hot, "pushes are no choice of one"
    train_here(monkeypatch, tmp_path, *"--data clips --steps 2 --cache cache --out free.pt".split())
    assert df.load_checkpoint(tmp_path / "free.pt")[1]["one_hot"] is False
    one_hot(eye, eye)
    train_here(monkeypatch, tmp_path, *"--data clips --steps 2 --cache cache --out choice.pt".split())
    assert df.load_checkpoint(tmp_path / "choice.pt")[1]["one_hot"] is True, "sample.py --play needs it"


# ---- sample.py: the world in the terminal


def shown_in(columns, lines, image, monkeypatch, capsys, colours="truecolor"):
    """What `draw` shows of an image in a terminal of this size -> pixels (2 * rows, columns) as told to the terminal, and
    the lines of text below. It understands just the codes that `draw` uses."""
    monkeypatch.setenv("COLORTERM", colours)
    monkeypatch.setattr(sample.os, "get_terminal_size", lambda *_: os.terminal_size((columns, lines)))
    capsys.readouterr()
    sample.draw(image, "a line that says which keys there are")
    said = capsys.readouterr().out
    assert said.startswith("\x1b[H"), "each picture is drawn over the last one"
    *rows, line = said[3:].split("\r\n")  # a terminal in this mode needs both
    pixels = []
    for row in rows:
        cells = re.findall("\x1b\\[38;([25](?:;\\d+)+);48;([25](?:;\\d+)+)m\u2580", row)
        assert row.count("\u2580") == len(cells) <= columns, "a half block for two pixels, with a colour for each"
        assert row.endswith("\x1b[K") == (len(cells) < columns), "what is left of an old picture is cleared, but not a last pixel"
        pixels += zip(*cells)
    assert len(rows) < lines or not rows, "one line is left for the text"
    assert line.endswith("\x1b[J") and len(line) - 3 < max(columns, 1), "the text is cut, so that it does not go on in a second line"
    return [[tuple(map(int, colour.split(";")[1:])) for colour in row] for row in pixels], line


@pytest.mark.cli
def test_two_pixels_share_a_character(monkeypatch, capsys):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    look = lambda columns, lines, **options: np.array(shown_in(columns, lines, image, monkeypatch, capsys, **options)[0])
    assert (look(8, 5) == image).all(), "the upper pixel is the colour in front, the lower one that behind"
    assert (look(5, 4) == image).all(), "a window in which it just fits"
    assert (look(11, 7) == image.repeat(2, 0).repeat(2, 1)).all(), "in a large window, pixels are enlarged by a whole number"
    small = look(40, 3)  # 4 of 6 rows
    assert small.shape == (4, 3, 3) and (small == image[[0, 1, 3, 4]][:, [0, 1, 3]]).all(), "rows and columns are left out evenly"
    for columns, lines in ((40, 1), (1, 1), (0, 0)):
        assert not len(look(columns, lines)), "a window without room for a picture is no error"
    levels = [0, 95, 135, 175, 215, 255]  # of the 216 colours that every terminal with 256 has
    nearest = lambda value: min(range(6), key=lambda i: abs(levels[i] - int(value)))
    expected = [[[16 + 36 * nearest(r) + 6 * nearest(g) + nearest(b)] for r, g, b in row] for row in image]
    assert (look(8, 5, colours="") == np.array(expected)).all(), "without COLORTERM: the nearest of 256 colours"


class Keyboard:
    """A screen of curses: gives out keys when the picture of a frame was shown. keys: {number of the frame: keys}."""

    def __init__(self, keys):
        self.keys, self.frame, self.waits = {t: list(k) for t, k in keys.items()}, -1, []

    def timeout(self, milliseconds):
        self.waits.append(milliseconds)
        assert len(self.waits) < 3000, "it never ends"

    def getch(self):
        left = self.keys.get(self.frame)
        if not left:
            time.sleep(self.waits[-1] / 1000)
        return left.pop(0) if left else -1


def played(monkeypatch, keys, action_dim=2, one_hot=False, context=0, num_frames=None, fps=1e6):
    """`play` with a model that records -> actions that reached the model, frame by frame, for every world; the lines that
    were shown; what was kept; the keyboard. Keys are pressed when the frame with that number (counted over all worlds) is
    on the screen."""
    curses = pytest.importorskip("curses")
    keyboard, kept, lines, worlds = Keyboard(keys), [], [], []

    def world(number, actions):
        assert number == len(worlds), "r goes on to the next world"
        spy = Spy(action_dim=action_dim)
        worlds.append(spy)
        rows = itertools.chain(torch.full((context, 1, action_dim), 9.0), actions)
        return df.rollout(spy, df.scheduling_matrix("autoregressive", 1, 2), num_frames, torch.zeros(1, context, 3, 8, 8), actions=rows)

    def keep(images):
        kept.append(images)
        keyboard.frame += 1

    monkeypatch.setattr(curses, "wrapper", lambda loop: loop(keyboard))
    monkeypatch.setattr(curses, "curs_set", lambda visible: None)
    monkeypatch.setattr(sample, "draw", lambda image, line: lines.append(line))
    with monkeypatch.context() as m:
        m.setattr(sample.signal, "signal", lambda *_: None)
        sample.play(world, action_dim, one_hot, fps, keep)
    told = [[call["actions"][0, -1].tolist() for call in spy.calls[::2]] for spy in worlds]  # 2 calls for each frame
    return told, lines, kept, keyboard


@pytest.mark.cli
def test_an_arrow_is_the_action_of_the_next_frame_and_of_no_other(monkeypatch):
    curses = pytest.importorskip("curses")

    left, right, up, down = curses.KEY_LEFT, curses.KEY_RIGHT, curses.KEY_UP, curses.KEY_DOWN
    (told,), lines, kept, _ = played(monkeypatch, {1: [left], 3: [right], 4: [up], 5: [down], 7: [up, right], 8: [left, right],
                                                   9: [ord("x"), ord("1"), curses.KEY_RESIZE], 10: [ord("q")]})
    expected = {2: [-1, 0], 4: [1, 0], 5: [0, -1], 6: [0, 1], 8: [1, -1]}  # y is down; two arrows are a diagonal
    for t in range(11):
        assert told[t] == expected.get(t, [0, 0]), f"frame {t}: a key shows in the next frame, and only there"
    assert len(kept) == 11 and kept[0].shape == (1, 8, 8, 3) and kept[0].dtype == np.uint8, "each frame is kept once"
    assert any(line.endswith("action 1 -1") for line in lines) and "arrows" in lines[0] and "frames/s" in lines[0], lines[-1]
    (told,), *_ = played(monkeypatch, {0: [up], 1: [right], 2: [ord("q")]}, action_dim=1)
    assert told[1:] == [[0], [1]], "with a single action, up and down are unknown keys"


@pytest.mark.cli
def test_a_digit_is_held_until_the_next(monkeypatch):
    curses = pytest.importorskip("curses")

    keys = {1: [ord("2")], 3: [ord("7"), curses.KEY_LEFT], 4: [ord("1"), ord("0")], 6: [ord("1")], 7: [ord("r")], 9: [ord("q")]}
    (told, anew), lines, *_ = played(monkeypatch, keys, action_dim=3, one_hot=True)
    assert [row.index(1) for row in told] == [0, 0, 2, 2, 2, 0, 0, 1], "idle is action 0; a 7 of 3 actions, and an arrow, mean nothing"
    assert all(sum(row) == 1 for row in told + anew), "always one of them"
    assert [row.index(1) for row in anew] == [0, 0], "a new world begins with action 0"
    assert "0 to 2" in lines[0] and any(line.endswith("action 2") for line in lines), "the line tells the keys and the action"


@pytest.mark.cli
def test_space_pauses_r_starts_anew_and_q_ends(monkeypatch):
    space, r, q = map(ord, " rq")
    (told,), lines, kept, keyboard = played(monkeypatch, {2: [space, -1, -1, -1, space], 3: [q]})
    assert len(kept) == 4 and len(lines) >= 9, "while it pauses, no frame is made, and the picture is drawn again (the window may change)"
    assert max(keyboard.waits) == 100, "a pause waits, and does not run in circles"
    worlds, _, kept, _ = played(monkeypatch, {2: [r], 7: [r], 11: [q]}, context=2)
    assert [len(told) for told in worlds] == [1, 3, 2] and len(kept) == 12, "frames of context are shown, but cost no calls"
    assert all(told[0] == [0, 0] for told in worlds), "the actions of the context are not those of the keys"
    worlds, _, kept, _ = played(monkeypatch, {8: [q]}, num_frames=3)
    assert [len(told) for told in worlds] == [3, 3, 3], "with --frames, each world has that length"
    *_, keyboard = played(monkeypatch, {3: [q]}, fps=20)
    assert 30 < max(keyboard.waits) <= 50, "at most --fps: it waits for keys until a frame was seen long enough"
    assert len(keyboard.waits) <= 8, "two waits for a frame are enough: it does not run in circles until the time has come"


class Terminal:
    """A terminal (pty) with a program in it: send keys, wait for what it shows, look at its mode."""

    def __init__(self, *words, cwd, in_a_shell=False):
        pty, self.termios, self.fcntl = map(pytest.importorskip, ("pty", "termios", "fcntl"))
        self.fd, inside = pty.openpty()
        self.resize(24, 80)
        self.before, self.shown = self.termios.tcgetattr(self.fd), b""

        def own():  # a terminal of its own; and Ctrl-C works, even if these tests run in the background, where it is ignored
            self.fcntl.ioctl(0, self.termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        shell = ["sh", "-c", 'set -m; "$@"; echo halted; read line; fg', "sh"] * in_a_shell  # only a shell can halt a program
        self.process = subprocess.Popen(
            [*shell, sys.executable, HERE / "sample.py", *map(str, words)], cwd=cwd, stdin=inside, stdout=inside, stderr=inside,
            start_new_session=True, preexec_fn=own,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLORTERM": "truecolor"})
        os.close(inside)

    def resize(self, lines, columns):
        self.fcntl.ioctl(self.fd, self.termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait_for(self, text, seconds=60):
        """Reads on until it has shown `text` once more."""
        start, end = len(self.shown), time.monotonic() + seconds
        while text.encode() not in self.shown[start:]:
            assert time.monotonic() < end, f"never shown: {text!r}\n{self.shown[-500:]}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 65536)
                except OSError:  # the program has ended
                    assert text.encode() in self.shown[start:], f"never shown: {text!r}\n{self.shown[-500:]}"

    def send(self, keys):
        os.write(self.fd, keys.encode())

    def restored(self):
        """Is the keyboard as it was, and the normal screen shown, with a cursor?"""
        return (self.termios.tcgetattr(self.fd)[:4] == self.before[:4] and
                self.shown.rindex(b"\x1b[?1049l") > self.shown.rindex(b"\x1b[?1049h") and
                self.shown.rindex(b"\x1b[?25h") > self.shown.rindex(b"\x1b[?25l"))


@pytest.fixture(scope="module")
def world_to_play(tmp_path_factory):
    path = tmp_path_factory.mktemp("play") / "world.pt"
    model = random_denoiser(action_dim=2)
    df.save_checkpoint(path, model.config, model.state_dict(), one_hot=False)
    return path


@pytest.mark.cli
def test_a_world_is_played_in_a_terminal(world_to_play, tmp_path):
    flags = ("--ckpt", world_to_play, "--play", "--steps", 2, "--device", "cpu")
    one, two, three = (Terminal(*flags, "--out", f"{i}.npy", cwd=tmp_path, in_a_shell=i == 0) for i in range(3))
    for terminal in (two, three, one):
        terminal.wait_for("action 0 0")
    assert b"\x1b[?1049h" in one.shown and b"\x1b[?25l" in one.shown, "on the other screen, without a cursor"
    assert not one.termios.tcgetattr(one.fd)[3] & (one.termios.ICANON | one.termios.ECHO), "keys come at once, and are not shown"
    for keys, action in (("\x1bOA", "0 -1"), ("\x1bOB", "0 1"), ("\x1bOC", "1 0"), ("\x1bOD", "-1 0")):  # up down right left
        one.send(keys)
        one.wait_for(f"action {action}\x1b[J")
        one.wait_for("action 0 0")
    one.resize(3, 5)
    one.wait_for("arro\x1b[J")  # all that a window of 5 columns has room for
    one.resize(24, 80)
    one.wait_for("action 0 0")
    one.send("x\x1a")  # an unknown key; Ctrl-Z
    one.wait_for("halted")
    assert one.restored(), "while it is halted, the shell has its terminal as it was"
    one.send("\n")
    one.wait_for("action 0 0")
    one.send("q")
    two.send("\x03")
    os.close(three.fd)
    for terminal, end in ((one, "q"), (two, "Ctrl-C")):
        terminal.wait_for("\x1b[?1049l")
        assert terminal.process.wait(60) == 0, f"{end}: exit status {terminal.process.returncode}"
        assert terminal.restored(), f"{end}: the terminal is not as it was before"
        os.close(terminal.fd)
    assert three.process.wait(60) != 0, "its window was closed"
    for i, end in enumerate(("q", "Ctrl-C", "a closed window")):
        video = np.load(tmp_path / f"{i}.npy")
        assert len(video) > 0 and video.shape[1:] == (8, 8, 3), f"{end}: --out keeps what was played"


@pytest.mark.cli
def test_each_world_to_play_has_its_own_beginning(world_to_play, tmp_path, monkeypatch):
    calls, told = [], {}
    for i, name in enumerate("ab"):
        write(tmp_path / f"{name}.npy", np.full((4, 8, 8, 3), 100 * i, np.uint8))
        np.save(tmp_path / f"{name}.actions.npy", np.full((4, 2), 5.0 + i))

    def rollout(model, matrix, num_frames, context, *, actions, generator, **options):
        calls.append((matrix, context, list(actions), generator.initial_seed(), options))
        return iter(())

    monkeypatch.setattr(sample, "rollout", rollout)
    monkeypatch.setattr(sample.os, "isatty", lambda fd: True)
    monkeypatch.setattr(sample, "play", lambda world, action_dim, one_hot, fps, keep: [
        told.update(action_dim=action_dim, one_hot=one_hot, fps=fps), *(world(n, iter(["keys"])) for n in range(3))])
    here(sample, "--ckpt", world_to_play, *"--play --device cpu --seed 7 --context a.npy b.npy --context-frames 2 --fps 9".split(), cwd=tmp_path)
    assert told == dict(action_dim=2, one_hot=False, fps=9)
    for n, (matrix, context, actions, seed, options) in enumerate(calls[1:]):  # the first only looks for mistakes
        assert torch.equal(matrix, df.scheduling_matrix("autoregressive", 1, sample.STEPS)) and not options["period"], "no frame ahead"
        assert context.shape == (1, 2, 3, 8, 8) and sample.to_bytes(context).max() == 100 * (n % 2), "contexts take turns"
        assert [a.unique().tolist() for a in actions[:-1]] == [[5 + n % 2]] * 2 and actions[-1] == "keys", "context first, then the keys"
        assert seed == 7 + n and options["batch_size"] == 1, "each world has a seed of its own"
    assert not list(tmp_path.glob("*.mp4")), "without --out, nothing is kept"


@pytest.mark.cli
def test_what_cannot_be_played_is_told_in_one_line(world_to_play, tmp_path, monkeypatch):
    def said(*words, ckpt=world_to_play):
        line = here(sample, "--ckpt", ckpt, "--play", "--device", "cpu", *words, cwd=tmp_path, code=2)
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line

    assert "needs a terminal" in said(), "standard input and output are no terminal here"
    monkeypatch.setattr(sample.os, "isatty", lambda fd: True)
    for name, options in (("still", {}), ("both", dict(action_dim=2, causal=False))):
        model = random_denoiser(**options)
        df.save_checkpoint(tmp_path / f"{name}.pt", model.config, model.state_dict())
    assert "without actions" in said(ckpt="still.pt") and "both ways" in said(ckpt="both.pt")
    write(tmp_path / "clip.npy", np.zeros((4, 8, 8, 3), np.uint8))
    assert "it counts the 4 frames of context" in said("--context", "clip.npy", "--frames", 3)
    assert "--actions" in said("--actions", "a.npy") and "autoregressive" in said("--schedule", "pyramid")
    assert not list(tmp_path.glob("*.mp4")), "without --out, nothing is written"
    monkeypatch.setattr(sample.os, "name", "nt")
    assert "Linux or macOS" in said()


@pytest.mark.cli
def test_a_folder_of_clips_is_trained_on_and_rolled_out(tmp_path):
    """Every kind of clip, and what the two scripts write, as a user calls them."""
    clips = tmp_path / "clips"
    (clips / "deep" / "images").mkdir(parents=True)
    for name in ("a.mp4", "b.GIF", "deep/c.WEBM", "d.npy", "short.npy"):  # cameras write capitals
        write(clips / name, balls(1, 2 if "short" in name else 8, 24)[0])
    for i, frame in enumerate(balls(1, 11, 20)[0]):
        iio.imwrite(clips / "deep" / "images" / f"frame{i}.png", frame)
    (clips / "notes.mp4").write_text("not a video")
    np.save(clips / "a.actions.npy", np.ones((8, 2), np.float32))

    def run(script, *words, code=0):
        done = subprocess.run([sys.executable, HERE / script, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == code, f"{script} {words}: exit status {done.returncode}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    flags = "--data clips --steps 3 --size 16 --clip-frames 4 --temporal gru --cache cache --device cpu".split()
    out = run("train.py", *flags)
    assert "5 clips (0 held out, 1 with actions), 43 frames; 2 skipped" in out and "short.npy" in out and "notes.mp4" in out, out
    missing = {"model.pt", "model.resume.pt", "model.csv", "model.rollout.mp4"} - set(os.listdir(tmp_path))
    assert not missing, f"train.py did not write {missing}"
    out = run("sample.py", *"--frames 7 --context clips/a.mp4 --context-frames 2 --steps 2 --device cpu".split())
    assert "7/7" in out and "frames/s" in out, "a progress bar with its speed"
    assert sample.read_clip(tmp_path / "rollout.mp4", 16, 16).shape == (7, 16, 16, 3), "frames got lost"
    last = run("train.py", *flags, code=2).strip().splitlines()[-1]
    assert last.startswith("error:") and "--resume" in last, "a finished model.pt is not overwritten, and one line says so"


@pytest.mark.cli
@pytest.mark.parametrize("suffix", [".gif", ".npy"])
def test_batches_write_a_file_each_and_enlarge_all_but_npy(tmp_path, suffix):
    df.save_checkpoint(tmp_path / "model.pt", tiny(), random_denoiser().state_dict())
    here(sample, *f"--frames 3 --batch 2 --steps 2 --schedule pyramid --out o{suffix} --device cpu".split(), cwd=tmp_path)
    assert {f"o_0{suffix}", f"o_1{suffix}"} <= set(os.listdir(tmp_path)), "--batch N writes N files"
    if suffix == ".npy":
        a, b = (np.load(tmp_path / f"o_{i}.npy") for i in (0, 1))
        assert a.shape == b.shape == (3, 8, 8, 3) and (a != b).any(), "each rollout has noise of its own"
    else:
        assert iio.imread(tmp_path / f"o_0{suffix}").shape[:3] == (3, 256, 256), "frames of 8x8 are enlarged to be watched"


@pytest.mark.cli
@pytest.mark.parametrize("words,kind,tile,period", [
    ("--schedule pyramid --uncertainty 2.5", "pyramid", 1, 2.5), ("--schedule autoregressive", "autoregressive", 1, None),
    ("--schedule full_sequence --tile 3", "full_sequence", 3, None), ("--schedule full_sequence", "full_sequence", 6, None)])
def test_every_option_of_sample_reaches_the_rollout(tmp_path, monkeypatch, words, kind, tile, period):
    told, model = {}, random_denoiser(action_dim=1, clip_frames=6)
    df.save_checkpoint(tmp_path / "m.pt", model.config, model.state_dict())
    np.save(tmp_path / "a.npy", np.ones((2, 1), np.float32))
    write(tmp_path / "c.npy", np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.setattr(sample, "rollout", lambda model, K, *a, **options: told.update(options, K=K) or iter(()))
    here(sample, *words.split(), *"--ckpt m.pt --steps 4 --solver euler --seed 7 --actions a.npy".split(),
         *"--device cpu --out o.npy --context c.npy".split(), cwd=tmp_path)
    assert torch.equal(told["K"], df.scheduling_matrix(kind, tile, 4)), "--schedule, --tile, --steps"
    assert told["period"] == period, "a pyramid is one column with period --uncertainty; others start when the last copy ends"
    assert told.get("solver") == "euler", "--solver"
    assert told["generator"].initial_seed() == 7, "--seed"
    assert torch.equal(torch.stack([*told["actions"]]), torch.ones(256, 1, 1)), "--actions, repeated to --frames"


@pytest.mark.cli
def test_a_first_frame_from_nothing_takes_four_times_the_steps(tmp_path, monkeypatch):
    calls, model, real = [], random_denoiser(action_dim=1), df.rollout
    df.save_checkpoint(tmp_path / "m.pt", model.config, model.state_dict())
    np.save(tmp_path / "a.npy", np.arange(1.0, 6)[:, None])

    def spy(model, K, num_frames, context=None, *, actions, **options):
        rows = list(itertools.islice(actions, num_frames))
        frames = list(real(model, K, num_frames, context, actions=iter(rows), **options))
        calls.append((K, torch.stack(rows)[:, :, 0], context, options.get("period"), frames))
        return iter(frames)

    monkeypatch.setattr(sample, "rollout", spy)
    here(sample, *"--ckpt m.pt --steps 2 --frames 5 --batch 2 --actions a.npy --device cpu --out o.npy".split(), cwd=tmp_path)
    (first, told, *_, (frame,)), (then, all_told, context, period, frames) = calls
    assert torch.equal(first, df.scheduling_matrix("autoregressive", 1, 8)), "no history says where things are: 4 x 2 steps"
    assert torch.equal(then, df.scheduling_matrix("autoregressive", 1, 2)) and period == 2, "all others as ever: here a pyramid"
    assert context.shape[1] == 1 and torch.equal(context[:, 0], frame), "the rollout goes on from that frame"
    assert told.tolist() == [[1, 1]] and all_told[:, 0].tolist() == [1, 2, 3, 4, 5], "its action leads to it; none is lost after it"
    assert len(frames) == 5 and np.load(tmp_path / "o_0.npy").shape == (5, 8, 8, 3), "it counts, and is written once"
    for words in ("--context o_0.npy", "--schedule full_sequence"):
        calls.clear()
        here(sample, *"--ckpt m.pt --steps 2 --frames 5 --device cpu --out o.npy".split(), *words.split(), cwd=tmp_path)
        assert len(calls) == 1, f"{words}: one rollout, in which no frame is the first that anybody sees"


@pytest.mark.cli
def test_the_stride_of_a_checkpoint_and_every_context_reach_the_rollout(tmp_path, monkeypatch):
    told, model = {}, random_denoiser()
    df.save_checkpoint(tmp_path / "m.pt", model.config, model.state_dict(), stride=2)
    counting_clip(tmp_path, 7)
    np.save(tmp_path / "b.npy", np.full((7, 8, 8, 3), 255, np.uint8))
    monkeypatch.setattr(sample, "rollout", lambda model, K, n, context, **options: told.update(options, context=context) or iter(()))
    here(sample, *"--ckpt m.pt --context a.npy b.npy --context-frames 2 --device cpu --out o.npy".split(), cwd=tmp_path)
    shown = sample.to_bytes(told["context"])[:, :, 0, 0, 0].tolist()
    assert shown == [[0, 20], [255, 255]] and told["batch_size"] == 2, "a rollout from each clip, in the stride of training"
    assert {"o_0.npy", "o_1.npy"} <= set(os.listdir(tmp_path)), "a file for each"


@pytest.mark.cli
def test_context_noise_reaches_the_history(tmp_path):
    df.save_checkpoint(tmp_path / "model.pt", tiny(), random_denoiser().state_dict())
    np.save(tmp_path / "clip.npy", balls(1, 4)[0])
    clips = []
    for words in ("", "--context-noise 0.05", "--context-noise 2"):
        here(sample, *f"--context clip.npy --frames 5 --steps 2 --out o.npy --device cpu {words}".split(), cwd=tmp_path)
        clips.append(np.load(tmp_path / "o.npy"))
    assert (clips[0] == clips[1]).all(), "the default is the checkpoint's, 0.05"
    assert (clips[0][:4] == clips[2][:4]).all() and (clips[0][4] != clips[2][4]).any(), "the frame after hazy ones differs"


@pytest.mark.cli
@pytest.mark.parametrize("words,rows", [
    ("--frames 2", ["8 8", "7 8", "6 8", "5 7", "4 6", "3 5", "2 4", "1 3", "0 2", "0 1", "0 0"]),
    ("--schedule autoregressive --context-frames 2 --frames 4 --steps 2", ["0 0 2 2", "0 0 1 2", "0 0 0 2", "0 0 0 1", "0 0 0 0"]),
    ("--schedule pyramid --uncertainty 0.5 --frames 3 --steps 2", ["2 2 2", "1 1 2", "0 0 1", "0 0 0"]),
    ("--schedule full_sequence --frames 3 --steps 2", ["2 2 2", "1 1 1", "0 0 0"])])
def test_show_schedule_prints_the_matrix(tmp_path, words, rows):
    assert here(sample, "--show-schedule", *words.split(), cwd=tmp_path).splitlines() == rows, "one row for each step, 0 for context"


@pytest.mark.cli
def test_a_stopped_rollout_keeps_what_it_wrote(tmp_path, monkeypatch):
    df.save_checkpoint(tmp_path / "model.pt", tiny(), random_denoiser().state_dict())
    real = sample.rollout

    def interrupted(*args, **options):
        yield from itertools.islice(real(*args, **options), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "rollout", interrupted)
    said = here(sample, *"--frames 9 --steps 1 --out o.npy --device cpu".split(), cwd=tmp_path, code=2)
    assert "stopped after 3 of 9 frames" in said and np.load(tmp_path / "o.npy").shape[0] == 3, said


@pytest.mark.cli
@pytest.mark.parametrize("text", ["1e-3", "0.5", "2"])
def test_rates_are_read_however_they_are_written(text):
    assert sample.positive_float(text) == float(text), "a number above 0, in any notation"


@pytest.mark.cli
def test_only_what_a_user_can_mend_is_told_in_one_line(capsys):
    with pytest.raises(ValueError), sample.mistakes():
        raise ValueError("a bug of ours: it keeps its traceback")
    with pytest.raises(RuntimeError), sample.mistakes(ValueError):
        raise RuntimeError("another bug")
    for error, said in ((ValueError("a bad option"), "a bad option"), (FileNotFoundError(2, "No such file", "a.mp4"), "a.mp4: No such file"),
                        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch"),
                        (MemoryError("Unable to allocate 3 TiB"), "--batch"), (KeyboardInterrupt(), "stopped")):
        with pytest.raises(SystemExit) as end, sample.mistakes(ValueError):
            raise error
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and said in lines[0], lines
    with pytest.raises(SystemExit), sample.mistakes():
        torch.empty(10**15)
    assert "out of memory" in capsys.readouterr().err, "so does torch on a CPU say it"


@pytest.mark.cli
@pytest.mark.parametrize("script,words,said", [
    (sample, "--ckpt none.pt", "none.pt"), (sample, "--frames 0", "--frames"), (sample, "--frames 2.5", "--frames"),
    (sample, "--out a.xyz", "--out"), (sample, "--out none/a.mp4", "--out"), (sample, "--ckpt junk.pt", "junk.pt"),
    (sample, "--schedule none", "--schedule"), (sample, "--ckpt ok.pt --context none.mp4", "none.mp4"),
    (sample, "--ckpt ok.pt --context short.npy", "--context-frames"), (sample, "--uncertainty 0", "--uncertainty"),
    (sample, "--ckpt ok.pt --context short.npy --context-frames 2 --out short.npy", "overwrite"),
    (sample, "--ckpt ok.pt --context short.npy --context-frames 2 --out short.actions.npy", "overwrite"),
    (sample, "--ckpt ok.pt --context o_0.npy --batch 2 --out o.npy", "overwrite"),
    (sample, "--ckpt ok.pt --actions none.npy", "none.npy"), (sample, "--ckpt both.pt --out o.npy", "is 4; a two-way"),
    (sample, "--ckpt ok.pt --tile 2", "--tile"), (train, "--stride 2", "--stride"), (train, "--out lost.pt", "lost.pt exists: --overwrite"),
    (sample, "--device nonsense", "--device"), (sample, "--device meta", "--device"), (sample, "--out full.mp4", "--out"),
    (train, "--lr abc", "--lr"), (train, "--data junk.pt", "not a folder"), (train, "--out old.pt", "old.resume.pt exists"),
    (train, "--data none", "--data"), (train, "--data empty", "--data"), (train, "--data . --cache cache --size 15", "15x15"),
    (train, "--resume", "there is no model.resume.pt"), (train, "--out none/model.pt", "--out"), (train, "--batch 0", "--batch"),
    (train, "--size 8", "two balls"), (train, "--size 8x", "--size"), (train, "--size 16x32", "square"), (train, "--out .", "--out"),
    (train, "--seed -1", "--seed"), (train, "--steps -1", "--steps"), (train, "--init junk.pt", "junk.pt"),
])
def test_a_users_mistake_is_one_line_and_status_two(tmp_path, script, words, said):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "old.resume.pt").write_bytes(b"of a run whose old.pt was moved: not to be lost")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.mp4").mkdir()
    (tmp_path / "lost.pt").write_bytes(b"a model without its resume.pt")
    np.save(tmp_path / "short.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for name, options in (("ok.pt", {}), ("both.pt", dict(causal=False))):
        df.save_checkpoint(tmp_path / name, tiny(**options), random_denoiser().state_dict())
    before = set(os.listdir(tmp_path))
    error = here(script, *([] if "--device" in words else ["--device", "cpu"]), *words.split(), cwd=tmp_path, code=2)
    last = error.strip().split("\n")[-1]
    assert "error:" in last and said in last, f"the last line says what is wrong:\n{error}"
    assert set(os.listdir(tmp_path)) == before, "nothing is written before the mistake is found"


# ---- README.md


@pytest.mark.cli
def test_readme_speaks_of_what_there_is(monkeypatch, request):
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(str(HERE / "assets"))
    import compare

    text = Path("README.md").read_text() + Path("assets/RESULTS.md").read_text()
    for program in re.findall("```python\n(.*?)```", text, re.S):
        exec(program.replace("num_frames=None", "num_frames=2"), {})
    known = "--nproc_per_node " + "".join(here(script, "-h", cwd=HERE) for script in (train, sample, compare))
    unknown = set(re.findall("--[a-z][a-z_-]*", text)) - set(re.findall("--[a-z][a-z_-]*", known))
    assert not unknown, f"options that no script has: {unknown}"
    for path in re.findall(r"\]\((?!http)(\S+?)\)", text):
        assert Path(path).exists() or Path("assets", path).exists(), f"{path} is not there"
    markers, exercises = " ".join(request.config.getini("markers")), re.findall(r"^\| \d \|(.*?)\|.*`pytest -m (.*)`", text, re.M)
    for task, graded in exercises:
        for name in re.findall("`([A-Za-z_.]+)`", task):
            assert attrgetter(name)(df), "what is to be written"
        for marker in re.findall("[a-z]{3,}", graded.split(" -k ")[0]):
            assert f"{marker}:" in markers, f"no test has the marker {marker}"
    assert len(exercises) == 8, "eight exercises"


@pytest.mark.checkpoint
def test_the_checkpoint_in_assets_still_denoises_balls():
    model, _ = df.load_checkpoint(HERE / "assets" / "balls.pt")
    x, sigma = sample.to_frames(balls(2, 8, 32)), torch.full((2, 8), 0.3)
    with torch.no_grad():
        loss = float(df.diffusion_forcing_loss(model, x, model.config, sigma=sigma, actions=torch.zeros(2, 8, 2),
                                               generator=seed()))
    assert loss < 0.01, f"a loss of {loss:.4f}, not 0.0035: the network is not the one that balls.pt was trained with"
