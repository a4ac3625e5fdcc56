"""Real probes on a real kernel."""
