"""Shards of image, nerve mask and prompt, the order in which training reads them, and the cache of what is encoded.

Making and reading shards imports no torch; :mod:`~ccmdist.data.latent_cache` and :mod:`~ccmdist.data.stream` do.
"""
