"""Joint attention on a device: adapters of the libraries, our own kernel, and which one serves a call."""
