"""What tells a person how things are: the state of a run, the fitness of a machine."""
