"""Running models: in ONNX Runtime, and as differentiable torch graphs."""
