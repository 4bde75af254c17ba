"""Artifacts in a running model: linears with packed weights, and how transformers loads them."""
