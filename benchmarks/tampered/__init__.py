"""Bundles that somebody altered, in every way we know, and what reading one may set off."""
