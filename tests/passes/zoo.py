"""A model with something for every pass: BatchNorm before and after layers, heavy layers, constants, an If, an LSTM."""

from __future__ import annotations

ZOO = """
zoo (float[2,3,8,8] x, int64[2] ids, int64 mode) => (float[2,4] y, float[2,4] z)
<
  float[6,3,3,3] conv_w, float[6] bn_scale, float[6] bn_bias, float[6] bn_mean, float[6] var_bn,
  float[8,6,1,1] point_w, float[8] point_b, float[8] bn2_scale, float[8] bn2_bias, float[8] bn2_mean, float[8] var_bn2,
  float[128,16] fc_w, float[16] fc_b, float[4,16] head_w, float[4] head_b,
  float[32,8] table, float[1,32,8] lstm_w, float[1,32,8] lstm_r, float[8,4] last_w,
  int64[1] one = {1}, int64[1] two = {2}, int64 zero = {0}, int64[1] zero1 = {0}
>
{
  c = Conv <pads: ints = [1,1,1,1]> (x, conv_w)
  n = BatchNormalization (c, bn_scale, bn_bias, bn_mean, var_bn)
  r = Relu (n)
  m = MaxPool <kernel_shape: ints = [2,2], strides: ints = [2,2]> (r)
  p = Conv (m, point_w, point_b)
  p2 = BatchNormalization (p, bn2_scale, bn2_bias, bn2_mean, var_bn2)
  id = Identity (p2)
  shape = Shape (id)
  batch = Gather (shape, zero)
  batch1 = Unsqueeze (batch, zero)
  minus = Neg (one)
  flat_shape = Concat <axis: int = 0> (batch1, minus)
  flat = Reshape (id, flat_shape)
  h = MatMul (flat, fc_w)
  h2 = Add (h, fc_b)
  t = Tanh (h2)
  y = Gemm <transB: int = 1> (t, head_w, head_b)
  e = Gather (table, ids)
  steps = Unsqueeze (e, zero)
  seq, hidden, cell = LSTM <hidden_size: int = 8> (steps, lstm_w, lstm_r)
  axes = Concat <axis: int = 0> (zero1, one)
  last = Squeeze (seq, axes)
  cond = Equal (mode, zero)
  v = If (cond) <
    then_branch = taken () => (float[2,8] a) { a = Neg (last) },
    else_branch = other () => (float[2,8] b) { b = Identity (last) }
  >
  z = MatMul (v, last_w)
}
"""

# Passes that need an option: {tests} stands for the folder of this file.
SPECS = {
    "specialize": "specialize{{mode=0}}",
    "surgeon": "surgeon{{script={tests}/add_relu.py}}",
}
