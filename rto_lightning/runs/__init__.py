"""A run on the disk: checkpoints that are whole, where to go on, signals to stop, metrics without repetitions."""
