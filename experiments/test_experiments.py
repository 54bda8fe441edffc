"""What is built on top. `pytest -m guidance` runs one part of it; play, compare and exercise are others."""

import ast
import itertools
import json
import math
import os
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import diffusion_forcing as df
import sample
from data.balls import Balls, bouncing_balls
from data.clips import to_frames
from experiments import compare, drift, exercise, graft, guidance, maze, play, record

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


def random_denoiser(**options):
    """A small Denoiser without zero layers: those would hide everything behind them."""
    torch.manual_seed(0)
    model = df.Denoiser(df.Config(height=8, width=8, dim=8, head_dim=8, window=3, sigma_data=0.3, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


class Spy:
    """Looks like a denoiser, and records every call. Its state is the number of frames in it."""

    def __init__(self, **options):
        self.config, self.calls = df.Config(sigma_data=0.3, **options), []

    def __call__(self, x, sigma, state=None, *, actions=None, commit=None):
        self.calls.append(dict(x=x, sigma=sigma, actions=actions, commit=commit))
        return 0.9 * x, (state or 0) + commit


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """A command, called in an empty folder in this process -> what it wrote to both outputs."""
    def call(command, *words, code=0):
        try:
            status = command([*map(str, words), "--device", "cpu"]) or 0
        except SystemExit as end:
            status = end.code
        out = "".join(capsys.readouterr())
        assert status == code, f"{words}: exit status {status}\n{out}"
        return out

    monkeypatch.chdir(tmp_path)
    for name, options in (("model", dict(action_dim=2)), ("still", {}), ("both", dict(causal=False, action_dim=2))):
        model = random_denoiser(**options)
        df.save_checkpoint(f"{name}.pt", model.config, model.state_dict())
    np.save("a.npy", np.full((5, 8, 8, 3), 99, np.uint8))
    np.save("a.actions.npy", np.full((5, 2), 5.0))
    return call


@pytest.mark.checkpoint
def test_the_checkpoint_that_is_shipped_denoises_balls():
    model, _ = df.load_checkpoint(graft.HERE / "experiments" / "balls.pt")
    clips, actions = Balls().batch(np.random.default_rng(0), 2, 8)
    sigma = torch.full((2, 8), 0.3)
    with torch.no_grad():
        loss = float(df.diffusion_forcing_loss(model, to_frames(clips), model.config, sigma=sigma,
                                               actions=torch.from_numpy(actions), generator=seed()))
    assert loss < 0.01, f"a loss of {loss:.4f}, not 0.0035: the network is not the one that balls.pt was trained with"


@pytest.mark.guidance
@pytest.mark.parametrize("temporal", df.MIXERS)
@pytest.mark.parametrize("noise", [1.0, 0.01, None])
def test_a_guided_model_is_two_models_with_two_states(temporal, noise):
    model, pair, states, generator = random_denoiser(temporal=temporal, action_dim=2), None, [None, None], seed()
    weaken = guidance.noisier_history(noise, seed()) if noise else guidance.without_actions
    for T, commit in ((3, 2), (2, 0), (3, None)):  # some frames enter the state, none, all
        x, actions, sigma = torch.randn(2, T, 3, 8, 8), torch.randn(2, T, 2), torch.full((2, T), 0.05)
        n = T if commit is None else commit
        sigma[:, n:] = 0.5
        D, pair = guidance.Guided(model, 2.5, weaken)(x, sigma, pair, actions=actions, commit=commit)
        hazy, label = x.clone(), sigma.clone()
        if noise == 1.0:  # with less than there is, nothing is added
            hazy[:, :n] += math.sqrt(1 - 0.05**2) * torch.randn(2, n, 3, 8, 8, generator=generator)
            label[:, :n] = 1.0
        full, states[0] = model(x, sigma, states[0], actions=actions, commit=commit)
        weak, states[1] = model(hazy, label, states[1], actions=actions if noise else None, commit=commit)
        assert torch.allclose(D, weak + 2.5 * (full - weak), atol=1e-4), f"{T} frames, {commit} enter the state"


@pytest.mark.guidance
def test_the_history_gets_more_noise_once_and_nothing_else_does():
    def go(guided):
        spy, context = Spy(), torch.randn(2, 3, 3, 32, 32, generator=seed(3))
        model = guidance.Guided(spy, 2.0, guidance.noisier_history(0.4, seed(1))) if guided else spy
        list(df.rollout(model, df.scheduling_matrix("pyramid", 1, 4), 7, context, period=2, generator=seed()))
        return spy.calls

    calls, plain, added = go(True), go(False), []
    for full, weak in zip(calls[::2], calls[1::2]):
        n = full["commit"]
        assert all(torch.equal(full[name][:, n:], weak[name][:, n:]) for name in ("x", "sigma")), "history only"
        assert (weak["sigma"][:, :n] == 0.4).all(), "the label is the noise"
        added += (weak["x"] - full["x"])[:, :n].flatten(0, 1).flatten(1)
    std = math.sqrt(0.4**2 - (0.05 * 0.3 / 0.5) ** 2)  # variances add up; context_noise in frame units
    assert [a.std().item() for a in added] == pytest.approx([std] * 12, rel=0.05), "6 frames of 2 clips"
    assert (torch.corrcoef(torch.stack(added)) - torch.eye(12)).abs().max() < 0.1, "each has noise of its own"
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(calls[::2], plain)), "all other noise stays what it was"
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(calls, go(True))), "the same generators, the same noise"


@pytest.mark.guidance
def test_without_a_weight_or_a_scale_guidance_changes_no_bit():
    model, x, sigma = random_denoiser(action_dim=2), torch.randn(2, 3, 3, 8, 8), torch.full((2, 3), 0.5)
    actions, cost = torch.randn(2, 3, 2), lambda D: D.square().sum((1, 2, 3, 4))
    D, _ = model(x, sigma, actions=actions)
    for what, guided in (("a weight of 1", guidance.Guided(model, 1, guidance.without_actions)),
                         ("a scale of 0", maze.guided(model, cost, 0))):
        assert torch.equal(guided(x, sigma, actions=actions)[0], D), f"{what}: D is what the model itself says"


@pytest.mark.guidance
@pytest.mark.parametrize("weight", [0.5, 2])
def test_guidance_by_actions_moves_a_gaussian_by_as_much_as_its_weight(weight):
    """Frames are Normal(a, .3^2) where their action is a, and Normal(0, .3^2) where it is unknown."""
    def model(x, sigma, state=None, *, actions=None, commit=None):
        mean = 0 if actions is None else actions[..., None, None]  # (B,T,1,1,1)
        return mean + df.per_frame(0.09 / (0.09 + sigma**2)) * (x - mean), state

    model.config = df.Config(height=1, width=1, channels=1, patch=1, dim_mults=(1,), action_dim=1)
    guided = guidance.Guided(model, weight, guidance.without_actions)
    actions = torch.tensor([0.7, -0.2, 0.1])
    x = df.sample(guided, df.scheduling_matrix("pyramid", 3, 32, 2), actions=actions.expand(4000, 3)[..., None],
                  batch_size=4000, generator=seed()).flatten(1)  # (B,T)
    assert (x.mean(0) - weight * actions).abs().max() < 0.03, "the mean is weight times that of the actions"
    assert (x.std(0) - 0.3).abs().max() < 0.02, "the deviation stays"


@pytest.mark.guidance
@pytest.mark.parametrize("scale", [0.5, 3])
def test_guidance_by_a_cost_moves_a_gaussian_as_theory_says(scale):
    """Three frames of one pixel are Normal(m, C), and the cost is |D - g|^2 / 2. Along each eigenvector of C, with the
    eigenvalue c, dx / dsigma = (x - D + scale sigma^2 d cost / dx) / sigma can be solved. From much noise down to 0,
    the variance becomes c exp(-scale c), and the mean goes from m to g by the share
    scale c exp(-scale c / 2) times the integral of exp(scale c w^2 / 2) over w from 0 to 1."""
    m, g, time = torch.tensor([0.3, -0.5, 0.2]), torch.tensor([1.0, 0.5, -0.4]), torch.arange(3)
    C = 0.5 * 0.8 ** (time[:, None] - time).abs()  # (3,3)

    def model(x, sigma, state=None, *, actions=None, commit=None):
        y = x.flatten(1) - m  # (B,T)
        return (m + y @ torch.linalg.solve(C + torch.diag(sigma[0] ** 2), C)).view_as(x), state

    config = df.Config(height=1, width=1, channels=1, patch=1, dim_mults=(1,), causal=False, sigma_min=0.002)
    guided = maze.guided(model, lambda D: (D.flatten(1) - g).square().sum(1) / 2, scale)
    matrix = df.scheduling_matrix("full_sequence", 3, 200)
    x = df.sample(guided, matrix, batch_size=4000, generator=seed(), config=config).flatten(1)  # (B,T)
    c, along = torch.linalg.eigh(C)
    w = (torch.arange(1000) + 0.5) / 1000
    share = scale * c * (-scale * c / 2).exp() * (scale * c * w[:, None] ** 2 / 2).exp().mean(0)  # (3,)
    mean, variance = share * ((g - m) @ along), c * (-scale * c).exp()
    assert ((x - m) @ along).mean(0).sub(mean).abs().max() < 0.05, "plans go towards the goal, and by so much"
    assert ((x @ along).var(0) / variance - 1).abs().max() < 0.1, "and their variance shrinks by so much"


@pytest.mark.guidance
def test_the_command_guides_the_rollout_of_sample(said):
    words = ["--context", "a.npy", "--frames", 7, "--ckpt", "model.pt", "--seed", 4, "--out", "o.npy"]
    model, actions = df.load_checkpoint("model.pt")[0], torch.full((1, 7, 2), 5.0)
    noisier = guidance.noisier_history(model.config.in_frame_units(9.0), seed(5))
    for more, weaken in ((["--noise", 9], noisier), ([], guidance.without_actions)):
        said(guidance.main, "--weight", 2, *more, *words)
        frames = sample.generate(guidance.Guided(model, 2.0, weaken), 7, torch.full((1, 4, 3, 8, 8), 99 / 127.5 - 1),
                                 actions=actions, generator=seed(4))
        assert (np.load("o.npy") == sample.to_bytes(torch.cat([*frames]))).all(), f"{more}: as a wrapper does it"
    for ckpt, *noise in (("still",), ("both", "--noise", 1), ("model", "--noise", 0)):
        line = said(guidance.main, "--weight", 2, *noise, "--ckpt", f"{ckpt}.pt", code=2).splitlines()[-1]
        assert "error:" in line and "--noise" in line, f"no actions, no history, no noise: {line}"


@pytest.mark.play
def test_two_pixels_share_a_character(monkeypatch, capsys):
    def look(columns, lines, colours="truecolor"):
        """-> the pixels that are shown in a terminal of this size. It understands just the codes that `draw` uses."""
        monkeypatch.setenv("COLORTERM", colours)
        monkeypatch.setattr(play.os, "get_terminal_size", lambda *_: os.terminal_size((columns, lines)))
        play.draw(image, "a line that says which keys there are")
        *rows, line = capsys.readouterr().out.removeprefix("\x1b[H").split("\r\n")
        cells = [re.findall("\x1b\\[38;[25];([\\d;]+);48;[25];([\\d;]+)m\u2580", row) for row in rows]  # upper, lower
        assert len(rows) < max(lines, 1) and line.endswith("\x1b[J") and len(line) - 3 < max(columns, 1), "text"
        assert all(row.endswith("\x1b[0m" + "\x1b[K" * (len(c) < columns)) for row, c in zip(rows, cells)), "old pixels"
        return np.array([[list(map(int, c[i].split(";"))) for c in row] for row in cells for i in (0, 1)])

    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    assert (look(8, 5) == image).all() and (look(5, 4) == image).all(), "the colour in front is the upper pixel"
    assert (look(11, 7) == image.repeat(2, 0).repeat(2, 1)).all(), "pixels are enlarged by a whole number"
    assert (look(40, 3) == image[[0, 1, 3, 4]][:, [0, 1, 3]]).all(), "rows and columns are left out evenly"
    assert not any(look(*size).size for size in ((40, 1), (1, 1), (0, 0))), "no room for a picture is no error"
    nearest = abs(np.array([0, 95, 135, 175, 215, 255]) - image[..., None].astype(int)).argmin(-1)
    assert (look(8, 5, "")[..., 0] == 16 + nearest @ [36, 6, 1]).all(), "the nearest of 256 colours"


def played(monkeypatch, keys, action_dim=2, digits=False, context=2, fps=1e6):
    """keys: {number of a frame, over all worlds: keys to press while it is shown} -> the actions of frames after the
    context, for each world; the lines and the frames that were shown; how long it waited for keys, each time."""
    def getch():
        assert len(waits) < 3000, "it never ends"
        left = pressed.get(len(kept) - 1)
        time.sleep(0 if left else waits[-1] / 1000)
        key = left.pop(0) if left else -1
        return ord(key) if isinstance(key, str) else key

    def worlds():
        for number in itertools.count():
            spies.append(Spy(height=8, width=8, action_dim=action_dim))
            given = torch.zeros(1, context, 3, 8, 8), torch.full((1, context, action_dim), 9.0)
            yield play.world(spies[-1], *(given if context else (None, None)), hands, 3, number)

    spies, lines, kept, waits, hands = [], [], [], [], play.Keys(action_dim, digits)
    pressed = {t: list(row) for t, row in keys.items()}
    monkeypatch.setattr(play.curses, "curs_set", lambda visible: None)
    monkeypatch.setattr(play, "draw", lambda image, line: lines.append(line))
    play.play(SimpleNamespace(getch=getch, timeout=waits.append), worlds(), hands, fps, kept.append)
    first = 0 if context else 12  # calls for a first frame; all others take 3
    assert all((spy.calls[0]["actions"][:, 0] == (9 if context else hands.idle)).all() for spy in spies if spy.calls)
    return [[call["actions"][0, -1].tolist() for call in spy.calls[first::3]] for spy in spies], lines, kept, waits


@pytest.mark.play
def test_an_arrow_is_the_action_of_the_next_frame_and_of_no_other(monkeypatch):
    left, right, up, down = (getattr(play.curses, f"KEY_{name}") for name in ("LEFT", "RIGHT", "UP", "DOWN"))
    keys = {0: [up], 1: [left], 3: [right], 4: [up], 5: [down], 7: [up, right], 8: [left, right], 9: "x1", 10: "q"}
    expected = [[0, -1], [-1, 0], [0, 0], [1, 0], [0, -1], [0, 1], [0, 0], [1, -1], [0, 0], [0, 0]]  # y is down
    for context in (0, 1):
        (told,), lines, kept, _ = played(monkeypatch, keys, context=context)
        assert told == expected, "a key shows in the next frame, and only there; two arrows are a diagonal"
        assert len(kept) == 11 and kept[0].shape == (8, 8, 3), "each frame is kept once"
        assert "arrows" in lines[0] and "frames/s" in lines[0] and any(line.endswith("action 1 -1") for line in lines)


@pytest.mark.play
def test_a_digit_is_held_until_the_next(monkeypatch):
    keys = {1: "2", 3: ["7", play.curses.KEY_LEFT], 4: "10", 6: "1", 7: "r", 11: "q"}
    (told, anew), lines, *_ = played(monkeypatch, keys, action_dim=3, digits=True)
    assert [row.index(1) for row in told] == [2, 2, 2, 0, 0, 1] and all(sum(row) == 1 for row in told + anew)
    assert [row.index(1) for row in anew] == [0, 0], "a new world begins with action 0"
    assert "0 to 2" in lines[0] and any(line.endswith("action 2") for line in lines)


@pytest.mark.play
def test_space_pauses_r_starts_anew_and_q_ends(monkeypatch):
    _, lines, kept, waits = played(monkeypatch, {2: [" ", -1, -1, -1, " "], 3: "q"})
    assert len(kept) == 4 and len(lines) >= 9 and max(waits) == 100, "a pause draws, and waits"
    told, *_ = played(monkeypatch, {0: "r", 5: "r", 9: "q"})
    assert [len(world) for world in told] == [0, 2, 2], "anew, even while a context is shown"
    *_, waits = played(monkeypatch, {3: "q"}, fps=20)
    assert 30 < max(waits) <= 50 and len(waits) <= 9, "at most --fps, without running in circles"


@pytest.mark.play
def test_options_reach_the_world_and_a_whole_file_is_left(said, monkeypatch):
    def wrapper(loop, worlds, keys, fps, keep):
        frames = [[*itertools.islice(world, 6)] for world in itertools.islice(worlds, 2)]
        told.append((fps, keys.digits, sample.to_bytes(torch.cat([*frames[0], *frames[1]]))))
        keep(np.zeros((8, 8, 3), np.uint8))
        interrupt() if len(told) == 1 else handlers[signal.SIGHUP](signal.SIGHUP, None)  # Ctrl-C, a closed window

    told, handlers, interrupt = [], {}, lambda: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(play.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    monkeypatch.setattr(play.curses, "wrapper", wrapper)
    assert "terminal" in said(play.main, "model.pt", code=2), "here is none"
    monkeypatch.setattr(play.os, "isatty", lambda fd: True)
    options = "--context a.npy --fps 9 --seed 7 --steps 2 --keys digits --guidance 2 --out 1.npy"
    said(play.main, "model.pt", *options.split())
    said(play.main, "model.pt", "--out", "2.npy", code=128 + signal.SIGHUP)
    assert len(np.load("1.npy")) == len(np.load("2.npy")) == 1, "whole, after Ctrl-C and in a closed window"
    assert [t[:2] for t in told] == [(9, True), (15, False)] and handlers[signal.SIGTSTP] == play.halt
    model = guidance.Guided(df.load_checkpoint("model.pt")[0], 2, guidance.without_actions)
    context = torch.full((1, 4, 3, 8, 8), 99 / 127.5 - 1)
    K, actions = df.scheduling_matrix("autoregressive", 1, 2), torch.tensor([[[5.0, 5]] * 4 + [[1, 0]] * 2])
    frames = [frame for n in (7, 8) for frame in df.rollout(model, K, 6, context, actions=actions, generator=seed(n))]
    assert (told[0][2] == sample.to_bytes(torch.cat(frames))).all(), "each world has the next seed, and is guided"
    for words in ("still.pt", "both.pt", "no.pt", "model.pt --fps 0", "model.pt --out a.npy --context a.npy"):
        line = said(play.main, *words.split(), code=2).splitlines()[-1]
        assert "error:" in line and (words.split()[0] in line or words.split()[1] in line), line


@pytest.mark.play
def test_the_terminal_is_as_before_while_it_is_halted_and_at_the_end(said):
    pty, termios = map(pytest.importorskip, ("pty", "termios"))
    shell = 'stty rows 24 cols 80; set -m; "$@"; echo halted; read line; fg; echo status $?'  # it can halt a program
    pid, terminal = pty.fork()
    if pid == 0:
        words = [sys.executable, play.__file__, "model.pt", "--device", "cpu", "--steps", "2", "--out", "o.npy"]
        os.execvpe("sh", ["sh", "-c", shell, "sh", *words], os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"})

    before, shown = termios.tcgetattr(terminal), b""
    for keys, text, ended in ((b"", b"action 0 0", False), (b"\x1bOC", b"action 1 0", False),  # an arrow to the right
                              (b"\x1a", b"halted", True), (b"\n", b"action 0 0", False), (b"q", b"status 0", True)):
        os.write(terminal, keys)
        start, end = len(shown), time.monotonic() + 60
        while text not in shown[start:]:
            assert time.monotonic() < end, f"never shown: {text}\n{shown[-500:]}"
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)
        normal_screen = shown.rfind(b"\x1b[?1049l") > shown.rfind(b"\x1b[?1049h")
        assert [normal_screen, termios.tcgetattr(terminal)[:4] == before[:4]] == [ended, ended], text
    assert os.waitpid(pid, 0)[0] == pid and len(np.load("o.npy")) > 0, "--out keeps what was played"


@pytest.mark.compare
def test_the_distance_of_two_gaussians_is_the_one_of_the_closed_form():
    rng = np.random.default_rng(0)
    turn, a, b = np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.uniform(1, 3, 4), rng.uniform(1, 3, 4)
    told = drift.frechet(np.ones(4), turn * a @ turn.T, np.zeros(4), turn * b @ turn.T)
    assert told == pytest.approx(4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()), "they have the same axes"
    assert drift.frechet(np.zeros(2), np.diag([4.0, 0]), np.zeros(2), np.diag([0, 9.0])) == pytest.approx(13)


@pytest.mark.compare
def test_drift_tells_blur_from_grain_and_a_still_from_motion():
    rng = np.random.default_rng(0)
    real = [*bouncing_balls(200, 6, rng)]
    measure = drift.Drift(real, 6_000)
    assert measure(real) == pytest.approx((0, 1, 1), abs=1e-6), "the real clips themselves"
    others = measure([*bouncing_balls(200, 6, rng)])
    soft = measure([(clip // 4 + np.roll(clip // 4, 1, 2) + np.roll(clip // 2, 1, 1)) for clip in real])
    grain = measure([(clip + rng.integers(0, 30, clip.shape)).clip(0, 255).astype(np.uint8) for clip in real])
    still = measure([clip[:1].repeat(6, 0) for clip in real])
    assert still[0] > 5 * others[0] and soft[0] > 1.5 * others[0], "the distance, against that of other real clips"
    assert soft[1] < 0.7 < 1.3 < grain[1] and still[1] == pytest.approx(1, abs=0.2), "how sharp they are"
    assert still[2] == 0 and others[2] == pytest.approx(1, abs=0.2), "how much they move"


@pytest.mark.compare
def test_rollouts_are_of_todays_contexts_and_of_no_others(tmp_path, monkeypatch):
    def call(script, words, log, after=""):
        options = dict(zip(words[:-1], words[1:]))
        contexts = words[words.index("--context") + 1 : words.index("--out")] if "--context" in words else []
        made.append((after, len(contexts)))
        count = max(len(contexts), int(options.get("--batch", 1)))
        for i in range(count):
            name = options["--out"].with_stem(f"r_{i}") if count > 1 else options["--out"]
            np.save(name, np.full((2, 8, 8, 3), i))

    made, args = [], SimpleNamespace(data=tmp_path / "clips", size=8, ckpt=[], configs=[], out=tmp_path, lander=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compare, "call", call)
    model = tmp_path / "model.pt"
    df.save_checkpoint(model, df.Config(height=8, width=8), {})
    args.data.mkdir()
    for i in range(60):
        np.save(args.data / f"{i}.npy", np.full((20 + i, 8, 8, 3), i, np.uint8))
        np.save(args.data / f"{i}.actions.npy", np.arange(20.0 + i)[:, None])
    real, others = compare.real_clips(args)
    lengths = [len(clip) for clip in real]
    assert lengths == sorted(lengths, reverse=True), "the longest ones first"
    assert 1 < len(real) <= 8 and {int(x[0, 0, 0, 0]) for x in real}.isdisjoint(int(x[0, 0, 0, 0]) for x in others)
    for i, clip in enumerate(real):
        rows = np.load(tmp_path / f"context_{i:02}.actions.npy")[:, 0]
        assert (np.load(tmp_path / f"context_{i:02}.npy") == clip[:4]).all(), "the first four frames"
        assert (rows == np.arange(256).clip(max=len(clip) - 1)).all(), "the last action goes on"
    assert len(compare.roll_out(model, "", args)) == len(real) and len(compare.roll_out(model, "--batch 3", args)) == 3

    for path in args.data.glob("*.npy"):
        if int(path.name.split(".")[0]) > 9 or ".actions" in path.name:
            path.unlink()
    real, _ = compare.real_clips(args)
    assert len(compare.roll_out(model, "", args)) == len(real) == 1, "one rollout has no number in its name"
    assert not [*tmp_path.glob("context_*.actions.npy")], "no actions of another clip"
    assert made[0][0] != made[2][0] and [count for _, count in made[1:]] == [0, 1], "from other clips, it is made again"


@pytest.mark.compare
@pytest.mark.parametrize("models", [1, 2])
def test_the_seeds_of_a_table_are_those_of_one_model_or_of_several(tmp_path, monkeypatch, capsys, models):
    def roll_out(ckpt, options, args):
        way, _, number = options.partition(" --seed ")
        rolled.setdefault(way, []).append((ckpt, number))
        return clips

    clips, rolled = bouncing_balls(2, 8, np.random.default_rng(0)), {}
    paths = [tmp_path / f"{i}.pt" for i in range(models)]
    monkeypatch.setattr(compare, "LENGTHS", (8,))
    monkeypatch.setattr(compare, "roll_out", roll_out)
    monkeypatch.setattr(compare, "seconds", lambda *_: 1.0)
    compare.table(SimpleNamespace(ckpt=paths, data=None, out=tmp_path, jobs=1))
    table = capsys.readouterr().out
    expected = [(paths[0], number) for number in "012"] if models == 1 else [(path, "") for path in paths]
    assert all(seeds == expected for seeds in rolled.values()), "three rollouts of one model; one of each of several"
    assert all(f"| {way} | 8 | 1.000 ± 0.000 |" in table for way in rolled), "each way has a row: mean and deviation"


@pytest.mark.record
@pytest.mark.parametrize("every,length", [(1, 9), (3, 4)])
def test_a_row_of_actions_leads_to_its_frame(every, length):
    """In this world, what is shown is the sum of all actions; it ends after eight steps."""
    class Sum:
        action_space = SimpleNamespace(n=3, start=1, sample=lambda: 1)

        def reset(self, seed):
            self.total, self.steps = seed, 0
            return self.total, {}

        def render(self):
            shown = np.arange(60)[:, None] // 10 % 5 > 0  # the rest is black
            return np.full((40, 60, 3), self.total, np.uint8) * shown

        def step(self, action):
            self.total, self.steps = self.total + int(action), self.steps + 1
            return self.total, 0, self.steps == 8, False, {}

    told = []
    choose = lambda t, total: told.append((t, total)) or 1 + t % 3
    frames, actions = record.record(Sum(), 5, choose, 20, size=4, every=every)
    assert frames.shape == (length, 4, 4, 3) and len(set(frames[0].ravel())) == 1, "the square in the middle"
    assert not actions[0].any() and (actions[1:].sum(1) == 1).all(), "one-hot rows; nothing leads to the first frame"
    steps = np.diff(frames[:, 0, 0, 0].astype(int))
    kept = np.minimum(every, 8 - every * np.arange(length - 1))
    assert (steps == kept * (1 + actions[1:].argmax(1))).all(), "row t is the action between the frames t - 1 and t"
    assert told == [(t, frames[t - 1, 0, 0, 0]) for t in range(1, length)], "whoever plays sees the frame before"
    assert len(record.record(Sum(), 5, choose, 3, size=4)[0]) == 3, "no longer than asked for"
    assert record.as_row(None, np.array([[0.5, -1]])).tolist() == [0.5, -1], "numbers stay numbers"


@pytest.fixture
def ours():
    """The core, with all that students write."""
    if graft.unwritten():
        pytest.skip(f"waits for {graft.unwritten()[0]}")  # this is a student's project
    return graft.read(graft.HERE / graft.CORE)


def blank(code):
    """The core, as students get it."""
    for number in graft.exercises():
        code = graft.without(code, number)
    return code


def module(code):
    m = ModuleType("core")
    exec(code, vars(m))
    return m


@pytest.mark.exercise
def test_the_table_in_readme_names_functions_that_exist_tests_that_run_and_100_points(ours):
    table, tests = graft.exercises(), {}
    for node in ast.parse(graft.read(graft.HERE / exercise.FILES[1])).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            tests[node.name] = re.findall(r"pytest\.mark\.(\w+)", " ".join(map(ast.unparse, node.decorator_list)))
    assert [*table] == [*range(1, 10)] and sum(points for *_, points in table.values()) == 100
    everything = [name for names, *_ in table.values() for name in names]
    assert len(set(everything)) == len(everything), "each function is written once"
    for name in everything:
        owner, _, function = name.rpartition(".")
        assert f"def {function}(" in graft.definitions(ours, owner)[function], f"{name} is not there"
    for number, (_, options, _) in table.items():
        asked = {"-m": "True", "-k": "True"} | dict(zip(options[::2], options[1::2]))
        words = {key: re.findall(r"\w+", expression) for key, expression in asked.items()}
        chosen = [name for name, marks in tests.items() if eval(asked["-m"], {w: w in marks for w in words["-m"]})
                  and eval(asked["-k"], {w: w in name for w in words["-k"]})]
        assert chosen and len(asked) == 2, f"exercise {number}: `pytest {' '.join(options)}` runs no test"


@pytest.mark.exercise
def test_a_handout_is_this_project_without_solutions(ours, tmp_path, capsys):
    def functions(code):
        """-> {name: (docstring, how it is called, statements)}"""
        found, tree = {}, ast.parse(code)
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            for f in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
                body = f.body[ast.get_docstring(f) is not None:]
                call = ast.dump(f.args) + "".join(map(ast.dump, f.decorator_list))
                found[f"{getattr(owner, 'name', '')}.{f.name}".strip(".")] = ast.get_docstring(f), call, body
        return found

    exercise.main(["handout", str(tmp_path / "student")])
    was, is_now = functions(ours), functions(graft.read(tmp_path / "student" / graft.CORE))
    files = [path for path in (tmp_path / "student").rglob("*") if path.is_file()]
    said = [graft.read(path) for path in files if path.suffix in (".py", ".md") and path.name != graft.CORE]
    exercised = {name: number for number, (names, *_) in graft.exercises().items() for name in names}
    for name, (docstring, call, body) in was.items():
        assert is_now[name][:2] == (docstring, call), f"{name}: its docstring, arguments and decorators stay"
        if name not in exercised:
            assert [*map(ast.dump, is_now[name][2])] == [*map(ast.dump, body)], f"{name} is no exercise, and stays"
            continue
        error = f'raise NotImplementedError("exercise {exercised[name]}: {name}")'
        assert [*map(ast.unparse, is_now[name][2])] == [ast.unparse(ast.parse(error))], f"{name} says what it is"
        lines = ours.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
        for line in (line.strip() for line in lines if len(line.strip()) > 35):
            assert not any(line in text for text in said), f"{name} can be read in the handout: {line}"
    assert is_now.keys() == was.keys() and {"balls.pt", "play.py"} < {path.name for path in files}, "it is whole"
    assert not {".git", ".venv", "__pycache__", "LOG.md"} & {part for path in files for part in path.parts}
    with pytest.raises(SystemExit):
        exercise.main(["handout", str(tmp_path / "student")])
    assert "not empty" in capsys.readouterr().err.splitlines()[-1], "what a student wrote is not written over"
    exercise.main(["handout", str(tmp_path / "one"), "5"])
    assert {*re.findall(r'Error\("exercise (\d)', graft.read(tmp_path / "one" / graft.CORE))} == {"5"}, "of one only"


@pytest.mark.exercise
def test_of_a_student_only_the_functions_of_an_exercise_are_taken_and_what_is_new_beside_them(ours):
    right = graft.definitions(ours)
    theirs = blank(ours) + """
import fractions
from fractions import \\
    Fraction as Half
HALF, TWO = Half(1, 2), 2
sys.exit("a line that was forgotten")
while True:
    pass
matrix = scheduling_matrix("nonsense", 1, 1)  # another one

def twice(v):
# a comment at the left
    return v * TWO
def randn(shape, like, generator=None):
    return 7  # this is no exercise: ours stays
def loss_weight(sigma, sigma_data):
    return 7  # another exercise
@torch.no_grad()
def karras_sigmas(
    num_steps, config
):
    assert not torch.is_grad_enabled()
    return twice(float(HALF)) * num_steps
def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0:
    return (
"""
    m = module(graft.graft(ours, theirs, 5))
    assert m.karras_sigmas(3, None) == 3, "helpers, constants and imports come along; and decorators"
    with pytest.raises(RuntimeError, match="SyntaxError"):
        m.scheduling_matrix("pyramid", 1, 8)
    assert m.loss_weight(1, 1) == 2 and m.randn((2,), torch.ones(1)).shape == (2,), "all else is ours"
    for code in ("", theirs.replace("def karras", "deff karras"), ours.replace("def karras", "def carras")):
        with pytest.raises(NotImplementedError, match="exercise 5: karras_sigmas"):
            module(graft.graft(ours, code, 5)).karras_sigmas(3, None)
    gru = graft.definitions(ours, "TemporalGRU")["run"]
    for broken in ("def forward(self, x state)", "def __init__(self:"):
        mine = "    @staticmethod\n    def seven(x):\n        return 7 * x\n\n"
        mine += "    def mine(self, x, first):\n        return self.seven(x), first\n"
        mine += f"\n    {broken}\n        pass\n\n" + gru.replace("return self.gru", "return self.mine")
        theirs = ours.replace(gru, mine)
        m = module(graft.graft(ours, theirs, 7))
        mixer, x, h = m.TemporalGRU(8, m.Config()), torch.randn(2, 3, 8), torch.randn(2, 8)
        assert torch.equal(mixer.run(x, h), 7 * x), "methods, too, with the new ones of their class"
    assert right.keys() == graft.definitions(graft.without(ours, 5)).keys()


@pytest.mark.exercise
def test_a_test_waits_for_what_is_not_written_and_fails_for_all_else(monkeypatch):
    def run(error):
        hook = exercise.pytest_runtest_call(None)
        next(hook)
        hook.throw(error)

    monkeypatch.setattr(exercise, "unwritten", lambda: ["exercise 5: karras_sigmas", "exercise 8: rotary"])
    missing = NotImplementedError("exercise 8: rotary")
    caught = ValueError("the checkpoint is damaged")
    caught.__cause__ = missing
    for error in (missing, caught, AssertionError(f"exit status 1\nNotImplementedError: {missing}")):
        with pytest.raises(pytest.skip.Exception, match="^waits for exercise 8: rotary$"):
            run(error)
    for error in (NotImplementedError("conv9d"), NotImplementedError("exercise 1: loss_weight"), AssertionError("no")):
        with pytest.raises(type(error), match=str(error)):
            run(error)


@pytest.mark.exercise
def test_points_are_for_functions_all_of_whose_cases_pass(ours, tmp_path, monkeypatch, capsys):
    def run(command, folder, limit):
        assert graft.read(Path(folder, graft.CORE)) == graft.graft(ours, "theirs", 6), "what is graded"
        assert command[-2:] == ["-m", "sampler"], "and by which tests"
        Path(folder, "results.xml").write_text(results) if results else None
        return "no end in 9 seconds"

    def graded(*words):
        status = exercise.main(["grade", str(tmp_path), "6", *words])
        return status, capsys.readouterr().out

    (tmp_path / graft.CORE).write_text("theirs")
    monkeypatch.setattr(exercise, "run", run)
    case = lambda name, bad="": f'<testcase name="{name}">{bad}</testcase>'
    cases = [case("test_a[1]"), case("test_a[2]", '<failure message="E: why&#10;more"/>'), case("test_a[3]"),
             case("test_b", '<skipped message="waits"/>'), case("test_c", '<error message="e"/>'), case("test_d")]
    results = f"<x>{''.join(cases)}</x>"
    status, out = graded("--json")
    assert status and json.loads(out) == [dict(exercise=6, names="solver_step, sample", points=3, of=12, passed=1,
                                               tests=4, failed="test_a: E: why")]
    assert graded()[1].splitlines()[2:] == ["| 6 solver_step, sample | 3 of 12 | 1 of 4 | test_a: E: why |",
                                            "| all | 3 of 12 | | |"]
    results = f"<x>{cases[0]}{cases[2]}{cases[-1]}</x>"
    status, out = graded()
    assert not status and "| 12 of 12 | 2 of 2 |  |" in out, "exit status 0, if all is there"
    results = ""
    status, out = graded()
    assert status and "| 0 of 12 | 0 of 0 | no end in 9 seconds |" in out


@pytest.mark.exercise
def test_what_never_ends_is_ended_with_all_that_it_started(tmp_path):
    late = "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 2; echo > late'])\nwhile True: pass"
    assert exercise.run([sys.executable, "-c", late], tmp_path, 1) == "no end in 1 seconds"
    assert "exit status 3" in exercise.run([sys.executable, "-c", "import os; os._exit(3)"], tmp_path, 60)
    assert "exit status 1" in exercise.run([sys.executable, "-c", "input()"], tmp_path, 60), "nobody answers"
    time.sleep(1.5)
    assert not (tmp_path / "late").exists(), "what it started lives on"


@pytest.mark.exercise
def test_a_student_is_graded(ours, tmp_path, capsys):
    """One of two functions is right, with a helper. All tests are ours, and none of the student's files is run."""
    theirs = blank(ours) + graft.definitions(ours)["karras_sigmas"].replace("def karras_sigmas", "def levels") + """
def karras_sigmas(num_steps, config):
    return levels(num_steps, config)
def scheduling_matrix(kind, num_frames, num_steps, uncertainty=1.0):
    sys.exit("I give up")
"""
    (tmp_path / graft.CORE).write_text(theirs)
    (tmp_path / exercise.FILES[1]).write_text("raise SystemExit")
    status = exercise.main(["grade", str(tmp_path / graft.CORE), "5", "--json"])  # the file, or its folder
    (row,) = json.loads(capsys.readouterr().out)
    first = row.pop("failed")
    assert status and (row["exercise"], row["names"]) == (5, "karras_sigmas, scheduling_matrix")
    assert [row[key] for key in ("points", "of", "passed", "tests")] == [2.7, 8, 1, 3], "a third of 8 points"
    assert first.startswith("test_matrix_against_a_slow_loop: "), first
