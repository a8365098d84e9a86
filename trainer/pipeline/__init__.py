"""Pipeline parallelism: a model is followed, its layers are divided into stages, and each stage is the model itself."""

from trainer.pipeline.balance import balance, bubble, divide, shares
from trainer.pipeline.stage import Record, Stage
from trainer.pipeline.trace import Flow, example_inputs, follow

__all__ = ["Flow", "Record", "Stage", "balance", "bubble", "divide", "example_inputs", "follow", "shares"]
