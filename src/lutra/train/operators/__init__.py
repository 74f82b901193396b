"""PyTorch operators of the layers: native kernels on the CPU, plain PyTorch elsewhere."""
