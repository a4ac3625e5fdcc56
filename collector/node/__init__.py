"""The node collector: from the kernel's events to Kafka. Never talks to the Kubernetes API."""
