"""Replace a weight by a sum of Kronecker products of two or more small factors.

    W[f, c, t] ≈ Σ_r Π_k A⁽ᵏ⁾[r, f_k, c_k, t_k],   f = (f_1·F_2 + f_2)·F_3 + .., c and t likewise

Which rank indices r_1, r_2, .. a factor carries makes it a sum of Kronecker products (gkpd), a tensor train, a Tucker
or a canonical polyadic form, or the free sequence of the paper.

Paper: Hameed, Mosleh, Tahaei, Partovi Nia, "SeKron: A Decomposition Method Supporting Many Factorization Structures",
arXiv 2210.06299. The sequence and the recursive SVD are the paper's; the search for structure, shapes and ranks, the
limit of predicted time, and the refinement by least squares are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir

from mc_opt.passes._base import Context
from mc_opt.passes._factored import factor_names
from mc_opt.passes._factorise import factorise
from mc_opt.passes._plan import Asked
from mc_opt.passes._plan_form import STRUCTURES
from mc_opt.passes._trainable import TrainablePass


@dataclass(frozen=True)
class SeKron(TrainablePass):
    """Replace Conv, Gemm, MatMul and embedding weights by Kronecker factors, W ≈ Σ_r A_r ⊗ B_r ⊗ ..

    ratio: at most that share of a layer's parameters. error: in its place, the fewest parameters with that relative
    error ‖W − Ŵ‖/‖W‖ or less. flops: in its place, at most that share of the multiplications. structure: auto, or one
    of gkpd, tucker, tt, cp, sekron. ranks: the ranks, found when empty. The error decides between forms that are
    predicted to be no slower than the dense layer on the target; a layer without such a form stays.
    """

    family: ClassVar[str] = "factorise"

    ratio: float = 0.5
    error: float = 0.0
    flops: float = 0.0
    structure: Literal["auto", "gkpd", "tucker", "tt", "cp", "sekron"] = "auto"
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_size(self.ratio, self.error, self.flops, self.ranks)

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Replace every weight that gains; each consumer becomes a SeKronConv, a KronLinear or two small products."""
        return factorise(self, model, ctx, self._asked)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Nothing: factors are stored as they are trained."""
        return 0

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """The factors."""
        return factor_names(model)

    def _asked(self, layer: str) -> Asked:
        own = self.at(layer)
        structures = STRUCTURES if own.structure == "auto" else (own.structure,)
        return Asked(own.ratio, own.error, own.flops, structures, own.ranks)


def check_size(ratio: float, error: float, flops: float, ranks: tuple[int, ...]) -> None:
    """Check the options that say how small a layer becomes.

    Raises:
        ValueError: for one out of its range, or two that exclude each other.
    """
    for name, value in (("ratio", ratio), ("error", error), ("flops", flops)):
        if not 0 <= value < 1 or (name == "ratio" and not value):
            raise ValueError(f"{name}={value:g}: expected a share between 0 and 1")
    if error and flops:
        raise ValueError(f"error={error:g} flops={flops:g}: choose one; each decides the size")
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks={','.join(map(str, ranks))}: a rank is 1 or more")
