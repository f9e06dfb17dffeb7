"""The GEMMs of a block with the row op behind each: our fused kernels, cuBLASLt's GEMM, and which one serves a call."""
