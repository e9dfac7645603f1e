"""Tests of kernels as kernels: what they compile to, what they touch, and what is special to one of them."""
