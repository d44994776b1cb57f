"""The other side of the rendezvous: what every client shares, and one file for each way to wait."""
