"""Training of a converted model: the loop, distillation, checkpoints."""
