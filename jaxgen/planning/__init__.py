"""What a model needs of a machine, before anything is loaded."""
