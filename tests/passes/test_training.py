"""The options of a training: what is allowed, as text and back, and what a report tells of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mc_opt import ir
from mc_opt.passes import Recipe, RecipeError, Training

WRONG: dict[str, tuple[Any, str]] = {
    "epochs": (0, "epochs=0: expected a whole number from 1 on"),
    "batch_size": (2.5, "batch_size=2.5: expected a whole number from 1 on"),
    "accumulate": (0, "accumulate=0: expected a whole number from 1 on"),
    "patience": (-1, "patience=-1: expected a whole number from 0 on"),
    "threads": (True, "threads=True: expected a whole number from 0 on"),
    "recalibrate": (-1, "recalibrate=-1: expected a whole number from 0 on"),
    "lr": (-0.1, "lr=-0.1: expected a number from 0 on"),
    "clip": (float("nan"), "clip=nan: expected a number from 0 on"),
    "weight_decay": (-1.0, "weight_decay=-1.0: expected a number from 0 on"),
    "checkpoint_every": (-1, "checkpoint_every=-1: expected a number from 0 on"),
    "holdout": (1.0, "holdout=1.0: expected a share from 0 on and below 1"),
    "warmup": (1.1, "warmup=1.1: expected a share from 0 to 1"),
    "optimizer": ("lion", "optimizer='lion': choose one of adamw, adam, sgd"),
    "schedule": ("step", "schedule='step': choose one of cosine, linear, constant"),
    "precision": ("fp8", "precision='fp8': choose one of fp32, bf16, fp16"),
    "batch_norm": ("fold", "batch_norm='fold': choose one of batch, frozen"),
    "device": ("tpu", "device='tpu': choose one of auto, cpu, cuda"),
    "loss": ("", "loss is empty: name a term, as in output or labels"),
    "parameters": ("all", "parameters='all': expected a tuple of forms, all or globs of names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_is_not_allowed_is_told_with_what_is(name: str) -> None:
    value, told = WRONG[name]
    with pytest.raises(ValueError) as caught:
        Training(**{name: value})
    assert str(caught.value) == told


def test_text_becomes_options_beside_those_that_are_there() -> None:
    texts = {"epochs": "7", "lr": "1e-4", "joint": "true", "parameters": "forms,head*", "data": "more.npz"}
    found = Training(data="few.npz", batch_size=8).with_options(texts)
    assert found == Training(
        data="more.npz", batch_size=8, epochs=7, lr=1e-4, joint=True, parameters=("forms", "head*")
    )
    assert found.with_options({}) == found
    assert Training().with_options({"checkpoint": "here"}).checkpoint == Path("here")


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"epochs": "0"}, "training: epochs=0: expected a whole number from 1 on"),
        ({"epochs": "two"}, "training: epochs='two' is not a whole number"),
        ({"optimizer": "lion"}, "training: optimizer='lion': choose one of adamw, adam, sgd"),
        ({"epoch": "3"}, "training: unknown option 'epoch'; did you mean 'epochs'? (known: accumulate, "),
    ],
)
def test_text_that_does_not_fit(texts: dict[str, str], told: str) -> None:
    with pytest.raises(ir.OptionError) as caught:
        Training().with_options(texts)
    assert str(caught.value).startswith(told)


def criterion() -> None:
    """A loss of the user's own."""


def test_a_report_tells_options_and_names_but_no_places() -> None:
    training = Training(
        data=Path("/data/private/train.npz"), held_out="my_data:held_out", lr=0.01, checkpoint=Path("/tmp/x")
    )
    assert training.told() == {"data": "train.npz", "held_out": "my_data:held_out", "lr": "0.01"}
    assert Training(data={"x": [1]}, loss=criterion).told() == {"data": "dict", "loss": "criterion"}


# --- in a recipe ----------------------------------------------------------------------------------

RECIPE = """\
seed = 3
targets = ["onnx"]

[train]
data = "train.npz"
epochs = 9
loss = "output,layers{weight=0.5}"
parameters = ["forms", "*bias"]
joint = true
checkpoint = "here"

[[pass]]
name = "denseshift"
bits = 3
[pass.layer."head"]
bits = 4
"""


def test_a_recipe_holds_a_training_and_comes_back_as_text() -> None:
    recipe = Recipe.parse(RECIPE)
    assert recipe.training == Training(
        data="train.npz",
        epochs=9,
        loss="output,layers{weight=0.5}",
        parameters=("forms", "*bias"),
        joint=True,
        checkpoint=Path("here"),
    )
    again = Recipe.parse(str(recipe))
    assert again == recipe and str(again) == str(recipe)
    assert Recipe.parse("").training is None and str(Recipe()) == ""
    assert Recipe.parse("[train]").training == Training()
    assert dataclasses.replace(recipe, training=Training()) == Recipe.parse(
        str(dataclasses.replace(recipe, training=Training()))
    )


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("epochs = 9", "epochs = 0", "recipe, line 6: training: epochs=0: expected a whole number from 1 on"),
        ("epochs = 9", "epoch = 9", "recipe, line 6: training: unknown option 'epoch'; did you mean 'epochs'?"),
        ("epochs = 9", "lr = {a = 1}", "recipe, line 6: train: lr is {'a': 1}, expected a text, a number"),
        ("joint = true", 'joint = "maybe"', "recipe, line 9: training: joint='maybe': write true or false"),
        ("[train]", "[[train]]", "recipe, line 4: 'train' is no table; write it as [train]"),
        ("[train]", "[training]", "recipe, line 4: unknown key 'training'; did you mean 'train'?"),
    ],
)
def test_an_error_of_a_recipe_names_its_line(old: str, new: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(RECIPE.replace(old, new))
    assert str(caught.value).startswith(told)
