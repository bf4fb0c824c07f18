"""Triton's interpreter rounds to bfloat16 and to 8 bits as a GPU does, to the nearest; by itself it cuts off, which is twice as
far off."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

# Triton is there for Linux alone
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def rounding_to_the_nearest():
    import triton.language as tl
    from triton.runtime import interpreter

    cutting_off = interpreter._convert_float
    rounded = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def convert(data, from_type, to_type, mode):
        if from_type == tl.float32 and to_type in rounded:
            dtype, bits = rounded[to_type]
            return torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(dtype).view(bits).numpy()
        return cutting_off(data, from_type, to_type, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
