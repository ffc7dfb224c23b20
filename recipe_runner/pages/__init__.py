"""Pages for people: one self-contained file each, without scripts and network."""
