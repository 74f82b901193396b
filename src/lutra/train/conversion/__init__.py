"""From a trained model to lookup layers: calibration, fitting, the speed gate."""
