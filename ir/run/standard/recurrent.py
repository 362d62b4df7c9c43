"""LSTM, GRU and RNN as loops over time; weights are values, so that gradients reach whatever made them.

Shapes: x [s, n, i], w [d, g·h, i], r [d, g·h, h], b [d, 2·g·h], initial states [d, n, h], Y [s, d, n, h].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mc_opt.ir.errors import IRError
from mc_opt.ir.run.standard.elementwise import (
    elu,
    hard_sigmoid,
    leaky_relu,
    softplus,
    softsign,
    thresholded_relu,
)

Activation = Callable[[torch.Tensor], torch.Tensor]
State = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, State], State]


def _affine(x: torch.Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    return alpha * x + beta


def _scaled_tanh(x: torch.Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> torch.Tensor:
    return alpha * torch.tanh(beta * x)


_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    "affine": (_affine, ("alpha", "beta")),
    "elu": (elu, ("alpha",)),
    "hardsigmoid": (hard_sigmoid, ("alpha", "beta")),
    "leakyrelu": (leaky_relu, ("alpha",)),
    "relu": (torch.relu, ()),
    "scaledtanh": (_scaled_tanh, ("alpha", "beta")),
    "sigmoid": (torch.sigmoid, ()),
    "softplus": (softplus, ()),
    "softsign": (softsign, ()),
    "tanh": (torch.tanh, ()),
    "thresholdedrelu": (thresholded_relu, ("alpha",)),
}


def _activations(
    names: Sequence[str] | None, default: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """One function a gate group and direction; alphas and betas are dealt out in the order of the names."""
    values = {"alpha": list(alphas or []), "beta": list(betas or [])}
    chosen: list[Activation] = []
    for name in names or default:
        if name.lower() not in _ACTIVATIONS:
            raise IRError(f"activation {name!r} is unknown, expected one of {', '.join(_ACTIVATIONS)}")
        function, parameters = _ACTIVATIONS[name.lower()]
        given = {p: values[p].pop(0) for p in parameters if values[p]}
        chosen.append(_with(function, given))
    return chosen


def _with(function: Callable[..., torch.Tensor], given: dict[str, float]) -> Activation:
    return lambda x: function(x, **given)


def _clipped(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    return x if limit is None else torch.clamp(x, -limit, limit)


def _walk(
    x: torch.Tensor, state: State, step: Step, *, lengths: torch.Tensor | None, backwards: bool
) -> tuple[torch.Tensor, State]:
    """Run `step` over x: [s, n, ...]; a sequence that has ended keeps its state and puts out zeros."""
    outputs: list[torch.Tensor] = []
    times = range(x.shape[0])
    for t in reversed(times) if backwards else times:
        new = step(x[t], state)
        if lengths is None:
            state = new
            outputs.append(new[0])
            continue
        running = (t < lengths)[:, None]
        state = tuple(torch.where(running, a, b) for a, b in zip(new, state, strict=True))
        outputs.append(torch.where(running, new[0], torch.zeros_like(new[0])))
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _layer(
    x: torch.Tensor,
    states: Sequence[torch.Tensor | None],
    make_step: Callable[[int], tuple[Callable[[torch.Tensor], torch.Tensor], Step]],
    *,
    directions: int,
    direction: str,
    hidden: int,
    lengths: torch.Tensor | None,
    layout: int,
) -> tuple[torch.Tensor, ...]:
    """All directions of one recurrent op: Y and the final states."""
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    outputs, finals = [], []
    for d in range(directions):
        project, step = make_step(d)
        start = tuple(x.new_zeros(x.shape[1], hidden) if s is None else s[d] for s in states)
        backwards = direction == "reverse" or d == 1
        y, final = _walk(project(x), start, step, lengths=lengths, backwards=backwards)
        outputs.append(y)
        finals.append(final)
    y = torch.stack(outputs, 1)
    lasts = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if layout:
        return (y.permute(2, 0, 1, 3), *(last.transpose(0, 1) for last in lasts))
    return (y, *lasts)


def lstm(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: torch.Tensor | None = None,
    initial_h: torch.Tensor | None = None,
    initial_c: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: list[str] | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    clip: float | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Gates in the order i, o, f, c; peepholes p: [d, 3·h] in the order i, o, f."""
    hidden, directions = r.shape[-1], w.shape[0]
    functions = _activations(activations, ["Sigmoid", "Tanh", "Tanh"] * directions, activation_alpha, activation_beta)

    def make_step(d: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], Step]:
        f, g, h = functions[3 * d : 3 * d + 3]
        bias = 0 if b is None else b[d][: 4 * hidden] + b[d][4 * hidden :]
        peep_i, peep_o, peep_f = (0, 0, 0) if p is None else p[d].chunk(3)
        recurrent = r[d].T

        def step(projected: torch.Tensor, state: State) -> State:
            previous, cell = state
            i, o, forget, c = (projected + previous @ recurrent).chunk(4, -1)
            i = f(_clipped(i + peep_i * cell, clip))
            forget = 1 - i if input_forget else f(_clipped(forget + peep_f * cell, clip))
            cell = forget * cell + i * g(_clipped(c, clip))
            o = f(_clipped(o + peep_o * cell, clip))
            return o * h(cell), cell

        return lambda inputs: inputs @ w[d].T + bias, step

    return _layer(
        x, [initial_h, initial_c], make_step, directions=directions, direction=direction, hidden=hidden,
        lengths=sequence_lens, layout=layout,
    )  # fmt: skip


def gru(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: torch.Tensor | None = None,
    initial_h: torch.Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: list[str] | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    clip: float | None = None,
    linear_before_reset: int = 0,
    layout: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Gates in the order z, r, h."""
    hidden, directions = r.shape[-1], w.shape[0]
    functions = _activations(activations, ["Sigmoid", "Tanh"] * directions, activation_alpha, activation_beta)

    def make_step(d: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], Step]:
        f, g = functions[2 * d : 2 * d + 2]
        bias_w, bias_r = (0, x.new_zeros(3 * hidden)) if b is None else b[d].chunk(2)
        bias_zr, bias_h = bias_r[: 2 * hidden], bias_r[2 * hidden :]
        recurrent_zr, recurrent_h = r[d][: 2 * hidden].T, r[d][2 * hidden :].T

        def step(projected: torch.Tensor, state: State) -> State:
            (previous,) = state
            gates = projected[:, : 2 * hidden] + previous @ recurrent_zr + bias_zr
            z, reset = f(_clipped(gates, clip)).chunk(2, -1)
            if linear_before_reset:
                pulled = reset * (previous @ recurrent_h + bias_h)
            else:
                pulled = (reset * previous) @ recurrent_h + bias_h
            candidate = g(_clipped(projected[:, 2 * hidden :] + pulled, clip))
            return ((1 - z) * candidate + z * previous,)

        return lambda inputs: inputs @ w[d].T + bias_w, step

    return _layer(
        x, [initial_h], make_step, directions=directions, direction=direction, hidden=hidden,
        lengths=sequence_lens, layout=layout,
    )  # fmt: skip


def _rnn(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: torch.Tensor | None = None,
    initial_h: torch.Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: list[str] | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    clip: float | None = None,
    layout: int = 0,
) -> tuple[torch.Tensor, ...]:
    hidden, directions = r.shape[-1], w.shape[0]
    functions = _activations(activations, ["Tanh"] * directions, activation_alpha, activation_beta)

    def make_step(d: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], Step]:
        f = functions[d]
        bias = 0 if b is None else b[d][:hidden] + b[d][hidden:]
        recurrent = r[d].T

        def step(projected: torch.Tensor, state: State) -> State:
            return (f(_clipped(projected + state[0] @ recurrent, clip)),)

        return lambda inputs: inputs @ w[d].T + bias, step

    return _layer(
        x, [initial_h], make_step, directions=directions, direction=direction, hidden=hidden,
        lengths=sequence_lens, layout=layout,
    )  # fmt: skip


MULTIPLE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "GRU": gru,
    "LSTM": lstm,
    "RNN": _rnn,
}
