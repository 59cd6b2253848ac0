"""What all benchmarks share: rows of a result, and how two sides are timed and weighed in one run."""
