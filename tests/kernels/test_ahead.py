"""Every public operation, type, width and configuration compiles to machine code for sm_80, sm_90 and sm_120, without a GPU, and
takes of a GPU what it took before: registers, shared memory, the width of its loads, its matrix instructions.

The golden file holds for the Triton it was made with; rules hold for every one. After a change that is meant:
`cd tests/support && python ahead.py > ../kernels/resources.json`, and look at the difference.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from ahead import read_unwritten
from kernel_cases import CASES, capabilities

GOLDEN = json.loads(Path(__file__).with_name("resources.json").read_text())
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}
"""Bytes of shared memory that a program may have (CUDA programming guide, table of compute capabilities)."""
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_120": "HMMA"}
"""What multiplies matrices of half precision there."""
INT8_PRODUCTS = {"sm_80": "IMMA", "sm_90": "IGMMA", "sm_120": "IMMA"}
MULTIPLY = ("self_attention", "cross_attention", "linear_")
EIGHT_BITS = ("int8", "fp8")
GROUPS = {
    "norms": [name for name in CASES if "norm" in name and not any(bits in name for bits in EIGHT_BITS)],
    "others": [name for name in CASES if "norm" not in name and not any(bits in name for bits in EIGHT_BITS)],
    "8 bits": [name for name in CASES if any(bits in name for bits in EIGHT_BITS)],
}


def compiled(cases: list[str]) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "ahead.py"
    command = [sys.executable, str(script), *cases]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(script.parent)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["cases"]


def broken_rules(cases: dict[str, dict]) -> list[str]:
    broken = []
    for name, made in cases.items():
        assert made.keys() == {f"sm_{capability}" for capability in capabilities(name)}
        for gpu, found in made.items():
            if found["spills"] or found["stack"]:
                broken.append(f"{name} on {gpu} spills registers: {found}")
            if found["unwritten"]:
                broken.append(f"{name} on {gpu} reads registers that nothing wrote: {found['unwritten']}")
            if found["shared"] > SHARED[gpu]:
                broken.append(f"{name} on {gpu} wants {found['shared']} bytes of shared memory; there are {SHARED[gpu]}")
            products = INT8_PRODUCTS if "int8" in name else PRODUCTS
            if found["products"] != ([products[gpu]] if name.startswith(MULTIPLY) else []):
                broken.append(f"{name} on {gpu} multiplies with {found['products']}")
            # the second part of a row of 384 or 1152 is 128 numbers, four for each thread: one warp a row is faster all the same
            wide = {"128", "64"} if name.split()[1] in ("S", "XL") else {"128"}
            if "norm" in name and not set(found["loads"]) <= wide:
                broken.append(f"{name} on {gpu} reads fewer bits at a time than {min(wide)}: {found['loads']}")
    return broken


@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_compiles_keeps_to_the_rules_and_takes_of_a_gpu_what_it_did(group: str):
    """One test, because compiling takes a minute or two, and workers would do it once for each."""
    made = compiled(GROUPS[group])
    assert not (broken := broken_rules(made)), "\n".join(broken)
    if triton.__version__ == GOLDEN["triton"]:
        assert made == {name: GOLDEN["cases"][name] for name in made}


def test_the_golden_file_knows_every_case_and_no_other():
    assert list(GOLDEN["cases"]) == list(CASES)


def test_an_address_that_begins_from_nothing_is_seen():
    """As ptxas 12.8 once made it of attention with rows an odd distance apart: UR30 should have been UR24."""
    head = ["ULDC.64 UR28, c[0x0][0x208] ;", "UIADD3 UR10, UR6, 0x8000, URZ ;", "USGXT.U32 UR24, UR10, 0xe ;"]
    wrong = ["UIADD3 UR30, UP0, UR30, 0x20, URZ ;", "UIADD3.X UR31, UR31, -0x3ffffff0, URZ, UP0, !UPT ;"]
    product = "HGMMA.64x16x16.F32 R88, R28, gdesc[UR28].tnspB, R88 ;"
    code = "\n".join(
        f"        /*{16 * i:04x}*/   {line}" for i, line in enumerate(["S2UR UR6, SR_CgaCtaId ;", *head, *wrong, product])
    )
    assert read_unwritten(code) == [line.removesuffix(" ;") for line in wrong]
    assert read_unwritten(code.replace("UP0, UR30,", "UP0, UR24,").replace("UR31, UR31,", "UR31, UR29,")) == []
