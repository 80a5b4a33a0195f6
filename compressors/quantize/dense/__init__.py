"""Storage formats of dense layers: one format and its step in each file.

Each file has, in this order: plain functions of tensors, the custom op with its gradient, the
format, the settings of the step.

float16.py         tables and dense layers as float16
bfloat16_dense.py  bfloat16
calibrated.py      what formats with scaled inputs share
static_int8.py     int8 weights and calibrated int8 inputs
qat.py             the same, trained
float8_dense.py    8-bit floats, weights and inputs
weight_only.py     what formats share in which only weights are quantized
weight_int8.py     int8 weights
gptq.py            rounding that compensates in the weights that follow
weight_int4.py     4-bit weights
"""
