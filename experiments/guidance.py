"""Guidance: history or actions count more than in training. Takes all options of sample.py.

    python experiments/guidance.py --ckpt model.pt --weight 1.5 --noise 0.1   the history does
    python experiments/guidance.py --ckpt model.pt --weight 2                 the actions do

It wraps the denoiser, so no sampling loop needs to know about it:

    model = Guided(model, 1.5, noisier_history(model.config.in_frame_units(0.1)))
    frames = rollout(model, matrix, 256, context)
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
import sample  # noqa: E402
from diffusion_forcing import need, per_frame, randn  # noqa: E402


class Guided(nn.Module):
    """A denoiser for which something counts for more: D_weak + weight (D - D_weak). D_weak is what
    the same model says of weaken(x, sigma, actions, commit), where this is missing or weaker.
    Called like Denoiser; the state is a pair, since each of the two has its own."""

    def __init__(self, model, weight, weaken):
        super().__init__()
        self.model, self.weight, self.weaken, self.config = model, weight, weaken, model.config

    def forward(self, x, sigma, state=None, *, actions=None, commit=None):
        commit = x.shape[1] if commit is None else commit
        state, state_weak = (None, None) if state is None else state
        D, state = self.model(x, sigma, state, actions=actions, commit=commit)
        x, sigma, actions = self.weaken(x, sigma, actions, commit)
        D_weak, state_weak = self.model(x, sigma, state_weak, actions=actions, commit=commit)
        return torch.lerp(D_weak, D, self.weight), (state, state_weak)


def without_actions(x, sigma, actions, commit):
    """Actions count for more (classifier-free guidance, arXiv 2207.12598). The model must know the
    world without them, too: from training in which they are unknown at times."""
    return x, sigma, None


def noisier_history(noise, generator=None):
    """-> a `weaken` with which the history counts for more (history guidance, arXiv 2502.06764). It
    is seen through noise of at least `noise`, in frame units: sigma_max hides all of it, less hides
    its details. A frame gets this noise once, in the call in which it enters the state; in
    `sample`, none enters it.

    Hiding all of it may go too far: x[t] = .9 x[t-1] + noise, with variance 1 in all, becomes
    1.08 x[t-1] with weight 1.5, and a long rollout explodes.
    """
    def weaken(x, sigma, actions, commit):
        history, told = x[:, :commit], sigma[:, :commit].clamp(min=noise)  # (B,n,C,H,W), (B,n)
        more = (told**2 - sigma[:, :commit] ** 2).sqrt()  # variances add up
        history = history + per_frame(more) * randn(history.shape, x, generator)
        x = torch.cat([history, x[:, commit:]], 1)  # (B,T,C,H,W)
        return x, torch.cat([told, sigma[:, commit:]], 1), actions
    return weaken


def main(argv=None):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter,
                       epilog="all others: python sample.py --help", allow_abbrev=False)
    p.add_argument("--weight", type=sample.positive_float, required=True, help="1: no guidance")
    p.add_argument("--noise", type=sample.positive_float, help="sigma through which the history is "
                   "seen where it counts less; without it, the actions count for more")
    ours, others = p.parse_known_args(argv)

    def wrap(model, args):
        if ours.noise is None:
            need(model.config.action_dim and args.actions != "unknown",
                 f"{args.ckpt} knows no actions, or they are unknown: --noise is needed")
            return Guided(model, ours.weight, without_actions)
        need(model.config.causal, f"--noise: {args.ckpt} looks both ways, and has no history")
        generator = torch.Generator(args.device).manual_seed(args.seed + 1)
        noise = model.config.in_frame_units(ours.noise)
        return Guided(model, ours.weight, noisier_history(noise, generator))

    sample.main(others, wrap)


if __name__ == "__main__":
    main()
