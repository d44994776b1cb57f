"""What the operating system does with descriptors: no names, no protocol."""
