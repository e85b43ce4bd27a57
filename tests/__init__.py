"""All tests. The folders mirror the rooms of worker/; beside them the fault matrix, the soak and the project itself."""
