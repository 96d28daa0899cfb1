"""The runner of a split graph: buffers, capture and replay."""
