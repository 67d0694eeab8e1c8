"""Triton kernels, one file per operation: the math, then the kernels. Only `backends.fused` launches them."""
