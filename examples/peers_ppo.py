"""A recurrent PPO update with done masks, in plain PyTorch: `python -m examples.peers_ppo`.

A rollout holds several episodes. Where one is done, the state is 0 before the next observation:
forward does that, by a mask of its own. Each chunk makes one clipped update.

Shapes: B environments, T time steps, K time steps in a chunk, I numbers in an observation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.functional import logsigmoid, mse_loss

import tbptt_props as tb
from examples.peers_model import tell

NORM = 0.5  # to which gradients are clipped


class Agent(nn.Module):
    """An actor with two actions and a critic, on one recurrent cell."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.hidden = case.hidden
        self.cell = nn.GRUCell(case.inputs, case.hidden)
        self.heads = nn.Linear(case.hidden, 2)

    def forward(self, x: Tensor, done: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run observations (B, K, I) on from `state`; return (B, K, 2) logits and values."""
        state = x.new_zeros(len(x), self.hidden) if state is None else state
        predictions = []
        for observed, over in zip(x.unbind(1), done.unbind(1), strict=True):
            state = self.cell(observed, state * (1 - over)[:, None])
            predictions.append(self.heads(state))
        return torch.stack(predictions, dim=1), state


def ppo_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return PPO's clipped loss, and the critic's.

    A target (B, K, 4) holds the action (1 or -1), its log-probability as it was played, its
    advantage and its return.
    """
    logit, value = prediction.unbind(-1)
    action, old, advantage, due = target.unbind(-1)
    ratio = (logsigmoid(action * logit) - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return 0.5 * mse_loss(value, due) - gain.mean()


def train(module: nn.Module, rollouts: Sequence[Any], *, chunk: int) -> None:
    """Learn from each rollout once, chunk by chunk."""
    optimizer = optim.Adam(module.parameters(), lr=1e-2)
    for rollout in rollouts:
        state: Tensor | None = None
        for x, y, done in zip(*(part.split(chunk, dim=1) for part in rollout), strict=True):
            prediction, state = module(x, done, state)
            optimizer.zero_grad()
            ppo_loss(prediction, y).backward()  # type: ignore[no-untyped-call]  # torch's own
            nn.utils.clip_grad_norm_(module.parameters(), NORM)
            optimizer.step()
            state = state.detach()


def rollouts(case: tb.Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Make rollouts whose episodes have three time steps, and begin one later per environment."""
    made = []
    for i, (x, y) in enumerate(case.tensors()):
        generator = torch.Generator().manual_seed(case.seed + i)
        numbers = torch.randn(*y.shape[:2], 4, generator=generator, dtype=y.dtype)
        action, old, advantage, due = numbers.unbind(-1)
        target = torch.stack((action.sign(), logsigmoid(old), advantage, due), dim=-1)
        since = torch.arange(x.shape[1]) - torch.arange(x.shape[0])[:, None]
        made.append((x, target, (since % 3 == 0).to(x.dtype)))
    return made


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    return tb.Subject(
        Agent(case),
        loss=ppo_loss,
        state="state",
        batches=rollouts,
        contract=tb.Contract(clip_norm=NORM),
        train=partial(train, chunk=case.chunk),
    )


if __name__ == "__main__":
    tell(build)
