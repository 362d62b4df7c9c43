"""Texts and recipes of pipelines, and how a name finds its pass."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt import ir, passes
from mc_opt.passes import Pipeline, Recipe, RecipeError, _find
from tests.passes.free import Free
from tests.passes.toy import Toy


@pytest.fixture(autouse=True, scope="module")
def toys() -> Iterator[pytest.MonkeyPatch]:
    monkeypatch = pytest.MonkeyPatch()
    real = _find._load
    kinds = {"toy": Toy, "free": Free}
    monkeypatch.setattr(_find, "_load", lambda entry: kinds.get(entry.name) or real(entry))
    listed = {name: importlib.metadata.EntryPoint(name, "tests", _find.GROUP) for name in kinds}
    monkeypatch.setattr(_find, "_entry_points", lambda: listed)
    yield monkeypatch
    monkeypatch.undo()


words = st.text(alphabet="abcXYZ09./*_-=", min_size=1, max_size=8)
toy_passes = st.builds(
    Toy,
    bits=st.integers(1, 8),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["fast", "good"]),
    deep=st.booleans(),
    script=st.just("") | words,
    limit=st.none() | st.integers(),
    layers=st.lists(words, min_size=1).map(tuple),
    skip=st.lists(words).map(tuple),
)


@given(st.lists(toy_passes))
def test_the_text_of_a_pipeline_reads_back(made: list[Toy]) -> None:
    pipeline = Pipeline.of(*made)
    assert Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.slow
@pytest.mark.ci
@given(st.lists(toy_passes, min_size=1), st.dictionaries(words, st.fixed_dictionaries({"bits": st.integers(1, 8)})))
def test_a_recipe_reads_back(made: list[Toy], overrides: dict[str, dict[str, int]]) -> None:
    pipeline = Pipeline(tuple(passes.Step(p, tuple(overrides.items())) for p in made))
    text = "\n".join(step.toml() for step in pipeline.steps)
    assert Recipe.parse(text).pipeline == pipeline


def test_spaces_separate_options_and_values_hold_commas() -> None:
    pipeline = Pipeline.parse("toy{bits=3 skip=first,last}, toy")
    assert pipeline.passes == (Toy(bits=3, skip=("first", "last")), Toy())
    assert str(pipeline) == "toy{bits=3 skip=first,last},toy"


def test_nothing_is_an_empty_pipeline() -> None:
    assert Pipeline.parse("") == Pipeline()
    assert str(Pipeline()) == ""


def test_a_pass_may_take_options_of_any_name() -> None:
    pipeline = Pipeline.parse("free{sr=16000 x=1}")
    assert str(pipeline) == "free{sr=16000 x=1}"
    assert Recipe.parse(pipeline.steps[0].toml()).pipeline == pipeline


def test_a_value_with_a_space_is_written_as_a_recipe() -> None:
    pipeline = Pipeline.of(Toy(script="my fix.py"))
    assert str(pipeline) == '[[pass]]\nname = "toy"\nscript = "my fix.py"\n'
    assert Recipe.parse(str(pipeline)).pipeline == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toys", "unknown pass 'toys'; did you mean 'toy'?"),
        ("toy{bit=3}", "toy: unknown option 'bit'; did you mean 'bits'?"),
        ("toy{bits=x}", "toy: bits='x' is not a whole number"),
        ("toy{bits=9}", "toy: bits=9: expected 1 to 8"),
        ("toy{mode=slow}", "choose one of fast, good"),
        ("toy,,toy", "an entry is empty"),
        ("toy{bits}", "'bits' is not option=value"),
        ("toy{bits=3", "quote the whole text"),
        ("toyskip=first", "quote the list"),
        ("toy,toylast", "quote the list"),
    ],
)
def test_a_mistake_is_told(text: str, message: str) -> None:
    with pytest.raises(ir.OptionError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)


def test_the_shell_is_blamed_only_for_what_it_does() -> None:
    assert passes.quoting_hint(["toy{bits=3 skip=a,b}"]) is None
    assert passes.quoting_hint(["toy{bits=3", "group=2}"]) is not None
    assert passes.quoting_hint(["toyskip=first", "toylast"]) is not None
    assert passes.quoting_hint(["model.onnx"]) is None


RECIPE = """
seed = 3
check = "structure"
targets = ["onnx", "x86{cpu=native}"]

[[pass]]
name = "toy"
bits = 3
layers = ["encoder.*", "fc"]
deep = true

[pass.layer."encoder.*"]
bits = 5

[pass.layer."*.3.*"]
ratio = 0.25

[[pass]]
name = "toy"
"""


def test_a_recipe_gives_passes_overrides_and_settings() -> None:
    recipe = Recipe.parse(RECIPE)
    first, second = recipe.pipeline.steps
    assert first.rewrite == Toy(bits=3, layers=("encoder.*", "fc"), deep=True)
    assert second.rewrite == Toy()
    assert (recipe.seed, recipe.check, recipe.targets) == (3, "structure", ("onnx", "x86{cpu=native}"))
    bound = first.bound()
    assert bound.at("fc") == Toy(bits=3, layers=("encoder.*", "fc"), deep=True)
    assert bound.at("encoder.1.w").bits == 5
    assert (bound.at("encoder.3.w").bits, bound.at("encoder.3.w").ratio) == (5, 0.25)


def test_the_later_override_wins() -> None:
    text = '[[pass]]\nname = "toy"\n[pass.layer."a*"]\nbits = 2\n[pass.layer."*"]\nbits = 6\n'
    assert Recipe.parse(text).pipeline.steps[0].bound().at("abc").bits == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = ", "not valid TOML"),
        ("sead = 1", "r.toml, line 1: unknown key 'sead'; did you mean 'seed'?"),
        ("seed = -1", "line 1: seed is -1"),
        ('check = "half"', "expected one of full, structure"),
        ('targets = "x86"', "line 1: targets is 'x86', expected a list"),
        ("[pass]\nname = 'toy'", "write each pass as a table [[pass]]"),
        ("[[pass]]\nbits = 3", "line 1: pass 1 has no name"),
        ("[[pass]]\nname = 'toy'\n\n[[pass]]\nname = 'tay'", "line 5: unknown pass 'tay'"),
        ("[[pass]]\nname = 'toy'\nbits = 3\nbit = 3", "line 4: toy: unknown option 'bit'"),
        ("[[pass]]\nname = 'toy'\nbits = 12", "line 3: toy: bits=12: expected 1 to 8"),
        ("[[pass]]\nname = 'toy'\nbits = {a = 1}", "line 3: toy: bits is {'a': 1}"),
        ("[[pass]]\nname = 'toy'\nskip = ['a,b']", "line 3: toy: skip: an entry of a list cannot hold a comma"),
        ("[[pass]]\nname = 'toy'\nlayer = 3", "line 3: toy: write layer options as a table"),
        ("[[pass]]\nname = 'toy'\n[pass.layer.'a.*']\nbits = 99", "line 3: layer 'a.*': toy: bits=99"),
        ("[[pass]]\nname = 'toy'\n[pass.layer.'a']\nskip = ['b']", "skip chooses layers and cannot differ by layer"),
    ],
)
def test_a_wrong_recipe_names_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "r.toml")
    assert str(caught.value).startswith("r.toml")
    assert message in str(caught.value)


def test_a_recipe_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        Pipeline.from_toml(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Pipeline.from_toml(tmp_path / "r.toml")
