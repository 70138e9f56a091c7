"""Every configuration key: one file per section, with default, range and help."""
