"""The blocking client: one connection a call, timeouts kept by the kernel."""
