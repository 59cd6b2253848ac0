"""Synthetic shard sets: what is to be drawn, drawing it, committing it, and the proof that nothing is missing or twice.

An image's bytes depend on its plan alone: not on the number of workers, on a restart, or on who drew it (on the same
hardware and software).
"""
