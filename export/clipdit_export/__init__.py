"""From a checkpoint to a bundle that runs in production: ONNX graphs, engines, and the proof that they are the same model."""
