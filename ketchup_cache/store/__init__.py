"""The cache: immutable segments of prompts, rollouts and scores, shared by any number of readers and writers.

Its format is written down in schemas/cache-format.md. `ketchup_cache.open_cache` opens one.
"""
