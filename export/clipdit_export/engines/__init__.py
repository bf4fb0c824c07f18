"""Engines of TensorRT and TensorRT-RTX from the graphs of a bundle, and the proof of what they compute in."""
