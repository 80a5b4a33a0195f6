"""Storage formats of dense layers: one format and its step in each file, and what they share.

A file of a format has, in this order: plain functions of tensors, the custom op with its gradient,
the format, the settings of the step.

float16.py         tables and dense layers as float16
bfloat16_dense.py  bfloat16
int8_codes.py      round weights and inputs to int8, for static_int8 and qat
smoothing.py       factors that move range from input channels into weights
calibrated.py      calibration of input ranges, for static_int8 and qat
table_inputs.py    inputs that are rows of int8 tables, for static_int8
static_int8.py     int8 weights and calibrated int8 inputs
qat.py             quantization-aware training of static_int8
float8_dense.py    weights and inputs as 8-bit floats
weight_only.py     blocks, codes and custom op of the weight-only formats
weight_int8.py     int8 weights
gptq.py            GPTQ rounding with error compensation
weight_int4.py     4-bit weights
"""
