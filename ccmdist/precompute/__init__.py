"""Filling the cache of prompt embeddings and latents."""
