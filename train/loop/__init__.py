"""What all trainings share: the loop, states on disk, processes, averages, the log."""
