"""Recipes that work block by block: grids of weights and activations, rewrites, and reconstruction.

`driver.run` does the steps of a recipe in order on a `Work`: parameters, still float, and the grids that they and
the activations are to be rounded to. What a stage cut by `jaxq.stages` computes is a block.
"""
