"""Serving engines: one module for each, which its engine loads by an entry point.

Each does nothing unless ``RINGFENCE`` asks for it, imports its engine only then, and compares what it hooks into with
what it was written for: where a target moved, it says so and does nothing.
"""
