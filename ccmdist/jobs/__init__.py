"""What one Slurm task or one local process runs: each job reads its settings from a path and calls the library."""
