"""Pillar 1: how near synthetic images are to real ones, as single images and as distributions of features."""
