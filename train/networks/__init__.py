"""The networks as training sees them, and how weights get into them."""
