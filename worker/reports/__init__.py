"""Reports for operators and users, and the proof that the books are right."""
