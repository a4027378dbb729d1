"""Models: configuration, weights, the native decoder and the transformers way, behind `loader.load_model`."""
