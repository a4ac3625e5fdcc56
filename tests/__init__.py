"""Tests by kind; see CONTRIBUTING.md for how to run some of them."""
