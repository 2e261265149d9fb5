"""Host: which configuration wins, and what it says."""
