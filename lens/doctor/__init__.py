"""lens doctor: what runs on this machine, why, and whether it is right."""
