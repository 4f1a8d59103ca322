"""Forecasts tomorrow's temperature from three readings an hour."""
