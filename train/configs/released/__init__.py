"""The paper's own recipe (arXiv 2605.21573): stages A and B of Lens-Base."""
