"""The user's command: `podwire demo`, `observe`, `topics`.

Reads topics and starts services; never parses kernel data.
"""
