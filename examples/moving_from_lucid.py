# %% [markdown]
# # Moving from lucid
# The documented scripts run with `torch` in place of lucid's tensors, and lucid's weight files load.

# %%
import sys
import warnings
from pathlib import Path

import safetensors.torch
import torch

from ncsn_fast import NCSN, NCSNConfig

QUICK = "--quick" in sys.argv
OUT = Path("example_lucid")
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)
size = {"in_channels": 3, "nf": 8 if QUICK else 32, "num_classes": 10}

# %% [markdown]
# The first API: keyword arguments.

# %%
model = NCSN(**size)
model.set_sigmas(NCSN.make_sigmas(50.0, 0.01, 10))
loss, labels = model.get_loss(torch.randn(4, 3, 16, 16))
loss.backward()

# %% [markdown]
# The second: a config.

# %%
model = NCSN(NCSNConfig(**size, sigmas=NCSN.make_sigmas(50.0, 0.01, 10)))
with torch.no_grad():
    images = model.sample(
        n_samples=2,
        image_size=8,
        in_channels=3,
        n_steps_each=1 if QUICK else 5,
        step_lr=2e-5,
        clip=True,
    )
assert images.shape == (2, 3, 8, 8)

# %% [markdown]
# A weight file of lucid's has running statistics under every norm, which were never used. They are dropped with a
# warning. Its pools pad with zeros, which `pool_padding="zero"` says. Here such a file is made first.

# %%
weights = model.state_dict()
for name in list(weights):
    if name.endswith("embed.weight"):
        norm = name.removesuffix("embed.weight") + "norm."
        weights[norm + "running_mean"] = torch.zeros(size["nf"])
        weights[norm + "running_var"] = torch.ones(size["nf"])
safetensors.torch.save_file(weights, OUT / "lucid.safetensors")

# %%
moved = NCSN(NCSNConfig(**size, pool_padding="zero"))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    moved.load_state_dict(safetensors.torch.load_file(OUT / "lucid.safetensors"))
print(said[0].message)
assert torch.equal(moved.sigmas, model.sigmas)
