"""Distributed fine-tuning of Qwen-Image-Edit on corneal confocal microscopy: shards to adapter, images and report."""

__version__ = "0.1.0"
