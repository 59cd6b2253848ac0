"""What can be learnt. An objective builds a model, names its parameter sets and computes losses."""
