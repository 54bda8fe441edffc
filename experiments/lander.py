# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[box2d]", "imageio[ffmpeg]", "numpy"]
# ///
"""Records 600 clips of a game, with actions: the lunar lander of Gymnasium.

    pip install "gymnasium[box2d]" && python experiments/lander.py

takes two to four minutes and writes lander/0000.mp4 and lander/0000.actions.npy to lander/0599.*.
Frames have 96x96 pixels. Actions are one-hot: 0 nothing, 1 left engine, 2 main engine, 3 right
engine. Row t leads to frame t: three steps of the simulator, as an engine's effect grows with the
square of the time. Then train a model, here for 103 minutes on two CPU cores, and play:

    python -m torch.distributed.run --nproc_per_node=2 train.py --data lander/ --preset small \\
        --size 48 --clip-frames 32 --lr 4e-3 --minutes 103 --out lander.pt
    python experiments/play.py lander.pt --context lander/0003.mp4 --fps 8
"""

from pathlib import Path

import gymnasium
import imageio.v3 as iio
import numpy as np
from gymnasium.envs.box2d.lunar_lander import heuristic
from PIL import Image  # comes with imageio

CLIPS, FRAMES, SHORTEST, STEPS, SIZE = 600, 96, 32, 3, 96
VIEW, SIDE, TOP = np.s_[90:330, 180:420], 0.36, 0.9  # the part of the picture; where it ends
ENGINES, MAIN, AFTER_CRASH = 4, 2, 16  # the number of actions, one of them, and frames


def record(env, seed, choose, num_frames=FRAMES):
    """-> frames (T, 96, 96, 3) uint8 and one-hot actions (T, 4). choose(t, state) is the action
    that leads to frame t. Frames show a square around the pad, close enough to see how the lander
    tilts. A clip begins once the lander is below the top, goes on after the landing, and ends where
    the lander leaves the square, or soon after it has crashed: it would lie there for most of the
    clip. The same seed and actions give the same clip."""
    state, _ = env.reset(seed=seed)
    frames, actions, action, crashed = [], [], 0, 0
    while len(frames) < num_frames and crashed < AFTER_CRASH and abs(state[0]) < SIDE:
        if state[1] < TOP:
            frames.append(Image.fromarray(env.render()[VIEW]).resize((SIZE, SIZE), Image.BOX))
            actions.append(np.eye(ENGINES, dtype=np.float32)[action])
        elif frames:
            break
        action = choose(len(frames), state)
        for _ in range(STEPS):
            state, *_ = env.step(action)
        crashed += env.game_over
    return np.array(frames), np.array(actions)


def pilot(env, rng):
    """Knows how to land, and takes off again after a while. Now and then, it keeps a random engine
    on for some frames."""
    slips, until, held = rng.uniform(0, 0.08), 0, 0

    def choose(t, state):
        nonlocal until, held
        if t >= until:
            if state[6] and state[7] and rng.random() < 0.05:  # both legs touch the ground
                until, held = t + rng.integers(5, 12), MAIN
            elif rng.random() < slips:
                until, held = t + rng.integers(2, 12), int(rng.integers(ENGINES))
        return held if t < until else heuristic(env, state)
    return choose


if __name__ == "__main__":
    env = gymnasium.make("LunarLander-v3", render_mode="rgb_array").unwrapped
    (folder := Path("lander")).mkdir(exist_ok=True)
    clips = (record(env, seed, pilot(env, np.random.default_rng(seed))) for seed in range(2999))
    for i, (frames, actions) in zip(range(CLIPS), (c for c in clips if len(c[0]) >= SHORTEST)):
        iio.imwrite(folder / f"{i:04}.mp4", frames, fps=12, macro_block_size=1, quality=9)
        np.save(folder / f"{i:04}.actions.npy", actions)
