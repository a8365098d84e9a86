"""The words of a tensor plan: what can become of a weight, or of a module.

The first dozen are Hugging Face's (`transformers.distributed`), with their meaning; the others say what its plans
cannot. Where a style takes an argument, it follows a colon.
"""

from __future__ import annotations

from dataclasses import dataclass

WORDS = {
    "colwise": "outputs cut, in whole units: colwise[:size of a unit]",
    "kv_colwise": "as colwise; where there are fewer units than ranks, ranks share one: kv_colwise:size of a unit",
    "packed_colwise": "several matrices in one, the outputs of each cut: packed_colwise[:how many, or their parts]",
    "rowwise": "inputs cut, outputs summed",
    "packed_rowwise": "as rowwise, the inputs being several joined: packed_rowwise[:how many, or their parts]",
    "rowwise_split_input": "as rowwise, of an input that is whole",
    "rowwise_enter": "as rowwise, and the sum is used by cut weights",
    "rowwise_scatter_output": "as rowwise, and each rank gets its part of the sum",
    "colwise_gather_output": "as colwise, and the outputs are joined again",
    "cut": "a bare parameter cut along a dimension: cut:dimension[:how many, or their parts]",
    "vocabulary": "one number for each token of the vocabulary, sharded as the head is: vocabulary:dimension",
    "embedding_rowwise": "an embedding cut along the vocabulary",
    "embedding_colwise": "an embedding cut along the vector, its outputs joined again",
    "vocabulary_head": "the head cut along the vocabulary; its logits stay cut",
    "rms_norm": "an RMS norm over a cut dimension, its mean square summed over ranks: rms_norm[:parts, as in cut]",
    "grouped_rms_norm": "a gated RMS norm over groups of a cut dimension; its mean squares likewise",
    "per_head_norms": "a module that applies its list `norms`, one for each head: those of this rank's heads",
    "replicated_with_grad_allreduce": "whole, used on cut activations: its gradient is summed",
    "replicate": "whole, used on whole activations: replicate[:reason]",
    "first_rank": "whole on the first rank and zero on the others: a bias inside a sum over ranks",
    "moe_tp_experts": "experts whose own parameters are cut: input and routing weights enter, the output is summed",
    "moe_identity_expert": "an expert that returns its input, inside a sum over ranks",
    "mla_kv_a_proj": "whole; the last qk_rope_head_dim outputs are used by cut heads",
    "all_reduce": "the module's output is summed over ranks",
    "enter_through": "the module's inputs enter a cut region, and its output lies in it: its users are 'inside'",
    "inside": "a column layer whose input lies in the cut region already",
    "parallel_residual": "a block that adds two branches; their rows share one sum: parallel_residual:first,second",
    "enter": "the module's inputs enter a cut region",
    "enter_output": "the module's output enters a cut region: enter_output[:which of several]",
    "gather_output": "the module's output is cut, and joined again",
    "gather_input": "a cut input is joined before a module that needs it whole",
    "narrow_input": "the first input is cut, for its size alone; column layers inside have gather_input, too",
    "residual_inside": "the module adds its input to a partial sum and hands that to a child: residual_inside:child",
    "needs": "a field of the configuration without whose value the plan would be wrong: needs:field=value",
    "split_output": "the output is whole and its users need their part: split_output[:which of several:dimension]",
    "split_input": "of a whole argument each rank needs its heads: split_input:argument:dimension[:heads in it]",
    "divide": "attributes that count heads or sizes, divided by the ranks: divide:name,config.name,of_some?,name=a*b+c",
    "unfused": "not the one kernel for all its layers, which would leave out the sums: unfused[:child it must have]",
    "local_params": "the module computes with its own cut parameters; nothing to be done",
}
"""Every style, with what it means."""

ON_MODULES = {
    "moe_tp_experts", "moe_identity_expert", "all_reduce", "enter", "enter_output", "enter_through", "inside",
    "gather_output", "gather_input", "narrow_input", "residual_inside", "needs", "split_output", "split_input",
    "parallel_residual", "divide", "unfused", "local_params", "mla_kv_a_proj", "per_head_norms",
}  # fmt: skip
"""Styles that act on a module and say nothing about its parameters."""

WHOLE = {"replicate", "replicated_with_grad_allreduce", "first_rank"}
"""Styles that leave a parameter whole."""

COLUMNS = {"colwise", "kv_colwise", "packed_colwise", "colwise_gather_output", "vocabulary_head", "rms_norm",
           "grouped_rms_norm"}  # fmt: skip
"""Styles that cut a parameter along its outputs."""

ROWS = {"rowwise", "packed_rowwise", "rowwise_split_input", "rowwise_enter", "rowwise_scatter_output"}
"""Styles that cut a parameter along its inputs."""


@dataclass(frozen=True)
class Style:
    """What a row asks for."""

    word: str
    argument: str = ""

    @classmethod
    def parse(cls, text: str) -> Style:
        word, _, argument = text.partition(":")
        return cls(word.strip(), argument.strip())

    def __str__(self) -> str:
        return f"{self.word}:{self.argument}" if self.argument else self.word
