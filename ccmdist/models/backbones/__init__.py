"""Frozen models that edit images, each behind one small interface."""
