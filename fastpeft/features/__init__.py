"""Cache of frozen stages' outputs, in memory or in files keyed by content."""

from fastpeft.caching.images import fill, image_caches

__all__ = ["fill", "image_caches"]
