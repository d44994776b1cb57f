"""The asynchronous client: all tasks share one connection, on anyio."""
