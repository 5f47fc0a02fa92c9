"""The training run and its parts."""
