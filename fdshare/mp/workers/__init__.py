"""Processes, pools, executors and managers on those channels."""
