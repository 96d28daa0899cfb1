"""What runs: process groups, and what their ranks tell each other; packages hold the rest.

Never imports compile_passes.
"""
