# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[classic-control]", "imageio[ffmpeg]", "numpy"]
# ///
"""Records clips, with actions, of random play in an environment of Gymnasium.

    pip install "gymnasium[classic-control]" && python experiments/record.py CartPole-v1

writes CartPole-v1/0000.mp4 and CartPole-v1/0000.actions.npy to CartPole-v1/0099.* for train.py. Row
t of the actions leads to frame t: one-hot for choices, else numbers; row 0 is zeros. Each
action is kept for some frames. To record a better player, write another `choose`.
"""

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps  # comes with imageio


def at_random(space, rng, longest=8):
    """-> choose(t, observation), a player who keeps each action for 1 to `longest` frames."""
    until, action = 0, None

    def choose(t, observation):
        nonlocal until, action
        if t >= until:
            until, action = t + rng.integers(1, longest + 1), space.sample()
        return action
    return choose


def as_row(space, action):
    """-> float32 (A,): one-hot for one of space.n choices, else the numbers of the action."""
    if hasattr(space, "n") and np.ndim(action) == 0:
        return np.eye(space.n, dtype=np.float32)[int(action) - int(getattr(space, "start", 0))]
    return np.asarray(action, np.float32).ravel()


def record(env, seed, choose, num_frames, size=64, every=1):
    """-> frames (T, size, size, 3) uint8 and actions (T, A), until the episode ends. Each action is
    kept for `every` steps of the environment. Pictures are cut to a square in their middle."""
    observation, _ = env.reset(seed=seed)
    frames, actions, over = [], [], False
    row = 0 * as_row(env.action_space, env.action_space.sample())
    while True:
        square = ImageOps.fit(Image.fromarray(env.render()), (size, size), Image.BOX)
        frames.append(np.array(square))
        actions.append(row)
        if over or len(frames) == num_frames:
            return np.array(frames), np.array(actions)
        action = choose(len(frames), observation)
        row = as_row(env.action_space, action)
        for _ in range(every):
            observation, _, terminated, truncated, _ = env.step(action)
            over = over or terminated or truncated
            if over:
                break


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("env", help="an id of Gymnasium, like CartPole-v1")
    p.add_argument("--clips", type=int, default=100, help="(%(default)s)")
    p.add_argument("--frames", type=int, default=96, help="of a clip, at most (%(default)s)")
    p.add_argument("--shortest", type=int, default=16, help="drop shorter clips (%(default)s)")
    p.add_argument("--every", type=int, default=1, help="steps from frame to frame (%(default)s)")
    p.add_argument("--size", type=int, default=64, help="height and width (%(default)s)")
    args = p.parse_args()
    folder = Path(args.env.replace("/", "-"))
    if min(args.clips, args.frames, args.every, args.size) < 1 or folder.exists():
        p.error(f"all numbers must be above 0, and {folder}/ must not exist yet")

    try:
        import gymnasium
        env = gymnasium.make(args.env, render_mode="rgb_array")
        env.reset()
        env.render()  # what it needs may be missing
    except Exception as error:  # whatever an environment raises
        p.error(str(error))
    env.action_space.seed(0)
    folder.mkdir()
    written, seed, shortest = 0, 0, min(args.shortest, args.frames)
    while written < args.clips and seed < 100 * args.clips:
        choose = at_random(env.action_space, np.random.default_rng(seed))
        frames, actions = record(env, seed, choose, args.frames, args.size, args.every)
        seed += 1
        if len(frames) >= shortest:
            name = folder / f"{written:04}.mp4"
            iio.imwrite(name, frames, fps=15, macro_block_size=1, quality=9)
            np.save(name.with_suffix(".actions.npy"), actions)
            written += 1
    print(f"{written} clips in {folder}/; {seed - written} were shorter than {shortest}")


if __name__ == "__main__":
    main()
