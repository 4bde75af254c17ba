"""File layouts: one layout, one file, each a pure pack / unpack pair."""
