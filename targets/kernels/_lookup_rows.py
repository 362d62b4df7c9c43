"""Products of few rows with packed weights on a GPU: a warp sums a column, the codebook lies in shared memory.

    y[m, n] = s[n] · Σ_w Σ_j a[m, w · per + j] · codebook[(word[n, w] >> j · bits) mod 2^bits]

The lanes of a warp read neighbouring words of a column's codes. A codebook of at most 32 values has a bank of shared
memory for each, so that lanes do not wait for each other whatever they look up.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, te, tirx

from mc_opt.targets.kernels._decode import Tiles

# The block that `schedule` knows.
NAME = "mc_lookup_rows"
_WARP, _WARPS = 32, 4


def product(
    tiles: Tiles, a: te.Tensor, words: te.Tensor, codebook: te.Tensor, *rest: te.Tensor, has_bias: bool
) -> te.Tensor:
    """a: [m, k], the arrays of tiles of one column [n, .., 1] -> [m, n]."""
    extra = list(rest)
    bias = extra.pop() if has_bias else None
    scale = extra.pop(0) if tiles.scale is not None else None
    offset = extra.pop(0) if tiles.offset is not None else None
    group = extra.pop(0) if tiles.group is not None else None
    # One scale a column multiplies the sum, not each weight.
    late = scale is not None and offset is None and group is None
    depth, per = tiles.depth, tiles.per
    word = te.reduce_axis((0, int(words.shape[2])), name="w")
    j = te.reduce_axis((0, per), name="j")
    zero = tirx.const(0, a.dtype)

    def term(m: Any, n: Any) -> Any:
        k = word * per + j
        code = (words(n, 0, word, 0) >> (j * tiles.bits).astype("int32")) & tirx.const((1 << tiles.bits) - 1, "int32")
        value = codebook(code)
        g = 0 if group is None else group(tirx.min(k, depth - 1))
        if scale is not None and not late:
            value = value * scale(n, g, 0)
        if offset is not None:
            value = value + offset(n, g, 0)
        x = a(m, k) if depth % per == 0 else tirx.if_then_else(k < depth, a(m, k), zero)
        return te.sum(x * value, axis=[word, j])

    total = te.compute((a.shape[0], words.shape[0]), term, name=NAME)

    def element(m: Any, n: Any) -> Any:
        value = total(m, n) * scale(n, 0, 0) if late and scale is not None else total(m, n)
        return value if bias is None else value + bias(n)

    return te.compute(total.shape, element, name="mc_bias")


def schedule(function: Any) -> s_tir.Schedule | None:
    """The kernel of `product` in threads; None for any other."""
    state = s_tir.Schedule(function)
    names = [state.get(b).name_hint for b in state.get_child_blocks(state.get_sblock("root"))]
    if NAME not in names:
        return None
    block = state.get_sblock(NAME)
    _inline(state, block)
    row, column, word, j = state.get_loops(block)
    turn, lane = state.split(word, [None, _WARP])
    columns, warp = state.split(column, [None, _WARPS])
    state.reorder(row, columns, warp, turn, j, lane)
    partial = state.rfactor(lane, factor_axis=0)
    row, columns, warp, turn, j, lane = state.get_loops(partial)
    state.reorder(row, columns, warp, lane, turn, j)
    for loop, tag in ((row, "blockIdx.y"), (columns, "blockIdx.x"), (warp, "threadIdx.y"), (lane, "threadIdx.x")):
        state.bind(loop, tag)
    state.unroll(j)
    state.set_scope(partial, 0, "local")
    state.decompose_reduction(partial, turn)
    state.reverse_compute_at(block, warp, preserve_unit_loops=True)
    lane, *rest = state.get_loops(block)[3:]
    state.reorder(*rest, lane)  # the sum over lanes must be the innermost loop
    state.bind(lane, "threadIdx.x")
    for consumer in state.get_consumers(block):
        state.reverse_compute_at(consumer, warp, preserve_unit_loops=True)
        state.set_scope(block, 0, "local")
    _share(state, partial, columns)
    return state


def _share(state: s_tir.Schedule, partial: Any, blocks: Any) -> None:
    """Read the codebook, the one operand of which any entry may be asked for, into shared memory first."""
    reads = [[int(r.extent) for r in region.region] for region in state.get(partial).reads]
    index = next(k for k, extents in enumerate(reads) if len(extents) == 1 and extents[0] > 1)
    held = state.cache_read(partial, index, "shared")
    state.compute_at(held, blocks)
    _, warp, lane = state.split(state.get_loops(held)[-1], [None, _WARPS, _WARP])
    state.bind(warp, "threadIdx.y")
    state.bind(lane, "threadIdx.x")


def _inline(state: s_tir.Schedule, block: Any) -> None:
    """Compute what moves its operands inside the block, and element-wise consumers in the last of them."""
    for producer in reversed(list(state.get_producers(block))):
        state.compute_inline(producer)
    consumers = list(state.get_consumers(block))
    while consumers:
        following = list(state.get_consumers(consumers[0]))
        if not following:
            return
        state.compute_inline(consumers[0])
        consumers = following
