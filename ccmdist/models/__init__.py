"""Model folders, encoders and the MMDiT: real classes at every size, one loader for a laptop and for 20 B."""
