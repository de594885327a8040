"""What the GPU products of all formats share: words of codes, instructions on pairs of halves, two kernels."""
