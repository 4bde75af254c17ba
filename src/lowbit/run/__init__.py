"""One run: from what was asked for to a proven artifact."""
