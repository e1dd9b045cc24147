"""Everything around the algorithms: command line, runner, checkpoints, run files, plots, player."""
