"""From a trained PyTorch model to a `.lutra` file: capture, fold, lower, compare."""
