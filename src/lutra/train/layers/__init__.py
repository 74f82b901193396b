"""Layers of lookups and of integers, as ordinary modules."""
