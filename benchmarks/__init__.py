"""What judging costs, as ratios to bare training; nothing here is a test."""
