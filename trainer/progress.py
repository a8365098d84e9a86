"""Training progress: the one value that the training loop advances and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Counts of completed training; only the training loop advances them."""

    step: int = 0
    """Optimizer steps completed."""

    tokens: int = 0
    """Tokens with a label that these steps were trained on."""

    samples: int = 0
    """Samples consumed: the position in the order of the training data."""

    def advance(self, tokens: int, samples: int) -> None:
        """Count one more step on a global batch of this size."""
        self.step += 1
        self.tokens += tokens
        self.samples += samples
