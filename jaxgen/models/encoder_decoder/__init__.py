"""Models with an encoder and a decoder: T5, BART and their relatives."""
