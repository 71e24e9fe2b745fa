# %% [markdown]
# # Two Gaussians: what a score is
# The mixture of N((-3, 0), 0.25 I) and N((3, 0), 0.25 I) has a score in closed form at every noise level, which a
# network of 3-128-128-128-2, with sigma as a plain third input, learns from samples alone.

# %%
import sys
from pathlib import Path

import torch

from ncsn_fast import ScoreMLP, plots
from ncsn_fast.data import two_gaussians
from ncsn_fast.evaluation import score_errors
from ncsn_fast.schedules import make_sigmas

QUICK = "--quick" in sys.argv
OUT = Path("example_two_gaussians")
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

points = two_gaussians()
data = points.sample(500 if QUICK else 20_000)
sigmas = make_sigmas(10.0, 0.01, 10)

# %%
plots.ladder(sigmas, path=OUT / "ladder.png")

# %%
plots.perturbed(data, sigmas, (0, 3, 6, 9), OUT / "perturbed.png")

# %% [markdown]
# A training loop by hand. The loss is `E || sigma s(x + sigma z, sigma) + z ||^2`: sigma squared times the squared
# error of the score, so that all levels count alike. `weighting="one"` leaves the factor out.

# %%
model = ScoreMLP(dim=2, conditioning="concat", sigmas=sigmas)
steps = 2 if QUICK else 3000
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
losses = []
for _ in range(steps):
    batch = data[torch.randint(len(data), (512,))]
    loss, _ = model.get_loss(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())

# %%
plots.loss_curve(losses, OUT / "loss.png")

# %% [markdown]
# The learned score over the exact one.

# %%
plots.score_fields(model.score, sigmas, data, (0, 3, 6, 9), OUT / "fields.png", exact=points.score)
print("relative error by level:", score_errors(model, data[:5000], points.score))

# %%
samples = model.sample(50 if QUICK else 2000, n_steps_each=1 if QUICK else 100, seed=0)
print("share of the samples in each Gaussian:", points.mode_weights(samples))
plots.compare(data, samples, OUT / "samples.png")
