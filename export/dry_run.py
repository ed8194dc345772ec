"""One forward pass before any work is spent on a network: does it take these images, and does it give logits?"""

import torch
from torch import Tensor, nn

from app.manifest import Preprocessing
from export.informative import sample_images
from export.spec import ExportError, image_tensor


def count_classes(network: nn.Module, preprocessing: Preprocessing) -> int:
    """Run two images through `network` in eval mode and give the number of classes C.

    Raises:
        ExportError: the network fails on the input size, or does not give finite float logits [B,C].
    """
    images = image_tensor(sample_images(preprocessing, 2, seed=0), preprocessing)
    size = f"{preprocessing.height}x{preprocessing.width}"
    try:
        with torch.no_grad():
            logits = network.eval()(images)
    except Exception as error:
        raise ExportError(f"The network fails on images of {size}: {error}") from error
    if not isinstance(logits, Tensor):
        raise ExportError(f"The network gives a {type(logits).__name__}; it must give one tensor of logits [B,C].")
    if logits.ndim != 2 or logits.shape[0] != 2 or not logits.is_floating_point():
        raise ExportError(f"The network gives {logits.dtype} {list(logits.shape)} for 2 images; it must give float logits [B,C].")
    if not torch.isfinite(logits).all():
        raise ExportError("The network gives logits that are not finite; check the weights.")
    return logits.shape[1]
