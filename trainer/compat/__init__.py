"""The guarded border to the dependencies whose internals Tessera uses: DeepSpeed, transformers and torch.

Each dependency has one package here. Its `names.py` states the supported versions and lists every internal name that is
used, once, with its purpose; its other modules are the only code that touches those names. An unsupported version, or
a version without one of the names, is refused before training starts instead of computing something else.
"""

from trainer.compat.dependency_check import Dependency, IncompatibleDependencyError, check_names, check_versions

__all__ = ["Dependency", "IncompatibleDependencyError", "check_names", "check_versions"]
