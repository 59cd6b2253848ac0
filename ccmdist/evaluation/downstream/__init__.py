"""Pillar 3: do synthetic images help to diagnose and to segment real ones."""
