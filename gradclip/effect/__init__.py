"""Effect: what is done to gradients, or to the step that follows."""
