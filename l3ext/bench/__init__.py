"""Measurements behind ``l3ext bench``."""
