"""Images, sound and text become the inputs of a model."""
