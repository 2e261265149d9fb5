"""Host: prompts, checked and laid out for the programs."""
