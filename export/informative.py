"""Random weights that make verification see: every parameter counts, and different images get different answers.

At their libraries' default initialisation many networks hardly look at the image: residual branches are scaled by 1e-5, and a
black image moves the probabilities by less than a rounding error. An engine that dropped a block would then pass for right.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.manifest import Preprocessing
from export.detector import Detector
from export.dual_encoder import DualEncoder
from export.grounder import Grounder
from export.phrase_detector import PhraseDetector
from export.phrases import grounding_phrases
from export.spec import CleanedVocabulary, ExportError, Vocabulary, image_tensor
from export.tokenizer import Tokenizer

_LOGIT_STD = 3.0
_PIXEL_STD = 45.0  # levels
_BOX_STD = 1.0  # of the logits of a box
_REFINEMENT = 0.25  # of what a layer would else move boxes by
_ALIKE = 0.1  # of the frame, between neighbouring queries' boxes
_SHARPENING_ROUNDS = 4
_LARGEST_GAIN = 10.0  # queries may not differ at all yet
_CENTRING_ROUNDS = 8  # several heads share the work, so each round leaves a part


def sample_images(preprocessing: Preprocessing, count: int, seed: int) -> Tensor:
    """Synthetic pictures uint8 [count,H,W,3]: coloured gradients of random layout, contrast and grain."""
    random = torch.Generator().manual_seed(seed)
    shape = (count, 3, preprocessing.height, preprocessing.width)
    coarse = torch.rand((count, 3, 4, 4), generator=random)
    smooth = nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=True)
    tint = torch.rand((count, 3, 1, 1), generator=random)
    grain = torch.randn(shape, generator=random) * 0.2 * torch.rand((count, 1, 1, 1), generator=random)
    pictures = (0.6 * smooth + 0.4 * tint + grain).clamp(0, 1) * 255
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def make_informative(network: nn.Module, images: Tensor, seed: int) -> None:
    """Redraw every parameter and BatchNorm statistic of `network` in place; it ends in eval mode.

    Args:
        images: normalised float32 [B,3,H,W], B >= 2, all different.

    Raises:
        ExportError: activations do not stay finite, or the logits do not depend on the image.
    """
    random = torch.Generator().manual_seed(seed)
    _redraw_parameters(network, random)
    _settle_batch_norms(network, images, random)
    _spread_logits(network, images)


def informative_weights(network: nn.Module, preprocessing: Preprocessing, seed: int) -> None:
    """`make_informative` on synthetic pictures of the network's own size."""
    make_informative(network, image_tensor(sample_images(preprocessing, 8, seed), preprocessing), seed)


@torch.no_grad()
def informative_detector(network: Detector, preprocessing: Preprocessing, seed: int) -> None:
    """Redraw every parameter of `network` in place; its logits vary over queries and images, and the rows' scores stay below 1.

    Raises:
        ExportError: activations do not stay finite, or the logits do not depend on the image.
    """
    random = torch.Generator().manual_seed(seed)
    refining = _refining_layers(network)
    _redraw_parameters(network, random)
    for layer in refining:
        layer.weight *= _REFINEMENT
    images = image_tensor(sample_images(preprocessing, 8, seed), preprocessing)
    _settle_batch_norms(network, images, random)
    _spread_queries(network, images)


@torch.no_grad()
def informative_phrase_detector(network: PhraseDetector, preprocessing: Preprocessing, seed: int) -> None:
    """Redraw every parameter of `network` in place; the logits of the phrases that it is asked for vary over queries and images.

    Raises:
        ExportError: activations do not stay finite, or the logits do not depend on the image.
    """
    random = torch.Generator().manual_seed(seed)
    _redraw_parameters(network, random)
    images = image_tensor(sample_images(preprocessing, 8, seed), preprocessing)
    head = network.library.class_head
    head.logit_scale.weight *= 0.1
    head.logit_shift.weight *= 0.3  # it is the same for all phrases
    head.logit_scale.bias.zero_()
    spread = network.detect(images, None).logits.std(dim=0).mean()
    if not torch.isfinite(spread) or spread < 1e-6:
        raise ExportError("With random weights the detector's logits are not finite or do not depend on the image.")
    gain = (_LOGIT_STD / 2 / spread).clamp(min=1)  # an image's logits are high or low together
    head.logit_scale.bias.copy_((gain - 1)[None])
    best = network.detect(images, None).logits.amax(-1)
    lasts = best.topk(min(network.rows, best.shape[1] // 2)).values[:, -1]
    head.logit_shift.bias -= lasts.quantile(0.25) / gain


@torch.no_grad()
def informative_tokenizer(network: Tokenizer, preprocessing: Preprocessing, seed: int) -> None:
    """Redraw every parameter of `network` in place; its codes become latents of synthetic pictures, and its images fill 0 to 255.

    Raises:
        ExportError: activations do not stay finite, or the latents do not depend on the image.
    """
    random = torch.Generator().manual_seed(seed)
    _redraw_parameters(network, random)
    images = image_tensor(sample_images(preprocessing, 8, seed), preprocessing)
    latents = torch.cat([network.encode(image[None]) for image in images])
    network.set_codebooks(_draw_codes(latents, network.codebooks().shape[1], random))
    _spread_pixels(network, network.nearest(latents[:2]), preprocessing)


@torch.no_grad()
def informative_grounder(network: Grounder, preprocessing: Preprocessing, vocabulary: Vocabulary, seed: int) -> None:
    """Redraw every parameter of `network` in place; the logits of its boxes vary by `_BOX_STD` over pictures and phrases, around 0.

    Raises:
        ExportError: activations do not stay finite, or the boxes do not depend on picture and phrase.
    """
    random = torch.Generator().manual_seed(seed)
    _redraw_parameters(network, random)
    images = image_tensor(sample_images(preprocessing, 8, seed), preprocessing)
    ids, mask = map(torch.from_numpy, vocabulary.rows(grounding_phrases()[:8], network.length))
    ran: list[nn.Linear] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Linear):
            ran.append(module)

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    pairs = [(image, (image + shift) % 8) for image in range(8) for shift in (0, 1)]
    logits = torch.cat([network.locate(images[i, None], ids[j, None], mask[j, None]) for i, j in pairs])
    for hook in hooks:
        hook.remove()
    spread = logits.std(0).mean()
    if not torch.isfinite(logits).all() or spread < 1e-6:
        raise ExportError("With random weights the network's boxes are not finite or do not depend on picture and phrase.")
    head = ran[-1]
    head.weight *= _BOX_STD / spread
    head.bias.copy_((head.bias - logits.mean(0)) * _BOX_STD / spread)


@torch.no_grad()
def informative_dual_encoder(network: DualEncoder, preprocessing: Preprocessing, vocabulary: CleanedVocabulary, seed: int) -> None:
    """Redraw every parameter of `network` in place, scale and bias apart; what the vectors of all images, or of all texts, have in
    common is taken out of them, since vectors of unit length that differ little from one another would hide most faults.

    Raises:
        ExportError: vectors do not stay finite, or do not depend on image and text.
    """
    random = torch.Generator().manual_seed(seed)
    single = [(parameter, parameter.clone()) for parameter in network.parameters() if parameter.numel() == 1]
    _redraw_parameters(network, random)
    for parameter, value in single:
        parameter.copy_(value)
    images = image_tensor(sample_images(preprocessing, 8, seed), preprocessing)
    _settle_batch_norms(network.image_tower, images, random)
    ids = torch.from_numpy(vocabulary.rows(grounding_phrases()[:8]))
    for features, layer in zip((network.image_features(images), network.text_features(ids)), network.last_layers, strict=True):
        if not torch.isfinite(features).all() or features.std(0).mean() < 1e-6:
            raise ExportError("With random weights the network's vectors are not finite or do not depend on image and text.")
        _centre(layer, features.mean(0))


def _centre(layer: nn.Linear | nn.Parameter, mean: Tensor) -> None:
    """Take the `mean` [D] out of what a layer gives: off its bias, or else, of weights alone, that direction out of all of them."""
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        layer.bias.sub_(mean)
        return
    direction = mean / mean.norm()
    weight = layer.weight.T if isinstance(layer, nn.Linear) else layer  # [width,D]
    weight.sub_(torch.outer(weight @ direction, direction))


@torch.no_grad()
def informative_chat(network: Any, seed: int) -> None:
    """Redraw every parameter in place; the logits of a chat model's tokens then lie much further apart than rounding."""
    _redraw_parameters(network, torch.Generator().manual_seed(seed))
    head = network.get_output_embeddings()
    head.weight *= _LOGIT_STD


def _refining_layers(network: Detector) -> list[nn.Linear]:
    """Those that move a box, layer by layer: four numbers of weights that start at zero.

    Steps as long as a box feed on one another: each layer looks elsewhere than the one before, and the network in float32 is then
    further from itself in float64 than an engine may be.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 4]
    return [layer for layer in layers if not layer.weight.any()]


def _draw_codes(latents: Tensor, count: int, random: torch.Generator) -> Tensor:
    """`count` codes [K,count,D]: latents [B,K,D,h,w] drawn at random, each moved by a part of what they differ by."""
    points = latents.permute(1, 0, 3, 4, 2).flatten(1, 3)
    spread = points.std(1, keepdim=True)
    if not torch.isfinite(points).all() or spread.min() < 1e-6:
        raise ExportError("With random weights the tokenizer's latents are not finite or do not depend on the image.")
    rows = torch.randint(points.shape[1], (count,), generator=random)
    return points[:, rows] + 0.3 * spread * torch.randn((len(points), count, points.shape[2]), generator=random)


def _spread_pixels(network: Tokenizer, tokens: Tensor, preprocessing: Preprocessing) -> None:
    """Scale and centre the last layer until most values of the images lie within 0 to 255, around the middle."""
    ran: list[nn.Conv2d | nn.ConvTranspose2d] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            ran.append(module)

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    images = network.detokenize(tokens)
    for hook in hooks:
        hook.remove()
    if not torch.isfinite(images).all():
        raise ExportError("With random weights the tokenizer's images are not finite.")
    last = ran[-1]
    deviation = torch.tensor(preprocessing.std) / preprocessing.scale
    middle = (127.5 - torch.tensor(preprocessing.mean) / preprocessing.scale) / deviation
    gain = _PIXEL_STD / deviation / images.std((0, 2, 3))
    outputs = 1 if isinstance(last, nn.ConvTranspose2d) else 0
    last.weight *= gain.view([-1 if axis == outputs else 1 for axis in range(4)])
    assert last.bias is not None
    last.bias.copy_(middle + gain * (last.bias - images.mean((0, 2, 3))))


def _redraw_parameters(network: nn.Module, random: torch.Generator) -> None:
    owners = {id(p): module for module in network.modules() for p in module.parameters(recurse=False)}
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point():
            parameter.copy_(_redraw(name, parameter, owners[id(parameter)], random))
    network.eval()  # modules that cache tables made of parameters drop them here


def _redraw(name: str, value: Tensor, owner: nn.Module, random: torch.Generator) -> Tensor:
    """New values by what the parameter does, which its initial values tell: scales near 1, biases near 0, weights by fan-in."""
    noise = torch.randn(value.shape, generator=random, dtype=value.dtype)
    kind = name.rpartition(".")[2]
    constant = bool((value == value.flatten()[0]).all())
    if (kind == "weight" and "Norm" in type(owner).__name__) or (constant and value.flatten()[0] != 0):
        return 1 + 0.1 * noise
    if kind.endswith("weight") and value.ndim >= 2 and not isinstance(owner, nn.Embedding):
        return noise / math.sqrt(math.prod(value.shape[1:]))
    if value.ndim == 1:
        return 0.1 * noise if constant else value + 0.1 * noise
    return 0.3 * noise


def _settle_batch_norms(network: nn.Module, images: Tensor, random: torch.Generator) -> None:
    """Take each BatchNorm's statistics from the images, so that activations stay in range, then disturb them."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        network.detect(images, None) if isinstance(network, Detector) else network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        if mean is not None and variance is not None:
            mean += 0.1 * variance.sqrt() * torch.randn(mean.shape, generator=random)
            variance *= torch.exp(0.2 * torch.randn(variance.shape, generator=random))


def _spread_logits(network: nn.Module, images: Tensor) -> None:
    """Scale and centre the head until each class's logit varies over the images by `_LOGIT_STD` around 0."""
    heads = _heads(network, images)
    logits = network(images)
    spread = logits.std(dim=0).mean()
    if not torch.isfinite(logits).all() or spread < 1e-6:
        raise ExportError("With random weights the network's logits are not finite or do not depend on the image.")
    for head in heads:
        head.weight *= _LOGIT_STD / spread
        if head.bias is not None:
            head.bias *= _LOGIT_STD / spread
    for _ in range(1 if len(heads) == 1 else _CENTRING_ROUNDS):
        centre = network(images).mean(dim=0)
        for head in heads:
            if head.bias is not None:
                head.bias -= centre / len(heads)


def _spread_queries(network: Detector, images: Tensor) -> None:
    """Scale the layer that gives the logits until each varies by `_LOGIT_STD`, and centre them; of sigmoids, where rows begin."""
    _sharpen_queries(network, images)
    ran: list[tuple[nn.Linear, Tensor]] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            ran.append((module, output))

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    logits = network.detect(images, None).logits
    for hook in hooks:
        hook.remove()
    head = next((layer for layer, output in reversed(ran) if output.shape == logits.shape and torch.equal(output, logits)), None)
    spread = logits.std(dim=0).mean()
    if head is None or head.bias is None or not torch.isfinite(logits).all() or spread < 1e-6:
        raise ExportError(
            "With random weights the detector's logits are not those of a linear layer, or do not depend on the image."
        )
    gain = _LOGIT_STD / spread
    scaled = logits * gain
    centre = scaled.mean((0, 1))
    if network.score == "sigmoid":
        pairs = (scaled - centre).flatten(1)
        lasts = pairs.topk(min(network.rows, pairs.shape[1] // 2)).values[:, -1]
        centre = centre + lasts.quantile(0.25)  # images differ much, and a score that is all but 0 tells little
    else:
        centre[-1] += _LOGIT_STD  # "no object", which else outdoes everything in some images
    head.weight *= gain
    head.bias.copy_(head.bias * gain - centre)


def _sharpen_queries(network: Detector, images: Tensor) -> None:
    """Lengthen learned queries, which may only say where attention looks, until an image's boxes differ; else let its places."""
    for _ in range(_SHARPENING_ROUNDS):
        boxes = network.detect(images, None).boxes
        if (boxes - boxes.roll(1, 1)).abs().sum(-1).median() >= _ALIKE:
            return
        for module in network.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == boxes.shape[1]:
                module.weight *= 4
    _settle_layer_norms(network, images)


def _settle_layer_norms(network: Detector, images: Tensor) -> None:
    """Take out of each LayerNorm's output what all places of all images have in common; what is left gets a deviation of 1.

    A deep transformer with random weights else averages its places away: attention adds the same to all of them, layer by layer.
    """
    settled: set[nn.Module] = set()

    def settle(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        assert isinstance(module, nn.LayerNorm)
        if module in settled:
            return None
        settled.add(module)
        mean = output.flatten(0, -2).mean(0)
        gain = (1 / (output - mean).std()).clamp(max=_LARGEST_GAIN)
        module.weight.mul_(gain)
        module.bias.sub_(mean).mul_(gain)
        return (output - mean) * gain

    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    last = [norm for norm in norms if norm.elementwise_affine and getattr(norm, "data_format", "channels_last") == "channels_last"]
    hooks = [norm.register_forward_hook(settle) for norm in last if norm.bias is not None]
    network.detect(images, None)
    for hook in hooks:
        hook.remove()


def _heads(network: nn.Module, images: Tensor) -> list[nn.Linear | nn.Conv2d]:
    """The layers that give the logits: the last ones to run, all as wide as there are classes."""
    ran: list[nn.Linear | nn.Conv2d] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            ran.append(module)

    hooks = [module.register_forward_hook(record) for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    classes = network(images[:1]).shape[1]
    for hook in hooks:
        hook.remove()
    heads: list[nn.Linear | nn.Conv2d] = []
    for layer in reversed(ran):
        if layer.weight.shape[0] != classes:
            break
        if layer not in heads:
            heads.append(layer)
    return heads
