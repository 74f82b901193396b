"""lutra in WebAssembly beside ONNX Runtime Web."""
