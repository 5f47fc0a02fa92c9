"""One pass over images, what is computed from it, and its plots."""
