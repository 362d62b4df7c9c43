"""What the standard ONNX ops mean in torch: one table a family of ops."""
