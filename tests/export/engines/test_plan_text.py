"""The plan in an engine's bytes is read as it is written, and nothing is guessed."""

from clipdit_export.engines.plan_text import products, weights

PLAN = b"""\x00\x01junk
  tensor={ alignment=2 dims={ "n" 768 } mem_prop=0 name="a" offset=0 strides={ 768 1 } type=half }
  tensor={ alignment=128 const_payload_size=4096 dims={ 64 64 } name="w" offset=92 region=c strides={ 64 1 } type=int8 }
  tensor={ alignment=128 const_payload_size=16384 dims={ 64 64 } name="v" offset=92 region=c strides={ 64 1 } type=float }
  sub_tensor={ base="a" const_offset=0 dims={ "n" 256 } name="b^deref" offset=0 strides={ 256 1 } type=fp8_e4m3 }
  fully_connected={ name="fc1" output={"c" } input={"a" "w" "alpha" } stream=0 layers="[ONNX Layer: fc1/MatMul]" }
  fully_connected={ name="fc2" output={"d" } input={"b^deref" "w" } stream=0 layers="[ONNX Layer: fc2/MatMul]" }
  corrltn={ name="conv" output={"e" } input={"v" "w" } stream=0 layers="[ONNX Layer: conv]" }
  function={ name=_gemm_mha_v2 fqn=x args={ "a" } input_args={ "a" "a" "a" } output_args={ "f" } layers="[ONNX Layer: softmax]" }
  function={ name=__myl_Add fqn=x args={ "a" } input_args={ "a" } output_args={ "f" } layers="[ONNX Layer: add]" }
  fully_connected={ name="fc3" output={"d" } input={"nobody" "w" } stream=0 layers="[ONNX Layer: fc3/MatMul]" }
\x00"""


def test_products_are_counted_by_what_they_read_and_an_attention_as_two():
    assert products(PLAN) == {"fp16": 3, "fp8": 1, "fp32": 1, "unknown": 1}


def test_constants_are_counted_in_bytes():
    assert weights(PLAN) == {"int8": 4096, "fp32": 16384}


def test_bytes_without_a_plan_hold_nothing():
    assert products(b"\x00" * 64) == {} and weights(b"") == {}
