"""Weights and configurations from folders and the Hub, verified before a model is built of them."""
