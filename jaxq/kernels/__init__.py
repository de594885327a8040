"""Products with quantized arrays: one file an operation."""
