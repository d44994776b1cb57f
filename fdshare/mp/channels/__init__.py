"""Pipes and queues that send the descriptors beside the pickle."""
