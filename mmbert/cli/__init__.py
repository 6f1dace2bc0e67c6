"""The command line: one parser for training, one small file for each other command."""
