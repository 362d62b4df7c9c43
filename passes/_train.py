"""The training of trainable passes: one loop for all of them, on the interpreter.

The prepared model is the student; the original is the teacher where the loss or the figure asks for one. What a run
gives does not depend on whether it was interrupted: batches follow from the seed and the epoch, the learning rate and
the settings of forms from the step, and a checkpoint holds all else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import accelerate
import onnx_ir
import torch

from mc_opt import ir
from mc_opt.passes._base import Context, PassError
from mc_opt.passes._held_out import is_divided
from mc_opt.passes._train_data import Batch, Source, open_source, split
from mc_opt.passes._train_interrupt import interruptible
from mc_opt.passes._train_loss import Figure, Loss
from mc_opt.passes._train_model import Student, is_batchable, run, teacher_of
from mc_opt.passes._train_optimizer import optimizer_of, rate
from mc_opt.passes._train_state import Checkpoint, Position, fingerprint
from mc_opt.passes._trainable import TrainablePass
from mc_opt.passes._training import Epoch, Training, TrainingReport

_PROBED = 8
"""Samples among which two of equal shapes are looked for, to see whether the model takes batches."""
_Tensors = Mapping[str, torch.Tensor]
_Outputs = tuple[_Tensors, _Tensors | None, torch.Tensor | None, _Tensors]
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def fit(model: onnx_ir.Model, steps: Sequence[TrainablePass], ctx: Context) -> None:
    """Train the forms that `steps` prepared in `model`; their numbers change in place, `ctx.log` gets the curve.

    A dry run holds data, model and options to each other, and logs how much there is to train on.

    Raises:
        DataError: the data does not fit the model or the loss.
        OptionError: an option of the training is wrong.
        IRError: an op of the model has no torch meaning.
        PassError: the loss became NaN or infinite.
        LimitError: memory or disk is full.
    """
    assert ctx.training is not None
    before = torch.get_num_threads()
    if ctx.training.threads:
        torch.set_num_threads(ctx.training.threads)
    try:
        fitting = _Fit(model, steps, ctx, ctx.training)
        if ctx.dry_run:
            ctx.log.training = fitting.report(fitting.total)
        else:
            fitting.run()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in _NO_MEMORY):
            raise
        size = ctx.training.batch_size
        raise ir.LimitError(
            f"training: out of memory at batch size {size}; take a smaller one, or cut it up by accumulate"
        ) from error
    finally:
        torch.set_num_threads(before)


class _Fit:
    """One training: its modules, data and position."""

    def __init__(self, model: onnx_ir.Model, steps: Sequence[TrainablePass], ctx: Context, training: Training) -> None:
        assert ctx.reference is not None
        self.model, self.steps, self.ctx, self.training = model, steps, ctx, training
        on_cpu = training.device == "cpu" or not torch.cuda.is_available()
        if on_cpu and training.device == "cuda":
            raise ir.OptionError("device=cuda: torch finds no GPU here; train with device=cpu")
        handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.processes = accelerate.Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
        self.device = self.processes.device
        torch.manual_seed(ctx.seed)
        self.batchable = True
        data = self._opened(training.data)
        samples = list(_singles(next(iter(data.batches(batch_size=_PROBED, seed=0, epoch=0, shuffle=False)))))
        label = samples[0].label
        loss = Loss.of(training.loss, allow_scripts=ctx.allow_scripts)
        self.loss = loss.bind(model, ctx.reference, label[0].numpy() if label is not None else None)
        self.loss.hold_classes(data.largest)
        self.student = Student.of(model, steps, training, self.loss.taps)
        self.student.module.to(self.device)
        self.batchable = is_batchable(self.student, samples, self.device, ctx)
        if not self.batchable:
            alone = "the model does not take several samples at a time: they run one after another"
            ctx.note("", f"{alone}; exported with an open batch it would train faster")
            data = self._opened(training.data)
        self.data, self.held_out = self._divided(data)
        if training.patience and self.held_out is None:
            raise ir.OptionError(
                f"patience={training.patience}: no sample of {data.size} is held out (holdout={training.holdout:g}), "
                "expected some to judge by; give held_out, or a larger holdout"
            )
        self.teacher = None
        if self.loss.needs_reference or (self.loss.figure_needs_reference and self.held_out is not None):
            self.teacher = teacher_of(ctx.reference, self.loss.taps, self.device)
        self.per_epoch = self.data.count(training.batch_size)
        self.total = training.epochs * self.per_epoch
        self.optimizer = optimizer_of(list(self.student.trained.values()), training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.precision == "fp16")
        self.wrapped = self.processes.prepare_model(self.student.module)
        self.position = Position()
        self.best: dict[str, torch.Tensor] = {}
        self.checkpoint = self._checkpoint(loss.fingerprint)

    def _opened(self, data: object) -> Source:
        states = self.ctx.states or None
        return open_source(data, _with_fixed(self.model, self.ctx), states=states, batchable=self.batchable)

    def _divided(self, data: Source) -> tuple[Source, Source | None]:
        """What is trained on and what is held out."""
        training = self.training
        if training.held_out is not None:
            held_out = self._opened(training.held_out)
            self.loss.hold_classes(held_out.largest)
            return data, held_out
        if not is_divided(data.size, training.holdout):
            return data, None
        return split(data, training.holdout, self.ctx.seed)

    def _checkpoint(self, loss: str) -> Checkpoint | None:
        if self.training.checkpoint is None:
            return None
        data = self.data.fingerprint + (self.held_out.fingerprint if self.held_out else "")
        names = tuple(str(step) for step in self.steps)
        key = fingerprint(self.model, names, self.training, loss=loss, data=data, seed=self.ctx.seed)
        return Checkpoint(self.training.checkpoint, key)

    def run(self) -> None:
        """Train from the start, or from the checkpoint, to the end."""
        self._resume()
        place = self.position
        self.student.module.train()
        if place.start is None:
            place.start = self._judged(loss=None, terms={})
            self._keep_best()
        with interruptible() as interrupted:
            saved = time.monotonic()
            while not place.finished:
                for parts in self._batches(place.epoch, skip=place.batch):
                    self._step(parts)
                    place.batch += 1
                    place.step += 1
                    self._tell()
                    if interrupted.is_set():
                        self._save()
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > self.training.checkpoint_every:
                        self._save()
                        saved = time.monotonic()
                self._end_epoch()
                self._save()
                if interrupted.is_set():
                    raise KeyboardInterrupt
        self._finish()

    def _batches(self, epoch: int, *, skip: int = 0) -> Iterator[tuple[Batch, ...]]:
        return self.data.batches(
            batch_size=self.training.batch_size,
            seed=self.ctx.seed,
            epoch=epoch,
            skip=skip,
            rank=self.processes.process_index,
            ranks=self.processes.num_processes,
        )

    # --- one step ---------------------------------------------------------------------------------

    def _step(self, parts: tuple[Batch, ...]) -> None:
        """One step of the optimizer on one batch, piece by piece."""
        progress = self.position.step / max(self.total - 1, 1)
        self.student.set_progress(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.lr * rate(self.training, self.position.step, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        pieces = list(self._pieces(parts))
        size = sum(piece.size for piece in pieces)
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            together = contextlib.nullcontext() if is_last else self.processes.no_sync(self.wrapped)
            with together:
                terms = self._terms(self.wrapped, piece)
                value = self.loss.total(terms) * (piece.size / size)
                penalty = self.student.penalty(progress) if is_last else None
                if penalty is not None:
                    terms["penalty"] = penalty.detach() * (size / piece.size)
                    value = value + penalty
                self._hold_finite(value)
                self.scaler.scale(value).backward()
            self._add("loss", float(value.detach()) * size)
            for name, term in terms.items():
                self._add(name, float(term.detach()) * piece.size)
        self._add("samples", size)
        if self.training.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.trained.values(), self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _pieces(self, parts: tuple[Batch, ...]) -> Iterator[Batch]:
        if not self.batchable:
            yield from _singles(parts)
            return
        most = max(1, -(-sum(part.size for part in parts) // self.training.accumulate))
        for part in parts:
            for start in range(0, part.size, most):
                yield part if part.size <= most else part.rows(start, min(start + most, part.size))

    def _terms(self, module: torch.nn.Module, piece: Batch) -> dict[str, torch.Tensor]:
        return self.loss(*self._outputs(module, piece, with_teacher=self.loss.needs_reference))

    def _outputs(self, module: torch.nn.Module, piece: Batch, *, with_teacher: bool = True) -> _Outputs:
        """What the loss and the figure take: outputs of student and teacher, the label, the inputs."""
        piece = piece.to(self.device)
        inputs, label = piece.inputs, piece.label
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.training.precision)
        with torch.autocast(self.device.type, low, enabled=low is not None):
            teacher = None
            if self.teacher is not None and with_teacher:
                with torch.no_grad():
                    teacher = run(self.teacher, self.teacher, inputs, self.ctx)
            student = run(module, self.student.module, inputs, self.ctx)
        return student, teacher, label, inputs

    def _add(self, name: str, amount: float) -> None:
        self.position.sums[name] = self.position.sums.get(name, 0.0) + amount

    def _hold_finite(self, value: torch.Tensor) -> None:
        if bool(torch.isfinite(value)):
            return
        place = self.position
        raise self._diverged(f"epoch {place.epoch + 1}, step {place.batch + 1}", f"the loss is {float(value.detach())}")

    def _diverged(self, where: str, what: str) -> PassError:
        path = self.checkpoint.path if self.checkpoint is not None else None
        kept = f"; the last good state is in {path}" if path is not None and path.exists() else ""
        advice = f"take a lower learning rate than {self.training.lr:g}, clip the gradient, or look for such numbers in"
        return PassError(self.steps[0].name, where, f"{what}; {advice} the data{kept}")

    # --- one epoch --------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        place, training = self.position, self.training
        sums = self._over_processes(place.sums)
        samples = sums.pop("samples", 0.0) or 1.0
        loss = sums.pop("loss", 0.0) / samples
        place.epochs.append(self._judged(loss=loss, terms={name: v / samples for name, v in sums.items()}))
        place.epoch, place.batch, place.sums = place.epoch + 1, 0, {}
        self._keep_best()
        stale = training.patience and place.epoch - place.best >= training.patience
        place.finished = place.epoch >= training.epochs or bool(stale)

    def _judged(self, *, loss: float | None, terms: dict[str, float]) -> Epoch:
        """The figures on held-out samples, of the forms as they would be converted now."""
        lr = self.training.lr * rate(self.training, max(self.position.step - 1, 0), self.total)
        if self.held_out is None:
            return Epoch(loss or 0.0, terms, lr=lr)
        sums = dict.fromkeys(("loss", "samples", "total", "count"), 0.0)
        progress = self.position.step / max(self.total - 1, 1)
        with self.student.judged(min(progress, 1.0)):
            batches = self.held_out.batches(
                batch_size=self.training.batch_size,
                seed=0,
                epoch=0,
                shuffle=False,
                rank=self.processes.process_index,
                ranks=self.processes.num_processes,
            )
            for parts in batches:
                for piece in self._pieces(parts):
                    outputs = self._outputs(self.student.module, piece)
                    figure = self.loss.figure(*outputs)
                    sums["loss"] += float(self.loss.total(self.loss(*outputs))) * piece.size
                    sums["samples"] += piece.size
                    sums["total"] += float(figure.total)
                    sums["count"] += float(figure.count)
        sums = self._over_processes(sums)
        held_out = sums["loss"] / max(sums["samples"], 1.0)
        metric = self.loss.score(Figure(torch.tensor(sums["total"]), torch.tensor(sums["count"])))
        return Epoch(held_out if loss is None else loss, terms, held_out, metric, lr)

    def _over_processes(self, sums: Mapping[str, float]) -> dict[str, float]:
        if self.processes.num_processes == 1:
            return dict(sums)
        together = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        values = self.processes.reduce(together, "sum").tolist()
        return dict(zip(sums, values, strict=True))

    def _keep_best(self) -> None:
        """Remember the parameters of the best epoch, where training may stop early."""
        place = self.position
        if not self.training.patience:
            place.best = place.epoch
            return
        figures = [place.start, *place.epochs]
        by_metric = self.loss.metric_is_the_aim
        ranked = [((e.metric or 0.0) * by_metric, -(e.held_out or 0.0)) for e in figures if e is not None]
        if len(ranked) == 1 or ranked[-1] > ranked[place.best]:
            place.best = len(ranked) - 1
            self.best = {name: tensor.clone() for name, tensor in self.student.state.items()}

    def _tell(self) -> None:
        place = self.position
        mean = place.sums.get("loss", 0.0) / max(place.sums.get("samples", 0.0), 1.0)
        last = place.epochs[-1] if place.epochs else place.start
        figure = "" if last is None or last.metric is None else f", {self.loss.metric} {last.metric:.4g}"
        what = f"epoch {place.epoch + 1} of {self.training.epochs}, loss {mean:.4g}{figure}"
        self.ctx.progress(place.step, self.total, what)

    # --- the ends ---------------------------------------------------------------------------------

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        loaded = self.checkpoint.load(self.optimizer)
        self.processes.wait_for_everyone()  # the file goes when the first process has ended
        if loaded is None:
            return
        place = loaded.position
        where = f"goes on at epoch {place.epoch + 1}, step {place.step}"
        self.ctx.progress(0, 0, "was trained by the interrupted run" if place.finished else where)
        self.position, self.best = loaded.position, loaded.best
        self.student.load(loaded.state)
        if loaded.scaler:
            self.scaler.load_state_dict(loaded.scaler)

    def _save(self) -> None:
        """Put the state into the checkpoint, where one that holds NaN never takes the place of a good one."""
        for name, parameter in self.student.trained.items():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"step {self.position.step}", f"{name} became NaN or infinite")
        if self.checkpoint is not None and self.processes.is_main_process:
            self.checkpoint.save(self.position, self.student.state, self.best, self.optimizer, self.scaler.state_dict())

    def _finish(self) -> None:
        place = self.position
        if self.best:
            self.student.load(self.best)
        self.student.set_progress(1.0)
        self._recalibrate()
        ir.state_to_model(self.student.module, self.model)
        self.ctx.log.training = self.report(place.step)

    def report(self, steps: int) -> TrainingReport:
        """What was trained, or would be, in so many steps."""
        place = self.position
        return TrainingReport(
            passes=tuple(step.name for step in self.steps),
            samples=self.data.size,
            held_out=self.held_out.size if self.held_out is not None else 0,
            steps=steps,
            parameters=sum(p.numel() for p in self.student.trained.values()),
            metric=self.loss.metric,
            start=place.start,
            epochs=tuple(place.epochs),
            best=place.best,
            batches=self.per_epoch,
        )

    def _recalibrate(self) -> None:
        """Take the statistics of BatchNormalizations again, as a mean over whole batches."""
        count = min(self.training.recalibrate, self.per_epoch)
        if not count or not self.student.norms:
            return
        for norm in self.student.norms:
            norm.frozen = False
            norm.restart()
        self.student.module.train()
        with torch.no_grad():
            for _, parts in zip(range(count), self._batches(self.training.epochs), strict=False):
                for piece in self._pieces(parts):
                    self._outputs(self.student.module, piece)


def _with_fixed(model: onnx_ir.Model, ctx: Context) -> onnx_ir.Model:
    """The model as data knows it: with the inputs of the original that an earlier pass has made constant."""
    assert ctx.reference is not None
    own = {value.name for value in model.graph.inputs}
    gone = [v for v in ctx.reference.graph.inputs if v.name in ctx.fixed and v.name not in own]
    if not gone:
        return model
    whole = model.clone()
    whole.graph.inputs.extend(onnx_ir.Value(name=v.name, type=v.type, shape=v.shape) for v in gone)
    return whole


def _singles(parts: Sequence[Batch]) -> Iterator[Batch]:
    for part in parts:
        yield from part.singles()
