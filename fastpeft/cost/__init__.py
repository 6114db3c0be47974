"""Cost of a training step: measured (profile, activations), estimated, and kept within a memory budget."""
