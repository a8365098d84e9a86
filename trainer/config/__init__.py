"""One JSON file, checked before anything starts."""

from trainer.config.load import LoadedConfig, load_config
from trainer.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config"]
