"""Pillar 2: do nerves lie where the mask wanted them, and are their biomarkers equivalent to the real ones."""
