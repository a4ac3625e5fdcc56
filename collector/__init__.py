"""The collectors: `node` turns kernel events into raw batches, `cluster` the Kubernetes API into metadata.

Never imports the enricher or the user's command; meets them in Kafka only.
"""
