"""What the Pallas kernels of TPUs share: generations, the order of codes, blocks, products with small integers."""
