"""Timings of every stage, of CIEMA and of the network, and the GPU kernels' budgets."""
