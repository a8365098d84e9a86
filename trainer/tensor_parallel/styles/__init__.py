"""The styles of a tensor plan: how a weight is sharded, or a module is changed.

The names of the first dozen, and their meaning, are Hugging Face's (`transformers.distributed`). The others express
what its plans cannot. A style is a class: its docstring is its documentation, and `STYLES` has it by name.
"""

from trainer.tensor_parallel.styles.attributes import Attribute, Computed, Divide, Requires, Unfused
from trainer.tensor_parallel.styles.base import (
    STYLES,
    ColumnStyle,
    FullStyle,
    ModuleTarget,
    ParameterStyle,
    ParameterTarget,
    RowStyle,
    ShardedStyle,
    Style,
)
from trainer.tensor_parallel.styles.columns import Column, ColumnGatherOutput, KeyValueColumn, PackedColumn
from trainer.tensor_parallel.styles.experts import Experts, IdentityExpert, LatentProjection
from trainer.tensor_parallel.styles.norms import GroupedRMSNorm, PerHeadNorms, RMSNorm
from trainer.tensor_parallel.styles.parameters import LocalParameters, ShardedParameter
from trainer.tensor_parallel.styles.parse import UnknownStyle, parse_styles
from trainer.tensor_parallel.styles.regions import (
    EnterInput,
    EnterOutput,
    EnterThrough,
    GatherInput,
    GatherOutput,
    InsideRegion,
    NarrowInput,
    ParallelResidual,
    ReduceOutput,
    ResidualInside,
    SplitInput,
    SplitOutput,
)
from trainer.tensor_parallel.styles.replicated import FirstRankOnly, Replicated, ReplicatedSumGradient
from trainer.tensor_parallel.styles.rows import PackedRow, Row, RowEnterOutput, RowScatterOutput, RowSplitInput
from trainer.tensor_parallel.styles.vocabulary import (
    EmbeddingColumn,
    VocabularyEmbedding,
    VocabularyHead,
    VocabularyParameter,
)
from trainer.tensor_parallel.units import Part

__all__ = [
    "STYLES",
    "Attribute",
    "Column",
    "ColumnGatherOutput",
    "ColumnStyle",
    "Computed",
    "Divide",
    "EmbeddingColumn",
    "EnterInput",
    "EnterOutput",
    "EnterThrough",
    "Experts",
    "FirstRankOnly",
    "FullStyle",
    "GatherInput",
    "GatherOutput",
    "GroupedRMSNorm",
    "IdentityExpert",
    "InsideRegion",
    "KeyValueColumn",
    "LatentProjection",
    "LocalParameters",
    "ModuleTarget",
    "NarrowInput",
    "PackedColumn",
    "PackedRow",
    "ParallelResidual",
    "ParameterStyle",
    "ParameterTarget",
    "Part",
    "PerHeadNorms",
    "RMSNorm",
    "ReduceOutput",
    "Replicated",
    "ReplicatedSumGradient",
    "Requires",
    "ResidualInside",
    "Row",
    "RowEnterOutput",
    "RowScatterOutput",
    "RowSplitInput",
    "RowStyle",
    "ShardedParameter",
    "ShardedStyle",
    "SplitInput",
    "SplitOutput",
    "Style",
    "Unfused",
    "UnknownStyle",
    "VocabularyEmbedding",
    "VocabularyHead",
    "VocabularyParameter",
    "parse_styles",
]
