"""Triton twins of `clipdit.model.ops`, and the backend that samples with them.

    norm.py        residual + gate * branch, LayerNorm or RMSNorm, modulate; forward and backward
    rotary.py      QK-norm and rotary positions of a packed projection in one pass
    attention.py   self-attention from the packed projection, and cross-attention: the kernel, or cuDNN's where that is faster
    mlp.py         linear + bias + GELU (cuBLASLt's), and SwiGLU
    solver.py      guidance and a row of the sampling table in one pass
    int8.py        products of 8-bit integers, and quantisation within what produces their input
    fp8.py         products of 8-bit floats (cuBLASLt's), likewise
    quantized.py   a DiT in 8 bits
    fused.py       the twins under the names and signatures of the plain operations: what `DiT.use` takes
    backend.py     the backend "triton": the fused operations, and on a GPU the whole loop as one CUDA graph

A kernel is a triple: the plain operation, its twin of the same name and signature, a test. Each twin is an operator of
`torch.library` (namespace `clipdit`) with a fake, so that torch.compile and torch.export pass through it, and with the plain
operation on a CPU. With TRITON_INTERPRET=1 the kernels themselves run on a CPU, in Triton's interpreter: slow, and exact enough
to test them.

Numbers: inputs and outputs in float32, bfloat16 or float16; statistics, softmax and sums in float32, one rounding at the end.
"""
