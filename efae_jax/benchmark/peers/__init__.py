"""The same computations in PyTorch, to compare speeds with: diffusers' models, and our own."""
