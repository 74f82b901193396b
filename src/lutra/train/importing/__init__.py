"""Trained models of other formats as PyTorch modules: ONNX files and graphs of lutra."""
