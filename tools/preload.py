"""Imported once by the server that forks the ranks: five seconds of imports that no rank has to repeat."""

from trainer.distributed import prepare_environment

prepare_environment()

import deepspeed
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral

import trainer.dry_run
import trainer.engine
import trainer.loop

__all__ = ["deepspeed", "trainer", "transformers"]
