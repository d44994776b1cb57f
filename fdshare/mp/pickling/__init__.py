"""How an object with a descriptor gets into a pickle and out of it."""
