# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium-robotics", "torch", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Plans without guidance, for comparison with maze.py: the goal is a keyframe, the last frame of a
bidirectional model. Commands and options are those of maze.py (--uncertainty and --scale say
nothing here); files are called Medium-keyframe.pt and Medium-keyframe.png.

    python experiments/maze_keyframe.py train Medium
    python experiments/maze_keyframe.py test Medium
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from diffusion_forcing import sample, scheduling_matrix  # noqa: E402
from experiments import maze  # noqa: E402
from experiments.maze import EVERY, MAZES, S, STACK  # noqa: E402


def plan(model, past, goal, args, step=0):
    """past (B, STACK, 2), goal (B, 2) -> `best` plans for each, positions (B, N, (T - 1) STACK, 2),
    and their scores (B, N). The best plan has the shortest longest move: one that goes through a
    wall often jumps. T decreases with the steps that were taken, as the goal comes nearer."""
    B, N, T = len(past), args.best, max(4, MAZES[args.maze][0] - step // (STACK * EVERY))
    past, goal = (torch.tensor(a, dtype=torch.float).repeat_interleave(N, 0) for a in (past, goal))
    frame = lambda x: x.reshape(B * N, 2 * STACK, 1, 1)
    keyframes = {T - 1: frame(goal[:, None].expand(-1, STACK, -1))}  # it rests at the goal
    matrix = scheduling_matrix("full_sequence", T - 1, S)
    x = sample(model, matrix, frame(past)[:, None], config=model.config, keyframes=keyframes)
    score = x.reshape(B * N, -1, 2).diff(dim=1).norm(dim=-1).amax(1)  # (BN,)
    return x[:, 1:].reshape(B, N, -1, 2).numpy(), score.view(B, N).numpy()


if __name__ == "__main__":
    maze.main(__doc__, plan, "{}-keyframe.pt", causal=False, P_mean=0.0)
