"""Training tasks: what a model learns to predict, and the loss that measures it."""
