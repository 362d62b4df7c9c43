"""The command line `mc-opt`: finds the verb, runs it, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mc_opt.tools import _command, _failure

DEFAULT = "compile"
"""The verb that runs when none is named: `mc-opt model.onnx --passes ...`."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def verb_names() -> tuple[str, ...]:
    """The verbs: the files of `tools/verbs`."""
    package = importlib.import_module("mc_opt.tools.verbs")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


class Verbs(click.Group):
    """A click group that imports a verb's file when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs that help lists; the default one has its options there instead."""
        return [name for name in verb_names() if name != DEFAULT]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb; None when there is no such verb."""
        if cmd_name not in verb_names():
            return None
        command: click.Command = importlib.import_module(f"mc_opt.tools.verbs.{cmd_name}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default verb in front of arguments that name none."""
        if not args:
            args = ["--help"]
        if args[0] not in (*verb_names(), *SETTINGS["help_option_names"], "--version"):  # type: ignore[misc]
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both forms: compile a model, or a verb."""
        formatter.write_usage("mc-opt", "MODEL --passes PASSES [OPTIONS] -o DIR")
        formatter.write_usage("mc-opt", "VERB [OPTIONS]", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of the default verb, then the other verbs."""
        default = self.get_command(ctx, DEFAULT)
        assert default is not None
        _command.write([*default.params, *self.get_params(ctx)], ctx, formatter)
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in verbs if verb is not None])


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import mc_opt

        click.echo(f"mc-opt {mc_opt.__version__}")
        ctx.exit()


@click.group(cls=Verbs, context_settings=SETTINGS, add_help_option=True)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli() -> None:
    """Compress a model: passes rewrite it, the result is an ONNX file and, for each target, an artefact.

    A file that is called like a verb is given as ./NAME.
    """


def process_number() -> int:
    """Which of several processes this is, as `torchrun` and `accelerate launch` tell it; 0 when it is the only one."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; errors are printed on stderr."""
    stdout, process = sys.stdout, process_number()
    try:
        result: Any = cli.main(args=list(arguments), prog_name="mc-opt", standalone_mode=False, obj=process)
    except (KeyboardInterrupt, click.Abort) as error:  # click makes the second of the first
        if not process:
            click.echo(f"mc-opt: {_failure.interruption(error)}", err=True)
        return _failure.INTERRUPTED
    except SystemExit as error:
        if sys.stdout is not stdout:  # click's answer to a reader that closed the pipe: it shields stdout and exits
            return _failure.OK
        click.echo(f"mc-opt: a script or factory ended the run by sys.exit({error.code!r}); return instead", err=True)
        return _failure.INPUT
    except Exception as error:
        failure = _failure.describe(error, traceback="--traceback" in arguments)
        click.echo(f"process {process}: {failure.text}" if process else failure.text, err=True)
        return failure.code
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """The entry point of the installed command `mc-opt`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout`, a build server: clean up as after Ctrl-C
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # as in `mc-opt passes | head -1`, where the rest is not wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
