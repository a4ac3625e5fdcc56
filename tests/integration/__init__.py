"""One service or command against a real Kafka."""
