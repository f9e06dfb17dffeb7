"""The GEMMs of a block with the row op behind each: our fused kernels, the library, and which one serves a call."""
