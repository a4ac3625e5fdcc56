"""The enricher: joins the two halves of each connection, names both ends and writes flows.

A Faust worker owns membership, assignment and offsets; pairing, as-of resolution and encoding are pure
modules around it. Never talks to Kubernetes or to a kernel, and never asks "who owns this address now".
"""
