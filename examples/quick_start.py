# %% [markdown]
# # Quick start: an NCSN on handwritten digits
# Real 8x8 digits come with scikit-learn. A minute of training is enough for strokes, not yet for good digits:
# `make demo` trains longer. `--quick` takes a few steps only, to see that all of it runs.

# %%
import sys
from pathlib import Path

import torch

from ncsn_fast import NCSN, NCSNConfig, plots
from ncsn_fast.data import load_digits
from ncsn_fast.training import TrainingSettings, train

QUICK = "--quick" in sys.argv
OUT = Path("example_quick_start")
torch.manual_seed(0)

# %% [markdown]
# The network, with its ladder of noise levels: from wide enough to cover the data down to what the eye does not see.

# %%
config = NCSNConfig(
    in_channels=1,
    nf=8 if QUICK else 24,
    num_classes=10,
    dilations=(1, 1, 2, 2),
    norm="instance++",
    sigmas=NCSN.make_sigmas(5.0, 0.08, 10),
)
model = NCSN(config)

# %% [markdown]
# Training writes a checkpoint and the losses into a folder, and gives back the moving average of the weights. A loop of
# your own needs `model.get_loss(x)` only.

# %%
settings = TrainingSettings(iterations=2 if QUICK else 300, batch_size=64, lr=2e-3, ema_decay=0.98)
model = train(model, load_digits(), settings, OUT, overwrite=True)

# %%
digits = model.sample(
    n_samples=4 if QUICK else 36,
    image_size=8,
    n_steps_each=1 if QUICK else 20,
    step_lr=0.2 * config.sigmas[-1] ** 2,
    clip=False,
    denoise=True,
    init_dist="normal",
    seed=0,
)
plots.images(digits.clamp(-1, 1), OUT / "digits.png", "sampled from the network")

# %% [markdown]
# What is saved loads in one line.

# %%
model.save_pretrained(OUT / "my_ncsn")
assert NCSN.from_pretrained(OUT / "my_ncsn").config == model.config
