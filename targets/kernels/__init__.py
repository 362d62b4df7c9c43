"""Kernels that the issue of speed rests on: one family a file, each with its table of handlers and its schedule."""
