"""The words of the rendezvous: messages and their framing. No I/O, no clock, no os, no socket."""
