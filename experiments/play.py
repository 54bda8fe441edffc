"""Steers a model in this terminal: what you press is the action of the next frame.

    python experiments/play.py experiments/balls.pt                             arrows
    python experiments/play.py experiments/lander.pt --context clip.mp4 --fps 8 digits

Arrows make the first or the second number of an action -1 or 1, for one frame. A digit says which
of its numbers is 1, all others being 0, and holds until the next digit. Digits steer where an
action has more than two numbers. space: pause; r: new; q: end.
"""

import collections
import contextlib
import itertools
import math
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from data.clips import to_bytes, video_writer  # noqa: E402
from diffusion_forcing import load_checkpoint, need  # noqa: E402
from experiments.guidance import Guided, without_actions  # noqa: E402
from sample import (STEPS, generate, load_inputs, mistakes, one_thread, output_paths,  # noqa: E402
                    positive, positive_float, working_device)

try:
    import curses
except ImportError:  # on Windows
    curses = None


class Keys:
    """What the keys say: the action of the next frame, a pause, or another world."""

    def __init__(self, action_dim, digits, device="cpu"):
        one = torch.eye(action_dim, device=device).split(1)  # (1,A) each
        arrows = curses.KEY_LEFT, curses.KEY_RIGHT, curses.KEY_UP, curses.KEY_DOWN  # y is down
        ways = [sign * row for row in one for sign in (-1, 1)]
        self.means = dict(zip(b"0123456789", one) if digits else zip(arrows, ways))
        self.digits = digits
        self.idle = one[0] if digits else 0 * one[0]  # number 0 is 1, or all are 0
        self.paused = False
        self.restart()

    def restart(self):
        self.anew = False
        self.told = self.chosen = self.idle  # the action of this frame, and of the next

    def press(self, key):
        self.paused = self.paused != (key == ord(" "))
        self.anew = self.anew or key == ord("r")
        if key in self.means and self.digits:
            self.chosen = self.means[key]
        elif key in self.means:  # two arrows before one frame are a diagonal
            self.chosen = (self.chosen + self.means[key]).clamp(-1, 1)

    def actions(self):
        """-> iterator over (1, A), each asked for after the frame before it was shown."""
        while not self.anew:
            self.told = self.chosen
            self.chosen = self.told if self.digits else self.idle
            yield self.told

    def line(self, rate):
        names = f"0 to {len(self.means) - 1}" if self.digits else "arrows"
        numbers = [self.told.argmax()] if self.digits else self.told[0]
        action = " ".join(f"{number:g}" for number in numbers)
        return f"{names} | space: pause | r: new | q: end | {rate:.0f} frames/s | action {action}"


def world(model, context, given, keys, steps, seed):
    """-> endless iterator over frames (1, C, H, W): context (1, T, C, H, W), to which the actions
    `given` (1, T, A) led, and what the keys make of it; without context, a world from nothing."""
    keys.restart()
    generator = torch.Generator(keys.idle.device).manual_seed(seed % 2**63)
    how = dict(schedule="autoregressive", steps=steps, generator=generator)  # no frame ahead of it
    if context is None:
        given = keys.idle[None]  # (1,1,A)
        context = next(generate(model, 1, actions=given, **how))[:, None]  # (1,1,C,H,W)
    actions = itertools.chain(given.unbind(1), keys.actions())
    return generate(model, None, context, actions=actions, **how)


def draw(image, line):
    """Shows uint8 (H, W, 3) in this terminal, and a line of text below. A half block is two pixels:
    the colour in front is the upper one. In a small window, pixels are left out evenly."""
    columns, lines = os.get_terminal_size()
    zoom = min(columns / image.shape[1], 2 * (lines - 1) / image.shape[0])
    zoom = int(zoom) or zoom
    y, x = ((np.arange(int(n * zoom)) / zoom).astype(int) for n in image.shape[:2])
    image = image[y][:, x]
    many = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    if not many:  # then a terminal has 6 levels of red, of green and of blue: the nearest of them
        image = np.searchsorted([48, 116, 156, 196, 236], image, "right")

    def colour(r, g, b):
        return f"2;{r};{g};{b}" if many else f"5;{16 + 36 * r + 6 * g + b}"

    end = "\x1b[0m" + "\x1b[K" * (len(x) < columns) + "\r\n"  # nothing is left of an old picture
    text = "\x1b[H"
    for upper, lower in zip(image[::2], image[1::2]):
        cells = (f"\x1b[38;{colour(*a)};48;{colour(*b)}m\u2580" for a, b in zip(upper, lower))
        text += "".join(cells) + end
    print(text + line[: max(columns - 1, 0)] + "\x1b[J", end="", flush=True)


def play(screen, worlds, keys, fps, keep):
    """Shows the frames of one world after the other, at most fps a second, until q is pressed."""
    with contextlib.suppress(curses.error):  # not every terminal can
        curses.curs_set(0)  # no cursor
    due, times = 0, collections.deque(maxlen=16)
    for frame in itertools.chain.from_iterable(worlds):
        image = to_bytes(frame)[0]
        keep(image)
        times.append(time.monotonic())
        due = max(due + 1 / fps, times[-1])
        rate, key = (len(times) - 1) / max(times[-1] - times[0], 1e-3), None
        while not keys.anew and (key != -1 or keys.paused or time.monotonic() < due):  # -1: no key
            draw(image, keys.line(rate))
            left = math.ceil(1000 * (due - time.monotonic()))
            screen.timeout(100 if keys.paused else max(0, left))
            key = screen.getch()
            if key == ord("q"):
                return
            keys.press(key)


def halt(number, _):
    """Ctrl-Z. (The handler of curses would run in any thread, and might never return.)"""
    curses.endwin()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.signal(number, halt)
    curses.doupdate()


def parse_args(argv):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("ckpt", help="as written by train.py")
    p.add_argument("--context", nargs=1, default=[], metavar="CLIP", help="go on from it")
    p.add_argument("--fps", type=positive_float, default=15, help="at most (%(default)s)")
    p.add_argument("--keys", choices=["digits", "arrows"], help="(arrows for 1 or 2 numbers)")
    p.add_argument("--steps", type=positive, default=STEPS, help="of a frame (%(default)s)")
    p.add_argument("--guidance", type=positive_float, default=1, help="weight of actions (1)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    p.add_argument("--device", type=working_device, default="auto", help="(cuda or cpu)")
    p.add_argument("--out", type=Path, help="keep what is shown: .mp4, .webm, .gif or .npy")
    p.set_defaults(frames=4, context_frames=None, keyframes=[], actions=None, batch=1)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with mistakes(), contextlib.ExitStack() as stack:  # it finishes the file, in any case
        with mistakes(ValueError):
            need(curses and os.isatty(0) and os.isatty(1), "a Linux or macOS terminal is needed")
            if args.out:
                output_paths(args)
            model, _ = load_checkpoint(args.ckpt, args.device)
            need(model.config.action_dim, f"{args.ckpt} was trained without actions")
            need(model.config.causal, f"{args.ckpt} looks both ways, and makes whole clips only")
            context, _, given = load_inputs(args, model.config)
        if args.guidance != 1:
            model = Guided(model, args.guidance, without_actions)

        digits = args.keys == "digits" or (not args.keys and model.config.action_dim > 2)
        keys = Keys(model.config.action_dim, digits, args.device)
        worlds = (world(model, context, given, keys, args.steps, seed)
                  for seed in itertools.count(args.seed))
        stack.enter_context(one_thread(model))
        kept = contextlib.nullcontext(lambda image: None)
        if args.out:
            kept = video_writer(args.out, model.config.height, model.config.width, args.fps)
        keep = stack.enter_context(kept)

        signal.signal(signal.SIGTSTP, halt)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):  # SIGHUP: a closed window
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with mistakes(curses.error), contextlib.suppress(KeyboardInterrupt):
            curses.wrapper(play, worlds, keys, args.fps, keep)  # at the end, all is as before


if __name__ == "__main__":
    main()
