"""Triton kernels, one file an operator: ``@triton.jit`` functions and what launches them.

A launch function has its operator's schema as its signature and expects checked arguments.
Checking, registration and the choice of a backend belong in ``ncsn_fast.ops``. Nothing is imported
here: Triton is optional.
"""
