"""Randomness as an argument: a counter-based generator, the streams drawn from it, and the address of a draw."""
