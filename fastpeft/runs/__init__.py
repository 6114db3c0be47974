"""Bodies of the commands, from a model's name and a data folder to a run's files."""
