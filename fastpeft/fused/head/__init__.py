"""Models with their heads: logits and last hidden states only where something reads them."""
