"""`podwire replay`: enriches a past span again, into a topic of its own."""
