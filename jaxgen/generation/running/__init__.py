"""Host: what runs a call and watches it."""
