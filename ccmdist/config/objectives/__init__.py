"""What can be learnt, and the settings of each."""
