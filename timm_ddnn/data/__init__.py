"""Data sets, images, augmentation and the loader."""
