"""The sponsorship pool against a model that shares no code with it, on real servers."""
