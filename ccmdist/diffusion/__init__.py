"""Rectified flow, its sampler and its randomness, as pure functions of tensors."""
