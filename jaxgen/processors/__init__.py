"""What changes scores and what ends texts, as array maths."""
