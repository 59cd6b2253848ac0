"""What a training run needs and how long it takes, from arithmetic alone; imports no torch."""
