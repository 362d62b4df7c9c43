"""BatchNormalization in training with several processes: it gives what one process with the whole batch gives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mc_opt.ir.run.standard import normal  # noqa: E402  (it imports torch)

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("shape", "own"), [((6, 3, 4), 2), ((5, 3), 1)], ids=["map", "one value a channel here"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_those_of_all_processes(
    shape: tuple[int, ...], own: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(shape, generator=generator)).to(dtype)
    scale, bias = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -1.0])
    statistics = [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
    whole = normal.BatchNorm(momentum=0.5).train()(x, scale, bias, *statistics[0])

    def others_added(sums: torch.Tensor) -> torch.Tensor:
        rest = x[own:].float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        more = [rest.sum(axes), rest.square().sum(axes), rest.new_tensor([rest.numel() / 3])]
        assert sums.dtype == torch.float32, "sums of half precision lose the variance"
        return sums + torch.cat(more)

    monkeypatch.setattr(normal.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(normal.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(normal.distributed_functions, "all_reduce", others_added)
    part = normal.BatchNorm(momentum=0.5).train()(x[:own], scale, bias, *statistics[1])
    assert part.dtype == whole.dtype
    # E[x²] − E[x]² of fp32 sums; one step of bfloat16 where the result is rounded to it.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(part, whole[:own], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*statistics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
