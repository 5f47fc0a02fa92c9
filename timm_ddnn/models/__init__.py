"""Dynamic-depth models: sharing, the forward at a depth, architectures, entrypoints and bundled weights."""
