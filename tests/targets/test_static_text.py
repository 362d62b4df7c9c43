"""The text of a static artefact: names in C, the header, what the target refuses."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt import ir, targets
from mc_opt.targets import _c_source, _machine
from mc_opt.targets._c_source import Identity, Program
from mc_opt.targets._manifest import Port
from mc_opt.targets.x86 import X86


def program(inputs: Sequence[str] = ("x",), outputs: Sequence[str] = ("y",)) -> Program:
    ports = [tuple(Port(n, (2, 3), "float32") for n in names) for names in (inputs, outputs)]
    return Program(*ports, calls=(), copies=(), planned=128, bound=128)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("x",), ["x"]),
        (("input.1", "input_1"), ["input_1", "input_1_2"]),
        (("float", "new", "NULL", "INT8_MAX"), ["float_", "new_", "NULL_", "INT8_MAX_"]),
        (("0", "", "/", "__x__"), ["t0", "tensor", "tensor_2", "x"]),
        (("workspace", "MODEL_ALIGNMENT"), ["workspace_2", "MODEL_ALIGNMENT_2"]),
        (("数据", "data:0"), ["tensor", "data_0"]),
    ],
)
def test_parameters_are_c_names(given: tuple[str, ...], names: list[str]) -> None:
    assert _c_source.parameters(program(given, ()), "model") == names


@pytest.mark.slow
@pytest.mark.ci
@settings(deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6), st.lists(st.text(max_size=12), max_size=6))
def test_any_names_make_distinct_parameters(inputs: list[str], outputs: list[str]) -> None:
    names = _c_source.parameters(program(inputs, outputs), "model")
    assert len(set(names)) == len(names) == len(inputs) + len(outputs)
    assert all(_c_source.is_prefix(n) for n in names)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_no_name_leaves_the_header_s_comment(name: str) -> None:
    text = _c_source.header(
        program((name, "*/ int evil; /*", "a\\\nb")), Identity("m", "x86", "x86-64-v3", ("avx",), "v"), ()
    )
    assert text.index("*/") < text.index("#ifndef") < text.index("#define")
    assert text[: text.index("#ifndef")].count("*/") == 1 and text.isascii()


def test_the_header_says_what_a_caller_must_know() -> None:
    ports = (Port("image", (1, 3, 8, 8), "float32"), Port("count", (), "int64"))
    made = Program(ports, (Port("mask", (4,), "bool"),), (), (), planned=640, bound=576, scratch=64)
    text = _c_source.header(
        made, Identity("net", "x86", "x86-64-v3", ("avx2", "fma"), "mc-opt 1, TVM 2"), ("expf", "memset")
    )
    for words in (
        "in  image: float32, 1x3x8x8",
        "in  count: int64, one value",
        "out mask: bool, 0 or 1, 4",
        "const int64_t *count",
        "uint8_t *mask",
        "#define NET_WORKSPACE_SIZE 704",
        "no plan needs less than 576",
        "libnet.a -lm   (it calls expf)",
        "avx2 fma",
        "mc-opt 1, TVM 2",
        'extern "C"',
    ):
        assert words in text, words


@pytest.mark.parametrize("text", ["", "1a", "a-b", "a b", "_x", "int", "é"])
def test_a_prefix_is_a_c_name(text: str) -> None:
    assert not _c_source.is_prefix(text)


def test_every_feature_that_code_may_need_can_be_checked() -> None:
    assert set(_machine.named("x86-64-v4").features) <= set(_c_source.CPUID)
    assert set(_machine._FEATURES) == set(_c_source.CPUID)
    assert {f for features, *_ in _machine._ARM.values() for f in features} == set(_machine.HWCAP)
    for rows in (list(_c_source.CPUID.values()), list(_machine.HWCAP.values())):
        assert len(set(rows)) == len(rows)


def test_every_processor_by_name_has_a_machine() -> None:
    assert set(typing.get_args(typing.get_type_hints(X86)["cpu"])) == {"native", *_machine.x86_names()}
    for name in _machine.x86_names():
        made = targets.parse_target(f"x86{{cpu={name}}}")
        assert f"cpu={name} features=+" in made.resolved()
    older, newer = (_machine.named(name).features for name in ("skylake-avx512", "sapphirerapids"))
    assert set(older) < set(newer)


def test_the_target_refuses_what_static_cannot_be() -> None:
    for text, word in (
        ("x86{form=static threads=2}", "threads=2"),
        ("x86{form=static prefix=int}", "prefix=int"),
        ("x86{prefix=net}", "prefix=net"),
    ):
        with pytest.raises(ir.OptionError, match=word):
            targets.parse_target(text)
    made = targets.parse_target("x86{form=static prefix=net}")
    assert targets.parse_target(str(made)) == made
