# %% [markdown]
# # Images of 28x28 with a small convolutional network
# `ScoreCNN` is conditioned on sigma itself, so it can train on any sigma between two ends, a random one for each image
# and step. Run it on images of your own, `python images_28x28.py mnist.npz` (an array `(N, 28, 28)` of bytes), or
# without an argument on scikit-learn's digits, enlarged.

# %%
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from ncsn_fast import ScoreCNN, plots
from ncsn_fast.data import load_digits, load_images
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, train

QUICK = "--quick" in sys.argv
OUT = Path("example_images_28x28")
torch.manual_seed(0)

files = [argument for argument in sys.argv[1:] if argument.endswith((".npz", ".npy"))]
if files:
    images = load_images(files[0], image_size=28, channels=1)
else:
    images = F.interpolate(load_digits(), size=(28, 28), mode="bicubic").clamp(-1, 1)

# %% [markdown]
# `levels="continuous"`: sigma is log-uniform between the ends of the ladder. The ladder itself is for sampling.

# %%
model = ScoreCNN(nf=8 if QUICK else 32, sigmas=make_sigmas(20.0, 0.03, 12))
settings = TrainingSettings(
    iterations=2 if QUICK else 600,
    batch_size=4 if QUICK else 32,
    lr=2e-3,
    ema_decay=0.98,
    levels="continuous",
)
model = train(model, images, settings, OUT, overwrite=True)

# %% [markdown]
# Langevin dynamics on that ladder.

# %%
n = 4 if QUICK else 36
options = {"denoise": True, "seed": 0}
samples = model.sample(n, n_steps_each=1 if QUICK else 10, **options)
plots.images(samples.clamp(-1, 1), OUT / "ald.png", "annealed Langevin dynamics")

# %% [markdown]
# Two alternatives want a fine ladder and one step at each level; any ladder will do, as the network takes any sigma.
# They are the reverse-time SDE with a corrector, and the probability-flow ODE, which adds no noise at all.

# %%
model.set_sigmas(make_sigmas(20.0, 0.03, 3 if QUICK else 100))
samples = model.sample(n, sampler="pc", n_steps_each=1, **options)
plots.images(samples.clamp(-1, 1), OUT / "pc.png", "predictor-corrector")

# %%
samples = model.sample(n, sampler="ode", n_steps_each=1, **options)
plots.images(samples.clamp(-1, 1), OUT / "ode.png", "probability-flow ODE")

# %%
plots.images(images[:n], OUT / "data.png", "data")
