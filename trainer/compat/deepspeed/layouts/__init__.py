"""Where DeepSpeed's optimizers hold master weights and optimizer state."""
