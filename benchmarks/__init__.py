"""What judging costs, as ratios to bare training, and how far it can be trusted; no tests."""
