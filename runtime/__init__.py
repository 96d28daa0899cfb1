"""What runs: the fused ops, process groups, capture and replay. Never imports compile_passes."""
