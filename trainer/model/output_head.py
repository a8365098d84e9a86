"""Whether a model's logits are the output of its head, unchanged."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.torch.meta import MetaMode
from trainer.config import LoadedConfig
from trainer.model.meta import traceable
from trainer.tasks import TASKS

_BATCH, _LENGTH = 1, 8


def returns_head_output(model: PreTrainedModel, loaded: LoadedConfig) -> bool:
    """Whether the model returns what its output embeddings compute, without scaling or capping it.

    Runs one forward pass without values. False for a model that is not on the meta device, or that cannot be traced.
    """
    task = TASKS[loaded.config.model.task]
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not all(parameter.is_meta for parameter in model.parameters()):
        return False
    model = copy.deepcopy(model)  # a forward pass may change a model
    outputs: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with traceable(model), torch.no_grad(), MetaMode():
            result = model.train()(**task.example_inputs(model, _BATCH, _LENGTH), **task.forward_options)
    except Exception:  # whatever an operation without values raises
        return False
    return len(outputs) == 1 and getattr(result, "logits", None) is outputs[0]
