"""Cache of frozen stages' outputs, in memory or in files keyed by content."""
