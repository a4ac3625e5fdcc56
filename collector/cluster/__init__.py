"""The cluster watcher: turns pods, services and nodes into compacted Kafka topics with validity intervals.

Pure: `records` (API object to facts), `intervals` (facts to bands), `state` (what is published and what is
not yet), `completeness` (when a watch has seen everything). At the rim: `manifests` and `source` (where objects
come from), `publish` (Kafka), `run` (the loop). Never talks to nodes and never writes to the Kubernetes API.
"""
