"""What a serialised TensorRT-RTX engine computes in, read from its own bytes.

An engine inspector wants the engine opened, and that wants its GPU. But an engine of TensorRT-RTX carries the plan that its
just-in-time compiler follows as text: every product with its operands, every tensor with its type. So an engine that was built
for a GPU that is not here can still be counted. The text is not a documented format (seen in 1.7): what is not found in it is
not guessed.

    tensor={ ... name="blocks.3.fc1/Add.1" ... type=half }
    fully_connected={ name="blocks.3.fc1/MatMul_U172" output={...} input={"blocks.3/Add_5.fp16.1" "weight" ...} ... }
    corrltn={ ... }                                              a convolution
    function={ name=_gemm_mha_v2 ... input_args={ "q" "k" ... }  attention, in one kernel
"""

import re
from collections import Counter

TYPES: dict[str, str] = {
    "float": "fp32",
    "half": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8_e4m3": "fp8",
    "int4": "int4",
}

_CONSTANT = re.compile(rb"tensor=\{[^\n]*? const_payload_size=(\d+)[^\n]*? type=(\w+)")
_TENSOR = re.compile(rb'tensor=\{[^\n]*? name="([^"\n]+)"[^\n]*? type=(\w+)')
_PRODUCT = re.compile(rb'\n *(?:fully_connected|corrltn)=\{ name="[^"\n]*"[^\n]*? input=\{ ?("[^}\n]*")')
_ATTENTION = re.compile(rb'\n *function=\{ name=_\w*mha\w* [^\n]*? input_args=\{ ?("[^}\n]*")')


def products(engine: bytes) -> Counter[str]:
    """Products, convolutions and fused attentions by the type of what they read; empty where the plan cannot be read.

    An attention counts as the two products that it is made of."""
    types: dict[bytes, str] = {name: kind.decode() for name, kind in _TENSOR.findall(engine)}
    counts: Counter[str] = Counter()
    for pattern, weight in ((_PRODUCT, 1), (_ATTENTION, 2)):
        for operands in pattern.findall(engine):
            first = operands.split(b'"')[1]
            kind = types.get(first, "unknown")
            counts[TYPES.get(kind, kind)] += weight
    return counts


def weights(engine: bytes) -> Counter[str]:
    """Bytes of constants by what they are stored in; empty where the plan cannot be read."""
    counts: Counter[str] = Counter()
    for size, kind in _CONSTANT.findall(engine):
        name: str = kind.decode()
        counts[TYPES.get(name, name)] += int(size)
    return counts
