"""The whole pipeline, from connect() to the flow."""
