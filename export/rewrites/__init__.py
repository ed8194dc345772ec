"""The table of rewrites: adding one is one file beside this one and one line here."""

from torch import nn

from export.rewrites.base import Rewrite
from export.rewrites.convit import BAKED_POSITIONS
from export.rewrites.crossvit import MATRIX_RESIZE
from export.rewrites.cvt import MATMUL_ATTENTION
from export.rewrites.deformable import GATHERED_ATTENTION
from export.rewrites.detr import PLAIN_MASKS
from export.rewrites.explicit_attention import EXPLICIT_ATTENTION
from export.rewrites.global_mean import GLOBAL_MEAN
from export.rewrites.hiera import GATHERED_UNROLL
from export.rewrites.rt_detr import ANY_BATCH
from export.rewrites.volo import ONE_HOT_OUTLOOK
from export.rewrites.yolos import BAKED_TABLES

REWRITES: tuple[Rewrite, ...] = (
    EXPLICIT_ATTENTION,
    GLOBAL_MEAN,
    BAKED_POSITIONS,
    MATRIX_RESIZE,
    MATMUL_ATTENTION,
    GATHERED_UNROLL,
    ONE_HOT_OUTLOOK,
    GATHERED_ATTENTION,
    PLAIN_MASKS,
    BAKED_TABLES,
    ANY_BATCH,
)


def rewrite(network: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Replace what matches, from the leaves up, in place; gives the network and the names of the rewrites that were used.

    The network has run once before, so that tables which depend on the image size are there.
    """
    used: dict[str, None] = {}
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        original = module
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = visit(child)
        for candidate in REWRITES:
            if candidate.matches(module):
                used[candidate.name] = None
                module = candidate.replace(module)
        done[id(original)] = module
        return module

    return visit(network), tuple(used)
