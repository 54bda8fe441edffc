"""The specification of diffusion_forcing.py, in the order of its sections. `pytest -m schedule` grades one of them.

Every test compares with something independent: a closed form, a slow loop, or a spy that records what it was given.
"""

import gc
import itertools
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusion_forcing as df
import sample
import train
from data.balls import Balls
from diffusion_forcing import Config, Denoiser, TemporalAttention

HERE = Path(__file__).parent
pytest_plugins = ["experiments.exercise"]  # what needs an unwritten exercise is skipped
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


class Apart(torch.nn.Module):
    """A mixer in which frames do not meet. It stands in wherever a test needs a network, but none of section 9."""
    causal_only = False

    def __init__(self, dim, config):
        super().__init__()

    def pattern(self, T, state, two_streams, device):
        return None

    def forward(self, x, state, commit, pattern):
        return torch.zeros_like(x), state


@pytest.fixture
def apart(monkeypatch):
    """The name of this mixer, for Config."""
    monkeypatch.setitem(df.MIXERS, "apart", Apart)
    return "apart"


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
    dict(rho=0.0), dict(P_std=-1.0), dict(alternating=2), dict(data_mean=(0.0,)),
    dict(action_dim=1, action_scale=(0.0,)), dict(action_dim=2, action_scale=(1.0,)), dict(context_noise=0.0),
    dict(temporal="lstm"), dict(forcing="nonsense"), dict(causal=False, temporal="gru"),
    dict(causal=False, forcing="teacher")])
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
    assert correlation.abs().max() < 0.1, "levels depend on each other: (B, 1) drawn? alternate called for teacher?"


@pytest.mark.noise
@pytest.mark.parametrize("options", [dict(alternating=0.0), dict(alternating=1.0), dict(alternating=1.0, causal=False)])
def test_levels_of_each_frame_are_log_normal_in_frame_units(options):
    z = log_sigmas(20000, 4, **options)
    assert z.mean(0).abs().max() < 0.04, "E[ln sigma] = P_mean + ln(sigma_data / 0.5): units? alternate?"
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
        assert not much.any() or clip[much].max() - clip[much].min() < 1e-4, "what is above the median has one sigma"
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
    assert df.sample_noise_levels(2, 3, tiny(P_std=0.0)).unique().numel() == 1, "a P_std of 0 is one level for all"


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
def test_preconditioning_is_that_of_edm_around_the_mean_of_the_data(monkeypatch, apart):
    model, seen, sigma = Denoiser(tiny(gates=False, temporal=apart)), {}, torch.tensor([[0.4, 0.3]])
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
@pytest.mark.parametrize("gates", [True, False])
def test_a_network_that_says_zero_has_loss_one_at_every_level(sigma, gates, apart):
    config = tiny(gates=gates, temporal=apart)
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
    assert call["actions"] is not None and torch.equal(call["actions"], actions), "the model is told the actions"
    assert call["commit"] == 0 and call["state"] is None, "it keeps no state"
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
def test_the_loss_has_a_gradient(apart):
    model = Denoiser(tiny(temporal=apart))
    df.diffusion_forcing_loss(model, torch.randn(2, 4, 3, 8, 8), model.config).backward()
    assert model.head[-1].weight.grad.any(), "no gradient reaches the network: detached?"


@pytest.mark.loss
def test_each_loss_is_divided_by_the_one_that_was_to_be_expected():
    x, u, sigma, told = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4), torch.rand(2, 4) + 0.1, []
    each = df.loss_weight(sigma, 0.3) * x.square().mean((2, 3, 4))  # the spy says 0
    for forcing in ("diffusion", "teacher"):
        spy = Spy(forcing=forcing, gates=False)
        loss = lambda **options: float(df.diffusion_forcing_loss(spy, x, spy.config, sigma=sigma, **options))
        weighed = loss(expected_loss=lambda *levels: told.append(levels) or u)
        assert loss() == pytest.approx(float(each.mean())), "without expected_loss nothing changes"
        assert weighed == pytest.approx(float((each / u.exp() + u).mean())), "loss / E + ln E, frame by frame, u = ln E"
    (own, seen), (own_teacher, seen_teacher) = told
    assert torch.equal(own, sigma) and torch.equal(own_teacher, sigma), "it is told the sigma that each frame has,"
    assert torch.equal(seen, sigma), "and the one with which other frames see it: the same,"
    assert (seen_teacher - 0.05 * units(spy.config)).abs().max() < 1e-6, "but for teacher forcing, context_noise"


@pytest.mark.loss
def test_gates_do_not_make_frames_with_little_noise_count_more():
    x, u, spy = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4), Spy(forcing="teacher")
    sigma, gain = torch.tensor([[0.003, 0.02, 0.2, 5.0]]), torch.tensor([25, 15, 1.5, 1])  # .3 / sigma, in 1 to 25
    each = df.loss_weight(sigma, 0.3) * x.square().mean((2, 3, 4))
    loss = lambda **options: float(df.diffusion_forcing_loss(spy, x, spy.config, sigma=sigma, **options))
    assert loss() == pytest.approx(float(each.mean())), "without expected_loss a loss is the plain one, with gates too"
    weighed, expected = loss(expected_loss=lambda *levels: u), ((each / u.exp() + u) / gain).mean()
    assert weighed == pytest.approx(float(expected)), "(loss / E + ln E) / gain of the own sigma"


# ---- 5. schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.schedule
def test_levels_are_those_of_edm():
    config = tiny(sigma_min=0.02, sigma_max=80.0, rho=7.0)
    sigma = df.karras_sigmas(4, config)
    assert sigma[0] == 0 and len(sigma) == 5 and sigma.dtype == torch.float32, "S + 1 levels; 0 is no noise"
    steps = [((0.02 ** (1 / 7) * (3 - i) + 80 ** (1 / 7) * i) / 3) ** 7 for i in range(4)]
    assert (sigma[1:] / units(config)).tolist() == pytest.approx(steps, rel=1e-4), "EDM, eq. 5, in frame units"
    assert df.karras_sigmas(1, config)[1] == pytest.approx(80 * units(config)), "a single step starts at sigma_max"
    bent = df.karras_sigmas(3, tiny(sigma_min=0.02, sigma_max=80.0, rho=2.0))[2] / units(config)
    assert bent == pytest.approx(((0.02**0.5 + 80**0.5) / 2) ** 2, rel=1e-4), "rho is that of the Config"


def matrix(kind, T, S, u=1.0):
    """A matrix, row by row. The tests of later sections take it, too."""
    apart = {"autoregressive": S, "full_sequence": 0}.get(kind, u)
    order = [min(t, T - 1 - t) if kind == "trapezoid" else t for t in range(T)]  # how far from an end
    rows, m = [], 0
    while not rows or any(rows[-1]):
        rows.append([min(S, max(0, S + math.floor(apart * n) - m)) for n in order])
        m += 1
    return torch.tensor(rows)


@pytest.mark.schedule
@pytest.mark.parametrize("kind,u", KINDS + TRAPEZOIDS + [("pyramid", 0.7)])  # in float32, floor(.7 90) is 63
@pytest.mark.parametrize("T,S", [(1, 1), (1, 4), (5, 1), (4, 3), (7, 10), (99, 2)])
def test_matrix_against_a_slow_loop(kind, u, T, S):
    K = df.scheduling_matrix(kind, T, S, u)
    rows = matrix(kind, T, S, u).tolist()
    assert K.tolist() == rows, f"{kind}: clip(S + floor(u turn) - m, 0, S), from all S to the first row of all 0"
    assert K.dtype == torch.int64, "levels are integers, and index the sigmas: int64"


@pytest.mark.schedule
@pytest.mark.parametrize("arguments", [("none", 4, 4), ("pyramid", 0, 4), ("pyramid", 4, 0), ("pyramid", 4, 4, -1.0),
                                       ("pyramid", 4, 4, math.inf), ("pyramid", 4, 4, math.nan),
                                       ("full_sequence", 4, 4, -1.0)])
def test_impossible_matrices_are_refused(arguments):
    refused(f"a matrix of {arguments}", df.scheduling_matrix, *arguments)


# ---- 6. sampling: Algorithm 2 ---------------------------------------------------------------------------------------


def rolled(model, K, context=None, **options):
    """A rollout of one copy of the matrix, as the clip that `sample` makes."""
    num_context = 0 if context is None else context.shape[1]
    return torch.stack(list(df.rollout(model, K, num_context + K.shape[1], context, **options)), 1)


LOOPS = [pytest.param(df.sample, marks=pytest.mark.sampler, id="sample"),
         pytest.param(rolled, marks=pytest.mark.rollout, id="rollout")]


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
        assert torch.allclose(out[:, t], alone, rtol=1e-5, atol=1e-9), \
            f"frame {t}, {options or 'multistep'}: by its own levels alone, and its own D_last and s_last"


@pytest.mark.sampler
@pytest.mark.parametrize("kind,u", KINDS + TRAPEZOIDS)
@pytest.mark.parametrize("solver", df.SOLVERS)
def test_a_constant_denoiser_is_landed_on_exactly(kind, u, solver):
    x0 = torch.randn(3, 8, 8)
    out = df.sample(Spy(lambda x, sigma: x0.expand_as(x)), matrix(kind, 4, 3, u), solver=solver)
    assert torch.equal(out, x0.expand_as(out)), "a step to sigma 0 lands on D exactly; NaN: is s_last wrong?"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("solver", df.SOLVERS)
def test_a_frame_whose_level_is_held_keeps_every_bit(solver, loop):
    K = torch.tensor([[3, 3], [2, 3], [1, 3], [1, 2], [1, 1], [0, 1], [0, 0]])
    spy = Spy(lambda x, sigma: torch.sin(3 * x))
    loop(spy, K, solver=solver)
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
        assert call["commit"] == 0 and call["state"] is None, "all frames are in every call: no state, commit=0"
        assert torch.equal(call["actions"], actions[:, :5]), "row t of the actions belongs to frame t, context included"
    assert out.shape == (2, 5, 3, 8, 8) and torch.equal(out[:, :2], context), "the context comes first, as it went in"
    assert torch.equal(K, before), "the matrix of the caller stays as it was"


@pytest.mark.sampler
def test_history_carries_the_noise_that_the_network_is_told_drawn_once():
    told, x0 = 0.3 * units(tiny()), torch.full((4, 2, 3, 16, 16), 0.5)
    both = Spy(lambda x, sigma: torch.full_like(x, 0.7), causal=False, window=6, height=16, width=16, context_noise=0.3)
    out = df.sample(both, matrix("autoregressive", 3, 2), x0, keyframes={4: x0[:, 0]})
    noise = torch.stack([call["x"] - out for call in both.calls])  # (calls,B,T,C,H,W): of known frames, their noise
    assert len(both.calls) == 2 * 2, "two frames, two steps each: keyframes take none, nor do still rows"
    for t, known in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [2, 3]), (4, [0, 1, 2, 3])):
        assert (noise[known, :, t] == noise[known[0], :, t]).all(), "one draw for each frame, not one for each call"
        assert float(noise[known[0], :, t].std()) == pytest.approx(told, rel=0.06), "context_noise, added and told"
    rows = noise[2][:, [0, 1, 2, 4]].flatten(3).flatten(0, 2)
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.35, "no clip, frame or channel shares it"
    first = torch.stack([both.calls[0]["x"][:, 2].flatten(), noise[2, :, 2].flatten()])
    assert torch.corrcoef(first)[0, 1].abs() < 0.1, "it is not the noise that the frame began with"
    given = dict(enumerate(x0.unbind(1)))
    assert torch.equal(df.sample(both, matrix("pyramid", 2, 2), keyframes=given, batch_size=4), x0), "all is given"
    assert len(both.calls) == 4, "so there is nothing to call the network for"


@pytest.mark.sampler
def test_noise_is_drawn_frame_by_frame():
    """So that equal seeds give equal frames in `rollout`, which cannot draw for frames that have not started."""
    spy, given, source = Spy(causal=False, window=6), torch.randn(2, 2, 3, 8, 8), seed(4)
    df.sample(spy, matrix("full_sequence", 3, 2), given[:, :1], keyframes={2: given[:, 1]}, generator=seed(4))
    sigma_max, known, begins = float(df.karras_sigmas(2, spy.config)[2]), 0.05 * units(spy.config), []
    for frame in (given[:, 0], None, given[:, 1], None):
        own = torch.randn(2, 3, 8, 8, generator=source) if frame is None else None
        as_history = torch.randn(2, 3, 8, 8, generator=source)
        begins.append(sigma_max * own if frame is None else frame + known * as_history)
    assert torch.allclose(spy.calls[0]["x"], torch.stack(begins, 1), rtol=1e-4, atol=1e-5), \
        "frame by frame: what it begins as, unless it is given, and then its noise as history"


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


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_type_and_device_are_those_of_the_context_or_of_the_weights(dtype, loop, apart):
    actions, nothing = torch.ones(1, 2, 1), torch.empty(1, 0, 3, 8, 8, dtype=dtype)
    spy, K = Spy(lambda x, sigma: 0.9 * x, action_dim=1), matrix("pyramid", 2, 2)
    out = loop(spy, K, nothing, actions=actions)
    types = {out.dtype} | {c[k].dtype for c in spy.calls for k in ("x", "sigma", "actions")}
    assert types == {dtype}, "out, x, sigma, actions: all have the type of context"
    model, types = random_denoiser(temporal=apart).to(dtype if dtype == torch.float64 else torch.float32), set()
    model.register_forward_pre_hook(lambda module, args: types.add(args[0].dtype))
    out = loop(model, K)
    assert types | {out.dtype} == {next(model.parameters()).dtype}, "without a context: as the weights"
    assert not out.requires_grad, "it keeps no graph"


GOOD, CLIP = matrix("autoregressive", 2, 2), torch.zeros(1, 2, 3, 8, 8)
IMPOSSIBLE = [
    ("a matrix upside down", dict(matrix=GOOD.flip(0))), ("a matrix of floats", dict(matrix=GOOD.float())),
    ("a level that rises", dict(matrix=torch.tensor([[2], [1], [2], [0]]))), ("levels below 0", dict(matrix=GOOD - 1)),
    ("a matrix of zeros", dict(matrix=GOOD[-1:])), ("a matrix that does not end at 0", dict(matrix=GOOD[:-1])),
    ("a matrix that does not begin at S", dict(matrix=GOOD[1:])), ("an empty matrix", dict(matrix=GOOD[:0])),
    ("a matrix without a frame", dict(matrix=GOOD[:, :0])), ("a matrix of one axis", dict(matrix=GOOD[0])),
    ("a solver", dict(solver="rk")),
    ("1 number a frame where 2 are needed", dict(actions=torch.zeros(1, 4, 1))), ("no clip", dict(batch_size=0)),
    ("actions of two clips", dict(actions=torch.zeros(2, 4, 2))), ("of one axis", dict(actions=torch.zeros(4))),
    ("too few actions", dict(actions=torch.zeros(1, 1, 2))), ("context of bytes", dict(context=CLIP.byte())),
    ("context of another size", dict(context=CLIP[..., :4])), ("of one channel", dict(context=CLIP[:, :, :1]))]


@pytest.mark.sampler
def test_sample_refuses_what_cannot_work():
    both, causal = Spy(action_dim=2, causal=False, window=4), Spy(action_dim=2)
    long = matrix("full_sequence", 5, 2)
    for what, options in IMPOSSIBLE + [
            ("frames beyond the window", dict(matrix=long)), ("with context", dict(matrix=long[:, :3], context=CLIP)),
            ("keyframes for a causal model", dict(model=causal, keyframes={1: CLIP[:, 1]})),
            ("a keyframe in the context", dict(context=CLIP, keyframes={0: CLIP[:, 0]})),
            ("one beyond the end", dict(keyframes={2: CLIP[:, 0]})), ("before 0", dict(keyframes={-1: CLIP[:, 0]})),
            ("of bytes", dict(keyframes={1: CLIP[:, 0].byte()})), ("a size", dict(keyframes={1: CLIP[:, 0, :, :4]})),
            ("keyframes of two clips for one", dict(keyframes={1: CLIP[0]}))]:
        refused(f"sample: {what}", df.sample, **dict(model=both, matrix=GOOD) | options)
    assert not both.calls and not causal.calls, "nothing is computed before that"


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
def test_levels_may_be_held_or_skipped_as_in_sample():
    spy = Spy(lambda x, sigma: torch.tanh(x) / (1 + df.per_frame(sigma)))
    K = torch.tensor([[5, 5], [4, 5], [2, 5], [2, 3], [1, 2], [1, 1], [0, 1], [0, 0]])
    clip = df.sample(spy, K, generator=seed())
    assert torch.allclose(rolled(spy, K, generator=seed()), clip, atol=1e-6), "D_last and s_last are of its last step"


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
    column = [df.endless_level([[2], [1], [0]], 2.5, 250_000_002 + m, 100_000_001) for m in range(3)]
    assert column == [2, 1, 0], "copy j starts floor(j * period) rows late, exactly: float32 has seven digits"
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
def test_rollout_refuses_what_cannot_work_before_anything_is_computed():
    spy, both = Spy(action_dim=2), Spy(action_dim=2, causal=False, window=4)
    for what, options in IMPOSSIBLE + [
            ("a frame cleaner than one before it", dict(matrix=GOOD.flip(1))), ("copies that clash", dict(period=1.9)),
            ("a trapezoid", dict(matrix=matrix("trapezoid", 5, 2))), ("a rollout of no frame", dict(num_frames=0)),
            ("a period of 0", dict(period=0)), ("an endless period", dict(period=math.inf)),
            ("2 frames after 2 of context, 1 in all", dict(context=CLIP, num_frames=1)),
            ("a bidirectional model, which has no state", dict(model=both))]:
        refused(f"rollout: {what}", df.rollout, **dict(model=spy, matrix=GOOD, num_frames=4) | options)
    refused("actions for a model without", df.rollout, Spy(), GOOD, 4, actions=torch.zeros(1, 4, 2))
    df.rollout(spy, GOOD, 4, period=2)  # the last column starts in row 2: the next copy may start there, too
    df.rollout(spy, GOOD, 4, actions=torch.zeros(1, 9, 2))  # more actions than frames are welcome
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
    refused("history and state at once", model, x, sigma, model(x, sigma)[1], history=(x, sigma))
    refused("history for a model that sees the future", random_denoiser(causal=False), x, sigma, history=(x, sigma))
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
def test_a_network_may_have_four_resolutions():
    model, x = random_denoiser(height=16, width=16, dim_mults=(1, 2, 3, 4)), torch.randn(1, 2, 3, 16, 16)
    assert model(x, torch.ones(1, 2))[0].shape == x.shape, "each layer of up belongs to its own level"


def denoised(model, x, sigma, biases):
    """-> D (len(biases), values of x), where the head says a bias alone, whatever the network sees."""
    torch.nn.init.zeros_(model.head[-1].weight)
    rows = []
    with torch.no_grad():
        for bias in biases:
            model.head[-1].bias[:] = bias
            rows.append(model(x, sigma)[0].flatten())
    return torch.stack(rows)


@pytest.mark.network
@pytest.mark.parametrize("sigma", [0.004, 0.05, 0.3, 1.5, 30.0])
def test_the_best_gates_are_the_exact_denoiser_of_pixels_with_any_mean_and_variance(sigma):
    model, g = Denoiser(tiny(sigma_data=0.3)).double(), seed()  # a patch has 2x2 pixels, each unlike the others
    mean = (torch.rand(3, 2, 2, generator=g) * 2 - 1).repeat(1, 4, 4).double()
    variance = (torch.rand(3, 2, 2, generator=g) * 0.7).repeat(1, 4, 4).double() ** 2
    x = mean + (variance + sigma**2).sqrt() * torch.randn(1, 2, 3, 8, 8, generator=g, dtype=torch.double)
    exact = (mean + variance / (variance + sigma**2) * (x - mean)).flatten()
    biases = torch.eye(model.head[-1].bias.numel()).double()
    D = denoised(model, x, torch.full((1, 2), sigma).double(), [0 * biases[0], *biases])
    basis = (D[1:] - D[0]).T  # (values, biases): D is linear in the bias
    best = torch.linalg.lstsq(basis, (exact - D[0])[:, None], driver="gelsd").solution
    off = (D[0] + (basis @ best)[:, 0] - exact).std() / sigma
    assert off < 1e-6, "for each value there is a guess and a gate with which D is the mean of what it may have been"


@pytest.mark.network
@pytest.mark.parametrize("mixer, patch", [("attention", 1), ("attention", 2), ("gru", 4)])
def test_gates_are_gain_times_a_plus_b_z(mixer, patch):
    model = Denoiser(tiny(temporal=mixer, patch=patch, dim_mults=(1,)))
    assert not model.head[-1].bias.any() and not model.head[-1].weight.any(), "a and b are 0 at first, so the loss is 1"
    x, sigma = torch.randn(1, 5, 3, 8, 8), torch.tensor([[0.003, 0.02, 0.2, 0.6, 20.0]])
    none, both = denoised(model, x, sigma, [0, 1]).view(2, *x.shape)
    c_skip, c_out, c_in, _ = (df.per_frame(c) for c in df.edm_scalings(sigma, 0.3))
    mean = torch.tensor(model.config.data_mean)[:, None, None]
    assert torch.allclose(none, mean + c_skip * (x - mean), atol=1e-5), "a = b = 0: D = mu + c_skip (x - mu)"
    gain = df.per_frame(torch.tensor([[25, 15, 1.5, 1, 1]]))  # sigma_data / sigma, and its bounds
    F_is, F_should = (both - none) / c_out, gain * (1 + c_in * (x - mean))
    for t, level in enumerate(sigma[0].tolist()):
        assert torch.allclose(F_is[:, t], F_should[:, t], rtol=1e-3, atol=1e-3), \
            f"sigma {level}: EDM's network is gain (a + b z), z is its input, gain = sigma_data / sigma in 1 to 25"
    plain = Denoiser(tiny(temporal=mixer, patch=patch, dim_mults=(1,), gates=False))
    none, both = denoised(plain, x, sigma, [0, 1]).view(2, *x.shape)
    assert torch.allclose((both - none) / c_out, torch.ones(1), atol=1e-3), "gates=False: what the head says, no more"


@pytest.mark.network
@pytest.mark.parametrize("gates", [True, False])
def test_the_head_is_not_rounded_to_bfloat16(gates, monkeypatch):
    model, x, sigma = random_denoiser(gates=gates), torch.randn(1, 2, 3, 8, 8), torch.tensor([[0.02, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model(x, sigma)
    told, head = [], model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda h: told.append(h) or head(h))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, sigma)
    monkeypatch.setattr(model.head, "forward", lambda h: head(told[0].float()))  # features as before
    whole, _ = model(x, sigma)
    assert rounded.dtype == torch.float32 and (whole - rounded).abs().max() < 1e-4, \
        "a network in bfloat16 still has a head in float32: gain multiplies rounding errors"


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


@pytest.mark.streaming
@pytest.mark.parametrize("temporal", MIXERS)
def test_when_no_frame_enters_the_state_of_a_mixer_it_stays_as_it_was(temporal):
    m, x = mixer(temporal), torch.randn(2, 3, 16)
    _, old = mix(m, x)
    _, new = mix(m, x, old, commit=0)
    assert all(map(torch.equal, flat([new]), flat([old]))), "commit=0: the old state"
    assert mix(m, x, None, commit=0)[1] is None, "commit=0: still none"


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
    """Pair i of channels turns by pi/2 1000^(-i / (d/2)) a frame, either way; a pair is (i, i + d/2) or neighbours."""
    m, x, expected = mixer("attention"), torch.randn(1, 4, 16), []
    q, k, v = m.qkv(x).view(1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (1,heads,T,d) each
    for pairs, way in itertools.product((lambda z: z.chunk(2, -1), lambda z: (z[..., ::2], z[..., 1::2])), (1, -1)):
        score = torch.full((1, 2, 4, 4), -math.inf)
        for i, j in itertools.product(range(4), repeat=2):
            if j <= i:
                angle = way * (i - j) * math.pi / 2 * 1000 ** (-torch.arange(4) / 4)
                a, b, c, d = *pairs(q[:, :, i]), *pairs(k[:, :, j])
                score[:, :, i, j] = ((a * c + b * d) * angle.cos() + (a * d - b * c) * angle.sin()).sum(-1) / 8**0.5
        y = score.softmax(-1) @ v
        expected.append(m.out(y.transpose(1, 2).reshape(1, 4, 16)))
    assert any(torch.allclose(mix(m, x)[0], each, atol=1e-5) for each in expected), \
        "softmax(q k / sqrt(d)) v, with q and k turned"


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
    assert max(sizes, default=0) <= 65_535, "CUDA's kernels take at most 65,535 sequences a call"
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
@pytest.mark.parametrize("version", [None, 1, 2, 4])
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
    model, path = random_denoiser(), tmp_path / "m.pt"
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


@pytest.mark.checkpoint
def test_two_runs_that_save_to_one_path_do_not_share_a_file(tmp_path, monkeypatch):
    with df.atomic_write(tmp_path / "m.pt") as first:
        monkeypatch.setattr(os, "getpid", lambda: 7)  # another process
        with df.atomic_write(tmp_path / "m.pt") as second:
            second.write_bytes(b"second")
        first.write_bytes(b"first")
    assert first != second and (tmp_path / "m.pt").read_bytes() == b"first", "the last one to finish wins, and is whole"


@pytest.mark.network
@pytest.mark.parametrize("temporal", MIXERS)
@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_all_weights_have_a_gradient_of_the_loss(temporal, forcing):
    model = random_denoiser(temporal=temporal, forcing=forcing, action_dim=2).train()
    df.diffusion_forcing_loss(model, torch.randn(2, 4, 3, 8, 8), model.config, actions=torch.randn(2, 4, 2)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, "something is not used, or detached"


@pytest.mark.network
def test_attention_goes_through_the_kernel_in_parts(monkeypatch):
    sizes, real, m, x = [], F.scaled_dot_product_attention, mixer("attention"), torch.randn(5, 2, 16)
    whole = mix(m, x)[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **o: sizes.append(len(q)) or real(q, *a, **o))
    monkeypatch.setattr(df, "MOST", 2)
    assert torch.allclose(mix(m, x)[0], whole, atol=1e-6) and sizes == [2, 2, 1]


@pytest.mark.checkpoint
def test_every_checkpoint_was_trained_with_this_rotation():
    m, x, angle = mixer("attention"), torch.randn(1, 1, 2, 8), math.pi / 2 * 1000 ** (-torch.arange(4) / 4)
    (a, b), turned = x[0, 0, 1].chunk(2), df.rotary(x, *m.pattern(2, None, False, x.device)[1:])[0, 0, 1]
    expected = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
    assert torch.allclose(turned, expected, atol=1e-6), "channels i and i + d/2 are a pair, and turn from i to i + d/2"


@pytest.mark.checkpoint
def test_the_loops_in_readme_train_and_sample():
    code = (HERE / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    for long, short in (("range(1000)", "range(3)"), ("num_frames=100", "num_frames=3"),
                        ("    ...", "    shapes.append(frame.shape)")):
        assert code.count(long) == 1, "shortened for this test"
        code = code.replace(long, short)
    names = dict(shapes=[])
    exec(code, names)
    assert names["shapes"] == [(1, 3, 32, 32)] * 3, "frames, one by one"
    assert names["model"].head[-1].weight.any() and not names["model"].training, "it was trained, and then it sampled"


# ---- sample.py from the outside ------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """sample.py in this process (starting one takes seconds), in a folder of checkpoints and clips -> what it said."""
    monkeypatch.chdir(tmp_path)
    models = dict(model={}, acts=dict(action_dim=2), three=dict(action_dim=3), both=dict(causal=False, window=4),
                  strided=dict(action_dim=2, stride=2), teach=dict(forcing="teacher"),
                  whole=dict(forcing="full_sequence", temporal="gru"))
    for name, options in models.items():
        model = df.Denoiser(df.Config(height=8, width=8, dim=8, head_dim=8, clip_frames=4, **options))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)  # a layer of zeros would hide all others
        df.save_checkpoint(f"{name}.pt", model.config, model.state_dict(), step=9)  # with extras, as model.resume.pt
    np.save("a.npy", np.tile(np.arange(0, 80, 10, dtype=np.uint8)[:, None, None, None], (1, 8, 8, 3)))
    np.save("b.npy", np.full((8, 8, 8, 3), 250, np.uint8))
    np.save("b.actions.npy", np.arange(6.0).reshape(3, 2))

    def command(words, code=0):
        status = 0
        try:
            sample.main(["--device", "cpu", *words.split()])
        except SystemExit as end:
            status = end.code
        said = "".join(capsys.readouterr())
        assert status == code, f"sample.py {words}: exit status {status}\n{said}"
        return said
    return command


@pytest.fixture
def told(monkeypatch):
    """What `rollout`, which makes no frames here, and `sample`, which makes all, were told: call by call."""
    def call(name, model, K, *rest, **options):
        calls.append(options | dict(name=name, K=K, rest=rest, noise=model.config.context_noise))
        return df.sample(model, K, *rest, **options) if name == "sample" else iter(())

    calls = []
    monkeypatch.setattr(sample, "rollout", lambda *args, **options: call("rollout", *args, **options))
    monkeypatch.setattr(sample, "sample", lambda *args, **options: call("sample", *args, **options))
    return calls


@pytest.mark.cli
@pytest.mark.parametrize("words,K,period,frames", [
    ("", ("pyramid", 1, 8), 2, 256),
    ("--ckpt teach.pt", ("autoregressive", 1, 8), None, 256),
    ("--ckpt whole.pt", ("full_sequence", 4, 8), None, 4),
    ("--ckpt both.pt", ("full_sequence", 4, 8), None, None),
    ("--uncertainty 2.5 --steps 3 --frames 9", ("pyramid", 1, 3), 2.5, 9),
    ("--schedule full_sequence", ("full_sequence", 4, 8), None, 256),
    ("--ckpt both.pt --schedule trapezoid --uncertainty 3 --frames 3 --steps 2", ("trapezoid", 3, 2, 3), None, None)])
def test_every_option_reaches_the_rollout_and_suits_the_model(command, told, words, K, period, frames):
    for more, *expected in (("", 1, "multistep", 0, 0.05),
                            ("--solver euler --seed 7 --context-noise 0.2 --batch 3", 3, "euler", 7, 0.2)):
        command(f"{words} {more} --out o.npy")
        *first, call = told
        told.clear()
        assert len(first) == (K[1] == 1), "one frame after the other, and no context: the first frame is made before"
        assert call["name"] == "sample" if "both" in words else call["rest"][0] == frames, "bidirectional: no rollout"
        assert torch.equal(call["K"], df.scheduling_matrix(*K)) and call.get("period") == period
        assert [call["batch_size"], call["solver"], call["generator"].initial_seed(), call["noise"]] == expected


@pytest.mark.cli
def test_a_first_frame_from_nothing_takes_four_times_the_steps(command, told):
    command("--ckpt strided.pt --steps 2 --frames 5 --batch 2 --actions b.actions.npy --out o.npy")
    first, then = told
    assert torch.equal(first["K"], df.scheduling_matrix("autoregressive", 1, 8)), "no history says where things are"
    assert torch.equal(then["K"], df.scheduling_matrix("pyramid", 1, 2)) and then["rest"][1].shape[:2] == (2, 1)
    assert first["actions"].tolist() == [[[0, 1]], [[0, 1]]], "the action that leads to it"
    assert then["actions"][1, :, 0].tolist() == [0, 3, 0, 3, 0], "means over the stride, repeated at the end"


@pytest.mark.cli
def test_every_clip_has_its_frames_and_its_actions(command, told):
    command("--ckpt acts.pt --context a.npy b.npy --frames 5 --batch 2 --out o.npy")
    assert sample.to_bytes(told[-1]["rest"][1])[:, 3, 0, 0, 0].tolist() == [30, 30, 250, 250], "4 frames; 2 of each"
    assert not told[-1]["actions"][:2].any(), "a clip without a side file: zeros, which is not the same as unknown"
    assert told[-1]["actions"][2:, :, 0].tolist() == [[0, 2, 4, 0, 2]] * 2, "actions that end are repeated"
    command("--ckpt acts.pt --actions b.actions.npy --context a.npy --frames 5 --out o.npy")
    assert told[-1]["actions"][0, :, 1].tolist() == [1, 3, 5, 1, 3], "--actions takes the place of a side file"
    command("--ckpt acts.pt --actions unknown --context b.npy --out o.npy")
    assert told[-1]["actions"] is None, "unknown: the model imagines them"
    np.save("a.actions.npy", np.arange(16.0).reshape(8, 2))
    command("--ckpt strided.pt --context a.npy --context-frames 2 --frames 4 --out o.npy")
    assert sample.to_bytes(told[-1]["rest"][1])[0, :, 0, 0, 0].tolist() == [0, 20], "stride 2: every other frame"
    assert told[-1]["actions"][0, :, 0].tolist() == [0, 3, 7, 11], "the means of what leads to a frame"


@pytest.mark.cli
def test_what_is_written_is_the_rollout_of_the_library(command):
    said = command("--ckpt acts.pt --frames 7 --context b.npy --context-frames 2 --batch 2 --steps 2 --out o.npy")
    assert "7/7" in said and "frames/s" in said and "<00:00" in said, "a progress bar with its speed and the time left"
    model, seed = df.load_checkpoint("acts.pt")[0], torch.Generator().manual_seed(0)
    context, actions = torch.full((2, 2, 3, 8, 8), 250 / 127.5 - 1), torch.arange(6.0).view(3, 2).repeat(2, 3, 1)
    K = df.scheduling_matrix("pyramid", 1, 2)
    clips = torch.stack(list(df.rollout(model, K, 7, context, period=2, actions=actions, generator=seed)), 1)
    assert [np.load(f"o_{i}.npy").tolist() for i in (0, 1)] == sample.to_bytes(clips).tolist(), "a file for each"
    command("--frames 3 --steps 1 --fps 5 --out o.mp4")
    assert iio.immeta("o.mp4", plugin="FFMPEG")["fps"] == 5, "--fps"
    for words in ("--keyframes 0 3", "--keyframes 3 --context-frames 1"):  # what is between these is filled in
        command(f"--ckpt both.pt --context a.npy --steps 2 --out o.npy {words}")
        assert (np.load("o.npy") == np.load("a.npy")[:4]).all((1, 2, 3)).tolist() == [True, False, False, True], words
    said = command("--show-schedule --ckpt none.pt --frames 3 --uncertainty 0.5 --steps 2")
    assert said.splitlines() == ["2 2 2", "1 1 2", "0 0 1", "0 0 0"], "the matrix, and no rollout"


@pytest.mark.cli
def test_a_stopped_rollout_is_whole_and_threads_are_as_before(command, monkeypatch):
    def frames(*_, **options):
        threads.append(torch.get_num_threads())
        yield from torch.zeros(3, 1, 3, 8, 8)
        raise ends.pop(0)

    threads, ends = [], [KeyboardInterrupt, ValueError]
    monkeypatch.setattr(sample, "rollout", frames)
    torch.set_num_threads(2)
    line = command("--context b.npy --out o.npy", code=2).splitlines()[-1]  # a model without actions needs no side file
    assert "3 frames" in line and "o.npy" in line and len(np.load("o.npy")) == 3, line
    assert (threads, torch.get_num_threads()) == ([1], 2), "a small model on a CPU: one thread, while it rolls"
    torch.set_num_threads(1)
    with pytest.raises(ValueError):  # once it rolls, this is no mistake of the user
        command("--context a.npy --out o.npy")


@pytest.mark.cli
def test_only_what_a_user_can_mend_is_told_in_one_line(capsys):
    for bug, kinds in ((ValueError("ours"), []), (RuntimeError("ours"), [ValueError])):
        with pytest.raises(type(bug)), sample.mistakes(*kinds):
            raise bug
    for error, said in ((ValueError("bad\nand more"), "bad"), (FileNotFoundError(2, "No", "a.mp4"), "a.mp4"),
                        (RuntimeError("CUDA out of memory. Tried"), "--batch"), (KeyboardInterrupt(), "stopped"),
                        (MemoryError(), "--batch"), (RuntimeError("[...] can't allocate memory"), "--batch")):
        with pytest.raises(SystemExit) as end, sample.mistakes(ValueError):
            raise error
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and said in lines[0], lines


@pytest.mark.cli
def test_a_users_mistake_is_one_line_and_status_two(command, tmp_path):
    os.symlink("a.npy", "link_0.npy")
    os.link("model.pt", "hard.npy")
    os.mkdir("full.mp4")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for words in ("--frames 0, --frames 2.5, --batch 0, --steps x, --fps nan, --fps inf, --uncertainty 1e-999, "
                  "--schedule no, --context-noise -1, --device no, --device meta, --ckpt no.pt, --ckpt b.npy, "
                  "--ckpt full.mp4, --context no.mp4, --context a.npy --context-frames 9, --context-frames 2, "
                  "--keyframes 1, --frames 4 --context a.npy, --frames 5 --ckpt both.pt, "
                  "--keyframes 1 --context a.npy, --keyframes -1 --ckpt both.pt --context a.npy, --schedule trapezoid, "
                  "--actions no.npy, --actions b.actions.npy, --actions b.actions.npy --ckpt three.pt, --out a.xyz, "
                  "--out no/a.mp4, --out full.mp4, --out hard.npy, --out b.actions.npy --context b.npy, "
                  "--out b.actions.npy --actions b.actions.npy --ckpt acts.pt, --out link_0.npy --context a.npy, "
                  "--out a.npy --context link_0.npy, --out link.npy --batch 2 --context ./a.npy").split(", "):
        option, value = words.split()[:2]
        *usage, line = command(words, code=2).splitlines()
        said = usage[0].startswith("usage:") if usage else line.startswith("error:")
        assert said and (option in line or value in line), f"{words}: one line that names it, and no traceback:\n{line}"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before, "nothing is written before that"


# ---- train.py from the outside -------------------------------------------------------------------------------------


CTRL_C, PREVIEW, SMALL = signal.SIGINT, train.preview, "--size 16 --clip-frames 4 --device cpu"
TINY = dict(dim=16, dim_mults=(1,), save_minutes=0)
STOPPED = "stopped and saved at step {}; the same command with --resume goes on"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(words) -> what train.py WORDS wrote. at: {step of this process: what happens then, and may scale the loss}"""
    def call(words="", at={}, code=0, preview=lambda *_: None, **preset):
        steps, forward, status = iter(range(1, 999)), train.Objective.forward, 0
        handlers = {n: signal.signal(n, signal.default_int_handler) for n in (CTRL_C, signal.SIGTERM, signal.SIGHUP)}
        with monkeypatch.context() as m:
            m.chdir(tmp_path)
            m.setattr(sys, "argv", ["train.py", *f"{SMALL} {words}".split()])
            m.setitem(train.PRESETS, "small", train.PRESETS["small"] | TINY | preset)
            m.setattr(train, "preview", preview)
            m.setattr(train, "THREADS", 1)
            m.setattr(train.Objective, "forward", lambda *x: forward(*x) * (at.get(next(steps), int)() or 1.0))
            try:
                with train.mistakes(FloatingPointError):
                    train.main()
            except SystemExit as end:
                status = end.code
        list(map(signal.signal, handlers, handlers.values()))
        said = "".join(capsys.readouterr())
        assert status == code, f"{words}: {status}\n{said}"
        return said
    return call


def saved(folder, name="model"):
    both = [torch.load(folder / f"{name}{end}.pt", weights_only=True) for end in (".resume", "")]
    return both[0]["training"] | dict(average=both[0]["weights"], shipped=both[1]["weights"])


def make_clips(folder, count=10):
    folder.mkdir()
    for i in range(count):
        np.save(folder / f"{i}.npy", np.full((40, 16, 16, 3), 25 * i + 5, np.uint8))
        np.save(folder / f"{i}.actions.npy", np.full((40, 1), 7.0))


@pytest.mark.cli
@pytest.mark.parametrize("causal,seen", [(True, [0, 1]), (False, [0, 1, 3, 4])])
def test_expected_loss_knows_the_frames_own_sigma_and_those_around_it(causal, seen):
    config = df.Config(sigma_data=0.3, causal=causal)
    model, (own, others) = train.ExpectedLoss(config, past=2), (torch.rand(2, 1, 6) + 0.1).requires_grad_()
    assert not model(own, others).any() and train.ExpectedLoss(config).past == 4, "it begins with 0: the plain loss"
    torch.nn.init.normal_(model.layers[-1].weight)
    knows = torch.autograd.grad(model(own, others)[0, 2], (own, others))
    assert [g[0].nonzero().flatten().tolist() for g in knows] == [[2], seen], "its own sigma, and those around it"
    padded = torch.nn.functional.pad(own, (2, 2), value=config.in_frame_units(config.sigma_max))
    assert torch.allclose(model(own, own), model(padded, padded)[:, 2:-2], atol=1e-4), "beyond the clip: pure noise"
    assert torch.autocast("cpu", torch.bfloat16)(model)(own, own).dtype == torch.float32, "bfloat16: wrong by percents"


USUAL = dict(height=32, width=32, clip_frames=16, window=16, stride=1, temporal="gru", causal=True, P_mean=-0.6,
             P_std=2.4, context_noise=0.05, dim=32, dim_mults=(1, 2), preset="small", batch=2, steps=math.inf, lr=0.003,
             minutes=8, fast=False, save_minutes=2, seed=0, forcing="diffusion", action_dim=2)
BIG = dict(height=64, width=64, dim=128, dim_mults=(1, 2, 3, 4), preset="base", batch=32, lr=0.0003, save_minutes=10,
           temporal="attention")


@pytest.mark.cli
@pytest.mark.parametrize("words,card,new", [
    ("", None, {}), ("", (8, 0), {}), ("--data clips", None, {}), ("--data clips", (7, 5), {}),
    ("--data clips", (8, 0), BIG | dict(minutes=240, fast=True)), ("--size 16", None, dict(width=16, height=16)),
    ("--preset base --minutes 2", (7, 5), BIG | dict(minutes=2)), ("--forcing teacher", None, dict(P_std=1.6)),
    ("--steps 9 --seed 3 --batch 7 --lr 1 --no-push", None, dict(steps=9, minutes=math.inf, seed=3, batch=7, lr=1)),
    ("--window 3 --context-noise 0.2 --temporal attention", None,
     dict(window=3, context_noise=0.2, temporal="attention")), ("--preset base --temporal gru", None, BIG | dict(
         temporal="gru", minutes=240)),
    ("--data clips --size 8 24 --stride 2 --clip-frames 4 --steps 1 --minutes 3", None,
     dict(height=8, width=24, stride=2, clip_frames=4, window=4, minutes=3, steps=1)),
    ("--forcing full_sequence", None, dict(P_mean=0.4, P_std=1.6, causal=False, temporal="attention")),
    ("--forcing full_sequence --temporal gru", None, dict(P_mean=0.4, P_std=1.6, temporal="gru")),
    ("--device mps", None, dict(device="mps", temporal="attention")),
    ("--bidirectional", None, dict(P_mean=0.6, P_std=2.0, causal=False, temporal="attention"))])
def test_words_become_settings_and_a_config(tmp_path, monkeypatch, words, card, new):
    make_clips(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "working_device", lambda name: name if name == "mps" else "cuda" if card else "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(sys, "argv", ["train.py", "--cache", "cache", *words.split()])
    s = train.parse_args()[0]
    got = vars(s) | vars(train.new_model(s, train.load_data(s)).config)
    assert got == got | USUAL | dict(forcing=s.forcing, action_dim=2 - bool(s.data) - 2 * s.no_push) | new


@pytest.mark.cli
def test_a_device_is_used_only_if_it_is_there_and_mps_only_if_asked_for(monkeypatch):
    there = ["cuda", "mps", "cpu"]
    monkeypatch.setattr(sample.torch, "zeros", lambda *_, device: torch.ones(1) if device in there
                        else torch.ones(1, device="nonsense"))
    assert [sample.working_device(name) for name in ("auto", "mps", "cuda")] == ["cuda", "mps", "cuda"]
    there.remove("cuda")
    assert sample.working_device("auto") == "cpu", "on MPS, PyTorch's GRU is slow or wrong"
    with pytest.raises(ValueError):
        sample.working_device("cuda")


@pytest.mark.cli
@pytest.mark.parametrize("words,named", [
    *((f"--{name} {value}", name) for name in ("minutes", "lr", "context-noise") for value in (0, "nan", -1, "inf")),
    ("--seed -1", "--seed"), ("--size 16 16 16", "--size"), ("--size 16 20", "--size"), ("--stride 2", "--stride"),
    ("--size 15 --data .", "15x15"), ("--data none", "none"), ("--out m.txt", "--out"), ("--out none/m.pt", "none"),
    ("--out .", "--out"), ("--out old.pt", "old.pt"), ("--out lost.pt", "lost.resume.pt"), ("--batch 0", "--batch"),
    ("--resume --out old.pt", "old.resume.pt"), ("--resume --out lost.pt", "lost.resume.pt"), ("--resume", "resume.pt"),
    ("--data grey --cache c", "grey"), ("--bidirectional --temporal gru", "--b"), (f"--out {'x' * 250}.pt", "x" * 250)])
def test_a_mistake_is_one_line_and_status_two(tmp_path, run, words, named):
    for name in ("old.pt", "old.resume.pt"):  # without what --resume needs
        df.save_checkpoint(tmp_path / name, df.Config(), df.Denoiser(df.Config()).state_dict())
    torch.save(dict(config={}, weights={}, step=3), tmp_path / "lost.resume.pt")  # of the version before
    make_clips(tmp_path / "grey", 1)
    before, said = {*os.listdir(tmp_path), "c"}, run(words, code=2)
    assert named in said.strip().splitlines()[-1] and said.count("error: ") == 1 and "Traceback" not in said, said
    assert {*os.listdir(tmp_path), "c"} == before, "something was written"


@pytest.mark.cli
def test_a_batch_depends_on_seed_step_and_rank_and_64_clips_are_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no model.pt is
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu"])
    s, data, rng = train.parse_args()[0], train.Balls(16), np.random.default_rng(0)
    draw = lambda step, seed=0, n=2, **options: train.draw(data, Namespace(seed=seed), n, 4, step, **options)
    drawn = [draw(5), draw(5), draw(6), draw(5, rank=1), draw(0, seed=5), draw(0), draw(train.MEASURE)]
    assert len({clips.tobytes() for clips, *_ in drawn}) == len({seed for *_, seed in drawn}) == 6, "only 5 is 5"
    assert train.to_device(drawn[0], s)[2].initial_seed() == drawn[0][2], "and so is the noise"
    withheld = [np.isnan(draw(step, n=999)[1]).all((1, 2)).mean() for step in (3, train.MEASURE, train.VALIDATE)]
    assert withheld == [pytest.approx(0.1, abs=0.03), 0, 0], "one clip of ten, in training"
    clips, a = (rng.random((64, 4, 8, 8, 3)) * [20, 80, 200]).astype(np.uint8), rng.random((64, 4, 3)) * [25, 0, 1e25]
    data = Namespace(action_dim=3, batch=lambda rng, n, *_: (clips[:n], a[:n].astype(np.float32)))
    a[:9] = np.nan
    config, x = train.new_model(s, data).config, clips / 127.5 - 1
    mean, rms = x.mean((0, 1, 2, 3)), np.sqrt((a[9:] ** 2).mean((0, 1)))
    assert [*config.data_mean, config.sigma_data] == pytest.approx([*mean, (x - mean).std()], rel=1e-4)
    assert config.action_scale == pytest.approx([rms[0], 1, rms[2]]), "of those that are known; 0 becomes 1"
    a[:] = np.nan
    assert train.new_model(s, data).config.action_scale == (1, 1, 1)


@pytest.mark.cli
def test_two_processes_do_what_this_slow_loop_does(tmp_path, monkeypatch):
    preset, losses = TINY | dict(warmup=4, ema=0.65, lr=1e-3), []
    (tmp_path / "run.py").write_text(f"""import train; train.preview, forward = lambda *_: None, train.Objective.forward
train.PRESETS["small"] |= {preset}; train.Objective.forward = lambda *x: 40 * forward(*x)  # some gradients are clipped
train.main(); assert not train.dist.is_initialized()""")
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 run.py {SMALL} --steps 20 --batch 4".split()
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(train.__file__))
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("weights") == 1, f"one process speaks for all: {done}"
    monkeypatch.setattr(sys, "argv", f"train.py {SMALL} --overwrite --out {tmp_path / 'model.pt'}".split())
    s, data = Namespace(**vars(train.parse_args()[0]) | preset), train.Balls(16)
    objective = train.Objective(train.new_model(s, data))
    weights, average = list(objective.parameters()), {k: w.clone() for k, w in objective.model.state_dict().items()}
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99))
    for i in range(20):
        batches = [train.to_device(train.draw(data, s, 2, 4, i, rank=rank), s) for rank in (0, 1)]
        if i % 4 == 0:  # the first of four frames, by itself
            batches = [(x[:, :1], a[:, :1], noise) for x, a, noise in batches]
        losses.append(20 * sum(objective(*batch) for batch in batches))  # the mean of two, times 40
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (i + 1) / 4) * min(1, 2 * (1 - i / 20))
        optimizer.step()
        keep = min(0.65, (i + 1) / (i + 10))
        average = {k: torch.lerp(average[k], w, 1 - keep) for k, w in objective.model.state_dict().items()}
    got = saved(tmp_path)
    for a, b in ((average, got["average"]), (average, got["shipped"]), (objective.state_dict(), got["objective"])):
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    row = np.loadtxt(tmp_path / "model.csv", delimiter=",", skiprows=1)
    assert row[:3] == pytest.approx([20, sum(losses).item() / 20, 1e-4], rel=1e-3), "mean loss, last learning rate"


@pytest.mark.cli
@pytest.mark.parametrize("words,single", [("", [(4, 1)]), ("--bidirectional", [(2, 5)])])
def test_one_batch_of_four_has_single_frames_as_the_first_frame_has_no_past(run, monkeypatch, words, single):
    seen, forward = [], train.Objective.forward
    monkeypatch.setattr(train.Objective, "forward", lambda *a: seen.append((*a[1].shape[:2],)) or forward(*a))
    run(f"--steps 5 --clip-frames 5 {words}")
    assert seen == single + [(2, 5)] * 3 + single, "each fourth frame of two clips; who looks ahead needs them whole"


@pytest.mark.cli
def test_a_run_that_was_stopped_and_killed_gives_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch, run):
    run("--steps 62 --out whole.pt")
    run("--steps 62", at={9: lambda: signal.raise_signal(CTRL_C)}, code=STOPPED.format(9))
    with monkeypatch.context() as m:  # killed at step 20, between the two files
        m.setattr(df.os, "replace", lambda a, b: sys.exit("killed") if str(b) == "model.pt" else os.rename(a, b))
        run("--resume", code="killed")
    run("--resume --size 16 --seed 0 --temporal gru")  # as it was
    a, b = saved(tmp_path, "whole"), saved(tmp_path)
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("objective", "average", "shipped") for k in a[part])
    logs = [{row.split(",")[0]: row.split(",")[:3] for row in got["log"].splitlines()} for got in (a, b)]
    assert [*logs[1]] == ["step", "9", "20", "40", "60", "62"] and logs[0]["40"] == logs[1]["40"]
    for words in ("--window 3", "--temporal attention", "--size 32", "--clip-frames 5", "--batch 3", "--seed 1",
                  "--no-push"):
        assert words.split()[0] in run(f"--resume {words}", code=2), "say what cannot change"
    run("--resume --steps 63 --minutes 9 --lr 1e-5 --cache x")
    assert saved(tmp_path)["step"] == 63 and not [*tmp_path.glob("*tmp*")]


@pytest.mark.cli
def test_whoever_ends_a_run_ends_it_after_saving_and_what_was_saved_stays(tmp_path, monkeypatch, run):
    signals = lambda *numbers: lambda *_: [signal.raise_signal(number) for number in numbers] and None
    save, step = train.save_checkpoint, lambda: saved(tmp_path)["step"]
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda *_: os.stat(""))  # an OSError, as when `| tee` has ended
    monkeypatch.setattr(df.Path, "write_text", lambda *_: os.stat(""))  # model.csv is open in another program
    for i, numbers in enumerate([(CTRL_C,), (signal.SIGTERM,), (signal.SIGHUP, signal.SIGHUP)], 2):
        run("--overwrite --steps 40", at={i: signals(*numbers)}, code=STOPPED.format(i))
        assert step() == i
    assert "error: the loss is nan" in run("--resume --steps 40", at={18: lambda: math.nan}, code=2) and step() == 20
    assert all(weight.isfinite().all() for weight in saved(tmp_path)["objective"].values())
    assert "--batch, --size, --clip-frames or --preset" in run("--resume", at={3: lambda: torch.empty(2**60)}, code=2)
    monkeypatch.setattr(train, "save_checkpoint", lambda *a, **o: signal.raise_signal(CTRL_C) or save(*a, **o))
    run("--resume --steps 40", at={5: signals(CTRL_C)}, code=STOPPED.format(25))  # and again while saving
    assert "stopped" in run("--resume --steps 40", at={3: signals(CTRL_C, CTRL_C)}, code=2) and step() == 25, "at once"
    assert "stopped" in run("--resume --steps 26", preview=signals(signal.SIGTERM), code=2) and step() == 26
    monkeypatch.setattr(df.Path, "write_bytes", lambda path, _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert "No space left" in run("--resume --steps 40", code=2) and step() == 26, "a full disk"


@pytest.mark.cli
def test_time_is_told_in_minutes_and_goes_on_after_resume(tmp_path, monkeypatch, run):
    clock, told = [0.0], []
    tick = lambda seconds=6: clock.append(clock[-1] + seconds)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[-1])
    show = lambda path, model, data, s, frames: told.append((path.name, frames)) or tick(100)
    with monkeypatch.context() as m:
        m.setattr(train, "choose_threads", lambda *_: told.append("threads"))
        run("--minutes 5.8", at=dict.fromkeys(range(99), tick), preview=show, save_minutes=3)
    assert told == ["threads", ("model.preview.mp4", 8), "threads", ("model.rollout.mp4", 256)], "3 minutes; the end"
    rows = np.loadtxt(tmp_path / "model.csv", delimiter=",", skiprows=1)[:, [0, 6]]  # frames/s without the preview
    assert rows.tolist() == [pytest.approx([step, 8 / 6], rel=1e-3) for step in (20, 40, 42)], "42 steps of six seconds"
    run("--resume --minutes 6", at=dict.fromkeys(range(99), tick))
    assert saved(tmp_path)["step"] == 44


@pytest.mark.cli
@pytest.mark.parametrize("fast", [1, 4])
def test_one_thread_or_all_of_them_whichever_is_faster(monkeypatch, fast):
    threads, objective = [], train.Objective(random_denoiser(height=16, width=16, action_dim=2))
    monkeypatch.setattr(train, "THREADS", 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(train, "timeit", lambda step, number: step() or 2 + (threads[-1] != fast))
    s = Namespace(batch=2, clip_frames=4, size=[16, 16], seed=0, device="cpu", steps=math.inf)
    for change in (dict(steps=9), dict(clip_frames=999)):
        train.choose_threads(objective, Balls(16), Namespace(**vars(s) | change))
        assert not threads, "a run of so many steps can be repeated exactly; many pixels gain by threads"
    train.choose_threads(objective, Balls(16), s)
    assert {*threads} == {1, 4} and threads[-1] == fast and all(w.grad is None for w in objective.parameters())


@pytest.mark.cli
def test_previews_and_losses_are_of_the_average_and_of_held_out_clips(tmp_path, monkeypatch, run):
    def generate(model, num_frames, context, actions, **_):
        told.append((model.training, num_frames, 0 if context is None else context.shape[1], threads[-1]))
        assert (actions == 7).all() and (context is None or (train.to_bytes(context) == grey).all())
        return iter([-torch.ones(4, 3, 16, 16)] * num_frames)

    make_clips(tmp_path / "clips")
    data = train.Clips(tmp_path / "clips", 16, 16, 4, cache=tmp_path / "c")
    told, frames, wanted, threads = [], [], [], [7]
    grey = data.batch(np.random.default_rng(0), 1, 4, held=True)[0].max()
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "video_writer", lambda path, h, w: train.contextlib.nullcontext(frames.append))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for words, shown in (("1", (256, 4)), ("1 --forcing full_sequence", (4, 0)), ("500 --bidirectional", (4, 3))):
        run(f"--overwrite --data clips --cache c --batch 1 --steps {words}", preview=PREVIEW, save_minutes=9)
        assert told.pop() == (False, *shown, 1) and threads[-1] == 7, "one thread, and then as before"
        assert abs(frames[-1][:16] - float(grey)).max() < 2 and not frames[-1][16:].any(), "real above, rolled below"
    (model, _), s = df.load_checkpoint(tmp_path / "model.pt"), Namespace(seed=0, device="cpu")
    for ln_sigma in (0.6 - 2, 0.6, 0.6 + 2):  # P_mean and P_std are 0.6 and 2
        x, a, noise = train.to_device(train.draw(data, s, 16, 4, train.VALIDATE, held=True), s)
        sigma = torch.full((16, 4), model.config.in_frame_units(math.exp(ln_sigma)))
        wanted += [df.diffusion_forcing_loss(model, x, model.config, sigma=sigma, actions=a, generator=noise).item()]
    rows = np.loadtxt(tmp_path / "model.csv", delimiter=",", skiprows=1)[:, 3:6]
    assert rows[-1] == pytest.approx(wanted, rel=1e-4) and np.isnan(rows[:-1]).all(), "every 500 steps"


@pytest.mark.cli
def test_a_gradient_that_is_no_number_is_seen_before_it_is_saved(tmp_path, run, monkeypatch):
    run("--steps 20")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    assert "--lr" in run("--resume --steps 40", code=2) and saved(tmp_path)["step"] == 20, "the last good state stays"


@pytest.mark.cli
def test_processes_share_a_batch_evenly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "WORLD", 3)
    for number in (6, 4):
        monkeypatch.setattr(sys, "argv", f"train.py --device cpu --batch {number}".split())
        with pytest.raises(ValueError, match="--batch 4") if number == 4 else nullcontext():
            assert train.parse_args()[0].batch == 6, "two clips for each of three processes"


@pytest.mark.cli
def test_expected_loss_learns_what_loss_a_frame_and_its_past_let_expect():
    config = tiny()
    torch.manual_seed(0)
    model = train.ExpectedLoss(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):  # a made-up loss: 4 with noise in the frame before, 0.01 without
        sigma = torch.where(torch.rand(64, 4) < 0.5, 0.01, 10.0)
        loss = torch.where(F.pad(sigma, (1, 0), value=config.sigma_max)[:, :-1] > 1, 4.0, 0.01) * torch.rand(64, 4) * 2
        log_expected = model(sigma, sigma)
        (loss / log_expected.exp() + log_expected).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sigma = torch.tensor([[0.01, 10.0, 10.0, 0.01]])
    expected = model(sigma, sigma).exp()[0].tolist()
    assert expected == pytest.approx([4, 0.01, 4, 4], rel=0.3), "the mean loss; before frame 0 there is only noise"


@pytest.mark.cli
def test_a_clip_of_any_name_is_told_and_an_emptied_cache_is_one_line(tmp_path, run):
    make_clips(tmp_path / "clips")
    (tmp_path / "clips" / os.fsdecode(b"odd\xff.mp4")).write_bytes(b"no video")  # no terminal can print this
    empty = lambda: [file.unlink() for file in (tmp_path / "c").glob("*.npy")] and None
    said = run("--data clips --cache c --steps 40", at={3: empty}, code=2)
    assert "skipped" in said and "odd" in said, "a clip that is skipped is told, whatever its name"
    assert said.count("error: ") == 1 and ".npy" in said, "one line says which file is missing"
