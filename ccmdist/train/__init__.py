"""One loop, many objectives: what is learnt differs, how it is stepped, stopped and committed does not."""
