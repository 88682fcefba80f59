"""A pole on a cart, many at once, and the policy gradient's loss (REINFORCE)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn.functional import log_softmax

HORIZON = 200
SPREAD = (1.0, 0.5, 0.1, 0.8)  # far from upright, so that some starts are lost to anyone
Floats = NDArray[np.float64]


def episodes(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
    """Starts and the chance of each action (count, 4 + HORIZON); what rewards count (count,)."""
    starts = (2 * torch.rand(count, 4, generator=generator) - 1) * torch.tensor(SPREAD)
    chance = torch.rand(count, HORIZON, generator=generator)
    return torch.cat([starts, chance], 1), torch.ones(count)


def moved(state: Floats, right: NDArray[np.bool_]) -> Floats:
    """The next states, (count, 4), by the equations of Barto, Sutton and Anderson (1983)."""
    _, speed, angle, turning = state.T
    force = np.where(right, 10.0, -10.0)
    sine, cosine = np.sin(angle), np.cos(angle)
    pushed = (force + 0.05 * turning**2 * sine) / 1.1
    turn = (9.8 * sine - cosine * pushed) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    rate = pushed - 0.05 * turn * cosine / 1.1
    change = np.stack([speed, rate, turning, turn], 1)
    return state + 0.02 * change


@torch.no_grad()
def played(
    model: nn.Module, starts: Tensor, chance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Play until all poles fell or HORIZON; without `chance` the likelier action is taken.

    Returns:
        States (time, count, 4), actions (time, count), and whether the pole still stood.
    """
    state = starts.double().numpy()
    standing = np.ones(len(state), dtype=bool)
    states, actions, alive = [], [], []
    for time in range(HORIZON):
        scores = model(torch.from_numpy(state).float())
        likely = (scores[:, 1] - scores[:, 0]).sigmoid()
        right = likely > (0.5 if chance is None else chance[:, time])
        states.append(torch.from_numpy(state).float())
        actions.append(right.long())
        alive.append(torch.from_numpy(standing.copy()))
        state = moved(state, right.numpy())
        standing &= (np.abs(state[:, 0]) < 2.4) & (np.abs(state[:, 2]) < 0.2095)
        state[~standing] = 0.0
        if not standing.any():
            break
    return torch.stack(states), torch.stack(actions), torch.stack(alive)


def loss(model: nn.Module, inputs: Tensor, rewards: Tensor) -> Tensor:
    """Minus the log-likelihood of what was done, times what came after it above the average."""
    states, actions, alive = played(model, inputs[:, :4], inputs[:, 4:])
    gained = alive.float() * rewards
    to_come = gained.flip(0).cumsum(0).flip(0)
    mean = to_come.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    chosen = log_softmax(model(states), -1).gather(-1, actions[:, :, None]).squeeze(-1)
    return -(chosen * (to_come - mean) * alive).sum() / len(inputs)


def missed(model: nn.Module, count: int = 64) -> float:
    """The share of HORIZON that the pole doesn't stand, over fixed starts."""
    starts = episodes(torch.Generator().manual_seed(1), count)[0][:, :4]
    alive = played(model, starts, None)[2]
    return 1 - float(alive.sum()) / (count * HORIZON)
