"""The search over system prompts: its loop, another optimiser, and what runs it on the small world alone."""
