# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[box2d]", "imageio[ffmpeg]", "numpy"]
# ///
"""Records 400 clips of a game, with actions: the lunar lander of Gymnasium.

    pip install "gymnasium[box2d]" && python experiments/lander.py

takes three minutes and writes lander/0000.mp4 and lander/0000.actions.npy to lander/0399.*. Frames
have 64x64 pixels. Actions are one-hot: 0 nothing, 1 left engine, 2 main engine, 3 right engine. Row
t leads to frame t: four steps of the simulator, as an engine's effect grows with the square of the
time. Then train a model, here for two hours on two CPU cores, and play:

    python -m torch.distributed.run --nproc_per_node=2 train.py --data lander/ --preset small \\
        --size 48 --clip-frames 48 --lr 4e-3 --minutes 115 --out lander.pt
    python experiments/play.py lander.pt --context lander/0003.mp4 --fps 6
"""

from pathlib import Path

import gymnasium
import imageio.v3 as iio
import numpy as np
from gymnasium.envs.box2d.lunar_lander import heuristic
from PIL import Image  # comes with imageio

CLIPS, FRAMES, SHORTEST, STEPS, SIZE, ENGINES, TOP = 400, 96, 48, 4, 64, 4, 1.35


def record(env, seed, choose, num_frames=FRAMES):
    """-> frames (T, 64, 64, 3) uint8 and one-hot actions (T, 4). choose(t, state) is the action
    that leads to frame t. Frames show a square, the middle of the picture. A clip begins once the
    lander is below the top, goes on after the landing, and ends where the lander leaves the square.
    The same seed and actions give the same clip."""
    state, _ = env.reset(seed=seed)
    frames, actions, action = [], [], 0
    while len(frames) < num_frames and abs(state[0]) < 2 / 3 and (state[1] < TOP or not frames):
        if state[1] < TOP:
            frames.append(Image.fromarray(env.render()[:, 100:500]).resize((SIZE, SIZE), Image.BOX))
            actions.append(np.eye(ENGINES, dtype=np.float32)[action])
        action = choose(len(frames), state)
        for _ in range(STEPS):
            state, *_ = env.step(action)
    return np.array(frames), np.array(actions)


def pilot(env, rng):
    """Knows how to land, but now and then keeps a random engine on for a while."""
    slips, until, held = rng.uniform(0, 0.05), 0, 0

    def choose(t, state):
        nonlocal until, held
        if t >= until and rng.random() < slips:
            until, held = t + rng.integers(2, 16), int(rng.integers(ENGINES))
        return held if t < until else heuristic(env, state)
    return choose


if __name__ == "__main__":
    env = gymnasium.make("LunarLander-v3", render_mode="rgb_array").unwrapped
    (folder := Path("lander")).mkdir(exist_ok=True)
    clips = (record(env, seed, pilot(env, np.random.default_rng(seed))) for seed in range(999))
    for i, (frames, actions) in zip(range(CLIPS), (c for c in clips if len(c[0]) >= SHORTEST)):
        iio.imwrite(folder / f"{i:04}.mp4", frames, fps=12, macro_block_size=1, quality=9)
        np.save(folder / f"{i:04}.actions.npy", actions)
