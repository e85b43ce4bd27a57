"""The fault matrix: servers and workers killed, frozen and cut off, and the books after it."""
