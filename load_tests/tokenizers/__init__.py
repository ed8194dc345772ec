"""Tokenizers over HTTP beside two bounds in process: onnxruntime doing the same work, and torch doing the forward pass alone."""
