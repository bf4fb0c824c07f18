"""Run by the Python that has NVIDIA ModelOpt: a graph and what it was called with go in, the graph with Q/DQ comes out.

    python modelopt_runner.py                                             prints ModelOpt's version
    python modelopt_runner.py GRAPH.onnx CALLS.npz MODE EXCLUDED.json OUT.onnx

It imports nothing of clipdit, which that Python does not have. Exit code 3: ModelOpt cannot be imported, the reason on stderr.
"""

import json
import re
import sys

NO_MODELOPT = 3


def main(*given: str) -> int:
    try:
        import modelopt  # pyright: ignore[reportMissingImports]  # that of the other Python
        import numpy as np
        from modelopt.onnx.quantization import quantize  # pyright: ignore[reportMissingImports]  (that of the other Python)
    except ImportError as error:
        print(error, file=sys.stderr)
        return NO_MODELOPT
    if not given:
        print(modelopt.__version__)
        return 0
    graph, calls, mode, excluded, out = given
    with open(excluded, encoding="utf-8") as file:
        names = json.load(file)
    with np.load(calls) as arrays:
        calibration = {name: arrays[name] for name in arrays.files}
    quantize(
        onnx_path=graph,
        quantize_mode=mode,
        calibration_data=calibration,  # images end to end; the batch is free, so it calls the graph with one after the other
        calibration_eps=["cpu"],
        nodes_to_exclude=[f"{re.escape(name)}$" for name in names],  # they are regular expressions for the beginning of a name
        high_precision_dtype="fp32",  # its default, fp16, knows nothing of the fp32 islands of a DiT
        output_path=out,
        log_level="WARNING",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
