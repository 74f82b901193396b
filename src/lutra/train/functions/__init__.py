"""Functions that are read from tables of lines: modules, swapped calls, fitting by training."""
