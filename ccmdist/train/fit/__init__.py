"""Fits the tiny VAE and MMDiT on phantoms, so that a laptop has a base model that can show an image: `model fit`."""
