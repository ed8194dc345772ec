"""The exporter: a torch network or an ONNX file becomes a verified engine in a model repository."""
