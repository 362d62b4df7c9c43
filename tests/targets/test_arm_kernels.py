"""The kernel tests once more, for ARM under qemu: the same cases for another machine's tiles and vectors."""

from __future__ import annotations

import pytest

from tests.targets import (
    _kernels,
    test_kernels_conv,
    test_kernels_gemm,
    test_kernels_kron,
    test_kernels_rows,
    test_open,
)

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.tvm, pytest.mark.zig]

for _module in (test_kernels_conv, test_kernels_gemm, test_kernels_kron, test_kernels_rows):
    globals().update({n: t for n, t in vars(_module).items() if n.startswith("test_") and not n.endswith("_on_avx2")})

test_open_transformer = test_open.test_a_block_of_a_transformer
test_open_pictures = test_open.test_a_small_network_for_pictures
test_open_reductions = test_open.test_reductions_and_softmax_along_open_axes


@pytest.fixture(autouse=True)
def _on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU", "cortex-a72")
