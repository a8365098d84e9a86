"""Styles of a tensor plan: text and objects say the same, and each style is documented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import nn

from trainer.sharding import DimShard, Shard
from trainer.tensor_parallel.families import COMMON, FAMILIES, UNITS, VARIANTS
from trainer.tensor_parallel.styles import (
    STYLES,
    Attribute,
    Column,
    Computed,
    Divide,
    KeyValueColumn,
    PackedColumn,
    ParameterTarget,
    Part,
    Replicated,
    ReplicatedSumGradient,
    Requires,
    RMSNorm,
    Row,
    ShardedParameter,
    SplitInput,
    SplitOutput,
    Style,
    UnknownStyle,
    parse_styles,
)
from trainer.tensor_parallel.styles.base import ModuleStyle
from trainer.tensor_parallel.units import Refused, Scope

DOCUMENT = Path(__file__).parents[1] / "docs" / "tensor_plans.md"

TEXTS = [
    ("colwise", Column()),
    ("colwise:head_dim", Column(unit="head_dim")),
    ("colwise:3*head_size", Column(unit="3*head_size")),
    ("kv_colwise:head_dim", KeyValueColumn(unit="head_dim")),
    ("packed_colwise", PackedColumn()),
    ("packed_colwise:12/head_dim", PackedColumn(12, unit="head_dim")),
    ("packed_colwise:a/b,~2*c/c//d", PackedColumn(parts=(Part("a", unit="b"), Part("2*c", unit="c//d", shared=True)))),
    ("rowwise", Row()),
    ("cut:1", ShardedParameter(dim=1)),
    ("cut:0:all/head_dim", ShardedParameter(dim=0, count=1, unit="head_dim")),
    ("cut:0:~all/1", ShardedParameter(dim=0, parts=(Part(unit="1", shared=True),))),
    ("cut:0:each ffn_size", ShardedParameter(dim=0, each="ffn_size")),
    ("rms_norm:~all/head_dim", RMSNorm(parts=(Part(unit="head_dim", shared=True),))),
    ("replicate:a router: all scores", Replicated("a router: all scores")),
    ("replicated_with_grad_allreduce", ReplicatedSumGradient()),
    ("needs:legacy=True", Requires("legacy", "True")),
    ("split_input:alibi:0:num_heads", SplitInput("alibi", 0, "num_heads")),
    ("split_output:2:1", SplitOutput(2, 1)),
    (
        "divide:heads,config.groups,width?,conv?=a+2*b",
        Divide(
            "heads",
            Attribute("groups", in_config=True),
            Attribute("width", optional=True),
            Computed("conv", "a+2*b", optional=True),
        ),
    ),
]


@pytest.mark.fast
@pytest.mark.parametrize(("text", "style"), TEXTS, ids=[text for text, _ in TEXTS])
def test_text_and_object_are_the_same_style(text: str, style: Style) -> None:
    assert parse_styles(text) == (style,)
    assert str(style) == text


@pytest.mark.fast
def test_every_style_of_a_family_can_be_written_as_text() -> None:
    tables = [UNITS, COMMON, *FAMILIES.values(), *(variant.entries for variant in VARIANTS)]
    entries = [entry for table in tables for entry in table.values() if entry is not None]
    styles = [style for entry in entries for style in (entry if isinstance(entry, tuple) else (entry,))]
    assert len(styles) > 2000
    for style in styles:
        (parsed,) = parse_styles(str(style))
        assert type(parsed) is type(style)
        assert str(parsed) == str(style)


@pytest.mark.fast
def test_several_styles_are_read_in_order() -> None:
    assert parse_styles("rowwise + split_output") == (Row(), SplitOutput())


@pytest.mark.fast
def test_misspelled_style_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownStyle, match="'colwize:head_dim' is not a style; did you mean 'colwise'"):
        parse_styles("colwize:head_dim")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cut", "the style is written 'cut:dimension"),
        ("cut:first", "'first' is not an integer; the style is written 'cut:dimension"),
        ("split_input:alibi", "'' is not an integer"),
        ("split_output:1", "'' is not an integer"),
        ("enter_output:last", "'last' is not an integer"),
        ("inside:here", "'inside' takes no argument"),
        ("needs:legacy", "'needs' takes field=value"),
        ("colwise:head-dim", "'head-dim' is not a sum of products of numbers and names"),
        ("divide:conv=a-b", "'a-b' is not a sum of products"),
        ("packed_colwise:a/b/c", "'b/c' is not a sum of products"),
        ("parallel_residual:first", "'parallel_residual' takes first,second"),
    ],
)
def test_argument_that_cannot_be_read_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_styles(text)


@pytest.mark.fast
@pytest.mark.parametrize(
    "build",
    [
        lambda: Column(unit="head dim"),
        lambda: Part("2**head_dim"),
        lambda: PackedColumn(3, parts=(Part("a"),)),
        lambda: ShardedParameter(dim=0, each="a", unit="b"),
        lambda: PackedColumn(0),
    ],
)
def test_style_of_a_family_that_is_wrong_is_refused_when_it_is_made(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"is not a sum|takes a count"):
        build()


@pytest.mark.fast
def test_name_of_a_style_is_taken_once() -> None:
    with pytest.raises(TypeError, match="two styles are called 'rowwise'"):

        @dataclass(frozen=True)
        class Another(ModuleStyle):
            name: ClassVar[str] = "rowwise"

    assert STYLES["rowwise"] is Row


@pytest.mark.fast
def test_document_lists_every_style() -> None:
    rows = [f"| `{usage}` | {meaning} |" for usage, meaning in (style.documentation() for style in STYLES.values())]
    table = DOCUMENT.read_text().partition("| style | meaning |\n| --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == rows
    for name, style in STYLES.items():
        assert style.documentation()[0].partition(":")[0].partition("[")[0] == name


def _target(module: nn.Module, shape: tuple[int, ...]) -> ParameterTarget:
    return ParameterTarget("w", shape, module, Scope(module))


@pytest.mark.fast
def test_style_divides_a_parameter() -> None:
    module = nn.Linear(6, 24)
    module.heads, module.size = 4, 2  # type: ignore[assignment]
    (shard,) = Column(unit="heads").shards(_target(module, (24, 6)), 1, 3)
    assert shard == Shard("w", (24, 6), (DimShard(0, 1, 3, (24,)),))
    (shard,) = Row().shards(_target(module, (24, 6)), 1, 3)
    assert shard.slices == (DimShard(1, 1, 3, (6,)),)
    (shard,) = Row().shards(_target(module, (24,)), 1, 3)
    assert shard == Shard.full("w", (24,), owner=False)
    queries, keys = PackedColumn(parts=(Part("heads*heads"), Part("heads*size", unit="heads", shared=True))).shards(
        _target(module, (24, 6)), 1, 4
    )
    assert queries == Shard("w", (24, 6), (DimShard(0, 1, 4, (16,)),))
    assert keys == Shard("w", (24, 6), (DimShard(0, 0, 2, (8,), start=16),), owner=False, copies=2)
    with pytest.raises(Refused, match="its 6 units of 4 cannot be divided by tensor 4"):
        Column(unit="heads").shards(_target(module, (24, 6)), 0, 4)
    with pytest.raises(Refused, match=r"its parts 5,7 = \[5, 7\] do not sum up to 24"):
        PackedColumn(parts=(Part("5"), Part("7"))).shards(_target(module, (24, 6)), 0, 2)
    with pytest.raises(Refused, match="24 is not a multiple of 7 = 7"):
        ShardedParameter(dim=0, each="7").shards(_target(module, (24, 6)), 0, 2)
    with pytest.raises(Refused, match="24 is not 5 equal parts"):
        PackedColumn(5).shards(_target(module, (24, 6)), 0, 2)
    with pytest.raises(Refused, match="'width' is not a number of the module"):
        Column(unit="width").shards(_target(module, (24, 6)), 0, 2)
