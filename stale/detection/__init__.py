"""From the model's outputs to detections."""
