"""One file of weights for all graphs of a bundle: equal tensors lie in it once, whichever graphs, sizes and variants use them."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

ALIGNMENT = 4096
"""Large tensors begin at a page, so that a runtime can map them instead of reading them."""
SMALLEST = 1024
"""Bytes from which a tensor leaves its graph; smaller ones are shapes and constants that a reader wants to see there."""


class WeightFile:
    """Being written. `with WeightFile(path) as weights:`; the file stands beside the graphs that use it, as ONNX demands."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[bytes, int] = {}
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, data: bytes) -> int:
        """The offset of these bytes in the file; they are written if they are new."""
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            if len(data) >= ALIGNMENT:
                self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]

    def take_from(self, model: ir.Model) -> None:
        """Move the large initializers of `model` here; the model then refers to them."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < SMALLEST or isinstance(tensor, ir.StringTensor):
                continue
            data = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self.add(data),
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=str(self.path.parent),
            )
        self._file.flush()  # whoever checks the graph reads the file
