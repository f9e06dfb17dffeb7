"""How a step runs: its buffers, its captured graph, the table of its schedule, where the weights live meanwhile."""
