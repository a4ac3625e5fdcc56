"""Measurements, one file each; see `make bench`."""
