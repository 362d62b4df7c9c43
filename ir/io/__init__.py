"""Models in and out: reading, lifting, shapes, capture from torch, data, and writing that never leaves a half."""
