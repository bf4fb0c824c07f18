"""Graphs of a few nodes, with all the patterns of a DiT's block."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

BLOCK = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[B,8,32] x, float[B,1,32] gate, float[B,1,32] scale) => (float[B,8,32] y)
{
  [norm] n = LayerNormalization <axis = -1, stash_type = 1> (x, ones)
  [modulate] m = Mul (n, scale)
  [fc1] a = MatMul (m, w1)
  [bias1] b = Add (a, b1)
  [gelu] g = Gelu <approximate = "tanh"> (b)
  [turn] g1 = Transpose <perm = [0, 2, 1]> (g)
  [back] g2 = Transpose <perm = [0, 2, 1]> (g1)
  [fc2] c = MatMul (g2, w2)
  [gated] d = Mul (gate, c)
  [residual] y = Add (x, d)
}
"""


def block(seed: int = 0, largest: float = 0.3) -> ir.Model:
    """norm, modulate, fc1, bias, gelu, fc2, gate, residual; weights of about `largest`."""
    generator = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> ir.Tensor:
        return ir.tensor((largest * generator.standard_normal(shape)).astype(np.float32), name=name)

    weights = [tensor("w1", 32, 48), tensor("b1", 48), tensor("w2", 48, 32), ir.tensor(np.ones(32, np.float32), name="ones")]
    model = ir.from_onnx_text(BLOCK, initializers=weights)
    ShapeInferencePass(strict_mode=False)(model)
    return model


def feeds(count: int = 3, batch: int = 4, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Calls of `block`; one channel of what fc1 reads is thirty times the others."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        scale = np.ones((batch, 1, 32), np.float32)
        scale[..., 5] = 30
        x, gate = (generator.standard_normal(shape).astype(np.float32) for shape in ((batch, 8, 32), (batch, 1, 32)))
        found.append({"x": x, "gate": gate, "scale": scale})
    return found


def as_written(model: ir.Model, calls: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Outputs of a quantised graph with every node computed as it stands: on any CPU the same, where the 8-bit products that a
    runtime would make of it overflow on some (clipdit_export.processor)."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        ir.save(model, Path(folder, "model.onnx"))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")), options, providers=["CPUExecutionProvider"])
        read, made = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
        return [dict(zip(made, session.run(made, {name: call[name] for name in read}), strict=True)) for call in calls]
