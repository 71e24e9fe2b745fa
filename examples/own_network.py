# %% [markdown]
# # The fused operators in a network of your own
# `ncsn_fast.ops` are plain functions with gradients: use them in any `nn.Module`. Losses and samplers ask for nothing
# but a function that gives a score.

# %%
import sys

import torch
from torch import nn

from ncsn_fast import ops
from ncsn_fast.data import load_digits
from ncsn_fast.losses import score_matching_loss
from ncsn_fast.sampling import annealed_langevin, initial_state
from ncsn_fast.schedules import make_sigmas

QUICK = "--quick" in sys.argv
torch.manual_seed(0)
sigmas = make_sigmas(5.0, 0.1, 8)


# %%
class Layer(nn.Module):
    """Conditional instance norm, ELU and a 3x3 convolution, in one operator."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        table = torch.cat(
            [torch.ones(len(sigmas), channels), torch.zeros(len(sigmas), channels)], 1
        )
        self.norm = nn.Parameter(table)  # a row of scales and shifts for each noise level
        self.conv = nn.Conv2d(channels, out, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ops.norm_elu_conv3x3(x, labels, self.norm, self.conv.weight, self.conv.bias)


class Small(nn.Module):
    """Three layers and a pool."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.a, self.b, self.last = Layer(width, width), Layer(width, width), Layer(width, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = h + self.a(h, labels)
        h = h + self.b(ops.max_pool5(h), labels)
        return self.last(h, labels) / sigmas[labels].view(-1, 1, 1, 1)


# %%
model, digits = Small(), load_digits()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(2 if QUICK else 300):
    x = digits[torch.randint(len(digits), (32,))]
    labels = torch.randint(len(sigmas), (len(x),))
    loss = score_matching_loss(
        lambda noisy, labels=labels: model(noisy, labels), x, sigmas[labels], seed=step
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.1f}, where a score of zero has {digits[0].numel()}")

# %% [markdown]
# The sampler calls `ops.langevin_step_`, which makes its noise and updates the state in one pass. Sample i of a seed is
# the same whatever the batch.

# %%
samples = annealed_langevin(
    lambda x, level: model(x, torch.full((len(x),), level)),
    5.0 * initial_state((4, 1, 8, 8), "normal", seed=0),
    sigmas.tolist(),
    n_steps_each=1 if QUICK else 20,
    step_lr=0.2 * 0.1**2,
    denoise=True,
    seed=0,
)
print(samples.shape, "from", samples.min().item(), "to", samples.max().item())
