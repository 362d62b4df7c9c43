"""`mc-opt explain MODEL LAYER`: why a layer was rewritten or left alone, and where it stands in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_opt.tools import _command, _console, _request, _texts


@click.command(cls=_command.Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("layer")
@_request.pass_options
@_request.model_options
@_console.common_options
def command(model: Path, layer: str, as_json: bool, **options: Any) -> None:
    """Say why each pass takes LAYER of MODEL or leaves it alone.

    LAYER is the name of a layer, of a weight, or of a node that uses one; every pass is asked by itself, or those
    of --passes one after the other.
    """
    from mc_opt import ir, passes
    from mc_opt.tools import _explain

    shapes = _request.shapes_of(options["shapes"])
    loaded = ir.load_model(model, shapes=shapes, check="structure")
    states = _texts.pairs(options["states"], "--state")
    data = ir.load_data(options["data"], loaded, states=states) if options["data"] else None
    recipe = _request.recipe_of(options)
    ctx = passes.Context(data=data, seed=options["seed"] or recipe.seed or 0, allow_scripts=options["allow_scripts"])
    asked = options["passes"] is not None or options["recipe"] is not None
    found = _explain.explain(loaded, layer, pipeline=recipe.pipeline if asked else None, ctx=ctx)
    if as_json:
        _console.print_json(_explain.to_json(found))
        return
    click.echo(f"{found.layer}: {found.weight}")
    for title, names in (("used by", found.consumers), ("after", found.feeds), ("before", found.fed)):
        if names:
            click.echo(f"  {title} {', '.join(names)}")
    click.echo(f"  {found.upstream} nodes lead here, {found.downstream} depend on it")
    rows = [(f.rewritten_by, f.outcome, f.reason) for f in found.findings]
    _console.print_table(("pass", "outcome", "why"), rows, title="Passes")
