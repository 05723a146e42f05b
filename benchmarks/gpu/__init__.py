"""``make gpu``: everything that only a machine with an NVIDIA GPU can tell, in one command."""
