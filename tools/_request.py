"""From the words of the command line to a request: the options that verbs share, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mc_opt.tools import _texts, _train_options

if TYPE_CHECKING:
    from mc_opt.ir import OptionError
    from mc_opt.passes import Recipe
    from mc_opt.targets import Target
    from mc_opt.tools.driver import Request

Command = TypeVar("Command", bound=Callable[..., Any])


def _stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_PATH = click.Path(path_type=Path)

pass_options = _stack(
    click.option("--passes", metavar="LIST", help="Passes in order, as in 'first,second{option=value}'."),
    click.option("--recipe", metavar="FILE", type=_PATH, help="A TOML file of passes, instead of --passes."),
)
torch_option = click.option(
    "--from-torch",
    metavar="MODULE:FACTORY",
    help="Capture what FACTORY returns: (torch module, inputs), and dynamic shapes if any.",
)
transformers_options = _stack(
    click.option(
        "--from-transformers",
        metavar="PATH",
        help="Capture the causal language model in a folder of save_pretrained or a .gguf file, with a cache.",
    ),
    click.option(
        "--max-length", metavar="N", type=click.IntRange(min=2), help="Positions of that cache; default 1024."
    ),
)
tune_options = _stack(
    click.option(
        "--tune",
        metavar="quick",
        help="Measure up to 8 tilings of each kernel's shape on this machine; writes DIR/tune-table.json.",
    ),
    click.option(
        "--tune-table",
        metavar="FILE",
        type=_PATH,
        help="Take the kernels' tiles from this table, to the same bytes; with --tune, add what is measured.",
    ),
)
model_options = _stack(
    click.option(
        "--shape",
        "shapes",
        metavar="IN=DIMS",
        multiple=True,
        help="Fix an input, as in x=1x3x224x224; a name leaves a size open: x=Nx3x224x224.",
    ),
    click.option("--data", metavar="PATH", type=_PATH, help="Real inputs: an .npz or a folder of them."),
    click.option(
        "--state", "states", metavar="OUT=IN", multiple=True, help="Recurrent state: output OUT feeds input IN."
    ),
    click.option("--allow-scripts", is_flag=True, help="Let passes run the Python files that they name."),
    click.option("--seed", metavar="N", type=click.IntRange(min=0), help="Of every random choice; default 0."),
)


def compile_request(words: Sequence[str], options: Mapping[str, Any], *, process: int = 0) -> Request:
    """What the default verb's arguments ask for; `words` are all positional ones.

    Args:
        words: the positional arguments.
        options: the others by name.
        process: which of several processes this is; the first writes.

    Raises:
        UsageError: words that do not fit together.
        OptionError: an unknown pass, target or option.
        RecipeError: the recipe file is wrong.
    """
    model = model_of(words, options)
    if options["out"] is None and not options["dry_run"]:
        raise click.UsageError("nowhere to write: name a folder with -o DIR (or ask for --dry-run)")
    check = options["check"]
    if check not in (None, "full", "structure"):
        raise click.UsageError(f"--check {check!r}: choose full or structure")
    _check_folder(options["out"])
    from mc_opt import passes
    from mc_opt.tools import driver

    recipe = recipe_of(options, words)
    limit = options["memory_limit"]
    return driver.Request(
        model=model,
        from_torch=options["from_torch"] or "",
        from_transformers=options["from_transformers"] or "",
        max_length=_max_length(options),
        pipeline=recipe.pipeline,
        targets=_targets(options["target"], recipe),
        out=options["out"],
        shapes=shapes_of(options["shapes"]),
        data=options["data"],
        states=_texts.pairs(options["states"], "--state"),
        check=check or recipe.check or "full",
        seed=options["seed"] if options["seed"] is not None else recipe.seed or 0,
        memory_limit=passes.MEMORY_LIMIT if limit is None else _texts.byte_count(limit),
        allow_scripts=options["allow_scripts"],
        stop_after=options["stop_after"],
        dump=options["dump"],
        training=_train_options.training_of(options, recipe.training),
        tune=options["tune"] or recipe.tune,
        tune_table=options["tune_table"] or recipe.tune_table,
        fresh=options["fresh"],
        writes=process == 0,
        dry_run=options["dry_run"],
    )


def model_of(words: Sequence[str], options: Mapping[str, Any]) -> Path | None:
    """The one model among the positional words; None when another option names it."""
    named = _named_by(options)
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)} were both given; give one model")
    if len(words) > 1 - len(named):
        _refuse_extra(words, options)
    if not words:
        if named:
            return None
        raise click.UsageError("no model was named; give an ONNX file, or --from-torch package.module:factory")
    word = words[0]
    if not Path(word).exists() and word.isidentifier():
        from mc_opt import ir
        from mc_opt.tools import cli

        verbs = [name for name in cli.verb_names() if name != cli.DEFAULT]
        raise click.UsageError(f"{word!r} is no file; {ir.unknown('verb', word, verbs)}")
    return Path(word)


def _named_by(options: Mapping[str, Any]) -> list[str]:
    """The options that name a model where no file does."""
    found = {"--from-torch": options.get("from_torch"), "--from-transformers": options.get("from_transformers")}
    return [option for option, value in found.items() if value]


def _max_length(options: Mapping[str, Any]) -> int:
    from mc_opt import ir

    given: int | None = options["max_length"]
    if given is not None and not options["from_transformers"]:
        raise click.UsageError("--max-length is the size of the cache that --from-transformers captures; drop it")
    return ir.MAX_LENGTH if given is None else given


def _refuse_extra(words: Sequence[str], options: Mapping[str, Any]) -> None:
    from mc_opt import ir, passes
    from mc_opt.tools import cli

    lists = [text for text in (options.get("passes"), options.get("target")) if text]
    verbs = [name for name in cli.verb_names() if name != cli.DEFAULT]
    if words[0].isidentifier() and not Path(words[0]).exists() and not lists:
        raise click.UsageError(ir.unknown("verb", words[0], verbs))
    # The model is the first file, or else the first word that no shell has torn off a list.
    whole = [word for word in words if not set(word) & set("{}=,")] or words
    model = next((word for word in words if Path(word).is_file()), whole[0])
    extra = list(words)
    named = _named_by(options)
    if not named:
        extra.remove(model)
    problem = f"unexpected argument{'s' if len(extra) > 1 else ''} {' '.join(map(repr, extra))}"
    if named:
        problem += f"; {named[0]} is the model"
    hint = passes.quoting_hint([*lists, *extra]) if lists else None
    raise click.UsageError(f"{problem}; {hint or 'give one model'}")


def recipe_of(options: Mapping[str, Any], words: Sequence[str] = ()) -> Recipe:
    """The passes of --passes or --recipe, with what a recipe says beside them."""
    from mc_opt import passes

    if options["passes"] is not None and options["recipe"] is not None:
        raise click.UsageError("--passes and --recipe were both given; give one")
    if options["recipe"] is not None:
        return passes.Recipe.read(options["recipe"])
    return passes.Recipe(passes.Pipeline.parse(options["passes"] or ""))


def shapes_of(texts: Sequence[str]) -> dict[str, tuple[int | str, ...]]:
    """`--shape` texts as input name to dimensions."""
    from mc_opt import ir

    shapes: dict[str, tuple[int | str, ...]] = {}
    for text in texts:
        name, dims = ir.parse_shape(text)
        if name in shapes:
            raise click.UsageError(f"--shape: input {name!r} is given twice")
        shapes[name] = dims
    return shapes


def _targets(text: str | None, recipe: Recipe) -> tuple[Target, ...]:
    from mc_opt import ir, passes, targets

    text = ",".join(recipe.targets or ()) if text is None else text
    try:
        return tuple(targets.parse_targets(text)) if text else ()
    except ir.OptionError as error:
        raise _hinted(error, passes.quoting_hint([text])) from error


def _hinted(error: OptionError, hint: str | None) -> OptionError:
    return error if hint is None or "quote" in str(error) else type(error)(f"{error}; {hint}")


def _check_folder(out: Path | None) -> None:
    """Refuse at once a place that cannot be a folder; the rest shows when it is written."""
    if out is not None and out.exists() and not out.is_dir():
        raise click.UsageError(f"-o {out}: is a file, a folder was expected; name another folder")
