"""What things look like: the wire format of events, the answers of the pre-flight calls. Imports nothing of ours."""
