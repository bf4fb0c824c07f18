"""Bugs that people make in such kernels, as changes to their source: what the tests must find.

Each is (file, what it says, what it says instead, what that does). The first place in the file that says it is changed."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    bug: str
    tests: str = ""
    """In test_{tests}.py; that of the file where there is none."""


NORM, ROTARY, ATTENTION, MLP, SOLVER, INT8 = "norm", "rotary", "attention", "mlp", "solver", "int8"

MUTANTS = [
    # the first `forward_kernel` of norm.py and what it calls
    Mutant(NORM, "image = tl.program_id(0) // rows", "image = tl.program_id(0) % rows", "another image's modulation"),
    Mutant(NORM, "image = tl.program_id(0) // rows_per_image", "image = 0", "the first image's modulation for all"),
    Mutant(
        NORM,
        "    squares = tl.sum(x1 * x1, axis=0)",
        "    x1 = x1.to(out_normed.dtype.element_ty).to(tl.float32)\n    squares = tl.sum(x1 * x1, axis=0)",
        "statistics of what is rounded to half precision",
    ),
    Mutant(
        NORM,
        "x = tl.load(residual + at + columns, mask=inside, other=0.0)",
        "x = tl.load(residual + at + columns)",
        "reads beyond the row",
    ),
    Mutant(NORM, "image * gate_stride, image", "image * D, image", "the stride of a view is ignored"),
    Mutant(NORM, "stored = (x + y).to", "stored = y.to", "no residual"),
    Mutant(
        NORM,
        "tl.store(out_residual + at + columns, stored, mask=inside)",
        "tl.store(out_residual + at + columns, stored)",
        "writes beyond the row",
    ),
    Mutant(NORM, "x = stored.to(tl.float32)", "x = x + y", "normalises what was not stored"),
    Mutant(NORM, "second = D1 + tl.arange(0, D2)", "second = tl.arange(0, D2)", "the first part of a row twice"),
    Mutant(NORM, "        total += tl.sum(x2, axis=0)", "        total += 0.0", "the mean of the first part"),
    Mutant(NORM, "mean = tl.div_rn(total, D + 0.0)", "mean = tl.div_rn(total, D1 + D2 + 0.0)", "the mean over the padded width"),
    Mutant(NORM, "x2 = tl.where(second < D, x2 - mean, 0.0)", "x2 -= mean", "padding counts in the variance"),
    Mutant(NORM, "    if not RMS:", "    if RMS:", "LayerNorm and RMSNorm exchanged"),
    Mutant(NORM, "        squares += tl.sum(x2 * x2, axis=0)", "        squares += 0.0", "the variance of the first part"),
    Mutant(NORM, "squares / D + EPS", "squares / (D1 + D2) + EPS", "the variance over the padded width"),
    Mutant(NORM, "squares / D + EPS", "squares / (D - 1) + EPS", "the unbiased variance"),
    Mutant(NORM, "squares / D + EPS", "squares / D", "no epsilon"),
    Mutant(
        NORM,
        "squares = tl.sum(x1 * x1, axis=0)",
        "offset = 0.0 if RMS else mean\n    squares = tl.sum((x1 + offset) * (x1 + offset), axis=0) - offset * offset * D1",
        "the variance as a difference of squares",
    ),
    Mutant(NORM, "return x * (1.0 + factor) + offset", "return x * factor + offset", "no 1 + before the scale"),
    Mutant(NORM, "return x * (1.0 + factor) + offset", "return x * (1.0 + offset) + factor", "scale and shift exchanged"),
    Mutant(NORM, "image * shift_stride, image * scale_stride", "image * shift_stride, 0", "one scale for all images"),
    Mutant(NORM, "tl.store(out_normed + first, x1", "tl.store(out_normed + first + 1, x1", "stores off by one"),
    Mutant(
        NORM,
        "x2.to(out_normed.dtype.element_ty), mask=second < D)",
        "x2.to(out_normed.dtype.element_ty))",
        "writes beyond the row",
    ),
    Mutant(
        NORM, "                x2 *= LARGEST / largest", "                x2 *= 1.0", "the second part without a scale", "fp8"
    ),
    Mutant(
        NORM, "tl.max(tl.abs(x2), axis=0), largest)", "tl.max(x2, axis=0), largest)", "the scale forgets what is negative", "fp8"
    ),
    Mutant(
        NORM,
        "tl.store(out_scales + tl.program_id(0), largest",
        "tl.store(out_scales + image, largest",
        "scales over one another",
        "fp8",
    ),
    Mutant(NORM, "factor += tl.load", "factor = tl.load", "backward: no 1 + before the scale"),
    Mutant(NORM, "tl.minimum((chunk + 1) * ROWS, rows_per_image)", "(chunk + 1) * ROWS", "backward: adds the next image's rows"),
    Mutant(NORM, "sum_scale += grad * normed", "sum_scale += grad * x", "backward: the scale's gradient without the norm"),
    Mutant(
        NORM,
        "inner = grad - normed * (tl.sum(grad * normed, axis=0) / D)",
        "inner = grad * 1.0",
        "backward: the variance is held constant",
    ),
    Mutant(NORM, "inner -= tl.sum(grad, axis=0) / D", "inner -= 0.0", "backward: the mean is held constant"),
    Mutant(NORM, "if HAS_GRAD_RESIDUAL:", "if HAS_GRAD_RESIDUAL and RMS:", "backward: the residual's gradient is dropped"),
    Mutant(NORM, "(total * weight).to", "total.to", "backward: the branch's gradient is not gated"),
    Mutant(
        NORM, "sum_gate += total * tl.load", "sum_gate += grad * tl.load", "backward: the gate's gradient without the residual's"
    ),
    Mutant(
        ATTENTION,
        "mask=(rows[:, None] < limit) & (columns[None, :] < D)",
        "mask=(rows[:, None] < limit)",
        "a padded head reads the next one",
    ),
    Mutant(
        ATTENTION, "mask=(rows[:, None] < limit) & (columns[None, :] < D)", "mask=columns[None, :] < D", "reads beyond the rows"
    ),
    Mutant(
        ATTENTION,
        "image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads",
        "image, head = (tl.program_id(1) % heads).to(tl.int64) * 0, tl.program_id(1) % heads",
        "the first image's keys for all",
    ),
    Mutant(
        ATTENTION, "k += image * k_batch + head * D", "k += image * q_batch + head * D", "the keys' stride is that of the queries"
    ),
    Mutant(ATTENTION, "scores * scale, float", "scores, float", "scores are not scaled"),
    Mutant(ATTENTION, " and aligned(q, k, v)):", "):", "the kernel where a GPU gets it wrong"),
    Mutant(ATTENTION, "tensor.data_ptr() % ALIGNED == 0 and ", "", "a view that begins anywhere"),
    Mutant(ATTENTION, "            scores += tl.dot(q2", "            scores += 0.0 * tl.dot(q2", "scores miss the second part"),
    Mutant(
        ATTENTION,
        'scores = tl.where((keys < k_rows)[None, :], scores * scale, float("-inf"))',
        "scores *= scale",
        "keys that are not there get a share",
    ),
    Mutant(
        ATTENTION,
        "higher = tl.maximum(best, tl.max(scores, axis=1))",
        "higher = tl.zeros((BLOCK_Q,), tl.float32)",
        "no maximum is subtracted",
    ),
    Mutant(
        ATTENTION,
        "shrink = tl.exp2(best - higher)",
        'shrink = tl.where(best > float("-inf"), 1.0, 0.0)',
        "earlier tiles are not rescaled to the new maximum",
    ),
    Mutant(ATTENTION, "shares = tl.exp2(scores - higher[:, None])", "shares = tl.exp(scores - higher[:, None])", "e^x for 2^x"),
    Mutant(
        ATTENTION,
        "total = total * shrink + tl.sum(shares, axis=1)",
        "total = total + tl.sum(shares, axis=1)",
        "the denominator is not rescaled",
    ),
    Mutant(ATTENTION, "sum1 = sum1 * shrink[:, None] +", "sum1 = sum1 +", "the numerator is not rescaled"),
    Mutant(
        ATTENTION, "for start in range(0, k_rows, BLOCK_K)", "for start in range(0, q_rows, BLOCK_K)", "as many keys as queries"
    ),
    Mutant(
        ATTENTION,
        "(sum1 / total[:, None]).to(dtype), mask=(rows[:, None] < q_rows) & (first[None, :] < D)",
        "(sum1 / total[:, None]).to(dtype), mask=(first[None, :] < D)",
        "writes beyond the rows",
    ),
    Mutant(
        ATTENTION,
        "inside = (rows[:, None] < q_rows) & (second[None, :] < D)",
        "inside = rows[:, None] < q_rows",
        "writes into the next head",
    ),
    Mutant(MLP, "tl.sigmoid(gate) * up", "tl.sigmoid(up) * up", "the halves are exchanged"),
    Mutant(MLP, "(gate * tl.sigmoid(gate) * up)", "(tl.sigmoid(gate) * up)", "a gate that is no SiLU"),
    Mutant(MLP, "x + row * 2 * columns + columns + at", "x + row * 2 * columns + at", "both halves are the first"),
    Mutant(MLP, "x + row * 2 * columns + at, mask=inside", "x + row * columns + at, mask=inside", "the rows of the result"),
    Mutant(MLP, "* up).to(out.dtype.element_ty), mask=inside)", "* up).to(out.dtype.element_ty))", "writes into the next row"),
    Mutant(MLP, "0.044715 * y * y", "0.044715 * y", "a wrong power in GELU", "fp8"),
    Mutant(MLP, "1.5957691216057308", "1.702", "another approximation of GELU", "fp8"),
    Mutant(
        MLP, "tl.max(tl.abs(y2), axis=0), largest)", "tl.max(tl.abs(y2), axis=0), LEAST)", "the scale of the second part", "fp8"
    ),
    Mutant(MLP, "(y1 * (LARGEST / largest)).to", "(y1 * LARGEST).to", "no scale", "fp8"),
    Mutant(MLP, "out.dtype.element_ty), mask=second < D)", "out.dtype.element_ty))", "8 bits beyond the row", "fp8"),
    Mutant(
        ROTARY,
        "(tl.program_id(0) // rows_per_image).to(tl.int64), tl.program_id(0) % rows",
        "(tl.program_id(0) // rows_per_image).to(tl.int64), tl.program_id(0) // rows",
        "the image's position for the row's",
    ),
    Mutant(ROTARY, "image * batch_stride", "image * rows_per_image * row_stride", "the stride of a view is ignored"),
    Mutant(ROTARY, "& (column < half)", "", "a head reads and writes the next one"),
    Mutant(ROTARY, "(head < 2 * heads) &", "", "reads and writes beyond the heads"),
    Mutant(ROTARY, "+ tl.sum(b * b, axis=1)", "", "the norm of the first half"),
    Mutant(ROTARY, "/ D + EPS", "/ half + EPS", "a wrong divisor"),
    Mutant(ROTARY, "/ D + EPS", "/ D", "no epsilon"),
    Mutant(ROTARY, "tl.where(is_query, of_query, of_key)", "of_query", "keys are normed with the queries' weight"),
    Mutant(ROTARY, "q_weight + half, k_weight + half", "q_weight, k_weight", "the first half's weights twice"),
    Mutant(ROTARY, "- b * _position", "+ b * _position", "positions turn backwards"),
    Mutant(ROTARY, "+ before * _position", "+ a * _position", "turns by what was turned"),
    Mutant(ROTARY, "_position(cos + turned + half", "_position(cos + turned", "the first half's cosines twice"),
    Mutant(ROTARY, "turned = row * D + column", "turned = column", "the first row's position for all"),
    Mutant(ROTARY, "tl.store(out + at + half, b", "tl.store(out + at + half, a", "the first half twice"),
    Mutant(SOLVER, "answer = blank + guidance * (answer - blank)", "answer = answer + 0.0 * guidance", "guidance is ignored"),
    Mutant(
        SOLVER,
        "answer = blank + guidance * (answer - blank)",
        "answer = answer + guidance * (blank - answer)",
        "conditioned and not are exchanged",
    ),
    Mutant(SOLVER, "tl.load(row + 1), tl.load(row + 2)", "tl.load(row + 2), tl.load(row + 1)", "constants exchanged"),
    Mutant(SOLVER, "c * tl.load(memory + at, mask=inside)", "c * before", "the memory is not read"),
    Mutant(SOLVER, "before + e * answer", "after + e * answer", "the memory keeps the new x"),
    Mutant(SOLVER, "tl.store(out_x + at, after, mask=inside)", "tl.store(out_x + at, after)", "writes beyond the latents"),
    Mutant(
        SOLVER,
        "tl.store(out_given + numbers + at, given, mask=inside)",
        "tl.store(out_given + at, given, mask=inside)",
        "the null half is not given the new x",
    ),
    Mutant(INT8, "range(0, inner // GROUP)", "range(0, inner // GROUP - 1)", "the last group is left out"),
    Mutant(INT8, "* (inner // GROUP) + group, mask", "* (inner // GROUP), mask", "the first group's scale for all"),
    Mutant(
        INT8, "total *= tl.load(w_scales + n, mask=n < columns, other=0.0)[None, :]", "total *= 1.0", "no scale of the weight"
    ),
    Mutant(INT8, "* (127.0 / largest)[:, None] + 0.5)", "* (127.0 / largest)[:, None])", "rounds down"),
    Mutant(NORM, "tl.max(tl.abs(grouped), axis=1)", "tl.max(grouped, axis=1)", "the scale forgets what is negative"),
    Mutant(NORM, "largest / 127.0, mask=group < D // GROUP", "largest / 127.0", "scales of groups that are not there"),
    Mutant(INT8, "* (columns // GROUP) + tile, largest", "* (columns // GROUP), largest", "scales over one another"),
    Mutant(
        INT8,
        "tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)",
        "tl.store(out + at, total.to(out.dtype.element_ty), mask=m[:, None] < rows)",
        "writes into the next row",
    ),
]
