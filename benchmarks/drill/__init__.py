"""What crash_drill.py is made of: a small world, faults, attempts under a fault, and stock DeepSpeed beside it."""
