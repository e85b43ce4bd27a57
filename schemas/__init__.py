"""The shape of things: the wire format of events, the answers of calls and reports. Imports nothing of ours."""
