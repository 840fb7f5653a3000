"""`quantkit verify`: checks of an artifact against its manifest (shallow) and its source (deep)."""
