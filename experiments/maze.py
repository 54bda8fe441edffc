# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium-robotics", "torch", "torchvision", "numpy", "tqdm", "imageio[ffmpeg]"]
# ///
"""Plans with guidance (paper, section 4.2): a ball finds its way to any goal in a maze.

    pip install gymnasium-robotics
    python experiments/maze.py train Medium    13 minutes on one core: Medium.pt; or UMaze, Large
    python experiments/maze.py test Medium     100 episodes
    python experiments/maze.py draw Medium     a plan that comes into focus: Medium.png

The world is PointMaze of gymnasium-robotics: two forces push a ball, 100 times a second. The clips
show how a controller drives it from one random goal to the next; nothing says where the goals are.
A frame is 32 steps: eight positions, as the 16 channels of one pixel. The first frame of a plan
is what the ball did last; all others are sampled, and pulled towards the goal in each call of the
network. The best of some plans is followed for two frames.
"""

import itertools
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import imageio.v3 as iio
import networkx  # comes with torch
import numpy as np
import torch
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from diffusion_forcing import (Config, Denoiser, load_checkpoint, per_frame, sample,  # noqa: E402
                               save_checkpoint, scheduling_matrix)
from sample import mistakes, positive, positive_float  # noqa: E402
from train import Objective  # noqa: E402

EVERY, STACK, S = 4, 8, 20  # steps between two positions, positions in a frame, sampling steps
MAZES = {"UMaze": (7, 300), "Medium": (10, 600), "Large": (14, 800)}  # frames of a plan; time limit


# ==== The clips: a controller that knows the map drives a ball from goal to goal. ================

def route(maze, start, goal):
    """-> the middles of the cells on a shortest way to the goal, and then the goal itself."""
    graph = networkx.grid_2d_graph(maze.map_length, maze.map_width)
    graph.remove_nodes_from(map(tuple, np.argwhere(walls(maze))))
    ends = (tuple(maze.cell_xy_to_rowcol(xy)) for xy in (start, goal))
    cells = networkx.shortest_path(graph, *ends)[1:-1]
    return [maze.cell_rowcol_to_xy(cell) for cell in cells] + [goal]


def walls(maze, xy=None):
    """-> (rows, columns): which cells are walls; or, for xy (..., 2), which of these are in one."""
    if xy is None:
        return np.array(maze.maze_map) == 1
    i = np.clip(maze.y_map_center - xy[..., 1], 0, maze.map_length - 1).astype(int)
    j = np.clip(maze.x_map_center + xy[..., 0], 0, maze.map_width - 1).astype(int)
    return walls(maze)[i, j]


def push(ball, target):
    """The two forces that bring a ball (x, y, vx, vy) to the target: PD control."""
    return np.clip(10 * (target - ball[:2]) - ball[2:], -1, 1)


def walk(ball, way):
    """The forces that bring it to the next waypoint. One that is nearer than 0.25 is done."""
    while len(way) > 1 and np.linalg.norm(ball[:2] - way[0]) < 0.25:
        way.pop(0)
    return push(ball, way[0])


def collect(env, rng, steps=1_000_000):
    """-> (steps / EVERY, 2): a ball's path: it goes to random goals, and rests at each."""
    ball, rest, noise, positions = env.reset(seed=0)[0]["observation"], -1, 0, []
    for step in trange(steps, desc="recording", unit=" steps", mininterval=1):
        if rest < 0:
            cell = rng.choice(np.argwhere(~walls(env.maze)))
            goal = env.maze.cell_rowcol_to_xy(cell) + rng.uniform(-0.25, 0.25, 2)
            way, rest = route(env.maze, ball[:2], goal), rng.exponential(100)
        rest -= np.linalg.norm(ball[:2] - goal) < 0.3
        noise = 0.9 * noise + 0.2 * rng.standard_normal(2)
        ball = env.point_env.step(walk(ball, way) + noise)[0]
        if step % EVERY == 0:
            positions.append(ball[:2])
    return torch.tensor(np.array(positions), dtype=torch.float)


def train(env, args):
    """Records, trains, and writes args.ckpt. A clip may begin with any position."""
    rng, (T, _) = np.random.default_rng(args.seed), MAZES[args.maze]
    data = collect(env, rng)  # (N,2)
    model = Denoiser(Config(
        height=1, width=1, channels=2 * STACK, patch=1, dim=64, dim_mults=(1,), clip_frames=T,
        window=T, data_mean=tuple(data.mean(0)) * STACK, sigma_data=data.std(0).mean().item(),
        P_std=1.8, sigma_max=20.0, context_noise=0.01, **({"P_mean": -1.2} | args.config)))
    objective = Objective(model)
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.99))
    for done in tqdm(np.linspace(0, 1, args.steps), "training", unit=" steps", mininterval=1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(50 * done + 0.01, 1 - done)
        first = rng.integers(len(data) - T * STACK, size=(64, 1))
        x = data[first + np.arange(T * STACK)].reshape(64, T, 2 * STACK, 1, 1)
        optimizer.zero_grad()
        objective(x, None, None).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    save_checkpoint(args.ckpt, model.config, model.state_dict())


# ==== Planning. ==================================================================================

def guided(model, cost, scale):
    """-> a denoiser that says D - scale sigma^2 d cost(D) / dx: samples of low cost become likelier
    (paper, section 3.4 and appendix). cost(D) -> (B,). The gradient goes through the network."""
    def denoise(x, sigma, **more):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            D, state = model(x, sigma, **more)
            gradient, = torch.autograd.grad(cost(D).sum(), x)  # (B,T,C,H,W)
        return D.detach() - scale * per_frame(sigma) ** 2 * gradient, state
    return denoise if scale else model


def plan(model, past, goal, args, step=0):  # step of the episode: maze_keyframe.py needs it
    """past (B, STACK, 2), goal (B, 2) -> `best` plans for each, positions (B, N, (T - 1) STACK, 2),
    and their scores (B, N). The least is the best: it ends at the goal, and gets there soon."""
    B, N, config = len(past), args.best, model.config
    past, goal = (torch.tensor(a, dtype=torch.float).repeat_interleave(N, 0) for a in (past, goal))
    away = lambda x: (x.reshape(B * N, -1, 2) - goal[:, None]).norm(dim=-1)  # (BN,positions)
    matrix = scheduling_matrix("pyramid", config.clip_frames - 1, S, args.uncertainty)
    denoise = guided(model, lambda D: away(D).mean(1), args.scale)
    x = sample(denoise, matrix, past.reshape(B * N, 1, 2 * STACK, 1, 1), config=config)[:, 1:]
    score = away(x[:, -1]).mean(1) + 0.3 * away(x).mean(1)  # (BN,)
    return x.reshape(B, N, -1, 2).numpy(), score.view(B, N).numpy()


def play(envs, args, model=None):
    """Plays episodes side by side, with the model or else with the controller of the clips."""
    maze, (_, limit) = envs[0].maze, MAZES[args.maze]
    states = [env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)]
    balls, goals = (np.stack([s[key] for s in states]) for key in ("observation", "desired_goal"))
    ways = [route(maze, ball[:2], goal) for ball, goal in zip(balls, goals)]
    far = np.array([len(way) >= 6 for way in ways])
    past = balls[:, None, :2].repeat(STACK, 1)  # (N,STACK,2): all are at rest
    took, crossing = np.full(len(envs), limit), []
    for step in trange(limit, desc="playing", unit=" steps", leave=False):
        live, now = np.flatnonzero(took == limit), step % (2 * STACK * EVERY)
        if model and now == 0 and len(live):  # a new plan for every two frames
            paths, scores = args.plan(model, past[live], goals[live], args, step)
            plans = {k: path[score.argmin()] for k, path, score in zip(live, paths, scores)}
            crossing += [walls(maze, path).any() for path in plans.values()]
        for k in live:  # a ball is pulled to where it should be three positions later
            force = push(balls[k], plans[k][now // EVERY + 2]) if model else walk(balls[k], ways[k])
            state, *_, info = envs[k].step(force)
            balls[k] = state["observation"]
            took[k] = step if info["success"] else limit
        if step % EVERY == EVERY - 1:
            past = np.concatenate([past[:, 1:], balls[:, None, :2]], 1)
    print(f"{'model' if model else 'controller'}: {took.mean():.0f} steps on average\nsuccess "
          f"{100 * (took < limit).mean():.0f} far {100 * (took < limit)[far].mean():.0f} crossing "
          f"{100 * np.mean(crossing or 0):.0f}")


def draw(maze, args, model, zoom=24, shown=6):
    """Draws MAZE.png: a plan between the two cells with the longest way between them, from black to
    green, at six of the calls that make it. A position is blue at the beginning of the plan, and
    red at its end; noisy ones are scaled to the spread of clean ones."""
    cells = [maze.cell_rowcol_to_xy(cell) for cell in np.argwhere(~walls(maze))]
    ends = max(itertools.product(cells, cells), key=lambda ends: len(route(maze, *ends)))
    calls, clouds = [], []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))  # x, sigma
    paths, scores = args.plan(model, np.tile(ends[0], (1, STACK, 1)), ends[1][None], args)
    for x, sigma in calls:
        size = per_frame((1 + (sigma / model.config.sigma_data) ** 2).sqrt())
        cloud = (x.detach() - model.data_mean) / size + model.data_mean  # (N,T,2 STACK,1,1)
        clouds.append(cloud[scores.argmin(), 1:].reshape(-1, 2).numpy())
    clouds.append(paths[0, scores.argmin()])
    late, panels = np.linspace(0, 235, len(clouds[0])).astype(int), []
    dots = [((k, 60, 235 - k), 1) for k in late] + [((0, 0, 0), 5), ((0, 150, 60), 5)]
    for m in np.linspace(0, len(clouds) - 1, shown).astype(int):
        panel = 255 - np.kron(walls(maze)[..., None], np.full((zoom, zoom, 3), 80))
        for (x, y), (colour, r) in zip([*clouds[m], *ends], dots):
            i, j = zoom * (maze.y_map_center - y), zoom * (maze.x_map_center + x)
            i, j = (int(np.clip(v, r, n - r - 1)) for v, n in zip((i, j), panel.shape))
            panel[i - r : i + r + 1, j - r : j + r + 1] = colour
        panels.append(np.pad(panel, ((0, 0), (0, 8), (0, 0)), constant_values=255))
    iio.imwrite(Path(args.ckpt).with_suffix(".png"), np.concatenate(panels, 1).astype(np.uint8))


def main(doc=__doc__, plan=plan, name="{}.pt", **config):
    p = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("train", "test", "draw"))
    p.add_argument("maze", choices=MAZES)
    p.add_argument("--steps", type=positive, default=7000, help="of training (%(default)s)")
    p.add_argument("--episodes", type=positive, default=100, help="of test (%(default)s)")
    p.add_argument("--uncertainty", type=positive_float, default=5.0, help="pyramid (%(default)s)")
    p.add_argument("--scale", type=float, default=3.0, help="of the guidance (%(default)s)")
    p.add_argument("--best", type=positive, default=16, help="plans to choose from (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = p.parse_args(namespace=Namespace(plan=plan, config=config))
    args.ckpt = name.format(args.maze)
    with mistakes(ImportError):
        import gymnasium
        import gymnasium_robotics  # it makes the mazes known to gymnasium
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gymnasium.register_envs(gymnasium_robotics)
    make = lambda: gymnasium.make(f"PointMaze_{args.maze}-v3").unwrapped
    if args.command == "train":
        return train(make(), args)
    with mistakes(ValueError):
        model, _ = load_checkpoint(args.ckpt)
    envs = [make() for _ in range(args.episodes)]
    if args.command == "draw":
        return draw(envs[0].maze, args, model)
    play(envs, args)
    play(envs, args, model)


if __name__ == "__main__":
    main()
