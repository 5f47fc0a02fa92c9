"""Models saved, described and published."""
