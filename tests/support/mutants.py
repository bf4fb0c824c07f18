"""Bugs that people make in such kernels, as changes to their source: what the tests must find.

Each is (file, what it says, what it says instead, what that does). The first place in the file that says it is changed."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    bug: str


NORM, ATTENTION, MLP, SOLVER, INT8 = "norm", "attention", "mlp", "solver", "int8"

MUTANTS = [
    # the first `forward_kernel` of norm.py, in order
    Mutant(NORM, "image = row // rows_per_image", "image = row % rows_per_image", "another image's modulation"),
    Mutant(NORM, "image = row // rows_per_image", "image = row * 0", "the first image's modulation for all"),
    Mutant(
        NORM,
        "x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)",
        "x = tl.load(residual + at, mask=inside, other=0.0)",
        "sums and statistics in half precision",
    ),
    Mutant(NORM, "x = tl.load(residual + at, mask=inside, other=0.0)", "x = tl.load(residual + at)", "reads beyond the row"),
    Mutant(NORM, "gate + image * gate_stride", "gate + image * D", "the stride of a view is ignored"),
    Mutant(NORM, "x += y", "x = y", "no residual"),
    Mutant(
        NORM, "tl.store(out_residual + at, stored, mask=inside)", "tl.store(out_residual + at, stored)", "writes beyond the row"
    ),
    Mutant(NORM, "x = stored.to(tl.float32)", "x = x * 1.0", "normalises what was not stored"),
    Mutant(
        NORM,
        "x if RMS else tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)",
        "x if RMS else x - tl.sum(x, axis=0) / D",
        "padding counts in the variance",
    ),
    Mutant(NORM, "x - tl.sum(x, axis=0) / D", "x - tl.sum(x, axis=0) / BLOCK", "the mean over the padded width"),
    Mutant(NORM, "x if RMS else", "x if not RMS else", "LayerNorm and RMSNorm exchanged"),
    Mutant(
        NORM,
        "tl.sum(centred * centred, axis=0) / D + EPS)",
        "tl.sum(centred * centred, axis=0) / BLOCK + EPS)",
        "the variance over the padded width",
    ),
    Mutant(
        NORM,
        "tl.sum(centred * centred, axis=0) / D + EPS)",
        "tl.sum(centred * centred, axis=0) / (D - 1) + EPS)",
        "the unbiased variance",
    ),
    Mutant(NORM, "tl.sum(centred * centred, axis=0) / D + EPS)", "tl.sum(centred * centred, axis=0) / D)", "no epsilon"),
    Mutant(
        NORM,
        "tl.rsqrt(tl.sum(centred * centred, axis=0) / D + EPS)",
        "tl.rsqrt(tl.sum(x * x, axis=0) / D - (0.0 if RMS else (tl.sum(x, axis=0) / D) * (tl.sum(x, axis=0) / D)) + EPS)",
        "the variance as a difference of squares",
    ),
    Mutant(NORM, "normed = normed * (1.0 + factor) + offset", "normed = normed * factor + offset", "no 1 + before the scale"),
    Mutant(
        NORM,
        "normed = normed * (1.0 + factor) + offset",
        "normed = normed * (1.0 + offset) + factor",
        "scale and shift exchanged",
    ),
    Mutant(NORM, "scale + image * scale_stride", "scale + image * shift_stride * 0", "one scale for all images"),
    Mutant(NORM, "tl.store(out_normed + at, normed", "tl.store(out_normed + at + 1, normed", "stores off by one"),
    Mutant(
        NORM,
        "tl.store(out_normed + at, normed.to(out_normed.dtype.element_ty), mask=inside)",
        "tl.store(out_normed + at, normed.to(out_normed.dtype.element_ty))",
        "writes beyond the row",
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
        "y = tl.where((columns < half)[None, :], -y, y)",
        "y = tl.where((columns < half)[None, :], y, -y)",
        "positions turn backwards",
    ),
    Mutant(
        ATTENTION,
        "x = x * read(cos, rows, D, limit, columns, D) + y",
        "x = x * read(cos, rows, D, limit, columns, D) - y",
        "keys and queries turn backwards",
    ),
    Mutant(
        ATTENTION,
        "others = tl.where(columns < half, columns + half, columns - half)",
        "others = tl.where(columns % 2 == 0, columns + 1, columns - 1)",
        "neighbours turn, not halves",
    ),
    Mutant(
        ATTENTION, "return tl.rsqrt(squares / D + EPS)", "return tl.rsqrt(squares / D1 + EPS)", "QK-norm over a part of the head"
    ),
    Mutant(
        ATTENTION, "        squares += tl.sum(x * x, axis=1)", "        squares += 0.0", "QK-norm misses the head's second part"
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
    Mutant(ATTENTION, "q1 = (q1 * scale).to(dtype).to(DOT)", "q1 = q1.to(dtype).to(DOT)", "scores are not scaled"),
    Mutant(
        ATTENTION,
        "inverse_k, k_weight, cos, sin, D, NORM, ROTARY).to(dtype).to(DOT)\n        scores = tl.dot(q1",
        "inverse_k, q_weight, cos, sin, D, NORM, ROTARY).to(dtype).to(DOT)\n        scores = tl.dot(q1",
        "keys are normed with the queries' weight",
    ),
    Mutant(
        ATTENTION, 'scores += tl.dot(q2, tl.trans(k2), input_precision="ieee")', "scores += 0.0", "scores miss the second part"
    ),
    Mutant(
        ATTENTION,
        'scores = tl.where((keys < k_rows)[None, :], scores, float("-inf"))',
        "scores += 0.0",
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
    Mutant(MLP, "mask=(m[:, None] < rows) & (start + k[None, :] < inner)", "mask=(m[:, None] < rows)", "sums beyond the row"),
    Mutant(
        MLP,
        "inside = (n[None, :] < columns) & (start + k[:, None] < inner)",
        "inside = n[None, :] < columns",
        "sums beyond the weight's row",
    ),
    Mutant(
        MLP,
        'total = tl.dot(left, tl.load(weight + start, mask=inside, other=0.0).to(DOT), total, input_precision="ieee")',
        'total = tl.dot(left, tl.load(weight + start, mask=inside, other=0.0).to(DOT), input_precision="ieee")',
        "the last tile of the sum alone",
    ),
    Mutant(MLP, "height = tl.minimum(tiles_m - band * TALL, TALL)", "height = TALL", "tiles of an uneven band are left out"),
    Mutant(MLP, "total += tl.load(bias + n", "total += 0.0 * tl.load(bias + n", "no bias"),
    Mutant(MLP, "gate += tl.load(bias + columns + n", "gate += tl.load(bias + n", "both halves get one bias"),
    Mutant(
        MLP, "total = total * tl.sigmoid(total) * gate", "total = total * gate * tl.sigmoid(gate)", "the halves are exchanged"
    ),
    Mutant(MLP, "0.044715 * total * total", "0.044715 * total", "a wrong power in GELU"),
    Mutant(MLP, "1.5957691216057308", "1.702", "another approximation of GELU"),
    Mutant(MLP, "mask=(m[:, None] < rows) & (n[None, :] < columns))", "mask=(n[None, :] < columns))", "writes beyond the rows"),
    Mutant(MLP, "mask=(m[:, None] < rows) & (n[None, :] < columns))", "mask=(m[:, None] < rows))", "writes into the next row"),
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
    Mutant(NORM, "largest / 127.0, mask=groups < D // GROUP", "largest / 127.0", "scales of groups that are not there"),
    Mutant(INT8, "* (columns // GROUP) + tile, largest", "* (columns // GROUP), largest", "scales over one another"),
    Mutant(
        INT8,
        "tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)",
        "tl.store(out + at, total.to(out.dtype.element_ty), mask=m[:, None] < rows)",
        "writes into the next row",
    ),
]
