"""The gate: are synthetic images copies of training images, and may a set be released."""
