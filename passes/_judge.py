"""The judge of numbers: runs the models before and after a pass in ONNX Runtime and compares what they put out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context, Pass, PassError

SAMPLES = 8
"""Seeded random samples, where no data was given."""


class Judge:
    """Compares each model of a run with the one before it and with the original.

    At most three sessions are open: the original, the last model and the new one.

    Raises:
        IRError: when the original does not run on the data in ONNX Runtime.
        DataError: when the data does not fit the original.
    """

    def __init__(self, model: onnx_ir.Model, ctx: Context, fixed: Mapping[str, np.ndarray]) -> None:
        """Open the original, which is `ctx.reference`.

        Args:
            model: the original with its shapes fixed: what data must fit. ONNX Runtime may refuse to load it, as
                when the two branches of an If have different shapes that only a later pass settles.
            ctx: the data, or the seed for it, and the original.
            fixed: values of inputs that a later pass makes constant.
        """
        self._fixed = fixed
        original = ctx.reference or model
        self._inputs = frozenset(str(v.name) for v in original.graph.inputs)
        self._original = self._open(original)
        self._previous = self._original
        # One run of everything, off and on: it gives r, and it shows at once whether the data fits.
        plain = self._open(original, optimise=False)
        self._data, self._noise = self._first_run(model, plain, ctx)
        self._states = self._data.states
        self.samples = self._noise.samples

    def _first_run(self, model: onnx_ir.Model, plain: ir.Session, ctx: Context) -> tuple[ir.Data, ir.Drift]:
        """The data, and the original's own noise on it."""
        if ctx.data is None:
            # Not every model keeps what the shapes of its inputs promise: some run at one batch alone.
            several = ir.seeded_data(model, SAMPLES, ctx.seed, states=ctx.states, sizes="several")
            try:
                return several, ir.compare(plain, self._original, several, states=several.states)
            except ir.LimitError:
                raise
            except ir.IRError:
                pass
        data = ir.seeded_data(model, SAMPLES, ctx.seed, states=ctx.states) if ctx.data is None else ctx.data
        return data, ir.compare(plain, self._original, data, states=data.states)

    def after(self, step: Pass, new: onnx_ir.Model, before: tuple[str, ...]) -> dict[str, Any]:
        """Drift and verdict of a pass that made `new`; `before` names the passes that ran earlier.

        Raises:
            PassError: when the new model does not run, or an exact pass moved the numbers.
        """
        try:
            session = self._open(new)
            previous = ir.compare(self._previous, session, self._data, states=self._states)
            reference = (
                previous
                if self._previous is self._original
                else ir.compare(self._original, session, self._data, states=self._states)
            )
        except ir.LimitError:
            raise
        except ir.IRError as error:
            raise PassError(step.name, "", f"the model does not run any more: {error}", before) from error
        verdict = ir.judge(previous, self._noise) if step.exact else None
        if verdict is not None and not verdict.ok:
            wrong = next(o for o in verdict.outputs if not o.ok)
            raise PassError(
                step.name, f"output {wrong.name}", f"the pass promises the same numbers, but {wrong}", before
            )
        self._previous = session
        return {
            "drift": {"previous": previous.to_json(), "reference": reference.to_json()},
            "verdict": verdict.to_json() if verdict is not None else None,
            "broken": max(previous.unmatched, 0),
        }

    def _open(self, model: onnx_ir.Model, *, optimise: bool = True) -> ir.Session:
        return _FedSession(model, fixed=self._fixed, known=self._inputs, optimise=optimise)


class _FedSession(ir.Session):
    """A session that takes the original's inputs though a pass may have made some of them constant."""

    def __init__(
        self, model: onnx_ir.Model, *, fixed: Mapping[str, np.ndarray], known: frozenset[str], optimise: bool
    ) -> None:
        super().__init__(model, optimise=optimise)
        own = {spec.name for spec in self.inputs}
        self._feeds = {name: array for name, array in fixed.items() if name in own}
        self._gone = known - own

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on the original's inputs."""
        kept = {name: array for name, array in inputs.items() if name not in self._gone}
        return super().run(kept | self._feeds)
