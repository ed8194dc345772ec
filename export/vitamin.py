"""ViTamin of any size (arXiv 2404.02132): the parts of timm, put together as timm does for the published ones.

Two stages of convolutions with LayerNorm at 1/4 and 1/8 of the image, a strided convolution to 1/16, then blocks of attention and
gated perceptrons with the mean over positions. open_clip asks timm for its trunks by name, so that a size of one's own needs one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
from timm.layers import HybridEmbed
from timm.models import VisionTransformer, register_model
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg


def register_trunk(widths: Sequence[int], depths: Sequence[int], heads: int, size: int) -> str:
    """Make timm know a trunk and give the name that it knows it by; the same sizes have the same name.

    Args:
        widths: channels of both stages, and of the blocks. ViTamin-S has 64, 128, 384.
        depths: blocks of both stages, and those with attention. ViTamin-S has 2, 4, 14.
        heads: of attention; ViTamin-S has 6.
        size: of a square image, in pixels; a multiple of 16.

    Raises:
        ValueError: not three widths and three depths, or an image of another size.
    """
    if len(widths) != 3 or len(depths) != 3 or size % 16:
        raise ValueError(f"ViTamin takes three widths, three depths and a multiple of 16 pixels, not {widths}, {depths}, {size}")
    name = "_".join(map(str, ("vitamin", *widths, *depths, heads, size)))
    if not timm.is_model(name):

        def make(pretrained: bool = False, *, drop_path_rate: float = 0.0, **_: Any) -> VisionTransformer:
            stages = MbConvStages(VitCfg(embed_dim=tuple(widths), depths=tuple(depths), stem_width=widths[0]))
            network = VisionTransformer(
                img_size=size,
                patch_size=1,
                embed_dim=widths[2],
                depth=depths[2],
                num_heads=heads,
                mlp_ratio=2.0,
                mlp_layer=GeGluMlp,
                class_token=False,
                global_pool="avg",
                drop_path_rate=drop_path_rate,
                embed_layer=partial(HybridEmbed, backbone=stages, proj=False),
            )
            network.default_cfg = {"pool_size": None, "input_size": (3, size, size)}
            return network

        make.__name__ = name
        register_model(make)
    return name
