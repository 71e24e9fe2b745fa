# %% [markdown]
# # The checkerboard: a score network for points
# `ScoreMLP` takes sigma itself. The board's exact score is known, so every step can be checked against it.

# %%
import sys
from pathlib import Path

import torch

from ncsn_fast import ScoreMLP, plots
from ncsn_fast.data import Checkerboard
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, train

QUICK = "--quick" in sys.argv
OUT = Path("example_checkerboard")
torch.manual_seed(0)

board = Checkerboard()
data = board.sample(1000 if QUICK else 50_000)

# %% [markdown]
# Any sampler takes the trained network: `"ald"` (annealed Langevin), `"cas"`, `"pc"` or `"ode"`.

# %%
model = ScoreMLP(dim=2, sigmas=make_sigmas(5.0, 0.02, 10))
settings = TrainingSettings(iterations=2 if QUICK else 3000, batch_size=512, ema_decay=0.995)
model = train(model, data, settings, OUT, overwrite=True)

# %%
n = 50 if QUICK else 2000
ladders = {"ald": (10, 100), "pc": (100, 1), "ode": (100, 1)}  # levels, steps at each
for sampler, (levels, steps) in ladders.items():
    model.set_sigmas(make_sigmas(5.0, 0.02, levels))  # the network takes any sigma
    samples = model.sample(n, sampler=sampler, n_steps_each=1 if QUICK else steps, seed=0)
    share = board.is_dark(samples).float().mean()
    print(f"{sampler}: {share:.1%} of the samples in the dark squares")

# %%
plots.compare(data, samples, OUT / "samples.png")

# %%
model.set_sigmas(make_sigmas(5.0, 0.02, 10))
plots.score_fields(model.score, model.sigmas, data, path=OUT / "fields.png", exact=board.score)
