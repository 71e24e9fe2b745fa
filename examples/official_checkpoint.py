# %% [markdown]
# # A checkpoint of the papers' own code
# `python official_checkpoint.py checkpoint.pth cifar10.yml` draws images from a checkpoint of Song & Ermon's programs,
# of 2019 or 2020, by its configuration. Without one, a small checkpoint in their format is made first, of a network
# that was never trained: its images are noise, and all else is as with a real one.

# %%
import sys
from pathlib import Path

import torch

from ncsn_fast import plots
from ncsn_fast.data.official import to_images
from ncsn_fast.models.base import load_pretrained
from ncsn_fast.models.convert import load_official, save_official
from ncsn_fast.models.official import NCSNv2
from ncsn_fast.models.official_config import config_of, read_config, sampling_of, save_config
from ncsn_fast.sampling.official import interpolate
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training.published import official_settings

OUT = Path("example_official")
OUT.mkdir(exist_ok=True)
files = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
torch.manual_seed(0)

# %%
if not files:
    files = [OUT / "checkpoint.pth", OUT / "checkpoint.yml"]
    made = NCSNv2(3, nf=8, num_classes=8, sigmas=make_sigmas(5.0, 0.05, 8))
    how = {"n_steps_each": 2, "step_lr": 1e-4, "denoise": True}
    save_official(made, files[0])
    save_config(config_of(made, (16, 16), how), files[1])

# %% [markdown]
# The network is told from the file, with the averaged weights. Steps, step size and denoising are those of the
# configuration; one of 2019 has none, and the published ones go with its ladder.

# %%
config = read_config(files[1])
model = load_official(files[0], config=config)
settings = sampling_of(config) or official_settings(model)
images = model.sample(4, config["data"]["image_size"], **settings, seed=0)

# %% [markdown]
# These networks work on data in [0, 1].

# %%
print(type(model).__name__, sum(p.numel() for p in model.parameters()), "parameters")
plots.images(2 * images - 1, OUT / "samples.png", "drawn by the checkpoint's network")

# %% [markdown]
# The interpolation of the 2020 paper, as a function of a score: one row from a start, its noise turned from one to
# another.

# %%
steps = {name: settings[name] for name in ("n_steps_each", "step_lr")}
start = torch.rand(1, *images.shape[1:])
row = interpolate(model.score, start, model.sigmas.tolist(), n_interpolations=4, seed=0, **steps)
plots.images(2 * to_images(row) - 1, OUT / "interpolation.png", "from one noise to another")

# %% [markdown]
# Saved, it is an ordinary model of this project: `ncsn-fast sample`, `load_pretrained`. `ncsn-fast convert` does the
# same from the command line, and goes back to the authors' format.

# %%
model.save_pretrained(OUT / "model")
assert torch.equal(load_pretrained(OUT / "model").sigmas, model.sigmas)
