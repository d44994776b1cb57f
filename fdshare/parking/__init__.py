"""The private server of a process tree: it holds the descriptors of pickles in transit."""
