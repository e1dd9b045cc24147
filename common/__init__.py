"""What surrounds an algorithm: command line, runner, recorder, plots, player. No algorithm needs it to train."""
