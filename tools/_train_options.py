"""The options of a training on the command line: one table of flags, fields and what help says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mc_opt import passes
from mc_opt.tools._command import Option

if TYPE_CHECKING:
    from mc_opt.passes import Training

Command = TypeVar("Command", bound=Callable[..., Any])

HEADING = "Training"


@dataclasses.dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        field: of `Training`.
        value: what help writes for the value; empty for a switch.
        text: what help says, without the default.
        flag: where it is not the field's name with dashes.
        default: what help says of the default; empty for the field's own.
    """

    field: str
    value: str
    text: str
    flag: str = ""
    default: str = ""

    @property
    def name(self) -> str:
        """The option as it is written."""
        return self.flag or f"--{self.field.replace('_', '-')}"

    @property
    def key(self) -> str:
        """The name of the parameter, which no other option has."""
        return f"train_{self.field}"

    def help(self, default: object) -> str:
        """The line of help."""
        told = self.default or (",".join(default) if isinstance(default, tuple) else _plain(default))
        return f"{self.text}; default {told}." if told else f"{self.text}."


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if isinstance(value, bool | None) else str(value)


ROWS = (
    Row("data", "PATH|MODULE:FACTORY", "Train on these samples: an .npz, a folder of them, or a factory's", "--train"),
    Row("held_out", "PATH|MODULE:FACTORY", "Samples to judge by that are not trained on", default="a share of --train"),
    Row("holdout", "SHARE", "The share of --train that is held out when there is no --held-out"),
    Row("epochs", "N", "Passes over the data, for each trained pass, or for all with --joint"),
    Row("batch_size", "N", "Samples of a step, over all processes"),
    Row("accumulate", "N", "Cut a batch into so many parts, to save memory"),
    Row("lr", "NUMBER", "The highest learning rate"),
    Row("optimizer", "adamw|adam|sgd", "What makes steps of gradients"),
    Row("schedule", "cosine|linear|constant", "How the learning rate falls"),
    Row("warmup", "SHARE", "The share of all steps in which the learning rate rises"),
    Row("clip", "NUMBER", "The largest norm of the gradient, 0 for any"),
    Row("weight_decay", "NUMBER", "Of the optimizer"),
    Row("precision", "fp32|bf16|fp16", "Of the forward pass"),
    Row("loss", "TERMS", "What is minimised, as in 'output,layers{weight=0.5},labels'"),
    Row("batch_norm", "batch|frozen", "Train BatchNorm on the batch's statistics, or keep its own"),
    Row("freeze_statistics", "SHARE", "Keep its running statistics in that share of the steps, the last ones"),
    Row("recalibrate", "N", "Take its statistics again over N batches at the end"),
    Row("parameters", "LIST", "What is trained: forms (what the passes made), all, or globs of names"),
    Row("joint", "", "Train passes that follow one another together, not one by one"),
    Row("patience", "N", "Stop after N epochs without a better figure on held-out samples, 0 for never"),
    Row("device", "auto|cpu|cuda", "Where it trains"),
    Row("checkpoint", "DIR", "Keep its state here, for a run to go on from", default="DIR.training beside -o DIR"),
    Row("checkpoint_every", "SECONDS", "Save the state so often, and after every epoch"),
    Row("threads", "N", "Of torch on a CPU, 0 for its own choice; the same number gives the same bytes"),
)


def train_options(command: Command) -> Command:
    """Add the options of a training to a command."""
    default = passes.Training()
    fresh = click.option(
        "--fresh", is_flag=True, cls=Option, heading=HEADING, help="Forget what an interrupted training has saved."
    )
    command = fresh(command)
    for row in reversed(ROWS):
        name = row.name if row.value else f"{row.name}/--no-{row.name[2:]}"
        text = row.help(getattr(default, row.field))
        option = click.option(
            name, row.key, cls=Option, heading=HEADING, metavar=row.value or None, default=None, help=text
        )
        command = option(command)
    return command


def training_of(options: Mapping[str, Any], recipe: Training | None) -> Training | None:
    """The training that a recipe and the command line ask for, which wins; None when neither does.

    Raises:
        UsageError: there are options of a training, and nothing to train on.
        OptionError: a value that does not fit.
    """
    given = dict(_given(options))
    training = recipe
    if given:
        texts = {row.field: text for row, text in given.items()}
        training = (recipe or passes.Training()).with_options(texts)
    if training is None and options["fresh"]:
        raise click.UsageError("--fresh is of a training, and there is none; name its data by --train PATH")
    if training is not None and training.data is None:
        what = next((row.name for row in given), "the recipe's table [train]")
        raise click.UsageError(f"{what} is of a training, and there is none; name its data by --train PATH")
    return training


def _given(options: Mapping[str, Any]) -> Iterator[tuple[Row, str]]:
    for row in ROWS:
        value = options[row.key]
        if value is not None:
            yield row, str(value).lower() if isinstance(value, bool) else value
