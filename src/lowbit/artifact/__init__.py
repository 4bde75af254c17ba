"""The folder of an artifact: its files, how they are written whole, proven, told of and shared."""
