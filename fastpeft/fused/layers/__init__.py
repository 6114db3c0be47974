"""What layers are made of, on fastpeft's operators: blocks, norms, feed-forward blocks, experts, projections, activations."""
