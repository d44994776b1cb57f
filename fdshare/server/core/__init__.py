"""What the server decides: no I/O and no clock. Time is an argument, effects are a Protocol."""
