"""From a trained model to a device: profile, choice of a depth, a controller, export."""
