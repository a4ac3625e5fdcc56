"""The data contract between the services: Avro schemas, topics and their wire format.

Owns the `.avsc` files, the table of topics (`catalog`), encoding and framing (`codec`) and schema ids
(`registry`). Never talks to Kafka and knows no service. Every service and the user's command import it.
"""
