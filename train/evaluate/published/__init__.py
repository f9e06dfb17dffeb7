"""Published benchmarks: their prompts, their layouts, their arithmetic, and judges behind small interfaces."""
