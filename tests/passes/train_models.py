"""Small models of which training losses ask what they hold."""

from __future__ import annotations

LOGITS = "m (float[N,4] x) => (float[N,3] y) <float[4,3] w, float[3] b> { h = MatMul (x, w)  y = Add (h, b) }"
TANH = "m (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul (x, w)  y = Tanh (h) }"
SOFTMAX = "m (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul (x, w)  y = Softmax (h) }"
LOG_SOFTMAX = "m (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul (x, w)  y = LogSoftmax (h) }"
FRAMES = "m (float[N,T,4] x) => (float[N,T,5] y) <float[4,5] w> { y = MatMul (x, w) }"
LANGUAGE = """
m (int64[N,S] ids, int64[N,S] attention_mask) => (float[N,S,7] y) <float[7,4] table, float[4,7] head>
{ e = Gather (table, ids)  y = MatMul (e, head) }
"""
ATTENTION = """
m (int64[2,3] ids, float[2,3,3] bias) => (float[2,3,4] y)
<float[7,4] table, float[4,4] q, float[4,4] k, float[4] one, float[4] zero>
{
  e = Gather (table, ids)
  n = LayerNormalization (e, one, zero)
  a = MatMul (n, q)
  b = MatMul (n, k)
  t = Transpose <perm: ints = [0,2,1]> (b)
  s = MatMul (a, t)
  scores = Add (s, bias)
  p = Softmax (scores)
  c = MatMul (p, n)
  d = Add (c, n)
  h = LayerNormalization (d, one, zero)
  y = MatMul (h, q)
}
"""
CONVS = """
m (float[2,3,8,8] x) => (float[2,4] y)
<float[4,3,3,3] w1, float[4,4,3,3] w2, float[4,4,1,1] w3, float[4] s, float[4] b, float[4] mean, float[4] var_a>
{
  c1 = Conv <pads: ints = [1,1,1,1]> (x, w1)
  n1 = BatchNormalization (c1, s, b, mean, var_a)
  r1 = Relu (n1)
  c2 = Conv <pads: ints = [1,1,1,1]> (r1, w2)
  n2 = BatchNormalization (c2, s, b, mean, var_a)
  c3 = Conv <strides: ints = [2,2]> (n2, w3)
  n3 = BatchNormalization (c3, s, b, mean, var_a)
  p = GlobalAveragePool (n3)
  y = Flatten (p)
}
"""
