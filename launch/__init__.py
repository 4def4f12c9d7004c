"""Training, evaluation, generation and compilation from one command line."""
