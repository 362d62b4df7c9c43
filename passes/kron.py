"""Replace a weight by a sum of Kronecker products of two factors.

    W ≈ Σ_r A_r ⊗ B_r,   r = 1 .. R

of any axis sizes F = F_1·F_2, C = C_1·C_2, K = K_1·K_2; found in closed form by the singular values of the rearranged
weight.

Paper: Hameed, Tahaei, Mosleh, Partovi Nia, "Convolutional Neural Network Compression through Generalized Kronecker
Product Decomposition", arXiv 2109.14710, AAAI 2022; for linear layers and embeddings Tahaei et al., "KroneckerBERT",
arXiv 2109.06243. The choice of shapes and rank within a predicted time is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir

from mc_opt.passes._base import Context
from mc_opt.passes._factored import factor_names
from mc_opt.passes._factorise import factorise
from mc_opt.passes._plan import Asked
from mc_opt.passes._trainable import TrainablePass
from mc_opt.passes.sekron import check_size


@dataclass(frozen=True)
class Kron(TrainablePass):
    """Replace Conv, Gemm, MatMul and embedding weights by two Kronecker factors, W ≈ Σ_r A_r ⊗ B_r.

    ratio: at most that share of a layer's parameters. error: in its place, the fewest parameters with that relative
    error or less. flops: in its place, at most that share of the multiplications. rank: the number of terms, found
    when 0.
    """

    family: ClassVar[str] = "factorise"

    ratio: float = 0.5
    error: float = 0.0
    flops: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        check_size(self.ratio, self.error, self.flops, ())
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: expected 1 or more, or 0 to find it")

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that gains."""
        return factorise(self, model, ctx, self._asked)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Nothing: factors are stored as they are trained."""
        return 0

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """The factors."""
        return factor_names(model)

    def _asked(self, layer: str) -> Asked:
        own = self.at(layer)
        return Asked(own.ratio, own.error, own.flops, ("gkpd",), (own.rank,) if own.rank else ())
