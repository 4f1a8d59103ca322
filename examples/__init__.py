"""Loops to judge: one that is right, and one that Lightning's documentation shows."""
