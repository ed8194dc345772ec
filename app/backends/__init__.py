"""Engines that compute: in-process onnxruntime, a Triton server, and a deterministic fake."""
