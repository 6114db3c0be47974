"""What a training step computes and holds: measured (profile, activations), estimated, and kept within a memory budget."""
