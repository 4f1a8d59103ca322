"""Truncated backpropagation through time done right: what `tbptt_props` judges others by."""
