"""One forward pass before any work is spent on a network: does it take these images, and does it give what its task needs?"""

import hashlib

import torch
from torch import Tensor, nn

from app.manifest import Codebook, Detection, Preprocessing
from export.detector import Detector
from export.dual_encoder import DualEncoder
from export.grounder import Grounder
from export.informative import sample_images
from export.spec import CleanedVocabulary, ExportError, Vocabulary, image_tensor
from export.tokenizer import Tokenizer


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


def measure_codebook(network: Tokenizer, preprocessing: Preprocessing) -> Codebook:
    """Run one image through `network` in eval mode, there and back, and describe its codebooks.

    Raises:
        ExportError: the network fails on the input size, or its latents, codes and images do not fit together or are not finite.
    """
    image = image_tensor(sample_images(preprocessing, 1, seed=0), preprocessing)
    size = f"{preprocessing.height}x{preprocessing.width}"
    try:
        with torch.no_grad():
            codes = network.eval().codebooks()
            latents = network.encode(image)
            restored = network.detokenize(network.nearest(latents))
    except Exception as error:
        raise ExportError(f"The tokenizer fails on images of {size}: {error}") from error
    count, codes_each, channels = codes.shape
    if latents.ndim != 5 or latents.shape[:3] != (1, count, channels) or restored.shape != image.shape:
        raise ExportError(
            f"The tokenizer gives latents {list(latents.shape)} and an image {list(restored.shape)} for an image of {size} and "
            f"codebooks {list(codes.shape)}; see export/tokenizer.py."
        )
    if not all(torch.isfinite(tensor).all() for tensor in (codes, latents, restored)):
        raise ExportError("The tokenizer gives numbers that are not finite; check the weights.")
    return Codebook(
        id=hashlib.sha256(codes.float().numpy().astype("<f4").tobytes()).hexdigest(),
        count=count,
        size=codes_each,
        channels=channels,
        bits=(codes_each - 1).bit_length(),
        grid=(latents.shape[3], latents.shape[4]),
    )


def measure_detector(network: Detector, preprocessing: Preprocessing) -> Detection:
    """Run two images through `network` in eval mode, to their rows, and describe these.

    Raises:
        ExportError: the network fails on the input size, or its logits, boxes and masks do not fit together or are not finite.
    """
    images = image_tensor(sample_images(preprocessing, 2, seed=0), preprocessing)
    size = f"{preprocessing.height}x{preprocessing.width}"
    try:
        with torch.no_grad():
            queries = network.eval().detect(images, None)
            scores = network.scores(queries.logits)
            rows = network.choose(queries, scores)
    except Exception as error:
        raise ExportError(f"The detector fails on images of {size}: {error}") from error
    wanted = None if network.mask_coefficients is None else network.mask_coefficients.count
    found = None if queries.masks is None else queries.masks.shape[2]
    if queries.boxes.shape != (2, queries.logits.shape[1], 4) or wanted != found:
        raise ExportError(
            f"The detector gives logits {list(queries.logits.shape)}, boxes {list(queries.boxes.shape)} and masks of {found} "
            "coefficients for 2 images; see export/detector.py."
        )
    if not all(torch.isfinite(tensor).all() for tensor in queries if tensor is not None):
        raise ExportError("The detector gives numbers that are not finite; check the weights.")
    return Detection(
        queries=rows.scores.shape[1],
        classes=scores.shape[2],
        score=network.score,
        content=network.content,
        masks=network.mask_coefficients,
    )


def check_grounder(network: Grounder, preprocessing: Preprocessing, vocabulary: Vocabulary) -> None:
    """Run two images with a phrase each through `network` in eval mode.

    Raises:
        ExportError: the network does not know all ids of the tokenizer, fails on the input size, or does not give finite boxes.
    """
    if vocabulary.size > network.vocabulary:
        raise ExportError(
            f"The tokenizer has {vocabulary.size} tokens, the network knows {network.vocabulary}; they do not go together."
        )
    images = image_tensor(sample_images(preprocessing, 2, seed=0), preprocessing)
    words = torch.ones((2, network.length), dtype=torch.int64)
    try:
        with torch.no_grad():
            boxes = network.eval()(images, words, words)
    except Exception as error:
        size = f"{preprocessing.height}x{preprocessing.width}"
        raise ExportError(f"The network fails on images of {size} with {network.length} tokens: {error}") from error
    if boxes.shape != (2, 4) or not torch.isfinite(boxes).all():
        raise ExportError(f"The network gives {list(boxes.shape)} for 2 images and phrases; it must give finite boxes [B,4].")


def measure_dual_encoder(network: DualEncoder, preprocessing: Preprocessing, vocabulary: CleanedVocabulary) -> int:
    """Run two images and two texts through `network` in eval mode and give the number of dimensions of their vectors.

    Raises:
        ExportError: the network does not know all ids of the tokenizer, fails on the input size, or gives vectors that do not fit.
    """
    if vocabulary.size > network.vocabulary:
        raise ExportError(
            f"The tokenizer has {vocabulary.size} tokens, the network knows {network.vocabulary}; they do not go together."
        )
    images = image_tensor(sample_images(preprocessing, 2, seed=0), preprocessing)
    ids = torch.from_numpy(vocabulary.rows(["a photo", "another one"]))
    try:
        with torch.no_grad():
            seen, read = network.eval().encode_images(images), network.encode_texts(ids)
    except Exception as error:
        size = f"{preprocessing.height}x{preprocessing.width}"
        raise ExportError(f"The network fails on images of {size} or texts of {network.length} tokens: {error}") from error
    if seen.ndim != 2 or seen.shape != read.shape or not torch.isfinite(torch.stack([seen, read])).all():
        raise ExportError(
            f"The network gives {list(seen.shape)} for 2 images and {list(read.shape)} for 2 texts; "
            "they must be finite vectors of one size."
        )
    return seen.shape[1]
