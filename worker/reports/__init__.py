"""What operators and users read, and the proof that the books are right."""
