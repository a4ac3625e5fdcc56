"""The demo on one machine: a real Kafka, three pods made by hand, the services as separate processes."""
