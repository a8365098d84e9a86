"""Imports of the server that forks the ranks: five seconds that no rank has to repeat."""

from trainer.distributed import prepare_environment

prepare_environment()

import cpuinfo
import deepspeed
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral

import trainer.dry_run
import trainer.engine
import trainer.loop

_processor = cpuinfo.get_cpu_info()
cpuinfo.get_cpu_info = lambda: _processor
"""DeepSpeed checks it in every rank that loads one of its optimizers, with a separate process that takes a second."""

__all__ = ["deepspeed", "trainer", "transformers"]
