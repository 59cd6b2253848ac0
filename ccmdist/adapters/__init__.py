"""Low-rank adapters on the linears of a frozen model: their mathematics, their files, merging and export."""
