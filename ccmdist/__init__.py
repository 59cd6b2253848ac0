"""Distributed fine-tuning of Qwen-Image-Edit on corneal confocal microscopy: shards in, adapter, images and report out."""

__version__ = "0.1.0"
