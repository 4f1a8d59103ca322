"""Forecasts a river's level from the rain upstream."""
