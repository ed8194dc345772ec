"""The graph of a user's own ONNX detector: preprocessing before it, decoding and suppression behind it."""

import onnx_ir as ir

from export.compose import compose_network
from export.detection_graph import append_head
from export.fuse_detector import detector_interface, inner_of
from export.onnx_detector import OnnxDetector
from export.onnx_network import count_weights
from export.spec import Fused, LoadedDetector


def fuse_onnx_detector(loaded: LoadedDetector, network: OnnxDetector) -> Fused:
    """uint8 [B,H,W,3] -> boxes, scores, classes; the detector is the reference.

    Raises:
        ExportError: see `compose_network`.
    """
    model, rewrites = compose_network(network.network, loaded.preprocessing)
    graph = ir.serde.deserialize_model(model)
    append_head(graph.graph, list(graph.graph.outputs), network.head)
    return Fused(
        graph=ir.serde.serialize_model(graph),
        interface=detector_interface(loaded),
        reference=network,
        parameters=count_weights(network.network.model),
        rewrites=rewrites,
        exact_tail=True,
        inner=inner_of(loaded),
    )
